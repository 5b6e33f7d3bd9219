// Gradient norm and AdamW update over flat float arrays (P,).

constexpr int FLOATS = 4;  // floats per 16-byte access

// parts (gridDim.x,) double = each block's partial sum of the squares of g.
extern "C" __global__ void square_partials(double* parts, const float* g, long long P) {
    __shared__ double sums[WARP];
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    const long long vectors = aligned16(g) ? P / FLOATS : 0;
    double sum = 0.0;
#pragma unroll 4
    for (long long i = thread; i < vectors; i += threads) {
        float values[FLOATS];
        load<FLOATS>(values, g + i * FLOATS);
#pragma unroll
        for (int k = 0; k < FLOATS; k++) {
            sum += (double)values[k] * values[k];
        }
    }
    for (long long i = vectors * FLOATS + thread; i < P; i += threads) {
        sum += (double)g[i] * g[i];
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = sum;
    }
}

// out (1,) = sum of parts (n,). Launched with one block.
extern "C" __global__ void sum_doubles(double* out, const double* parts, int n) {
    __shared__ double sums[WARP];
    double sum = 0.0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        sum += parts[i];
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        *out = sum;
    }
}

constexpr int BLOCK_ELEMENTS = 4096;  // elements per block of adamw

// Hyperparameters of one update: the slots of spec.HYPER, converted to float once, in the form the update uses.
struct Step {
    float rate;
    float epsilon;
    float decay;
    float clip;  // factor applied to the gradients
    float beta1, one_minus_beta1;  // beta1, 1 - beta1
    float beta2, one_minus_beta2;  // beta2, 1 - beta2
    float inverse_correction1, inverse_correction2;  // 1 / (1 - beta^t)
};

__device__ __forceinline__ Step read_step(const double* hyper, double sumsq) {
    const double max_norm = hyper[7];
    const bool clipped = max_norm > 0.0 && sumsq > max_norm * max_norm;
    Step step;
    step.rate = (float)hyper[0];
    step.beta1 = (float)hyper[1];
    step.one_minus_beta1 = (float)(1.0 - hyper[1]);
    step.beta2 = (float)hyper[2];
    step.one_minus_beta2 = (float)(1.0 - hyper[2]);
    step.epsilon = (float)hyper[3];
    step.decay = (float)hyper[4];
    step.inverse_correction1 = (float)(1.0 / hyper[5]);
    step.inverse_correction2 = (float)(1.0 / hyper[6]);
    step.clip = clipped ? (float)(max_norm / sqrt(sumsq)) : 1.0f;
    return step;
}

template <int W>
__device__ __forceinline__ void update(
    float* master, float* m, float* v, const float* g, const Step& step, float decay) {
    float weight[W];
    float first[W];
    float second[W];
    float gradient[W];
    load<W>(weight, master);
    load<W>(first, m);
    load<W>(second, v);
    load<W>(gradient, g);
#pragma unroll
    for (int k = 0; k < W; k++) {
        const float clipped = step.clip * gradient[k];
        first[k] = step.beta1 * first[k] + step.one_minus_beta1 * clipped;
        second[k] = step.beta2 * second[k] + step.one_minus_beta2 * (clipped * clipped);
        const float length = sqrtf(second[k] * step.inverse_correction2) + step.epsilon;
        weight[k] -= step.rate * (first[k] * step.inverse_correction1 / length + decay * weight[k]);
    }
    store<W>(master, weight);
    store<W>(m, first);
    store<W>(v, second);
}

__device__ __forceinline__ long long segment_end(const long long* segments, int k) {
    return segments[3 * k] + segments[3 * k + 1];
}

// One AdamW update of master, m, v (P,) by g, as specified in spec.py. segments (K,3) has rows of offset, length and
// decay (0 or 1) in ascending order; elements outside all segments are not modified. Each block handles BLOCK_ELEMENTS
// consecutive elements, each thread FLOATS at a time.
extern "C" __global__ void adamw(
    float* master, float* m, float* v, const float* g,
    const long long* segments, int K, const double* hyper, const double* sumsq, long long P) {
    __shared__ Step shared_step;
    if (threadIdx.x == 0) {
        shared_step = read_step(hyper, sumsq[0]);
    }
    __syncthreads();
    const Step step = shared_step;
    const bool aligned = aligned16(master, m, v, g);
    const long long start = (long long)blockIdx.x * BLOCK_ELEMENTS;
    const long long end = start + BLOCK_ELEMENTS < P ? start + BLOCK_ELEMENTS : P;
    // binary search for the first segment that ends after the block's first element
    int segment = 0;
    for (int above = K; segment < above;) {
        const int middle = (segment + above) / 2;
        if (segment_end(segments, middle) <= start) {
            segment = middle + 1;
        } else {
            above = middle;
        }
    }
    for (long long first = start + threadIdx.x * FLOATS; first < end; first += blockDim.x * FLOATS) {
        while (segment < K && segment_end(segments, segment) <= first) {
            segment++;
        }
        if (segment == K) {
            return;
        }
        const long long* here = segments + 3 * segment;
        if (aligned && here[0] <= first && first + FLOATS <= here[0] + here[1]) {
            const float decay = here[2] ? step.decay : 0.0f;
            update<FLOATS>(master + first, m + first, v + first, g + first, step, decay);
            continue;
        }
        // spans several segments, or is not aligned to 16 bytes
        int k = segment;
        for (long long i = first; i < first + FLOATS && i < end; i++) {
            while (k < K && segment_end(segments, k) <= i) {
                k++;
            }
            if (k < K && segments[3 * k] <= i) {
                const float decay = segments[3 * k + 2] ? step.decay : 0.0f;
                update<1>(master + i, m + i, v + i, g + i, step, decay);
            }
        }
    }
}
