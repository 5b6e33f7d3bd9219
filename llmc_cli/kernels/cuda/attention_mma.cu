// Causal attention on tensor cores for head sizes 64 and 128, in bf16 with float accumulation. Requires sm_80.
//
//   qkv, dqkv    (B, T, 3C)  Bf16, C = NH * HS; each row is q, k, v, each split by head
//   out, dout    (B, T, C)  Bf16
//   lse          (B, NH, T)  float, log of the sum of exp(scale * q·k)
//   statistics   (B, NH, T, 2)  float: lse * log2(e), and the sum of dout * out over the head
//   queries      (B, T, C)  Bf16, copy of q
//
// All arrays are aligned to 16 bytes. The backward pass recomputes the scores in three kernels: delta, then queries
// (dq), then keys (dk, dv). dqkv may alias qkv: the queries kernel writes dq over q, which only the same block reads,
// and the keys kernel writes dk and dv over k and v, which only the same block reads; it takes q from the copy that the
// delta kernel made. Every output belongs to one block, which sums in a fixed order. Dao 2023, arXiv:2307.08691.
//
// Grid: (ceil(T / rows), NH, B); for the delta kernel (ceil(B * T * NH * HS / 8 / threads)).
// The kernels use nearly all registers, so compile every change for all architectures: one may spill where others do
// not.

struct Launch {
    int threads;
    int rows;    // rows of the sequence per block
    int shared;  // bytes of dynamic shared memory
};

// attention.py reads these lines.
constexpr Launch FORWARD_64 = {128, 128, 49152};
constexpr Launch DELTA_64 = {256, 0, 0};
constexpr Launch KEYS_64 = {128, 64, 17408};
constexpr Launch QUERIES_64 = {128, 128, 49152};
constexpr Launch FORWARD_128 = {256, 128, 65536};
constexpr Launch DELTA_128 = {256, 0, 0};
constexpr Launch KEYS_128 = {256, 128, 99328};
constexpr Launch QUERIES_128 = {256, 128, 65536};

constexpr float LOG2_E = 1.4426950408889634f;

__host__ __device__ constexpr int larger(int a, int b) {
    return a > b ? a : b;
}

// Sizes of one kernel. A block owns ROWS rows of one head. Their RESIDENT tiles (q; k and v; or q and dout) are loaded
// once and stay in shared memory or, if IN_REGISTERS, are moved from there to registers. Pairs of tiles of STREAMED
// rows (k and v, or q and dout) are streamed through a ring of two stages.
template <int HEAD, int WARPS, int WARP_PATCHES, int STREAMED_ROWS, bool REGISTERS, int RESIDENT, int EXTRA>
struct Sizes {
    static constexpr int HS = HEAD;
    static constexpr int STEPS = HEAD / 16;    // k steps of a product over the head
    static constexpr int COLUMNS = HEAD / 8;   // 8-column patches per row, 16 bytes each
    static constexpr int ROW = HEAD * 2;       // bytes per row
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int PATCHES = WARP_PATCHES;  // 16-row patches per warp
    static constexpr int WARP_ROWS = PATCHES * 16;
    static constexpr int ROWS = WARPS * WARP_ROWS;
    static constexpr int STREAMED = STREAMED_ROWS;
    static constexpr int SCORES = STREAMED_ROWS / 8;  // 8-column patches of scores
    static constexpr bool IN_REGISTERS = REGISTERS;
    static constexpr int REGISTER_PATCHES = IN_REGISTERS ? PATCHES : 1;
    static constexpr int REGISTER_STEPS = IN_REGISTERS ? STEPS : 1;
    static constexpr int OWN = ROWS * ROW;              // bytes per resident tile
    static constexpr int TILE = STREAMED * ROW;         // bytes per streamed tile
    static constexpr int STAGE = 2 * TILE + EXTRA;
    static constexpr int RING = IN_REGISTERS ? 0 : RESIDENT * OWN;  // offset of the ring; resident tiles are at 0
    static constexpr int SHARED = IN_REGISTERS ? larger(2 * STAGE, RESIDENT * OWN) : RESIDENT * OWN + 2 * STAGE;
};

// ---- Tiles in shared memory: rows of HS elements without padding. 16-byte chunk c of row r is stored at index
// c ^ (r % 8), so that the same chunk of eight consecutive rows, and all chunks of one row, are in different banks.

