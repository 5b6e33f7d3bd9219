// Layer normalization fused with the preceding residual sum and bias, and sums over rows for the gradients of its
// parameters and of biases.
//
// x, delta, res, y and their gradients (N,C) Real; mean, rstd (N,), bias, w, b (C,) float. The forward pass uses one
// block per row and keeps the row in shared memory between passes. Each thread reads back only elements that it wrote
// itself, so no barrier is needed.

template <int W>
__device__ __forceinline__ void normalize_row(
    Real* res, Real* y, float* mean, float* rstd,
    const Real* x, const Real* delta, const float* delta_bias, const float* w, const float* b, int C, float eps,
    float* parts) {
    extern __shared__ float4 row_memory[];
    Real* row = (Real*)row_memory;  // (C,): input of the normalization, rounded to Real
    float total = 0.0f;
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        float values[W];
        load<W>(values, x + c);
        if (delta) {
            float more[W];
            load<W>(more, delta + c);
            if (delta_bias) {
                float bias[W];
                load<W>(bias, delta_bias + c);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    more[k] += bias[k];
                }
            }
#pragma unroll
            for (int k = 0; k < W; k++) {
                values[k] = as_stored(values[k] + more[k]);
            }
            store<W>(res + c, values);
        }
        store<W>(row + c, values);
#pragma unroll
        for (int k = 0; k < W; k++) {
            total += values[k];
        }
    }
    const float center = block_sum(total, parts) / C;
    float squares = 0.0f;
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        float values[W];
        load<W>(values, row + c);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const float distance = values[k] - center;
            squares += distance * distance;
        }
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, parts) / C + eps);
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        float values[W];
        float weight[W];
        float bias[W];
        load<W>(values, row + c);
        load<W>(weight, w + c);
        load<W>(bias, b + c);
#pragma unroll
        for (int k = 0; k < W; k++) {
            values[k] = (values[k] - center) * scale * weight[k] + bias[k];
        }
        store<W>(y + c, values);
    }
    if (threadIdx.x == 0) {
        *mean = center;
        *rstd = scale;
    }
}

// res = x + delta + bias; y = (res - mean) * rstd * w + b with the mean and rstd of each row of res. If delta is null,
// x is normalized instead of res, and res is not written. bias may be null. res may alias x. Dynamic shared memory:
// C Real.
extern "C" __global__ void residual_norm_forward(
    Real* res, Real* y, float* mean, float* rstd,
    const Real* x, const Real* delta, const float* bias, const float* w, const float* b, int N, int C, float eps) {
    __shared__ float parts[WARP];
    const size_t n = blockIdx.x;
    const size_t at = n * C;
    const Real* delta_row = delta ? delta + at : nullptr;
    if (C % WIDTH == 0 && aligned16(res, y, x, delta, bias, w, b)) {
        normalize_row<WIDTH>(res + at, y + at, mean + n, rstd + n, x + at, delta_row, bias, w, b, C, eps, parts);
    } else {
        normalize_row<1>(res + at, y + at, mean + n, rstd + n, x + at, delta_row, bias, w, b, C, eps, parts);
    }
}

constexpr int THREAD_COLUMNS = 4;  // columns of a row that a thread handles at a time
constexpr int ROWS_AT_ONCE = 2;    // rows that a thread loads before it stores the results, which may alias them

