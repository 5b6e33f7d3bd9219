// Causal attention for any head size up to 256 and either activation type, with all arithmetic in float.
//
//   qkv, dqkv    (B, T, 3C)  Real, C = NH * HS; each row is q, k, v, each split by head
//   out, dout    (B, T, C)  Real
//   lse          (B, NH, T)  float, log of the sum of exp(scale * q·k)
//   delta        (B, NH, T)  float, sum of dout * out over the head
//   queries      (B, T, C)  Real, copy of q
//   keys, values (S, NH, Tmax, HS)  Real, KV cache; sequence s has lengths[s] + T positions filled
//
// A block owns TILE queries (in backward_keys TILE keys) of one head and iterates over tiles of the others. No (T, T)
// matrix is stored, and every output is summed by one thread in a fixed order (Dao et al. 2022, arXiv:2205.14135).
// Grid: (ceil(T / TILE), NH, B or S); for the delta kernel ceil(B * T * NH / 8). Each kernel is compiled twice, for
// heads of up to 64 and of up to 256.
//
// The backward pass runs three kernels: delta, then queries (dq), then keys (dk, dv). dqkv may alias qkv: the queries
// kernel writes dq over q, which only the same block reads, and the keys kernel writes dk and dv over k and v, which
// only the same block reads; it takes q from the copy that the delta kernel made.

constexpr int TILE = 64;         // queries, keys or head columns per tile
constexpr int PITCH = TILE + 1;  // row pitch of a tile in shared memory, which avoids bank conflicts within a column
constexpr int SIDE = 16;         // a block has SIDE x SIDE threads
constexpr int THREADS = SIDE * SIDE;
constexpr int EACH = TILE / SIDE;  // thread (x, y) has rows y + SIDE * i, columns x + SIDE * j of a tile; i, j < EACH

typedef float Tile[TILE][PITCH];
typedef float Part[EACH][EACH];  // one thread's elements of a tile

// `valid` rows of one head in memory, `stride` elements apart.
struct Rows {
    const Real* first;
    int stride;
    int valid;
};

__device__ __forceinline__ Rows rows_from(const Real* head, int stride, int row, int T) {
    return {head + (size_t)row * stride, stride, T - row};
}

__device__ __forceinline__ void clear(Part& part) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            part[i][j] = 0.0f;
        }
    }
}

// Load TILE rows and TILE columns, starting at `column`, into `tile`. Elements outside the head or valid rows are 0.
__device__ __forceinline__ void load_tile(Tile& tile, Rows rows, int column, int HS) {
#pragma unroll 4
    for (int index = threadIdx.x; index < TILE * TILE; index += THREADS) {
        const int r = index / TILE;
        const int c = index % TILE;
        const bool inside = r < rows.valid && column + c < HS;
        tile[r][c] = inside ? to_float(rows.first[r * rows.stride + column + c]) : 0.0f;
    }
}

// products (TILE, TILE) = left (TILE, HS) · right (TILE, HS)ᵀ, staged through shared tiles a and b
__device__ __forceinline__ void multiply_heads(Part& products, Tile& a, Tile& b, Rows left, Rows right, int HS) {
    const int x = threadIdx.x % SIDE;
    const int y = threadIdx.x / SIDE;
    clear(products);
    for (int column = 0; column < HS; column += TILE) {
        __syncthreads();  // all threads have finished reading the tiles
        load_tile(a, left, column, HS);
        load_tile(b, right, column, HS);
        __syncthreads();
        const int depth = min(TILE, HS - column);
#pragma unroll 4
        for (int k = 0; k < depth; k++) {
            float rows[EACH];
            float columns[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                rows[i] = a[y + SIDE * i][k];
                columns[i] = b[x + SIDE * i][k];
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    products[i][j] += rows[i] * columns[j];
                }
            }
        }
    }
}

// sums (TILE, HS) += weights (TILE, TILE) · right (TILE, HS), staged through shared tiles a and b
template <int SLABS>
__device__ __forceinline__ void add_weighted(
    Part (&sums)[SLABS], const Part& weights, Tile& a, Tile& b, Rows right, int HS) {
    const int x = threadIdx.x % SIDE;
    const int y = threadIdx.x / SIDE;
    const int depth = min(TILE, right.valid);
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
        if (slab * TILE >= HS) {
            break;
        }
        __syncthreads();  // all threads have finished reading the tiles
        if (slab == 0) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    a[y + SIDE * i][x + SIDE * j] = weights[i][j];
                }
            }
        }
        load_tile(b, right, slab * TILE, HS);
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < depth; k++) {
            float rows[EACH];
            float columns[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                rows[i] = a[y + SIDE * i][k];
                columns[i] = b[k][x + SIDE * i];
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    sums[slab][i][j] += rows[i] * columns[j];
                }
            }
        }
    }
}

