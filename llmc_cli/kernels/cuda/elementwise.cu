// Bias addition, GELU and its derivative, and rounding of weights to bf16.

constexpr float CUBIC_SLOPE = 3.0f * CUBIC;  // du/dx = SLOPE + CUBIC_SLOPE * x^2, with u as in common.cuh
constexpr float LIMIT = 10.0f;  // beyond it the derivative is 0 or 1, and its intermediate products would overflow

// s + x * s * (1 - s) * du/dx with s = 1 / (1 + exp(-u)). 1 - s is computed as s * exp(-u) to avoid cancellation.
__device__ __forceinline__ float gelu_derivative(float x) {
    x = x > LIMIT ? LIMIT : x;  // not fminf and fmaxf, which would replace NaN by the limit
    x = x < -LIMIT ? -LIMIT : x;
    const float closed = expf(-x * fmaf(CUBIC * x, x, SLOPE));
    const float open = 1.0f / (1.0f + closed);
    return fmaf(x * open * (closed * open), fmaf(CUBIC_SLOPE * x, x, SLOPE), open);
}

constexpr int BIAS_ROWS = 4;  // rows per block of the bias kernels; the block reads the bias once for all of them

// y (N,O) += b (O,).
template <int W>
__device__ __forceinline__ void add_bias_rows(Real* y, const float* b, int N, int O) {
    const int first = blockIdx.x * BIAS_ROWS;
    for (int o = threadIdx.x * W; o < O; o += blockDim.x * W) {
        float bias[W];
        load<W>(bias, b + o);
#pragma unroll
        for (int row = 0; row < BIAS_ROWS; row++) {
            if (first + row < N) {
                Real* here = y + (size_t)(first + row) * O + o;
                float values[W];
                load<W>(values, here);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    values[k] += bias[k];
                }
                store<W>(here, values);
            }
        }
    }
}

extern "C" __global__ void add_bias(Real* y, const float* b, int N, int O) {
    if (O % WIDTH == 0 && aligned16(y, b)) {
        add_bias_rows<WIDTH>(y, b, N, O);
    } else {
        add_bias_rows<1>(y, b, N, O);
    }
}

template <int W>
__device__ __forceinline__ void bias_gelu_rows(Real* act, Real* pre, const float* b, int N, int F) {
    const int first = blockIdx.x * BIAS_ROWS;
    for (int f = threadIdx.x * W; f < F; f += blockDim.x * W) {
        float bias[W];
        load<W>(bias, b + f);
#pragma unroll
        for (int row = 0; row < BIAS_ROWS; row++) {
            if (first + row < N) {
                const size_t at = (size_t)(first + row) * F + f;
                float values[W];
                load<W>(values, pre + at);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    values[k] = as_stored(values[k] + bias[k]);
                }
                store<W>(pre + at, values);
#pragma unroll
                for (int k = 0; k < W; k++) {
                    values[k] = gelu(values[k]);
                }
                store<W>(act + at, values);
            }
        }
    }
}

// pre (N,F) += b (F,); act (N,F) = gelu(pre), from pre as rounded for storage.
extern "C" __global__ void bias_gelu_forward(Real* act, Real* pre, const float* b, int N, int F) {
    if (F % WIDTH == 0 && aligned16(act, pre, b)) {
        bias_gelu_rows<WIDTH>(act, pre, b, N, F);
    } else {
        bias_gelu_rows<1>(act, pre, b, N, F);
    }
}

// act = gelu(pre) over n elements, with the same bits as bias_gelu_forward. Each thread handles WIDTH elements.
extern "C" __global__ void gelu_forward(Real* act, const Real* pre, long long n) {
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (first + WIDTH <= n && aligned16(act, pre)) {
        float values[WIDTH];
        load<WIDTH>(values, pre + first);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            values[k] = gelu(values[k]);
        }
        store<WIDTH>(act + first, values);
    } else {
        for (long long i = first; i < first + WIDTH && i < n; i++) {
            act[i] = to_real(gelu(to_float(pre[i])));
        }
    }
}

// dpre *= gelu'(pre) over n elements. Each thread handles WIDTH elements.
extern "C" __global__ void gelu_backward(Real* dpre, const Real* pre, long long n) {
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (first + WIDTH <= n && aligned16(dpre, pre)) {
        float values[WIDTH];
        float gradient[WIDTH];
        load<WIDTH>(values, pre + first);
        load<WIDTH>(gradient, dpre + first);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            gradient[k] *= gelu_derivative(values[k]);
        }
        store<WIDTH>(dpre + first, gradient);
    } else {
        for (long long i = first; i < first + WIDTH && i < n; i++) {
            dpre[i] = to_real(to_float(dpre[i]) * gelu_derivative(to_float(pre[i])));
        }
    }
}

constexpr int ROUNDED = 8;  // bf16 numbers per 16-byte access

// Round K float arrays to bf16. Row k of table (K,3) holds the source address, the destination address and the number
// of elements. The blocks with blockIdx.y == k share array k.
extern "C" __global__ void round_weights(const long long* table, int K) {
    const long long* row = table + (size_t)blockIdx.y * 3;
    const float* from = (const float*)row[0];
    Bf16* to = (Bf16*)row[1];
    const long long count = row[2];
    const bool aligned = aligned16(from, to);
    const long long stride = (long long)gridDim.x * blockDim.x * ROUNDED;
    const long long start = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * ROUNDED;
    for (long long first = start; first < count; first += stride) {
        if (aligned && first + ROUNDED <= count) {
            float values[ROUNDED];
            load<ROUNDED>(values, from + first);
            store<ROUNDED>(to + first, values);
        } else {
            for (long long i = first; i < first + ROUNDED && i < count; i++) {
                to[i] = to_bf16(from[i]);
            }
        }
    }
}