// Process rows `first` to `end` in groups of as many rows as the block has warps. First each warp reduces one row to
// the two sums that its gradient needs. Then each thread handles its columns of all rows in the group while they are in
// the cache.
template <int W>
__device__ __forceinline__ void differentiate_rows(
    Real* dx, float* dw, float* db, const Real* dy, const Real* res, const float* mean, const float* rstd,
    const float* w, const Real* dres, int first, int end, int C, float2* row_means) {
    extern __shared__ float column_sums[];  // (2, C): sums of dy * normed and of dy; a thread uses only its own columns
    constexpr int COLUMNS = W < THREAD_COLUMNS ? W : THREAD_COLUMNS;
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int group = blockDim.x / WARP;
    for (int start = first; start < end; start += group) {
        const int row = start + warp;
        if (row < end) {
            const float center = mean[row];
            const float scale = rstd[row];
            float2 sums = make_float2(0.0f, 0.0f);  // sums of dnormed and of dnormed * normed
            for (int c = lane * W; c < C; c += WARP * W) {
                float gradient[W];
                float values[W];
                float weight[W];
                load<W>(gradient, dy + (size_t)row * C + c);
                load<W>(values, res + (size_t)row * C + c);
                load<W>(weight, w + c);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    const float dnormed = gradient[k] * weight[k];
                    sums.x += dnormed;
                    sums.y += dnormed * ((values[k] - center) * scale);
                }
            }
            sums.x = warp_sum(sums.x) / C;
            sums.y = warp_sum(sums.y) / C;
            if (lane == 0) {
                row_means[warp] = sums;
            }
        }
        __syncthreads();
        const int rows = min(group, end - start);
        for (int c = threadIdx.x * COLUMNS; c < C; c += blockDim.x * COLUMNS) {
            float weight[COLUMNS];
            float weight_sums[COLUMNS] = {};
            float bias_sums[COLUMNS] = {};
            load<COLUMNS>(weight, w + c);
            for (int r = 0; r < rows; r += ROWS_AT_ONCE) {
                float gradient[ROWS_AT_ONCE][COLUMNS];
                float values[ROWS_AT_ONCE][COLUMNS];
                float dx_values[ROWS_AT_ONCE][COLUMNS] = {};
#pragma unroll
                for (int i = 0; i < ROWS_AT_ONCE; i++) {
                    const size_t at = (size_t)(start + r + i) * C + c;
                    if (r + i < rows) {
                        load<COLUMNS>(gradient[i], dy + at);
                        load<COLUMNS>(values[i], res + at);
                        if (dres) {
                            load<COLUMNS>(dx_values[i], dres + at);
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < ROWS_AT_ONCE; i++) {
                    if (r + i < rows) {
                        const int n = start + r + i;
                        const float center = mean[n];
                        const float scale = rstd[n];
                        const float2 sums = row_means[r + i];
#pragma unroll
                        for (int k = 0; k < COLUMNS; k++) {
                            const float normed = (values[i][k] - center) * scale;
                            weight_sums[k] += gradient[i][k] * normed;
                            bias_sums[k] += gradient[i][k];
                            dx_values[i][k] += scale * (gradient[i][k] * weight[k] - sums.x - normed * sums.y);
                        }
                        store<COLUMNS>(dx + (size_t)n * C + c, dx_values[i]);
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < COLUMNS; k++) {
                column_sums[c + k] = start == first ? weight_sums[k] : column_sums[c + k] + weight_sums[k];
                column_sums[C + c + k] = start == first ? bias_sums[k] : column_sums[C + c + k] + bias_sums[k];
            }
        }
        __syncthreads();  // all threads have read the row sums before the next group overwrites them
    }
    for (int c = threadIdx.x * COLUMNS; c < C; c += blockDim.x * COLUMNS) {
#pragma unroll
        for (int k = 0; k < COLUMNS; k++) {
            dw[c + k] = column_sums[c + k];
            db[c + k] = column_sums[C + c + k];
        }
    }
}

// dx = dres + gradient of dy through the norm. dres may be null, and dx may alias dres or dy. The rows are divided into
// P nonempty pieces, one per block. parts (2,P,C) = for each piece the sums of dy * normed, then the sums of dy.
// Dynamic shared memory: 2 * C floats.
extern "C" __global__ void norm_backward(
    Real* dx, float* parts, const Real* dy, const Real* res, const float* mean, const float* rstd, const float* w,
    const Real* dres, int N, int C) {
    __shared__ float2 row_means[WARP];  // means of dnormed and of dnormed * normed of each row in the group
    const int rows = (N + gridDim.x - 1) / gridDim.x;
    const int first = blockIdx.x * rows;
    const int end = min(N, first + rows);
    float* dw = parts + (size_t)blockIdx.x * C;
    float* db = dw + (size_t)gridDim.x * C;
    if (C % WIDTH == 0 && aligned16(dx, dy, res, w, dres)) {
        differentiate_rows<WIDTH>(dx, dw, db, dy, res, mean, rstd, w, dres, first, end, C, row_means);
    } else {
        differentiate_rows<1>(dx, dw, db, dy, res, mean, rstd, w, dres, first, end, C, row_means);
    }
}

// Sums over rows. A block handles one of P = gridDim.y pieces of the rows and WARP * W consecutive columns. Each of its
// STRIPES warps handles every STRIPES-th row.

constexpr int STRIPES = 8;

template <int W>
__device__ __forceinline__ void sum_rows(float* out, const Real* dy, int first, int end, int O, float* stripes) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    for (int start = blockIdx.x * WARP * W; start < O; start += gridDim.x * WARP * W) {
        const int o = start + lane * W;
        float sums[W] = {};
        if (o < O) {
#pragma unroll 4
            for (int n = first + warp; n < end; n += STRIPES) {
                float gradient[W];
                load<W>(gradient, dy + (size_t)n * O + o);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    sums[k] += gradient[k];
                }
            }
        }
#pragma unroll
        for (int k = 0; k < W; k++) {
            stripes[(warp * W + k) * WARP + lane] = sums[k];
        }
        __syncthreads();
        for (int column = threadIdx.x; column < WARP * W && start + column < O; column += STRIPES * WARP) {
            float total = 0.0f;
#pragma unroll
            for (int stripe = 0; stripe < STRIPES; stripe++) {
                total += stripes[(stripe * W + column % W) * WARP + column / W];
            }
            out[start + column] = total;
        }
        __syncthreads();
    }
}

// parts (P,O) = sum of the rows of dy (N,O) in each of P pieces.
extern "C" __global__ void column_partials(float* parts, const Real* dy, int N, int O) {
    __shared__ float stripes[STRIPES * WIDTH * WARP];
    const int rows = (N + gridDim.y - 1) / gridDim.y;
    const int first = min(N, (int)blockIdx.y * rows);
    const int end = min(N, first + rows);
    float* out = parts + (size_t)blockIdx.y * O;
    if (O % WIDTH == 0 && aligned16(dy)) {
        sum_rows<WIDTH>(out, dy, first, end, O, stripes);
    } else {
        sum_rows<1>(out, dy, first, end, O, stripes);
    }
}

// Sum partial results over P. parts is (1,P,O) or (2,P,O); first (O,) is the sum of parts[0], second (O,) that of
// parts[1]. The outputs are added to if acc. Block (x, y) handles WARP columns of parts[y].
extern "C" __global__ void sum_partials(float* first, float* second, const float* parts, int P, int O, int acc) {
    __shared__ float stripes[STRIPES * WARP];
    float* out = blockIdx.y == 0 ? first : second;
    parts += (size_t)blockIdx.y * P * O;
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int o = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (o < O) {
#pragma unroll 8
        for (int p = warp; p < P; p += STRIPES) {
            sum += parts[(size_t)p * O + o];
        }
    }
    stripes[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || o >= O) {
        return;
    }
    float total = 0.0f;
#pragma unroll
    for (int stripe = 0; stripe < STRIPES; stripe++) {
        total += stripes[stripe * WARP + lane];
    }
    out[o] = acc ? out[o] + total : total;
}
