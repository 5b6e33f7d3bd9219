// Matrix products with at most ROWS rows of x, as needed to decode one token of a few sequences. Larger products use
// cuBLAS.
//
//   x  (N, I)  Real
//   w  (O, I)  Real
//   y  (N, O) = x · wᵀ
//
// The cost is dominated by reading w. Each block reads OUTPUTS rows of w, which no other block reads, for all rows of
// x. Its threads are spread along I, 16 bytes apart, so each thread has OUTPUTS loads in flight; x stays in the cache.
// Sums are in float: first over each thread's elements in order, then over the lanes of a warp, then over the warps in
// order. The order is the same on every device.

constexpr int OUTPUTS = 4;
constexpr int MAX_WARPS = 8;  // maximum warps per block

// sums[n * OUTPUTS + o] += this thread's share of x[n] · w[first + o]. Row indices past the end are clamped to the last
// row; the caller discards those sums.
template <int W, int ROWS>
__device__ __forceinline__ void add_products(
    float (&sums)[ROWS * OUTPUTS], const Real* x, const Real* w, int first, int N, int O, int I) {
    for (int i = threadIdx.x * W; i < I; i += blockDim.x * W) {
        float weights[OUTPUTS][W];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            load<W>(weights[o], w + (size_t)min(first + o, O - 1) * I + i);
        }
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            float values[W];
            load<W>(values, x + (size_t)min(n, N - 1) * I + i);
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++) {
#pragma unroll
                for (int k = 0; k < W; k++) {
                    sums[n * OUTPUTS + o] += values[k] * weights[o][k];
                }
            }
        }
    }
}

// Reduce K values per lane (K a power of two up to WARP) over a warp. Lane l returns the sum of value l * K / WARP. At
// each step a lane sends half of its remaining values to the partner lane that keeps them, which takes about K shuffles
// instead of 5 * K.
template <int K>
__device__ __forceinline__ float warp_sums(float (&numbers)[K]) {
    const int lane = threadIdx.x % WARP;
    int distance = WARP / 2;
#pragma unroll
    for (int half = K / 2; half > 0; half /= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int k = 0; k < half; k++) {
            const float given = upper ? numbers[k] : numbers[k + half];
            const float kept = upper ? numbers[k + half] : numbers[k];
            numbers[k] = kept + __shfl_xor_sync(ALL_LANES, given, distance);
        }
        distance /= 2;
    }
#pragma unroll
    for (int left = WARP / K / 2; left > 0; left /= 2) {
        numbers[0] += __shfl_xor_sync(ALL_LANES, numbers[0], left);
    }
    return numbers[0];
}

// Return element (n, blockIdx.x * OUTPUTS + o) of x · wᵀ in thread n * OUTPUTS + o of the block.
template <int ROWS>
__device__ __forceinline__ float product(const Real* x, const Real* w, int N, int O, int I) {
    constexpr int COUNT = ROWS * OUTPUTS;
    __shared__ float parts[MAX_WARPS][COUNT];
    const int lane = threadIdx.x % WARP;
    const int first = blockIdx.x * OUTPUTS;
    float sums[COUNT] = {};
    if (I % WIDTH == 0 && aligned16(x, w)) {
        add_products<WIDTH, ROWS>(sums, x, w, first, N, O, I);
    } else {
        add_products<1, ROWS>(sums, x, w, first, N, O, I);
    }
    const float sum = warp_sums<COUNT>(sums);
    if (lane % (WARP / COUNT) == 0) {
        parts[threadIdx.x / WARP][lane * COUNT / WARP] = sum;
    }
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x < COUNT) {
        for (int warp = 0; warp < blockDim.x / WARP; warp++) {
            total += parts[warp][threadIdx.x];
        }
    }
    return total;
}

// y = x · wᵀ + b. If act is not null, act = gelu(y), from y as rounded for storage. b may be null.
template <int ROWS>
__device__ __forceinline__ void linear(
    Real* y, Real* act, const Real* x, const Real* w, const float* b, int N, int O, int I) {
    const float total = product<ROWS>(x, w, N, O, I);
    const int n = threadIdx.x / OUTPUTS;
    const int o = blockIdx.x * OUTPUTS + threadIdx.x % OUTPUTS;
    if (n < N && o < O) {
        const float stored = as_stored(b ? total + b[o] : total);
        const size_t at = (size_t)n * O + o;
        y[at] = to_real(stored);
        if (act) {
            act[at] = to_real(gelu(stored));
        }
    }
}

// logits (N, V) float = x · wᵀ, using the first V rows of w.
template <int ROWS>
__device__ __forceinline__ void head(float* logits, const Real* x, const Real* w, int N, int V, int I) {
    const float total = product<ROWS>(x, w, N, V, I);
    const int n = threadIdx.x / OUTPUTS;
    const int v = blockIdx.x * OUTPUTS + threadIdx.x % OUTPUTS;
    if (n < N && v < V) {
        logits[(size_t)n * V + v] = total;
    }
}

extern "C" __global__ void __launch_bounds__(256) few_rows_linear_1(
    Real* y, Real* act, const Real* x, const Real* w, const float* b, int N, int O, int I) {
    linear<1>(y, act, x, w, b, N, O, I);
}

extern "C" __global__ void __launch_bounds__(256) few_rows_linear_8(
    Real* y, Real* act, const Real* x, const Real* w, const float* b, int N, int O, int I) {
    linear<8>(y, act, x, w, b, N, O, I);
}

extern "C" __global__ void __launch_bounds__(256) few_rows_head_1(
    float* logits, const Real* x, const Real* w, int N, int V, int I) {
    head<1>(logits, x, w, N, V, I);
}

extern "C" __global__ void __launch_bounds__(256) few_rows_head_8(
    float* logits, const Real* x, const Real* w, int N, int V, int I) {
    head<8>(logits, x, w, N, V, I);
}
