// Token and position embeddings: lookup in the forward pass, gradient sums without atomics in the backward pass.
//
// x, dx (N,C) Real; wte, dwte (Vp,C), wpe, dwpe (T,C) float; ids, positions (N,).

template <int W>
__device__ __forceinline__ void look_up(Real* x, const float* token, const float* position, int C) {
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        float sum[W];
        float other[W];
        load<W>(sum, token + c);
        load<W>(other, position + c);
#pragma unroll
        for (int k = 0; k < W; k++) {
            sum[k] += other[k];
        }
        store<W>(x + c, sum);
    }
}

// x[n] = wte[ids[n]] + wpe[positions[n]]. One block per row.
extern "C" __global__ void embedding_forward(
    Real* x, const float* wte, const float* wpe, const int* ids, const int* positions, int N, int C) {
    const size_t n = blockIdx.x;
    const float* token = wte + (size_t)ids[n] * C;
    const float* position = wpe + (size_t)positions[n] * C;
    if (C % WIDTH == 0 && aligned16(x, wte, wpe)) {
        look_up<WIDTH>(x + n * C, token, position, C);
    } else {
        look_up<1>(x + n * C, token, position, C);
    }
}

constexpr int THREADS = 256;                       // threads per block of the backward kernels
constexpr int THREAD_KEYS = 4;                     // keys that a thread compares between two barriers
constexpr int BLOCK_KEYS = THREADS * THREAD_KEYS;  // keys that the block compares between two barriers
constexpr int BALLOTS = BLOCK_KEYS / WARP;         // 32-bit words with one bit per key

// The rows in [first, first + BLOCK_KEYS) and below N whose key equals the requested one, in ascending order.
struct Matches {
    unsigned found[BALLOTS];  // one bit per compared row
    int rows[BLOCK_KEYS];
};

// Fill `matches` and return their number. All threads of the block must call it. They may read `matches.rows` until the
// next call, which writes them only after its first barrier.
__device__ __forceinline__ int find_rows(Matches& matches, const int* keys, int key, int first, int N) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    bool mine[THREAD_KEYS];
    bool any = false;
#pragma unroll
    for (int i = 0; i < THREAD_KEYS; i++) {
        const int n = first + i * THREADS + threadIdx.x;
        mine[i] = n < N && keys[n] == key;
        any = any || mine[i];
        const unsigned found = __ballot_sync(ALL_LANES, mine[i]);
        if (lane == 0) {
            matches.found[i * (THREADS / WARP) + warp] = found;
        }
    }
    if (!__syncthreads_or(any)) {
        return 0;
    }
    // the index of a match in the list is the number of matches before it
    int places[THREAD_KEYS];
    int count = 0;
#pragma unroll
    for (int word = 0; word < BALLOTS; word++) {
        if (word % (THREADS / WARP) == warp) {
            places[word / (THREADS / WARP)] = count + __popc(matches.found[word] & ((1u << lane) - 1u));
        }
        count += __popc(matches.found[word]);
    }
#pragma unroll
    for (int i = 0; i < THREAD_KEYS; i++) {
        if (mine[i]) {
            matches.rows[places[i]] = first + i * THREADS + threadIdx.x;
        }
    }
    __syncthreads();
    return count;
}

// target (C,) = sum of the rows n >= first of dx whose key equals `key`; added to target if acc. Each group of
// BLOCK_KEYS keys is summed separately first, which is more accurate for sums over many thousand rows. The keys are
// searched once per THREADS * W columns.
template <int W>
__device__ __forceinline__ void add_rows(
    float* target, const Real* dx, const int* keys, int key, int first, int N, int C, bool acc, Matches& matches) {
    for (int start = 0; start < C; start += THREADS * W) {
        const int c = start + threadIdx.x * W;
        float sum[W] = {};
        for (int n = first; n < N; n += BLOCK_KEYS) {
            const int count = find_rows(matches, keys, key, n, N);
            if (c < C && count > 0) {
                float part[W] = {};
#pragma unroll 4
                for (int k = 0; k < count; k++) {  // unrolled so that the loads of four rows overlap
                    float row[W];
                    load<W>(row, dx + (size_t)matches.rows[k] * C + c);
#pragma unroll
                    for (int j = 0; j < W; j++) {
                        part[j] += row[j];
                    }
                }
#pragma unroll
                for (int j = 0; j < W; j++) {
                    sum[j] += part[j];
                }
            }
        }
        if (c < C) {
            float before[W] = {};
            if (acc) {
                load<W>(before, target + c);
            }
#pragma unroll
            for (int j = 0; j < W; j++) {
                sum[j] += before[j];
            }
            store<W>(target + c, sum);
        }
    }
}

// dwte[id] += sum of the rows of dx with that id. One block per row: the block of an id's first row computes the sum.
// The other blocks find an earlier row with the same id, searching backwards from their own row, and exit.
extern "C" __global__ void embedding_backward(float* dwte, const Real* dx, const int* ids, int N, int C) {
    __shared__ Matches matches;
    const int first = blockIdx.x;
    const int id = ids[first];
    for (int end = first; end > 0; end -= BLOCK_KEYS) {
        bool any = false;
#pragma unroll
        for (int i = 0; i < THREAD_KEYS; i++) {
            const int n = end - 1 - i * THREADS - threadIdx.x;
            any = any || (n >= 0 && ids[n] == id);
        }
        if (__syncthreads_or(any)) {
            return;
        }
    }
    float* target = dwte + (size_t)id * C;
    if (C % WIDTH == 0 && aligned16(dwte, dx)) {
        add_rows<WIDTH>(target, dx, ids, id, first, N, C, true, matches);
    } else {
        add_rows<1>(target, dx, ids, id, first, N, C, true, matches);
    }
}

// dwpe[t] = sum of the rows of dx at position t; added to dwpe[t] if acc. One block per position.
extern "C" __global__ void position_backward(float* dwpe, const Real* dx, const int* positions, int N, int C, int acc) {
    __shared__ Matches matches;
    const int t = blockIdx.x;
    float* target = dwpe + (size_t)t * C;
    if (C % WIDTH == 0 && aligned16(dwpe, dx)) {
        add_rows<WIDTH>(target, dx, positions, t, 0, N, C, acc, matches);
    } else {
        add_rows<1>(target, dx, positions, t, 0, N, C, acc, matches);
    }
}
