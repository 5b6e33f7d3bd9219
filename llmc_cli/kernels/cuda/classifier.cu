// Softmax cross-entropy loss over rows of logits, and its gradient.
//
// logits (N,Vp) float, dlogits (N,Vp) Real, losses (N,) float, targets (N,) int. Columns V to Vp are padding; their
// logits are ignored.

constexpr float LOWEST = -3.402823466e38f;  // lowest finite float: unlike -inf, it can be subtracted from itself

// Compute the loss of one row, and its gradient if requested. Each thread handles W consecutive columns at a time. The
// second pass over the logits runs backwards, because the end of the row is still in the caches. Each thread then
// overwrites only elements that it has read itself, so dlogits may alias logits.
template <int W>
__device__ __forceinline__ void classify_row(
    Real* dlogits, float* loss, const float* logits,
    int target, int V, int Vp, float dloss, bool gradient, float* parts) {
    // read before anything is overwritten, which happens after the barriers of the reductions
    const float correct = logits[target];
    float largest = LOWEST;
    float total = 0.0f;  // running sum of exp(logit - largest) over this thread's columns
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
    for (int i = (Vp - 1) / stride; i >= 0; i--) {
        const int c = i * stride + threadIdx.x * W;
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

// losses[n] = cross-entropy of row n, or 0 if its target is -1. If `gradient`, also dlogits = dloss * gradient, with
// zeros in the padding and in rows whose target is -1. One block per row. dlogits may alias logits if Real is float.
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