// Store the first `valid` rows of sums (TILE, HS) to `target`, in rows `stride` elements apart. Each thread multiplies
// its row i by factors[i].
template <int SLABS>
__device__ __forceinline__ void store_rows(
    Real* target, int stride, int valid, const Part (&sums)[SLABS], const float (&factors)[EACH], int HS) {
    const int x = threadIdx.x % SIDE;
    const int y = threadIdx.x / SIDE;
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int row = y + SIDE * i;
                const int column = slab * TILE + x + SIDE * j;
                if (row < valid && column < HS) {
                    target[row * stride + column] = to_real(sums[slab][i][j] * factors[i]);
                }
            }
        }
    }
}

// Compute out (TILE, HS) and, unless null, lse (TILE,) of TILE queries. Query row r attends to keys 0 to `last` + r.
template <int SLABS>
__device__ __forceinline__ void attend(
    Real* out, int stride, float* lse, Rows queries, Rows keys, Rows values, int last, int HS, float scale) {
    __shared__ Tile a;
    __shared__ Tile b;
    const int x = threadIdx.x % SIDE;
    const int y = threadIdx.x / SIDE;
    Part sums[SLABS];  // sum of p · v, not yet divided by the sum of p
    float largest[EACH];
    float total[EACH];
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
        clear(sums[slab]);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        largest[i] = __int_as_float(0xff800000);
        total[i] = 0.0f;
    }
    const int stop = min(keys.valid, last + TILE);
    for (int key = 0; key < stop; key += TILE) {
        Part p;
        multiply_heads(p, a, b, queries, rows_from(keys.first, keys.stride, key, keys.valid), HS);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float maximum = largest[i];  // finite after the first tile, which contains key 0
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const bool visible = key + x + SIDE * j <= last + y + SIDE * i;
                p[i][j] = visible ? p[i][j] * scale : __int_as_float(0xff800000);
                maximum = fmaxf(maximum, p[i][j]);
            }
            maximum = warp_max<SIDE>(maximum);  // over the threads that share the row, as for the sum below
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                p[i][j] = expf(p[i][j] - maximum);
                sum += p[i][j];
            }
            const float shrink = expf(largest[i] - maximum);
            largest[i] = maximum;
            total[i] = total[i] * shrink + warp_sum<SIDE>(sum);
#pragma unroll
            for (int slab = 0; slab < SLABS; slab++) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    sums[slab][i][j] *= shrink;
                }
            }
        }
        add_weighted<SLABS>(sums, p, a, b, rows_from(values.first, values.stride, key, values.valid), HS);
    }
    float factors[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        factors[i] = 1.0f / total[i];
        if (lse && x == 0 && y + SIDE * i < queries.valid) {
            lse[y + SIDE * i] = largest[i] + logf(total[i]);
        }
    }
    store_rows<SLABS>(out, stride, queries.valid, sums, factors, HS);
}

template <int SLABS>
__device__ __forceinline__ void forward(Real* out, float* lse, const Real* qkv, int T, int NH, int HS, float scale) {
    const int first = (gridDim.x - 1 - blockIdx.x) * TILE;  // blocks with the most work start first
    const size_t h = blockIdx.y;
    const size_t b = blockIdx.z;
    const int C = NH * HS;
    const Real* head = qkv + b * T * 3 * C + h * HS;
    const Rows queries = rows_from(head, 3 * C, first, T);
    const Rows keys = {head + C, 3 * C, T};
    const Rows values = {head + 2 * C, 3 * C, T};
    Real* target = out + (b * T + first) * C + h * HS;
    attend<SLABS>(target, C, lse + (b * NH + h) * T + first, queries, keys, values, first, HS, scale);
}

