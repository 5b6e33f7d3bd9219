// Correct kernels that use every supported feature; test_emulator.py expects no errors from them.

#define ALL 0xffffffffu
__device__ __forceinline__ float warp_sum(float x) {
    #pragma unroll
    for (int bits = 16; bits > 0; bits >>= 1) x += __shfl_xor_sync(ALL, x, bits);
    return x;
}

template <int WARPS> __device__ float block_sum(float x) {
    __shared__ float partial[WARPS];
    int lane = threadIdx.x % warpSize;
    x = warp_sum(x);
    if (lane == 0) partial[threadIdx.x / warpSize] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / warpSize ? partial[lane] : 0.0f);
}

extern "C" __global__ void __launch_bounds__(256)
    row_sums(float* __restrict__ out, const float* __restrict__ x, int C) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < C; i += blockDim.x) sum += __ldg(x + (size_t)blockIdx.x * C + i);
    sum = block_sum<8>(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// out (10, 32): one operation per row
extern "C" __global__ void warps(int* out, int width) {
    int lane = threadIdx.x;
    out[lane] = __shfl_sync(ALL, lane, 5, width);
    out[32 + lane] = __shfl_up_sync(ALL, lane, 3, width);
    out[64 + lane] = __shfl_down_sync(ALL, lane, 3, width);
    out[96 + lane] = __shfl_xor_sync(ALL, lane, 17, width);
    out[128 + lane] = __ballot_sync(ALL, lane % 3 == 0);
    out[160 + lane] = __any_sync(ALL, lane == 31) + 2 * __any_sync(ALL, lane == 32);
    out[192 + lane] = __all_sync(ALL, lane < 32) + 2 * __all_sync(ALL, lane < 31);
    double both = __shfl_down_sync(ALL, lane + 0.25, 1);
    out[224 + lane] = (int)(both * 4);
    // the halves of the warp vote separately
    unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    for (int i = 0; i <= lane / 16; i++) out[256 + lane] = __ballot_sync(half, lane % 2);
    out[288 + lane] = (int)(__shfl_sync(ALL, (long long)lane << 40, 31 - lane) >> 40);
}

extern "C" __global__ void counts(int* out) {
    int i = threadIdx.x;
    int together = __syncthreads_and(i < 100) + 2 * __syncthreads_or(i == 99) + 4 * __syncthreads_and(i < 99);
    out[i] = together + 100 * __syncthreads_count(i % 3 == 0);
}

extern "C" __global__ void reverse(float* out, const float* x) {
    extern __shared__ __align__(16) unsigned char raw[];
    float* s = reinterpret_cast<float*>(raw);
    int i = threadIdx.x + blockDim.x * threadIdx.y, n = blockDim.x * blockDim.y;
    s[i] = x[blockIdx.z * n + i];
    __syncthreads();
    out[blockIdx.z * n + i] = s[n - 1 - i];
}

extern "C" __global__ void vectors(float4* out, const float4* x, const int2* index, const uint4* words, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float4 v = __ldcs(x + index[i].x);
    const float* each = &v.x;
    float sum = 0.0f;
    for (int k = 0; k < 4; k++) sum += each[k];
    __stcs(out + i, make_float4(v.w, sum, __uint_as_float(words[i].z), (float)index[i].y));
}

// some threads exit before a barrier, and for n <= 64 a whole warp exits before warp operations of others
extern "C" __global__ void leaving(float* out, int n) {
    __shared__ float s[96];
    int i = threadIdx.x;
    if (i >= n) return;
    s[i] = i;
    __syncthreads();
    float x = s[n - 1 - i];
    out[i] = i < 64 ? warp_sum(x) : x;
}

extern "C" __global__ void types(double* out, float f, long long l, int i) {
    out[0] = f;
    out[1] = l;
    out[2] = i;
    out[3] = __int_as_float(0xff800000);
    out[4] = max(i, 7) + min(2.5f, f) + fabsf(-1.0f);
    out[5] = tanhf(0.5f) + exp(1.0) + rsqrtf(4.0f);
    out[6] = __popc(0xf0f0u) + __clz(1) + __ffs(8) + isnan(__int_as_float(0x7fc00000));
}

// lanes exchange values through shared memory, synchronized only by __syncwarp
extern "C" __global__ void within_warps(int* out) {
    __shared__ int s[64];
    int i = threadIdx.x;
    for (int round = 0; round < 3; round++) {
        s[i] = i + round;
        __syncwarp();
        out[i] = s[i ^ 31];
        __syncwarp();
    }
}

// conditional reads, which the compiler must not perform speculatively: some would be uninitialized or out of bounds
extern "C" __global__ void where_due(float* out, const float* x, int n) {
    __shared__ float s[64];
    int i = threadIdx.x;
    if (i < n) s[i] = x[i];
    __syncthreads();
    float y = i < n ? s[i] : 0.0f;
    for (int k = 0; k < 4; k++)
        if (n == 64) y += s[63];
    for (int k = 0; k < 64; k++) y += k < n ? s[k] * x[k] : 0.0f;
    out[i] = n > 32 ? y + s[32] : y;
}

struct Pair {
    unsigned short low, high;
};

// adjacent threads write the two halves of a 4-byte structure, which is then read in one access
extern "C" __global__ void halves(Pair* out, const unsigned short* x) {
    __shared__ Pair pairs[32];
    int i = threadIdx.x;
    if (i % 2)
        pairs[i / 2].high = x[i];
    else
        pairs[i / 2].low = x[i];
    __syncthreads();
    if (i < 32) out[i] = pairs[31 - i];
}

__device__ __forceinline__ void begin_copy(float* to, const float* from) { emulator_cp_async(to, from, 16); }

// x (tiles, 128) is double-buffered; out[i] = the sum over tiles of the four elements that thread 31 - i copied
extern "C" __global__ void pipeline(float* out, const float* x, int tiles) {
    __shared__ __align__(16) float s[2][128];
    int i = threadIdx.x;
    float sum = 0.0f;
    begin_copy(&s[0][4 * i], x + 4 * i);
    emulator_cp_commit();
    for (int t = 0; t < tiles; t++) {
        if (t + 1 < tiles) begin_copy(&s[(t + 1) % 2][4 * i], x + (t + 1) * 128 + 4 * i);
        emulator_cp_commit();
        emulator_cp_wait(1); // WAIT
        __syncthreads(); // ARRIVED
        for (int k = 0; k < 4; k++) sum += s[t % 2][127 - (4 * i + k)];
        __syncthreads(); // FREE
    }
    out[i] = sum;
}

extern "C" __global__ void zeros(float* out) {
    extern __shared__ float s[];
    emulator_cp_async(s + 4 * threadIdx.x, nullptr, 16);
    emulator_cp_commit();
    emulator_cp_wait(0);
    for (int k = 0; k < 4; k++) out[4 * threadIdx.x + k] = s[4 * threadIdx.x + k];
}

// c (16, 8) += a (16, 16) b (16, 8), bf16 operands; b is stored transposed, (8, 16)
extern "C" __global__ void product(float* c, const unsigned* a, const unsigned* b) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    unsigned A[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
    unsigned B[2] = {b[g * 8 + t], b[g * 8 + t + 4]};
    float D[4];
    for (int i = 0; i < 4; i++) D[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    emulator_mma_bf16(D, A, B);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = D[i];
}

// x (4, 8, 8) of 16-bit elements, in shared memory with rows of 8 + padding; out (32, 4): the registers of each lane
extern "C" __global__ void matrices(unsigned* out, const unsigned short* x, int padding, int transposed) {
    extern __shared__ __align__(128) unsigned short s[];
    int lane = threadIdx.x;
    for (int k = 0; k < 8; k++) s[lane * (8 + padding) + k] = x[lane * 8 + k];
    __syncwarp();
    unsigned r[4];
    emulator_ldmatrix(r, emulator_shared_address(s) + lane * (8 + padding) * 2, transposed);
    for (int k = 0; k < 4; k++) out[lane * 4 + k] = r[k];
}

extern "C" __global__ void of_static_shared(int* out) {
    __shared__ __align__(16) int s[32][4];
    for (int k = 0; k < 4; k++) s[threadIdx.x][k] = 4 * threadIdx.x + k;
    __syncwarp();
    unsigned r[4];
    emulator_ldmatrix(r, emulator_shared_address(s[threadIdx.x]), false);
    out[threadIdx.x] = r[1] + *(int*)emulator_shared_pointer(emulator_shared_address(&s[31][3]));
}

extern "C" __global__ __launch_bounds__(
    2 * 32, 1) void scaled(float* out) {
    out[threadIdx.x] = SCALE;
}
