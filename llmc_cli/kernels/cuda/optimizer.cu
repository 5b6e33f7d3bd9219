// The norm of the gradients, and AdamW, over flat float arrays (P,).

constexpr int LANES = 4;  // floats of 16 bytes

// parts (gridDim.x,) = the sums of the squares of g that each block comes to, in double.
extern "C" __global__ void square_partials(double* parts, const float* g, long long P) {
    __shared__ double sums[WARP];
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    const long long vectors = aligned16(g) ? P / LANES : 0;
    double sum = 0.0;
#pragma unroll 4
    for (long long i = thread; i < vectors; i += threads) {
        float values[LANES];
        load<LANES>(values, g + i * LANES);
#pragma unroll
        for (int k = 0; k < LANES; k++) {
            sum += (double)values[k] * values[k];
        }
    }
    for (long long i = vectors * LANES + thread; i < P; i += threads) {
        sum += (double)g[i] * g[i];
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = sum;
    }
}

// out (1,) = the sum of parts (n,), by one block.
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

constexpr int TAKEN = 4096;  // elements of a block of AdamW

// What one update is made with: slots of spec.HYPER, rounded to float once, in the form in which they are used.
struct Step {
    float rate;
    float epsilon;
    float decay;
    float clip;  // factor of the gradients
    float keep1, take1;  // beta1 and 1 - beta1
    float keep2, take2;
    float per_correction1, per_correction2;
};

__device__ __forceinline__ Step read_step(const double* hyper, double sumsq) {
    const double max_norm = hyper[7];
    const bool clipped = max_norm > 0.0 && sumsq > max_norm * max_norm;
    Step step;
    step.rate = (float)hyper[0];
    step.keep1 = (float)hyper[1];
    step.take1 = (float)(1.0 - hyper[1]);
    step.keep2 = (float)hyper[2];
    step.take2 = (float)(1.0 - hyper[2]);
    step.epsilon = (float)hyper[3];
    step.decay = (float)hyper[4];
    step.per_correction1 = (float)(1.0 / hyper[5]);
    step.per_correction2 = (float)(1.0 / hyper[6]);
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
        first[k] = step.keep1 * first[k] + step.take1 * clipped;
        second[k] = step.keep2 * second[k] + step.take2 * (clipped * clipped);
        const float length = sqrtf(second[k] * step.per_correction2) + step.epsilon;
        weight[k] -= step.rate * (first[k] * step.per_correction1 / length + decay * weight[k]);
    }
    store<W>(master, weight);
    store<W>(m, first);
    store<W>(v, second);
}

__device__ __forceinline__ long long segment_end(const long long* segments, int k) {
    return segments[3 * k] + segments[3 * k + 1];
}

// One AdamW update of master, m, v (P,) by g, as in spec.py. segments (K,3), rows of offset, length and decay (0 or 1),
// ascend; what lies between them is left alone. A block takes TAKEN neighbours, of which each thread LANES at a time.
extern "C" __global__ void adamw(
    float* master, float* m, float* v, const float* g,
    const long long* segments, int K, const double* hyper, const double* sumsq, long long P) {
    __shared__ Step shared_step;
    if (threadIdx.x == 0) {
        shared_step = read_step(hyper, sumsq[0]);
    }
    __syncthreads();
    const Step step = shared_step;
    const bool whole = aligned16(master, m, v, g);
    const long long start = (long long)blockIdx.x * TAKEN;
    const long long end = start + TAKEN < P ? start + TAKEN : P;
    // the first segment that ends behind the block's first element, by bisection
    int segment = 0;
    for (int above = K; segment < above;) {
        const int middle = (segment + above) / 2;
        if (segment_end(segments, middle) <= start) {
            segment = middle + 1;
        } else {
            above = middle;
        }
    }
    for (long long first = start + threadIdx.x * LANES; first < end; first += blockDim.x * LANES) {
        while (segment < K && segment_end(segments, segment) <= first) {
            segment++;
        }
        if (segment == K) {
            return;
        }
        const long long* here = segments + 3 * segment;
        if (whole && here[0] <= first && first + LANES <= here[0] + here[1]) {
            const float decay = here[2] ? step.decay : 0.0f;
            update<LANES>(master + first, m + first, v + first, g + first, step, decay);
            continue;
        }
        // not all in one segment, or not where 16 bytes can be accessed
        int k = segment;
        for (long long i = first; i < first + LANES && i < end; i++) {
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
