// Softmax and cross-entropy of rows of logits, and their gradient.
//
// logits (N,Vp) float, dlogits (N,Vp) Real, losses, targets (N,). Of a row the first V columns count; the others, up to
// Vp, are padding, whose logits may be anything.

constexpr float LOWEST = -3.402823466e38f;  // the least finite float: a start for a maximum that a difference survives

// Threads take W neighbours at a time. logits are read twice, the second time from the end, which is in the caches from
// the first; each thread then overwrites only what it has read, so dlogits may be logits.
template <int W>
__device__ __forceinline__ void classify_row(
    Real* dlogits, float* loss, const float* logits,
    int target, int V, int Vp, float dloss, bool gradient, float* parts) {
    // before anything is overwritten, which is behind the barriers of the sums
    const float correct = logits[target];
    float largest = LOWEST;
    float total = 0.0f;  // of exp(logit - largest), as far as this thread has seen them
    for (int c = threadIdx.x * W; c < V; c += blockDim.x * W) {
        float values[W];
        load<W>(values, logits + c);
        float larger = largest;
#pragma unroll
        for (int k = 0; k < W; k++) {
            if (c + k < V) {
                larger = fmaxf(larger, values[k]);
            }
        }
        total *= expf(largest - larger);
#pragma unroll
        for (int k = 0; k < W; k++) {
            if (c + k < V) {
                total += expf(values[k] - larger);
            }
        }
        largest = larger;
    }
    const float top = block_max(largest, parts);
    total = block_sum(total * expf(largest - top), parts);
    if (threadIdx.x == 0) {
        *loss = logf(total) + (top - correct);
    }
    if (!gradient) {
        return;
    }
    const float share = 1.0f / total;
    const int stride = blockDim.x * W;
    for (int turn = (Vp - 1) / stride; turn >= 0; turn--) {
        const int c = turn * stride + threadIdx.x * W;
        if (c < Vp) {
            float values[W];
            load<W>(values, logits + c);
#pragma unroll
            for (int k = 0; k < W; k++) {
                const float probability = expf(values[k] - top) * share;
                const float difference = c + k == target ? probability - 1.0f : probability;
                values[k] = c + k < V ? difference * dloss : 0.0f;
            }
            store<W>(dlogits + c, values);
        }
    }
}

// losses[n] = the cross-entropy of row n, 0 where the target is -1; with gradient also dlogits = dloss * its gradient,
// 0 in the padding and where the target is -1. A block for each row. dlogits may be logits where Real is float.
extern "C" __global__ void __launch_bounds__(1024) softmax_loss(
    Real* dlogits, float* losses, const float* logits, const int* targets, int V, int Vp, float dloss, int gradient) {
    __shared__ float parts[WARP];
    const size_t n = blockIdx.x;
    const float* row = logits + n * Vp;
    Real* drow = dlogits + n * Vp;
    const int target = targets[n];
    if (target < 0) {
        if (threadIdx.x == 0) {
            losses[n] = 0.0f;
        }
        for (int c = threadIdx.x; gradient && c < Vp; c += blockDim.x) {
            drow[c] = to_real(0.0f);
        }
    } else if (Vp % 8 == 0 && aligned16(dlogits, logits)) {
        classify_row<4>(drow, losses + n, row, target, V, Vp, dloss, gradient, parts);
    } else {
        classify_row<1>(drow, losses + n, row, target, V, Vp, dloss, gradient, parts);
    }
}