template <int SLABS>
__device__ __forceinline__ void prompt(
    Real* out, const Real* qkv, const Real* keys, const Real* values, const int* lengths, int T, int NH, int HS,
    int Tmax, float scale) {
    const int first = (gridDim.x - 1 - blockIdx.x) * TILE;  // blocks with the most work start first
    const size_t h = blockIdx.y;
    const size_t s = blockIdx.z;
    const int C = NH * HS;
    const size_t cached = (s * NH + h) * Tmax * HS;
    const int length = lengths[s];
    const Rows queries = rows_from(qkv + s * T * 3 * C + h * HS, 3 * C, first, T);
    const Rows all_keys = {keys + cached, HS, length + T};  // rows of one head are contiguous
    const Rows all_values = {values + cached, HS, length + T};
    Real* target = out + (s * T + first) * C + h * HS;
    attend<SLABS>(target, C, nullptr, queries, all_keys, all_values, length + first, HS, scale);
}

// Compute dk and dv (TILE, HS) of TILE keys from the queries that attend to them.
template <int SLABS>
__device__ __forceinline__ void backward_keys(
    Real* dqkv, const Real* qkv, const Real* dout, const float* lse, const float* delta, const Real* queries, int T,
    int NH, int HS, float scale) {
    __shared__ Tile a;
    __shared__ Tile b;
    const int x = threadIdx.x % SIDE;
    const int y = threadIdx.x / SIDE;
    const int first = blockIdx.x * TILE;  // block 0 has the most work
    const size_t h = blockIdx.y;
    const size_t n = blockIdx.z;
    const int C = NH * HS;
    const size_t head = n * T * 3 * C + h * HS;
    const Rows keys = rows_from(qkv + head + C, 3 * C, first, T);
    const Rows values = rows_from(qkv + head + 2 * C, 3 * C, first, T);
    lse += (n * NH + h) * T;
    delta += (n * NH + h) * T;
    Part dk[SLABS];
    Part dv[SLABS];
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
        clear(dk[slab]);
        clear(dv[slab]);
    }
    for (int query = first; query < T; query += TILE) {
        const size_t at = ((size_t)blockIdx.z * T + query) * C + blockIdx.y * HS;  // recomputed in each iteration:
        const Rows streamed = {queries + at, C, T - query};                        // pointers would spill registers
        const Rows douts = {dout + at, C, T - query};
        Part p;  // (key, query)
        Part ds;
        multiply_heads(p, a, b, keys, streamed, HS);
        multiply_heads(ds, a, b, values, douts, HS);
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int t = query + x + SIDE * j;
            const float row_lse = t < T ? lse[t] : 0.0f;
            const float row_delta = t < T ? delta[t] : 0.0f;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const bool visible = first + y + SIDE * i <= t && t < T;
                p[i][j] = visible ? expf(p[i][j] * scale - row_lse) : 0.0f;
                ds[i][j] = p[i][j] * (ds[i][j] - row_delta);
            }
        }
        add_weighted<SLABS>(dv, p, a, b, douts, HS);
        add_weighted<SLABS>(dk, ds, a, b, streamed, HS);
    }
    float scales[EACH];
    float ones[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        scales[i] = scale;
        ones[i] = 1.0f;
    }
    Real* target = dqkv + head + (size_t)first * 3 * C;
    store_rows<SLABS>(target + C, 3 * C, T - first, dk, scales, HS);
    store_rows<SLABS>(target + 2 * C, 3 * C, T - first, dv, ones, HS);
}

// Compute dq (TILE, HS) of TILE queries from the keys that they attend to.
template <int SLABS>
__device__ __forceinline__ void backward_queries(
    Real* dqkv, const Real* qkv, const Real* dout, const float* lse, const float* delta, int T, int NH, int HS,
    float scale) {
    __shared__ Tile a;
    __shared__ Tile b;
    const int x = threadIdx.x % SIDE;
    const int y = threadIdx.x / SIDE;
    const int first = (gridDim.x - 1 - blockIdx.x) * TILE;  // blocks with the most work start first
    const size_t h = blockIdx.y;
    const size_t n = blockIdx.z;
    const int C = NH * HS;
    const size_t head = n * T * 3 * C + h * HS;
    const Rows queries = rows_from(qkv + head, 3 * C, first, T);
    const Rows douts = rows_from(dout + n * T * C + h * HS, C, first, T);
    float row_lse[EACH];
    float row_delta[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int t = first + y + SIDE * i;
        row_lse[i] = t < T ? lse[(n * NH + h) * T + t] : 0.0f;
        row_delta[i] = t < T ? delta[(n * NH + h) * T + t] : 0.0f;
    }
    Part dq[SLABS];
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
        clear(dq[slab]);
    }
    for (int key = 0; key <= first; key += TILE) {
        const Rows keys = rows_from(qkv + head + C, 3 * C, key, T);
        const Rows values = rows_from(qkv + head + 2 * C, 3 * C, key, T);
        Part p;  // (query, key)
        Part ds;
        multiply_heads(p, a, b, queries, keys, HS);
        multiply_heads(ds, a, b, douts, values, HS);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const bool visible = key + x + SIDE * j <= first + y + SIDE * i;
                const float probability = visible ? expf(p[i][j] * scale - row_lse[i]) : 0.0f;
                ds[i][j] = probability * (ds[i][j] - row_delta[i]);
            }
        }
        add_weighted<SLABS>(dq, ds, a, b, keys, HS);
    }
    float scales[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        scales[i] = scale;
    }
    store_rows<SLABS>(dqkv + head + (size_t)first * 3 * C, 3 * C, T - first, dq, scales, HS);
}

