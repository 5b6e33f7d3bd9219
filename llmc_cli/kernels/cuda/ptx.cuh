// All that is written in PTX, one function each, and for the emulator that the tests run kernels in the same in C++.
//
// An address in shared memory is a number of 32 bits here, on both sides, so that kernels may calculate with it.

// 2^x to about 2 ulp, subnormal results 0; x = -inf gives 0.
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
// The upper half of a float's bits, to nearest even.
inline unsigned rounded_half(float x) {
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded;
}
#endif

// Two floats rounded to bf16, to nearest even, `low` in the lower half; any NaN becomes 0x7fff.
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

// Begins to copy 16 bytes from global to shared memory, or to write zeros there where `inside` is false: then nothing
// is read, but `from` must be an address all the same. Both aligned to 16 bytes.
__device__ __forceinline__ void copy_async_16(unsigned to, const void* from, bool inside) {
#ifdef CUDA_EMULATOR
    emulator_cp_async(emulator_shared_pointer(to), inside ? from : nullptr, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
#endif
}

// The same for 8 bytes, aligned to 8.
__device__ __forceinline__ void copy_async_8(unsigned to, const void* from, bool inside) {
#ifdef CUDA_EMULATOR
    emulator_cp_async(emulator_shared_pointer(to), inside ? from : nullptr, 8);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(inside ? 8 : 0) : "memory");
#endif
}

// Makes a group of the copies that this thread has begun since its last group.
__device__ __forceinline__ void copy_async_commit() {
#ifdef CUDA_EMULATOR
    emulator_cp_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread. Other threads see what it copied behind the next barrier.
__device__ __forceinline__ void copy_async_wait() {
#ifdef CUDA_EMULATOR
    emulator_cp_wait(0);
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

// Four 8x8 matrices of bf16 from shared memory, by a whole warp. Lane i gives the address of row i % 8 (16 bytes,
// aligned) of matrix i / 8; lane l gets from matrix m, in r[m], row l / 4, columns 2 * (l % 4) and the next.
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

// The same, transposed: lane l gets column l / 4, rows 2 * (l % 4) and the next.
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

// d (16x8, float) += a (16x16, bf16) · b (16x8, bf16), spread over a warp. With g = lane / 4 and t = lane % 4, and two
// neighbours of a row (of a, d) or of a column (of b) beside each other:
//   d[0..1] = (g, 2t)   d[2..3] = (g + 8, 2t)
//   a[0] = (g, 2t)   a[1] = (g + 8, 2t)   a[2] = (g, 2t + 8)   a[3] = (g + 8, 2t + 8)
//   b0 = (2t, g)   b1 = (2t + 8, g)
// So two d side by side, packed to bf16, are an a.
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
