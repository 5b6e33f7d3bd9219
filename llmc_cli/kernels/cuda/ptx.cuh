// Wrappers of PTX instructions, each with a C++ equivalent for the emulator that the tests use (CUDA_EMULATOR).
//
// A shared memory address is a 32-bit integer in both versions, so kernels can do arithmetic on it.

// 2^x to about 2 ulp. Subnormal results are flushed to 0; x = -inf gives 0.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef CUDA_EMULATOR
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

#if __CUDA_ARCH__ >= 800 || defined(CUDA_EMULATOR)

#ifdef CUDA_EMULATOR
// Bits of x rounded to bf16, to nearest even; any NaN becomes 0x7fff.
inline unsigned rounded_half(float x) {
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded;
}
#endif

// Round two floats to bf16, to nearest even, and pack them with `low` in the lower half. Any NaN becomes 0x7fff.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#ifdef CUDA_EMULATOR
    return rounded_half(low) | rounded_half(high) << 16;
#else
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
#ifdef CUDA_EMULATOR
    return emulator_shared_address(pointer);
#else
    return (unsigned)__cvta_generic_to_shared(pointer);
#endif
}

// Start an asynchronous copy of 16 bytes from global to shared memory. If `inside` is false, write zeros and read
// nothing; `from` must still be a valid address. Both addresses must be aligned to 16 bytes.
__device__ __forceinline__ void copy_async_16(unsigned to, const void* from, bool inside) {
#ifdef CUDA_EMULATOR
    emulator_cp_async(emulator_shared_pointer(to), inside ? from : nullptr, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
#endif
}

// copy_async_16 for 8 bytes, aligned to 8.
__device__ __forceinline__ void copy_async_8(unsigned to, const void* from, bool inside) {
#ifdef CUDA_EMULATOR
    emulator_cp_async(emulator_shared_pointer(to), inside ? from : nullptr, 8);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(inside ? 8 : 0) : "memory");
#endif
}

// Commit the copies that this thread has started since its last commit as one group.
__device__ __forceinline__ void copy_async_commit() {
#ifdef CUDA_EMULATOR
    emulator_cp_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait for all groups of this thread. Other threads see the copied data after the next barrier.
__device__ __forceinline__ void copy_async_wait() {
#ifdef CUDA_EMULATOR
    emulator_cp_wait(0);
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

// Load four 8x8 bf16 matrices from shared memory with a whole warp (ldmatrix). Lane i passes the address of row i % 8
// (16 aligned bytes) of matrix i / 8. Lane l receives in r[m] row l / 4, columns 2 * (l % 4) and 2 * (l % 4) + 1 of
// matrix m.
__device__ __forceinline__ void load_matrices(unsigned r[4], unsigned address) {
#ifdef CUDA_EMULATOR
    emulator_ldmatrix(r, address, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// The same, transposed: lane l receives column l / 4, rows 2 * (l % 4) and 2 * (l % 4) + 1.
__device__ __forceinline__ void load_matrices_transposed(unsigned r[4], unsigned address) {
#ifdef CUDA_EMULATOR
    emulator_ldmatrix(r, address, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// d (16x8, float) += a (16x16, bf16) · b (16x8, bf16), distributed over a warp. With g = lane / 4 and t = lane % 4,
// each register holds the element named below and the next one in the same row (a, d) or column (b):
//   d[0..1] = (g, 2t)   d[2..3] = (g + 8, 2t)
//   a[0] = (g, 2t)   a[1] = (g + 8, 2t)   a[2] = (g, 2t + 8)   a[3] = (g + 8, 2t + 8)
//   b0 = (2t, g)   b1 = (2t + 8, g)
// So two adjacent d, packed to bf16, form one a.
__device__ __forceinline__ void multiply_add(float d[4], const unsigned a[4], unsigned b0, unsigned b1) {
#ifdef CUDA_EMULATOR
    const unsigned b[2] = {b0, b1};
    emulator_mma_bf16(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

#endif
