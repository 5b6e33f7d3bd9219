// The cache of keys and values: taking in new positions, and attention of one new position per sequence. (Attention of
// several, for prompts, is in attention.cu.)
//
//   qkv           (S, T, 3C)  Real, C = NH * HS; a row is q, k, v, each by head
//   keys, values  (S, NH, Tmax, HS)  Real
//   lengths       (S,)  int, positions in the cache before the new ones
//   out           (S, T, C)  Real
//
// Lengths are read on the device, so that a graph of launches stays valid as they grow.

constexpr int WARPS = 16;  // of a block, for one head of one sequence

// Puts new positions behind the old ones; a thread for each element of (S, T, C).
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

// T = 1, the new position in the cache already. A block for each head of each sequence, grid (NH, S): its warps take
// KEYS keys each in turn, whose loads are all under way at once, with a softmax of their own (Milakov and Gimelshein
// 2018, arXiv:1805.02867), and are put together in order. A lane has LANE columns: lane + WARP * i.
template <int LANE, int KEYS>
__device__ __forceinline__ void attend(
    Real* out, const Real* qkv, const Real* keys, const Real* values, const int* lengths, int NH, int HS, int Tmax,
    float scale) {
    __shared__ float sums[WARPS][LANE * WARP];  // of p · v
    __shared__ float largest[WARPS];            // score
    __shared__ float totals[WARPS];             // of p
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const size_t h = blockIdx.x;
    const size_t s = blockIdx.y;
    const size_t C = (size_t)NH * HS;
    const int count = lengths[s] + 1;  // keys
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
    float most = __int_as_float(0xff800000);
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
        const float before = most;
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            const float score = warp_sum(p[n]) * scale;
            p[n] = first + n < count ? score : __int_as_float(0xff800000);
            most = fmaxf(most, p[n]);
        }
        const float shrink = expf(before - most);
        total *= shrink;
#pragma unroll
        for (int n = 0; n < KEYS; n++) {
            p[n] = expf(p[n] - most);
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
        largest[warp] = most;
        totals[warp] = total;
    }
    __syncthreads();
    if (threadIdx.x < HS) {
        float top = largest[0];  // finite: warp 0 had key 0
        for (int w = 1; w < WARPS; w++) {
            top = fmaxf(top, largest[w]);
        }
        float result = 0.0f;
        float divisor = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            const float weight = expf(largest[w] - top);  // 0 for a warp that had no key
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
