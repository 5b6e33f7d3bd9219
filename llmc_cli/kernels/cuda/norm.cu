// Layer normalization with the residual sum and the bias before it, and sums over rows for the gradients of its
// parameters and of biases.
//
// x, delta, res, y and their gradients (N,C) Real; mean, rstd (N,), bias, w, b (C,) float. A block for each row, which
// lies in shared memory between the passes over it: each thread reads only what it has written there itself, so that
// needs no barrier.

template <int W>
__device__ __forceinline__ void normalize_row(
    Real* res, Real* y, float* mean, float* rstd,
    const Real* x, const Real* delta, const float* delta_bias, const float* w, const float* b, int C, float eps,
    float* parts) {
    extern __shared__ float4 row_memory[];
    Real* row = (Real*)row_memory;  // (C,): what is normalized, rounded as it is stored
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

// res = x + delta + bias, y = (res - mean) * rstd * w + b, with mean and rstd of each row of res. Without delta x takes
// the place of res, which is not written; bias may be null in any case. res may be x. Shared memory: C Real.
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

template <int W>
__device__ __forceinline__ void differentiate_row(
    Real* dx, const Real* dy, const Real* res, float mean, float rstd, const float* w, const Real* dres, int C,
    float* parts) {
    extern __shared__ float4 row_memory[];
    Real* dy_row = (Real*)row_memory;  // (C,)
    Real* res_row = dy_row + C;        // (C,); aligned to 16 bytes where W is WIDTH, of which C is a multiple then
    float along_mean = 0.0f;
    float along_normed = 0.0f;
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        float gradient[W];
        float values[W];
        float weight[W];
        load<W>(gradient, dy + c);
        load<W>(values, res + c);
        load<W>(weight, w + c);
        store<W>(dy_row + c, gradient);
        store<W>(res_row + c, values);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const float dnormed = gradient[k] * weight[k];
            along_mean += dnormed;
            along_normed += dnormed * ((values[k] - mean) * rstd);
        }
    }
    along_mean = block_sum(along_mean, parts) / C;
    along_normed = block_sum(along_normed, parts) / C;
    for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        float gradient[W];
        float values[W];
        float weight[W];
        float past[W] = {};
        load<W>(gradient, dy_row + c);
        load<W>(values, res_row + c);
        load<W>(weight, w + c);
        if (dres) {
            load<W>(past, dres + c);
        }
#pragma unroll
        for (int k = 0; k < W; k++) {
            const float normed = (values[k] - mean) * rstd;
            past[k] += rstd * (gradient[k] * weight[k] - along_mean - normed * along_normed);
        }
        store<W>(dx + c, past);
    }
}

// dx = dres (absent: 0) + the gradient of dy through the norm. dx may be dres or dy. Shared memory: 2 * C Real.
extern "C" __global__ void norm_backward(
    Real* dx, const Real* dy, const Real* res, const float* mean, const float* rstd, const float* w, const Real* dres,
    int N, int C) {
    __shared__ float parts[WARP];
    const size_t n = blockIdx.x;
    const size_t at = n * C;
    const Real* dres_row = dres ? dres + at : nullptr;
    if (C % WIDTH == 0 && aligned16(dx, dy, res, w, dres)) {
        differentiate_row<WIDTH>(dx + at, dy + at, res + at, mean[n], rstd[n], w, dres_row, C, parts);
    } else {
        differentiate_row<1>(dx + at, dy + at, res + at, mean[n], rstd[n], w, dres_row, C, parts);
    }
}

// Sums over rows: a block takes one of P pieces of the rows, gridDim.y, and WARP * W neighbouring columns; each of its
// warps every STRIPES-th row.

constexpr int STRIPES = 8;

// out[c] for this block's columns from `start` on: the sum of what its warps have, in their order.
template <int W>
__device__ __forceinline__ void store_column_sums(
    float* out, const float (&sums)[W], int start, int C, float* stripes) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
#pragma unroll
    for (int k = 0; k < W; k++) {
        stripes[(warp * W + k) * WARP + lane] = sums[k];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < WARP * W && start + column < C; column += STRIPES * WARP) {
        float total = 0.0f;
#pragma unroll
        for (int stripe = 0; stripe < STRIPES; stripe++) {
            total += stripes[(stripe * W + column % W) * WARP + column / W];
        }
        out[start + column] = total;
    }
    __syncthreads();
}

template <int W>
__device__ __forceinline__ void sum_rows_of_norm(
    float* dw, float* db, const Real* dy, const Real* res, const float* mean, const float* rstd,
    int first, int end, int C, float* stripes) {
    for (int start = blockIdx.x * WARP * W; start < C; start += gridDim.x * WARP * W) {
        const int c = start + threadIdx.x % WARP * W;
        float weight_sums[W] = {};
        float bias_sums[W] = {};
        if (c < C) {
#pragma unroll 2
            for (int n = first + threadIdx.x / WARP; n < end; n += STRIPES) {
                const float center = mean[n];
                const float scale = rstd[n];
                float gradient[W];
                float values[W];
                load<W>(gradient, dy + (size_t)n * C + c);
                load<W>(values, res + (size_t)n * C + c);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    weight_sums[k] += gradient[k] * ((values[k] - center) * scale);
                    bias_sums[k] += gradient[k];
                }
            }
        }
        store_column_sums<W>(dw, weight_sums, start, C, stripes);
        store_column_sums<W>(db, bias_sums, start, C, stripes);
    }
}

// parts (2,P,C): for each piece of rows the sums of dy * normed, then those of dy.
extern "C" __global__ void norm_weight_partials(
    float* parts, const Real* dy, const Real* res, const float* mean, const float* rstd, int N, int C) {
    __shared__ float stripes[STRIPES * WIDTH * WARP];
    const int rows = (N + gridDim.y - 1) / gridDim.y;
    const int first = min(N, (int)blockIdx.y * rows);
    const int end = min(N, first + rows);
    float* dw = parts + (size_t)blockIdx.y * C;
    float* db = dw + (size_t)gridDim.y * C;
    if (C % WIDTH == 0 && aligned16(dy, res)) {
        sum_rows_of_norm<WIDTH>(dw, db, dy, res, mean, rstd, first, end, C, stripes);
    } else {
        sum_rows_of_norm<1>(dw, db, dy, res, mean, rstd, first, end, C, stripes);
    }
}

template <int W>
__device__ __forceinline__ void sum_rows(float* out, const Real* dy, int first, int end, int O, float* stripes) {
    for (int start = blockIdx.x * WARP * W; start < O; start += gridDim.x * WARP * W) {
        const int o = start + threadIdx.x % WARP * W;
        float sums[W] = {};
        if (o < O) {
#pragma unroll 4
            for (int n = first + threadIdx.x / WARP; n < end; n += STRIPES) {
                float gradient[W];
                load<W>(gradient, dy + (size_t)n * O + o);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    sums[k] += gradient[k];
                }
            }
        }
        store_column_sums<W>(out, sums, start, O, stripes);
    }
}

// parts (P,O): for each piece of the rows of dy (N,O) their sum.
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

// first (O,) = the sum of the rows of parts (P,O), added to it with acc; where there are two of these, parts (2,P,O),
// second (O,) = that of the other. A block for WARP columns of one, blockIdx.y.
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