template <int HS>
__device__ __forceinline__ unsigned swizzle(int row, int chunk) {
    return (unsigned)(row * HS * 2 + ((chunk ^ (row & 7)) << 4));
}

// Start copying ROWS rows, `stride` elements apart, to a tile. Rows from `valid` on are filled with zeros.
template <int HS, int ROWS, int THREADS>
__device__ __forceinline__ void copy_tile(unsigned tile, const Bf16* source, int stride, int valid) {
    constexpr int CHUNKS = HS / 8;  // per row
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies the same number of chunks");
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        const int index = i * THREADS + threadIdx.x;
        const int row = index / CHUNKS;
        const int chunk = index % CHUNKS;
        const bool inside = row < valid;
        copy_async_16(tile + swizzle<HS>(row, chunk), source + (inside ? row * stride : 0) + chunk * 8, inside);
    }
}

// The lane-dependent part of an address for load_matrices. The full address is
// tile + row * HS * 2 + (part ^ step * 32), where row is a multiple of 8 and a step is 16 columns.
//   lane_of_rows: one 16x16 operand a in a tile (row, k); transposed, two 16x8 operands b in a tile (k, column)
//   lane_of_columns: two 16x8 operands b in a tile (column, k)
template <int HS>
__device__ __forceinline__ unsigned lane_of_rows(int lane) {
    return swizzle<HS>(lane & 15, lane >> 4);
}

template <int HS>
__device__ __forceinline__ unsigned lane_of_columns(int lane) {
    return swizzle<HS>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}

// ---- Matrix products of one warp. Sums are stored as 16x8 patches in the layout of multiply_add:
// [patch of rows][patch of columns][4].

template <int M, int N>
__device__ __forceinline__ void clear(float (&sums)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sums[m][n][e] = 0.0f;
            }
        }
    }
}

// Load this warp's rows of a resident tile into registers. `tile` is the address of its first row.
template <class S>
__device__ __forceinline__ void load_resident(
    unsigned (&resident)[S::REGISTER_PATCHES][S::REGISTER_STEPS][4], unsigned tile, unsigned rows) {
#pragma unroll
    for (int m = 0; m < S::PATCHES; m++) {
#pragma unroll
        for (int step = 0; step < S::STEPS; step++) {
            load_matrices(resident[m][step], tile + m * 16 * S::ROW + (rows ^ (step << 5)));
        }
    }
}

// sums (WARP_ROWS, STREAMED) += own (WARP_ROWS, HS) · streamed (STREAMED, HS)ᵀ. The left operand is read from `resident`
// if IN_REGISTERS, otherwise from shared memory at `own`.
template <class S>
__device__ __forceinline__ void multiply_rows(
    float (&sums)[S::PATCHES][S::SCORES][4], const unsigned (&resident)[S::REGISTER_PATCHES][S::REGISTER_STEPS][4],
    unsigned own, unsigned streamed, unsigned rows, unsigned columns) {
#pragma unroll
    for (int step = 0; step < S::STEPS; step++) {
        unsigned a[S::PATCHES][4];
#pragma unroll
        for (int m = 0; m < S::PATCHES; m++) {
            if constexpr (S::IN_REGISTERS) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    a[m][e] = resident[m][step][e];
                }
            } else {
                load_matrices(a[m], own + m * 16 * S::ROW + (rows ^ (step << 5)));
            }
        }