extern "C" __global__ void __launch_bounds__(256, 2) attention_forward_64(
    Real* out, float* lse, const Real* qkv, int T, int NH, int HS, float scale) {
    forward<1>(out, lse, qkv, T, NH, HS, scale);
}

extern "C" __global__ void __launch_bounds__(256, 1) attention_forward_256(
    Real* out, float* lse, const Real* qkv, int T, int NH, int HS, float scale) {
    forward<4>(out, lse, qkv, T, NH, HS, scale);
}

// Attention of T new positions per sequence over the KV cache, which must already contain them.
extern "C" __global__ void __launch_bounds__(256, 2) attention_prompt_64(
    Real* out, const Real* qkv, const Real* keys, const Real* values, const int* lengths, int T, int NH, int HS,
    int Tmax, float scale) {
    prompt<1>(out, qkv, keys, values, lengths, T, NH, HS, Tmax, scale);
}

extern "C" __global__ void __launch_bounds__(256, 1) attention_prompt_256(
    Real* out, const Real* qkv, const Real* keys, const Real* values, const int* lengths, int T, int NH, int HS,
    int Tmax, float scale) {
    prompt<4>(out, qkv, keys, values, lengths, T, NH, HS, Tmax, scale);
}

// Compute delta and copy q to queries. One warp per row and head.
extern "C" __global__ void __launch_bounds__(256) attention_delta(
    float* delta, Real* queries, const Real* dout, const Real* out, const Real* qkv, int B, int T, int NH, int HS) {
    const size_t row = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;  // (b * T + t) * NH + h
    if (row >= (size_t)B * T * NH) {
        return;
    }
    const int lane = threadIdx.x % WARP;
    const Real* query = qkv + row * HS + row / NH * 2 * NH * HS;  // skips k and v of the preceding rows
    float sum = 0.0f;
    for (int column = lane; column < HS; column += WARP) {
        sum += to_float(dout[row * HS + column]) * to_float(out[row * HS + column]);
        queries[row * HS + column] = query[column];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        const size_t h = row % NH;
        const size_t bt = row / NH;
        delta[(bt / T * NH + h) * T + bt % T] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) attention_backward_keys_64(
    Real* dqkv, const Real* qkv, const Real* dout, const float* lse, const float* delta, const Real* queries, int T,
    int NH, int HS, float scale) {
    backward_keys<1>(dqkv, qkv, dout, lse, delta, queries, T, NH, HS, scale);
}

extern "C" __global__ void __launch_bounds__(256, 1) attention_backward_keys_256(
    Real* dqkv, const Real* qkv, const Real* dout, const float* lse, const float* delta, const Real* queries, int T,
    int NH, int HS, float scale) {
    backward_keys<4>(dqkv, qkv, dout, lse, delta, queries, T, NH, HS, scale);
}

extern "C" __global__ void __launch_bounds__(256, 2) attention_backward_queries_64(
    Real* dqkv, const Real* qkv, const Real* dout, const float* lse, const float* delta, int T, int NH, int HS,
    float scale) {
    backward_queries<1>(dqkv, qkv, dout, lse, delta, T, NH, HS, scale);
}

extern "C" __global__ void __launch_bounds__(256, 1) attention_backward_queries_256(
    Real* dqkv, const Real* qkv, const Real* dout, const float* lse, const float* delta, int T, int NH, int HS,
    float scale) {
    backward_queries<4>(dqkv, qkv, dout, lse, delta, T, NH, HS, scale);
}
