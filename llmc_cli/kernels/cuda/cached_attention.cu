// KV cache: appending new positions, and attention of one new position per sequence. Attention of several new
// positions, for prompts, is in attention.cu.
//
//   qkv           (S, T, 3C)  Real, C = NH * HS; each row is q, k, v, each split by head
//   keys, values  (S, NH, Tmax, HS)  Real
//   lengths       (S,)  int, number of cached positions before the new ones
//   out           (S, T, C)  Real
//
// Lengths are read on the device, so a CUDA graph stays valid as they grow.

constexpr int WARPS = 16;  // warps per block; a block handles one head of one sequence

// Append new positions to the cache. One thread per element of (S, T, C).
extern "C" __global__ void __launch_bounds__(256) cache_append(
    Real* keys, Real* values, const Real* qkv, const int* lengths, int S, int T, int NH, int HS, int Tmax) {
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t C = (size_t)NH * HS;
    if (index >= (size_t)S * T * C) {
        return;
    }
    const size_t row = index / C;
    const size_t column = index % C;
    const size_t s = row / T;
    const size_t position = lengths[s] + row % T;
    const size_t to = ((s * NH + column / HS) * Tmax + position) * HS + column % HS;
    keys[to] = qkv[row * 3 * C + C + column];
    values[to] = qkv[row * 3 * C + 2 * C + column];
}

// Attention of one new position per sequence (T = 1), which must already be in the cache. One block per head and
// sequence, grid (NH, S). Each warp handles KEYS keys per iteration, so that their loads overlap, with its own online
// softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). The warps' results are then combined in order. A lane holds
// LANE columns: lane + WARP * i.
template <int LANE, int KEYS>
__device__ __forceinline__ void attend(
    Real* out, const Real* qkv, const Real* keys, const Real* values, const int* lengths, int NH, int HS, int Tmax,
    float scale) {
    __shared__ float sums[WARPS][LANE * WARP];  // sum of p · v of each warp
    __shared__ float largest[WARPS];            // maximum score of each warp
    __shared__ float totals[WARPS];             // sum of p of each warp
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const size_t h = blockIdx.x;
    const size_t s = blockIdx.y;
    const size_t C = (size_t)NH * HS;
    const int count = lengths[s] + 1;  // number of keys
    const Real* q = qkv + s * 3 * C + h * HS;
    keys += (s * NH + h) * Tmax * HS;
    values += (s * NH + h) * Tmax * HS;

    float query[LANE];
    float sum[LANE];
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        const int column = lane + WARP * i;
        query[i] = column < HS ? to_float(q[column]) : 0.0f;
        sum[i] = 0.0f;
    }
    float maximum = __int_as_float(0xff800000);
    float total = 0.0f;
    for (int first = warp * KEYS; first < count; first += WARPS * KEYS) {
        float p[KEYS];
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            const Real* key = keys + (size_t)min(first + n, count - 1) * HS;
            p[n] = 0.0f;
#pragma unroll
            for (int i = 0; i < LANE; i++) {
                const int column = lane + WARP * i;
                if (column < HS) {
                    p[n] += query[i] * to_float(key[column]);
                }
            }
        }
        const float before = maximum;
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            const float score = warp_sum(p[n]) * scale;
            p[n] = first + n < count ? score : __int_as_float(0xff800000);
            maximum = fmaxf(maximum, p[n]);
        }
        const float shrink = expf(before - maximum);
        total *= shrink;
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            p[n] = expf(p[n] - maximum);
            total += p[n];
        }
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            const int column = lane + WARP * i;
            if (column < HS) {
                sum[i] *= shrink;
#pragma unroll
                for (int n = 0; n < KEYS; n++) {
                    sum[i] += p[n] * to_float(values[(size_t)min(first + n, count - 1) * HS + column]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        sums[warp][lane + WARP * i] = sum[i];
    }
    if (lane == 0) {
        largest[warp] = maximum;
        totals[warp] = total;
    }
    __syncthreads();
    if (threadIdx.x < HS) {
        float top = largest[0];  // finite, because warp 0 has key 0
        for (int w = 1; w < WARPS; w++) {
            top = fmaxf(top, largest[w]);
        }
        float result = 0.0f;
        float divisor = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            const float weight = expf(largest[w] - top);  // 0 for a warp without keys
            result += weight * sums[w][threadIdx.x];
            divisor += weight * totals[w];
        }
        out[s * C + h * HS + threadIdx.x] = to_real(result / divisor);
    }
}

extern "C" __global__ void __launch_bounds__(512, 1) attention_cached_64(
    Real* out, const Real* qkv, const Real* keys, const Real* values, const int* lengths, int NH, int HS, int Tmax,
    float scale) {
    attend<2, 8>(out, qkv, keys, values, lengths, NH, HS, Tmax, scale);
}

extern "C" __global__ void __launch_bounds__(512, 1) attention_cached_256(
    Real* out, const Real* qkv, const Real* keys, const Real* values, const int* lengths, int NH, int HS, int Tmax,
    float scale) {
    attend<8, 4>(out, qkv, keys, values, lengths, NH, HS, Tmax, scale);
}