#pragma unroll
        for (int n = 0; n < S::SCORES / 2; n++) {
            unsigned b[4];
            load_matrices(b, streamed + n * 16 * S::ROW + (columns ^ (step << 5)));
#pragma unroll
            for (int m = 0; m < S::PATCHES; m++) {
                multiply_add(sums[m][2 * n], a[m], b[0], b[1]);
                multiply_add(sums[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sums (WARP_ROWS, HS) += scores (WARP_ROWS, STREAMED) · streamed (STREAMED, HS), with scores rounded to bf16
template <class S>
__device__ __forceinline__ void multiply_scores(
    float (&sums)[S::PATCHES][S::COLUMNS][4], const float (&scores)[S::PATCHES][S::SCORES][4], unsigned streamed,
    unsigned rows) {
#pragma unroll
    for (int step = 0; step < S::SCORES / 2; step++) {
        unsigned a[S::PATCHES][4];
#pragma unroll
        for (int m = 0; m < S::PATCHES; m++) {
            a[m][0] = pack_bf16(scores[m][2 * step][0], scores[m][2 * step][1]);
            a[m][1] = pack_bf16(scores[m][2 * step][2], scores[m][2 * step][3]);
            a[m][2] = pack_bf16(scores[m][2 * step + 1][0], scores[m][2 * step + 1][1]);
            a[m][3] = pack_bf16(scores[m][2 * step + 1][2], scores[m][2 * step + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < S::COLUMNS / 2; n++) {
            unsigned b[4];
            load_matrices_transposed(b, streamed + step * 16 * S::ROW + (rows ^ (n << 5)));
#pragma unroll
            for (int m = 0; m < S::PATCHES; m++) {
                multiply_add(sums[m][2 * n], a[m], b[0], b[1]);
                multiply_add(sums[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Store the first `valid` rows of sums (WARP_ROWS, HS) as Bf16, in rows `stride` elements apart. Each row is multiplied
// by its factor [patch][upper or lower half]. The data pass through `stage`, WARP_ROWS * ROW bytes of shared memory
// private to this warp, so that global stores are 16 bytes wide.
template <class S>
__device__ __forceinline__ void store_rows(
    Bf16* target, int stride, int valid, const float (&sums)[S::PATCHES][S::COLUMNS][4],
    const float (&factors)[S::PATCHES][2], unsigned char* stage, int lane) {
    const int g = lane >> 2;
    const int t = lane & 3;
#pragma unroll
    for (int m = 0; m < S::PATCHES; m++) {
#pragma unroll
        for (int n = 0; n < S::COLUMNS; n++) {
            const unsigned upper = pack_bf16(sums[m][n][0] * factors[m][0], sums[m][n][1] * factors[m][0]);
            const unsigned lower = pack_bf16(sums[m][n][2] * factors[m][1], sums[m][n][3] * factors[m][1]);
            *(unsigned*)(stage + swizzle<S::HS>(m * 16 + g, n) + t * 4) = upper;
            *(unsigned*)(stage + swizzle<S::HS>(m * 16 + g + 8, n) + t * 4) = lower;
        }
    }
    __syncwarp();
    constexpr int CHUNKS = S::COLUMNS;  // per row
#pragma unroll
    for (int i = 0; i < S::WARP_ROWS * CHUNKS / 32; i++) {
        const int index = i * 32 + lane;
        const int row = index / CHUNKS;
        const int chunk = index % CHUNKS;
        if (row < valid) {
            *(uint4*)(target + row * stride + chunk * 8) = *(const uint4*)(stage + swizzle<S::HS>(row, chunk));
        }
    }
}

constexpr int QUAD = 4;  // lanes that share one row of a patch

// Start copying a tile of keys and values, from row `key` of a head, to a stage.
template <class S>
__device__ __forceinline__ void copy_keys(unsigned stage, const Bf16* k, size_t C, int key, int T) {
    copy_tile<S::HS, S::STREAMED, S::THREADS>(stage, k + key * 3 * C, 3 * C, T - key);
    copy_tile<S::HS, S::STREAMED, S::THREADS>(stage + S::TILE, k + key * 3 * C + C, 3 * C, T - key);
    copy_async_commit();
}

// ---- Forward: q is resident; k and v are streamed up to the diagonal.

template <class S>
__device__ __forceinline__ void forward(
    Bf16* __restrict__ out, float* __restrict__ lse, const Bf16* __restrict__ qkv, int T, int NH, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int g = lane >> 2;
    const int t = lane & 3;
    const int first = (int)(gridDim.x - 1 - blockIdx.x) * S::ROWS;  // first query of the block; most work first
    const int row = first + warp * S::WARP_ROWS;                    // first query of the warp
    const int h = blockIdx.y;
    const size_t b = blockIdx.z;
    const size_t C = (size_t)NH * S::HS;
    const Bf16* q = qkv + b * T * 3 * C + (size_t)h * S::HS;
    const Bf16* k = q + C;
    const unsigned base = shared_address(memory);
    const unsigned ring = base + S::RING;
    const unsigned own = base + warp * S::WARP_ROWS * S::ROW;
    const unsigned rows = lane_of_rows<S::HS>(lane);
    const unsigned columns = lane_of_columns<S::HS>(lane);
    const int tiles = (min(first + S::ROWS, T) + S::STREAMED - 1) / S::STREAMED;

    copy_tile<S::HS, S::ROWS, S::THREADS>(base, q + first * 3 * C, 3 * C, T - first);
    copy_async_commit();
    unsigned resident[S::REGISTER_PATCHES][S::REGISTER_STEPS][4];
    if constexpr (S::IN_REGISTERS) {
        copy_async_wait();
        __syncthreads();
        load_resident<S>(resident, own, rows);
        __syncthreads();  // the ring overwrites q
    }
    copy_keys<S>(ring, k, C, 0, T);

    float sums[S::PATCHES][S::COLUMNS][4];  // sum of p · v, not yet divided by the sum of p
    clear(sums);
    float largest[S::PATCHES][2];  // maximum score of each row
    float total[S::PATCHES][2];    // sum of p over this lane's columns
#pragma unroll
    for (int m = 0; m < S::PATCHES; m++) {
        largest[m][0] = largest[m][1] = __int_as_float(0xff800000);
        total[m][0] = total[m][1] = 0.0f;
    }
    const float scale2 = scale * LOG2_E;  // exp(scale * x) = 2^(scale2 * x)

    for (int j = 0; j < tiles; j++) {
        copy_async_wait();
        __syncthreads();  // tile j has arrived, and all threads have finished reading tile j - 1
        const int key = j * S::STREAMED;
        if (j + 1 < tiles) {
            copy_keys<S>(ring + ((j + 1) & 1) * S::STAGE, k, C, key + S::STREAMED, T);
        }
        if (key > row + S::WARP_ROWS - 1) {
            continue;  // no query of this warp attends to the tile
        }
        const unsigned keys = ring + (j & 1) * S::STAGE;
        const unsigned values = keys + S::TILE;
        float scores[S::PATCHES][S::SCORES][4];
        clear(scores);
        multiply_rows<S>(scores, resident, own, keys, rows, columns);
        if (key + S::STREAMED - 1 > row) {  // on the diagonal; this also masks keys past T for all queries before T
#pragma unroll
            for (int m = 0; m < S::PATCHES; m++) {
#pragma unroll
                for (int n = 0; n < S::SCORES; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int column = key + n * 8 + 2 * t + (e & 1);
                        if (column > row + m * 16 + g + 8 * (e >> 1)) {
                            scores[m][n][e] = __int_as_float(0xff800000);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < S::PATCHES; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {  // rows g and g + 8; tile 0 has key 0, so no row is fully masked
                float maximum = largest[m][half];
#pragma unroll
                for (int n = 0; n < S::SCORES; n++) {
                    maximum = fmaxf(maximum, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                maximum = warp_max<QUAD>(maximum);
                const float shrink = exp2_approximate((largest[m][half] - maximum) * scale2);
                const float shift = maximum * scale2;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < S::SCORES; n++) {
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        const float p = exp2_approximate(fmaf(scores[m][n][e], scale2, -shift));
                        scores[m][n][e] = p;
                        sum += p;
                    }
                }
                largest[m][half] = maximum;
                total[m][half] = total[m][half] * shrink + sum;
#pragma unroll
                for (int n = 0; n < S::COLUMNS; n++) {
                    sums[m][n][2 * half] *= shrink;
                    sums[m][n][2 * half + 1] *= shrink;
                }
            }
        }
        multiply_scores<S>(sums, scores, values, rows);
    }

    __syncthreads();  // the results are staged in the memory of the tiles
    float factors[S::PATCHES][2];
#pragma unroll
    for (int m = 0; m < S::PATCHES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = warp_sum<QUAD>(total[m][half]);
            const int query = row + m * 16 + g + 8 * half;
            factors[m][half] = 1.0f / sum;
            if (t == 0 && query < T) {
                lse[(b * NH + h) * T + query] = largest[m][half] * scale + logf(sum);
            }
        }
    }
    Bf16* target = out + (b * T + row) * C + (size_t)h * S::HS;
    store_rows<S>(target, C, T - row, sums, factors, memory + warp * S::WARP_ROWS * S::ROW, lane);
}

// ---- Delta: statistics (B, NH, T, 2), queries (B, T, C). HS / 8 consecutive lanes handle one row of a head, 8
// elements each.

// Dot product of two packed pairs of bf16.
__device__ __forceinline__ float pair_dot(unsigned a, unsigned b) {
    const float low = __uint_as_float(a << 16) * __uint_as_float(b << 16);
    return low + __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}

template <int HS>
__device__ __forceinline__ void delta(
    float* __restrict__ statistics, Bf16* __restrict__ queries, const float* __restrict__ lse,
    const Bf16* __restrict__ dout, const Bf16* __restrict__ out, const Bf16* __restrict__ qkv, int B, int T, int NH) {
    constexpr int CHUNKS = HS / 8;
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t row = index / CHUNKS;  // (b * T + t) * NH + h
    const bool inside = row < (size_t)B * T * NH;
    float sum = 0.0f;
    if (inside) {
        const uint4 x = *(const uint4*)(out + index * 8);
        const uint4 y = *(const uint4*)(dout + index * 8);
        const size_t skipped = row / NH * 2 * NH * HS;  // k and v of the preceding rows
        *(uint4*)(queries + index * 8) = *(const uint4*)(qkv + skipped + index * 8);
        sum = pair_dot(x.x, y.x) + pair_dot(x.y, y.y) + (pair_dot(x.z, y.z) + pair_dot(x.w, y.w));
    }
    sum = warp_sum<CHUNKS>(sum);
    if (inside && index % CHUNKS == 0) {
        const size_t h = row % NH;
        const size_t bt = row / NH;
        const size_t at = (bt / T * NH + h) * T + bt % T;
        *(float2*)(statistics + 2 * at) = make_float2(lse[at] * LOG2_E, sum);
    }
}

// ---- Keys: k and v are resident; q and dout are streamed from the diagonal on. Scores are computed transposed, with
// keys as rows, so that pᵀ and dsᵀ, rounded to bf16, are already laid out as operands a of dv += pᵀ · dout and
// dk += dsᵀ · q. Queries past T are zeros with zero statistics and contribute nothing.

// Start copying a tile of queries to a stage: q, dout, statistics. The addresses are recomputed on every call from the
// kernel's arguments, so that they occupy no registers in between.
template <class S>
__device__ __forceinline__ void copy_queries(
    unsigned stage, const Bf16* queries, const Bf16* dout, const float* statistics, int query, int T, int NH) {
    const int C = NH * S::HS;
    const size_t h = blockIdx.y;
    const size_t b = blockIdx.z;
    const size_t at = b * T + query;
    copy_tile<S::HS, S::STREAMED, S::THREADS>(stage, queries + at * C + h * S::HS, C, T - query);
    copy_tile<S::HS, S::STREAMED, S::THREADS>(stage + S::TILE, dout + at * C + h * S::HS, C, T - query);
    if ((int)threadIdx.x < S::STREAMED) {
        const int t = query + (int)threadIdx.x;
        const float* pair = statistics + 2 * ((b * NH + h) * T + (t < T ? t : 0));
        copy_async_8(stage + 2 * S::TILE + threadIdx.x * 8, pair, t < T);
    }
    copy_async_commit();
}

template <class S>
__device__ __forceinline__ void backward_keys(
    Bf16* dqkv, const Bf16* qkv, const Bf16* __restrict__ dout, const float* __restrict__ statistics,
    const Bf16* __restrict__ queries, int T, int NH, float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int g = lane >> 2;
    const int t = lane & 3;
    const int first = (int)blockIdx.x * S::ROWS;  // this block's first key; block 0 has the most work
    const int row = first + warp * S::WARP_ROWS;  // this warp's first key
    const int h = blockIdx.y;
    const size_t b = blockIdx.z;
    const size_t C = (size_t)NH * S::HS;
    const size_t head = b * T * 3 * C + (size_t)h * S::HS;
    const Bf16* k = qkv + head + C;
    const Bf16* v = k + C;
    const unsigned base = shared_address(memory);
    const unsigned ring = base + S::RING;
    const unsigned own_keys = base + warp * S::WARP_ROWS * S::ROW;
    const unsigned own_values = own_keys + S::OWN;
    const unsigned rows = lane_of_rows<S::HS>(lane);
    const unsigned columns = lane_of_columns<S::HS>(lane);
    const int start = first / S::STREAMED;  // the first tile of queries that attends to these keys
    const int tiles = (T + S::STREAMED - 1) / S::STREAMED - start;

    copy_tile<S::HS, S::ROWS, S::THREADS>(base, k + first * 3 * C, 3 * C, T - first);
    copy_tile<S::HS, S::ROWS, S::THREADS>(base + S::OWN, v + first * 3 * C, 3 * C, T - first);
    copy_async_commit();
    unsigned resident_keys[S::REGISTER_PATCHES][S::REGISTER_STEPS][4];
    unsigned resident_values[S::REGISTER_PATCHES][S::REGISTER_STEPS][4];
    if constexpr (S::IN_REGISTERS) {
        copy_async_wait();
        __syncthreads();
        load_resident<S>(resident_keys, own_keys, rows);
        load_resident<S>(resident_values, own_values, rows);
        __syncthreads();  // the ring overwrites k and v
    }
    copy_queries<S>(ring, queries, dout, statistics, start * S::STREAMED, T, NH);

    float dk[S::PATCHES][S::COLUMNS][4];
    float dv[S::PATCHES][S::COLUMNS][4];
    clear(dk);
    clear(dv);
    const float scale2 = scale * LOG2_E;

    for (int j = 0; j < tiles; j++) {
        copy_async_wait();
        __syncthreads();  // tile j has arrived, and all threads have finished reading tile j - 1
        const int query = (start + j) * S::STREAMED;
        if (j + 1 < tiles) {
            const unsigned stage = ring + ((j + 1) & 1) * S::STAGE;
            copy_queries<S>(stage, queries, dout, statistics, query + S::STREAMED, T, NH);
        }
        if (query + S::STREAMED - 1 < row) {
            continue;  // no query of the tile attends to this warp's keys
        }
        const unsigned streamed = ring + (j & 1) * S::STAGE;
        const unsigned douts = streamed + S::TILE;
        const unsigned char* pairs = memory + S::RING + (j & 1) * S::STAGE + 2 * S::TILE;  // (STREAMED, 2) float
        float p[S::PATCHES][S::SCORES][4];
        float ds[S::PATCHES][S::SCORES][4];
        clear(p);
        clear(ds);
        multiply_rows<S>(p, resident_keys, own_keys, streamed, rows, columns);
        multiply_rows<S>(ds, resident_values, own_values, douts, rows, columns);
        const bool diagonal = query < row + S::WARP_ROWS - 1;
#pragma unroll
        for (int n = 0; n < S::SCORES; n++) {
            const float4 two = *(const float4*)(pairs + (n * 8 + 2 * t) * 8);  // statistics of this lane's two queries
#pragma unroll
            for (int m = 0; m < S::PATCHES; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float x = exp2_approximate(fmaf(p[m][n][e], scale2, -(e & 1 ? two.z : two.x)));
                    if (diagonal && query + n * 8 + 2 * t + (e & 1) < row + m * 16 + g + 8 * (e >> 1)) {
                        x = 0.0f;
                    }
                    p[m][n][e] = x;
                    ds[m][n][e] = x * (ds[m][n][e] - (e & 1 ? two.w : two.y));
                }
            }
        }
        multiply_scores<S>(dv, p, douts, rows);
        multiply_scores<S>(dk, ds, streamed, rows);
    }

    __syncthreads();  // the results are staged in the memory of the tiles
    float scales[S::PATCHES][2];
    float ones[S::PATCHES][2];
#pragma unroll
    for (int m = 0; m < S::PATCHES; m++) {
        scales[m][0] = scales[m][1] = scale;
        ones[m][0] = ones[m][1] = 1.0f;
    }
    Bf16* target = dqkv + head + row * 3 * C;
    unsigned char* stage = memory + warp * S::WARP_ROWS * S::ROW;
    store_rows<S>(target + C, 3 * C, T - row, dk, scales, stage, lane);
    store_rows<S>(target + 2 * C, 3 * C, T - row, dv, ones, stage + S::OWN, lane);
}

// ---- Queries: q and dout are resident; k and v are streamed up to the diagonal, as in the forward pass.

template <class S>
__device__ __forceinline__ void backward_queries(
    Bf16* dqkv, const Bf16* qkv, const Bf16* __restrict__ dout, const float* __restrict__ statistics, int T, int NH,
    float scale) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int g = lane >> 2;
    const int t = lane & 3;
    const int first = (int)(gridDim.x - 1 - blockIdx.x) * S::ROWS;  // first query of the block; most work first
    const int row = first + warp * S::WARP_ROWS;                    // first query of the warp
    const int h = blockIdx.y;
    const size_t b = blockIdx.z;
    const size_t C = (size_t)NH * S::HS;
    const size_t head = b * T * 3 * C + (size_t)h * S::HS;
    const Bf16* q = qkv + head;
    const Bf16* k = q + C;
    dout += b * T * C + (size_t)h * S::HS;
    statistics += (b * NH + h) * T * 2;
    const unsigned base = shared_address(memory);
    const unsigned ring = base + S::RING;
    const unsigned own_queries = base + warp * S::WARP_ROWS * S::ROW;
    const unsigned own_douts = own_queries + S::OWN;
    const unsigned rows = lane_of_rows<S::HS>(lane);
    const unsigned columns = lane_of_columns<S::HS>(lane);
    const int tiles = (min(first + S::ROWS, T) + S::STREAMED - 1) / S::STREAMED;

    copy_tile<S::HS, S::ROWS, S::THREADS>(base, q + first * 3 * C, 3 * C, T - first);
    copy_tile<S::HS, S::ROWS, S::THREADS>(base + S::OWN, dout + first * C, C, T - first);
    copy_async_commit();
    float lse2[S::PATCHES][2];   // lse * log2(e) of each row
    float deltas[S::PATCHES][2];
#pragma unroll
    for (int m = 0; m < S::PATCHES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = row + m * 16 + g + 8 * half;
            float2 pair = make_float2(0.0f, 0.0f);
            if (query < T) {
                pair = *(const float2*)(statistics + 2 * (size_t)query);
            }
            lse2[m][half] = pair.x;
            deltas[m][half] = pair.y;
        }
    }
    unsigned resident_queries[S::REGISTER_PATCHES][S::REGISTER_STEPS][4];
    unsigned resident_douts[S::REGISTER_PATCHES][S::REGISTER_STEPS][4];
    if constexpr (S::IN_REGISTERS) {
        copy_async_wait();
        __syncthreads();
        load_resident<S>(resident_queries, own_queries, rows);
        load_resident<S>(resident_douts, own_douts, rows);
        __syncthreads();  // the ring overwrites q and dout
    }
    copy_keys<S>(ring, k, C, 0, T);

    float dq[S::PATCHES][S::COLUMNS][4];
    clear(dq);
    const float scale2 = scale * LOG2_E;

    for (int j = 0; j < tiles; j++) {
        copy_async_wait();
        __syncthreads();  // tile j has arrived, and all threads have finished reading tile j - 1
        const int key = j * S::STREAMED;
        if (j + 1 < tiles) {
            copy_keys<S>(ring + ((j + 1) & 1) * S::STAGE, k, C, key + S::STREAMED, T);
        }
        if (key > row + S::WARP_ROWS - 1) {
            continue;  // no query of this warp attends to the tile
        }
        const unsigned keys = ring + (j & 1) * S::STAGE;
        const unsigned values = keys + S::TILE;
        float p[S::PATCHES][S::SCORES][4];
        float ds[S::PATCHES][S::SCORES][4];
        clear(p);
        clear(ds);
        multiply_rows<S>(p, resident_queries, own_queries, keys, rows, columns);
        multiply_rows<S>(ds, resident_douts, own_douts, values, rows, columns);
        const bool diagonal = key + S::STREAMED - 1 > row;
#pragma unroll
        for (int m = 0; m < S::PATCHES; m++) {
#pragma unroll
            for (int n = 0; n < S::SCORES; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float x = exp2_approximate(fmaf(p[m][n][e], scale2, -lse2[m][e >> 1]));
                    if (diagonal && key + n * 8 + 2 * t + (e & 1) > row + m * 16 + g + 8 * (e >> 1)) {
                        x = 0.0f;
                    }
                    ds[m][n][e] = x * (ds[m][n][e] - deltas[m][e >> 1]);
                }
            }
        }
        multiply_scores<S>(dq, ds, keys, rows);
    }

    __syncthreads();  // the results are staged in the memory of the tiles
    float scales[S::PATCHES][2];
#pragma unroll
    for (int m = 0; m < S::PATCHES; m++) {
        scales[m][0] = scales[m][1] = scale;
    }
    Bf16* target = dqkv + head + row * 3 * C;
    store_rows<S>(target, 3 * C, T - row, dq, scales, memory + warp * S::WARP_ROWS * S::ROW, lane);
}

// ---- Kernels. The extra bytes per stage hold the statistics of the streamed queries, 8 bytes per row, rounded up to
// keep the stages aligned.

// HS, warps, patches per warp, streamed rows, in registers, resident tiles, extra bytes
using Forward64 = Sizes<64, 4, 2, 64, false, 1, 0>;
using Keys64 = Sizes<64, 4, 1, 32, true, 2, 512>;
using Queries64 = Sizes<64, 4, 2, 32, false, 2, 0>;
using Forward128 = Sizes<128, 8, 1, 64, true, 1, 0>;
using Keys128 = Sizes<128, 8, 1, 32, false, 2, 512>;
using Queries128 = Sizes<128, 8, 1, 32, true, 2, 0>;

template <class S>
__host__ __device__ constexpr bool fits(Launch launch) {
    return launch.threads == S::THREADS && launch.rows == S::ROWS && launch.shared == S::SHARED;
}

static_assert(fits<Forward64>(FORWARD_64), "launch table");
static_assert(fits<Keys64>(KEYS_64), "launch table");
static_assert(fits<Queries64>(QUERIES_64), "launch table");
static_assert(fits<Forward128>(FORWARD_128), "launch table");
static_assert(fits<Keys128>(KEYS_128), "launch table");
static_assert(fits<Queries128>(QUERIES_128), "launch table");
static_assert(DELTA_64.threads == 256 && DELTA_128.threads == 256, "the delta kernels' launch bounds");

extern "C" __global__ void __launch_bounds__(128, 2) attention_mma_forward_64(
    Bf16* out, float* lse, const Bf16* qkv, int T, int NH, float scale) {
    forward<Forward64>(out, lse, qkv, T, NH, scale);
}

extern "C" __global__ void __launch_bounds__(256) attention_mma_forward_128(
    Bf16* out, float* lse, const Bf16* qkv, int T, int NH, float scale) {
    forward<Forward128>(out, lse, qkv, T, NH, scale);
}

extern "C" __global__ void __launch_bounds__(256) attention_mma_delta_64(
    float* statistics, Bf16* queries, const float* lse, const Bf16* dout, const Bf16* out, const Bf16* qkv, int B,
    int T, int NH) {
    delta<64>(statistics, queries, lse, dout, out, qkv, B, T, NH);
}

extern "C" __global__ void __launch_bounds__(256) attention_mma_delta_128(
    float* statistics, Bf16* queries, const float* lse, const Bf16* dout, const Bf16* out, const Bf16* qkv, int B,
    int T, int NH) {
    delta<128>(statistics, queries, lse, dout, out, qkv, B, T, NH);
}

extern "C" __global__ void __launch_bounds__(128, 3) attention_mma_keys_64(
    Bf16* dqkv, const Bf16* qkv, const Bf16* dout, const float* statistics, const Bf16* queries, int T, int NH,
    float scale) {
    backward_keys<Keys64>(dqkv, qkv, dout, statistics, queries, T, NH, scale);
}

extern "C" __global__ void __launch_bounds__(256) attention_mma_keys_128(
    Bf16* dqkv, const Bf16* qkv, const Bf16* dout, const float* statistics, const Bf16* queries, int T, int NH,
    float scale) {
    backward_keys<Keys128>(dqkv, qkv, dout, statistics, queries, T, NH, scale);
}

extern "C" __global__ void __launch_bounds__(128, 2) attention_mma_queries_64(
    Bf16* dqkv, const Bf16* qkv, const Bf16* dout, const float* statistics, int T, int NH, float scale) {
    backward_queries<Queries64>(dqkv, qkv, dout, statistics, T, NH, scale);
}

extern "C" __global__ void __launch_bounds__(256) attention_mma_queries_128(
    Bf16* dqkv, const Bf16* qkv, const Bf16* dout, const float* statistics, int T, int NH, float scale) {
    backward_queries<Queries128>(dqkv, qkv, dout, statistics, T, NH, scale);
}
