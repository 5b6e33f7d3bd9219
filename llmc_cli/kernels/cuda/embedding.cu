// Token and position embeddings: rows looked up, and their gradients added up without atomics.
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

// x[n] = wte[ids[n]] + wpe[positions[n]]; a block for each row.
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

constexpr int SEARCHERS = 256;                // threads of a block of the backward kernels
constexpr int TURNS = 4;                      // keys that each of them compares between two barriers
constexpr int SEARCHED = SEARCHERS * TURNS;   // keys that the block does
constexpr int BALLOTS = SEARCHED / WARP;      // words of one bit a key

// Rows among `first` to `first + SEARCHED` (below N) whose key is the one sought, in order.
struct Matches {
    unsigned found[BALLOTS];  // a bit for each of them, in order
    int rows[SEARCHED];
};

// Fills in `matches` and returns how many there are. All threads of the block call it, and may read the rows until they
// call it again: the next ones are written behind its first barrier.
__device__ __forceinline__ int find_rows(Matches& matches, const int* keys, int key, int first, int N) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    bool mine[TURNS];
    bool any = false;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int n = first + turn * SEARCHERS + threadIdx.x;
        mine[turn] = n < N && keys[n] == key;
        any = any || mine[turn];
        const unsigned found = __ballot_sync(ALL_LANES, mine[turn]);
        if (lane == 0) {
            matches.found[turn * (SEARCHERS / WARP) + warp] = found;
        }
    }
    if (!__syncthreads_or(any)) {
        return 0;
    }
    // the place of a match in the list: the number of those before it
    int places[TURNS];
    int count = 0;
#pragma unroll
    for (int word = 0; word < BALLOTS; word++) {
        if (word % (SEARCHERS / WARP) == warp) {
            places[word / (SEARCHERS / WARP)] = count + __popc(matches.found[word] & ((1u << lane) - 1u));
        }
        count += __popc(matches.found[word]);
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        if (mine[turn]) {
            matches.rows[places[turn]] = first + turn * SEARCHERS + threadIdx.x;
        }
    }
    __syncthreads();
    return count;
}

// target (C,) = the sum of those rows n >= first of dx whose key is the one sought, added to it with acc. What SEARCHED
// keys come to is added up first, as sums of many thousand rows keep more digits so. The keys are searched once for
// every SEARCHERS * W columns.
template <int W>
__device__ __forceinline__ void add_rows(
    float* target, const Real* dx, const int* keys, int key, int first, int N, int C, bool acc, Matches& matches) {
    for (int start = 0; start < C; start += SEARCHERS * W) {
        const int c = start + threadIdx.x * W;
        float sum[W] = {};
        for (int n = first; n < N; n += SEARCHED) {
            const int count = find_rows(matches, keys, key, n, N);
            if (c < C && count > 0) {
                float part[W] = {};
#pragma unroll 4
                for (int k = 0; k < count; k++) {  // unrolled: the loads of four rows are under way at once
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

// dwte[id] += the sum of the rows of dx with that id. Of the blocks, one for each row, that of an id's first row does it
// for all; the others find an earlier row, searching from the nearest on, and leave.
extern "C" __global__ void embedding_backward(float* dwte, const Real* dx, const int* ids, int N, int C) {
    __shared__ Matches matches;
    const int first = blockIdx.x;
    const int id = ids[first];
    for (int end = first; end > 0; end -= SEARCHED) {
        bool any = false;
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int n = end - 1 - turn * SEARCHERS - threadIdx.x;
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

// dwpe[t] = the sum of the rows of dx at position t, added to it with acc; a block for each position.
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
