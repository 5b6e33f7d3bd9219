// Shared by all kernels: the activation type, vectorized loads and stores, warp and block reductions, GELU.
//
// Activations and their gradients are stored as Real; arithmetic is in float. Dimension letters are those of spec.py.

struct Bf16 {
    unsigned short bits;  // the upper half of a float
};

#ifdef REAL_BF16
typedef Bf16 Real;
#else
typedef float Real;
#endif

constexpr int WIDTH = 16 / sizeof(Real);  // activations per 16-byte access
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) {
    return x;
}

__device__ __forceinline__ float to_float(Bf16 x) {
    return __uint_as_float((unsigned)x.bits << 16);
}

// Bits of x rounded to bf16, to nearest, ties to even. A NaN with any payload stays a NaN.
__device__ __forceinline__ unsigned bf16_bits(float x) {
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

__device__ __forceinline__ Bf16 to_bf16(float x) {
    Bf16 result;
    result.bits = (unsigned short)bf16_bits(x);
    return result;
}

__device__ __forceinline__ Real to_real(float x) {
#ifdef REAL_BF16
    return to_bf16(x);
#else
    return x;
#endif
}

// x rounded to Real and converted back to float.
__device__ __forceinline__ float as_stored(float x) {
    return to_float(to_real(x));
}

// Return whether every pointer is aligned to 16 bytes. A null pointer counts as aligned.
template <typename... Pointers>
__device__ __forceinline__ bool aligned16(Pointers... pointers) {
    return ((... | (unsigned long long)pointers) & 15ull) == 0;
}

// Load W consecutive elements as floats. For W > 1 the accesses are 8 or 16 bytes wide, and `from` must be aligned to
// that.
template <int W>
__device__ __forceinline__ void load(float (&values)[W], const float* from) {
    if constexpr (W == 1) {
        values[0] = from[0];
    } else {
#pragma unroll
        for (int k = 0; k < W; k += 4) {
            const float4 four = *(const float4*)(from + k);
            values[k] = four.x;
            values[k + 1] = four.y;
            values[k + 2] = four.z;
            values[k + 3] = four.w;
        }
    }
}

template <int W>
__device__ __forceinline__ void load(float (&values)[W], const Bf16* from) {
    if constexpr (W == 1) {
        values[0] = to_float(from[0]);
    } else {
        unsigned pairs[W / 2];
        if constexpr (W == 4) {
            const uint2 words = *(const uint2*)from;
            pairs[0] = words.x;
            pairs[1] = words.y;
        } else {
            const uint4 words = *(const uint4*)from;
            pairs[0] = words.x;
            pairs[1] = words.y;
            pairs[2] = words.z;
            pairs[3] = words.w;
        }
#pragma unroll
        for (int k = 0; k < W / 2; k++) {
            values[2 * k] = __uint_as_float(pairs[k] << 16);
            values[2 * k + 1] = __uint_as_float(pairs[k] & 0xffff0000u);
        }
    }
}

// Store W consecutive floats, rounded to bf16 if `to` points to Bf16. Alignment as for load.
template <int W>
__device__ __forceinline__ void store(float* to, const float (&values)[W]) {
    if constexpr (W == 1) {
        to[0] = values[0];
    } else {
#pragma unroll
        for (int k = 0; k < W; k += 4) {
            *(float4*)(to + k) = make_float4(values[k], values[k + 1], values[k + 2], values[k + 3]);
        }
    }
}

template <int W>
__device__ __forceinline__ void store(Bf16* to, const float (&values)[W]) {
    if constexpr (W == 1) {
        to[0] = to_bf16(values[0]);
    } else {
        unsigned pairs[W / 2];
#pragma unroll
        for (int k = 0; k < W / 2; k++) {
            pairs[k] = bf16_bits(values[2 * k]) | (bf16_bits(values[2 * k + 1]) << 16);
        }
        if constexpr (W == 4) {
            *(uint2*)to = make_uint2(pairs[0], pairs[1]);
        } else {
            *(uint4*)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

// Sum and maximum over a warp, or over each aligned group of LANES lanes. Every lane gets the same bits.
template <int LANES = WARP, typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    }
    return value;
}

template <int LANES = WARP>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// Sum over a one-dimensional block of whole warps. All threads must call it, and all get the same bits. The order of
// summation depends only on the block size. `parts` is shared memory with one element per warp; the trailing barrier
// makes it reusable immediately.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* parts) {
    const int lane = threadIdx.x % WARP;
    const int warps = blockDim.x / WARP;
    value = warp_sum(value);
    if (lane == 0) {
        parts[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    value = warp_sum(lane < warps ? parts[lane] : (T)0);
    __syncthreads();
    return value;
}

// Maximum over a block, called like block_sum. NaNs are ignored, as by fmaxf.
__device__ __forceinline__ float block_max(float value, float* parts) {
    const int lane = threadIdx.x % WARP;
    const int warps = blockDim.x / WARP;
    value = warp_max(value);
    if (lane == 0) {
        parts[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    value = warp_max(parts[lane < warps ? lane : 0]);
    __syncthreads();
    return value;
}

// GELU, tanh approximation: x/2 * (1 + tanh(u/2)) = x / (1 + exp(-u)) with u = SLOPE * x + CUBIC * x^3.
constexpr float SLOPE = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
constexpr float CUBIC = 0.044715f * SLOPE;

__device__ __forceinline__ float gelu(float x) {
    return x / (1.0f + expf(-x * fmaf(CUBIC * x, x, SLOPE)));
}
