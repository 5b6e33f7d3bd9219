// Each kernel has one fault; test_emulator_faults.py expects an error that names the line marked HERE.

#define ALL 0xffffffffu
__device__ __forceinline__ float warp_sum(float x) {
    #pragma unroll
    for (int bits = 16; bits > 0; bits >>= 1) x += __shfl_xor_sync(ALL, x, bits);
    return x;
}

extern "C" __global__ void race(float* out) {
    __shared__ float cells[64];
    cells[threadIdx.x] = 0.0f;
    __syncthreads();
    cells[threadIdx.x] = 1.0f;
    out[threadIdx.x] = cells[(threadIdx.x + 33) % 64]; // HERE
}

extern "C" __global__ void race_of_writes(float* out) {
    __shared__ float cell;
    cell = threadIdx.x; // HERE
    __syncthreads();
    out[threadIdx.x] = cell;
}

extern "C" __global__ void race_after_reading(float* out) {
    __shared__ float cells[64];
    cells[threadIdx.x] = 0.0f;
    __syncthreads();
    float other = cells[threadIdx.x ^ 32];
    cells[threadIdx.x] = other + 1.0f; // HERE
    out[threadIdx.x] = other;
}

extern "C" __global__ void race_of_warps(float* out) { // __syncwarp does not order the accesses of different warps
    __shared__ float cells[64];
    cells[threadIdx.x] = 0.0f;
    __syncthreads();
    cells[threadIdx.x] = 1.0f;
    __syncwarp();
    out[threadIdx.x] = cells[threadIdx.x ^ 32]; // HERE
}

extern "C" __global__ void race_of_halves(float* out) { // the halves of the warp do not wait for each other
    __shared__ float cells[32];
    cells[threadIdx.x] = 0.0f;
    __syncwarp();
    cells[threadIdx.x] = 1.0f;
    __syncwarp(threadIdx.x < 16 ? 0xffffu : 0xffff0000u);
    out[threadIdx.x] = cells[threadIdx.x ^ 16]; // HERE
}

extern "C" __global__ void race_past_a_shuffle(float* out) { // a shuffle does not order memory accesses
    __shared__ float cells[32];
    cells[threadIdx.x] = __shfl_xor_sync(ALL, 1.0f, 1);
    warp_sum(1.0f);
    out[threadIdx.x] = cells[threadIdx.x ^ 1]; // HERE
}

extern "C" __global__ void race_in_global(float* out) {
    out[threadIdx.x] = 1.0f;
    if (threadIdx.x == 0) out[1] += 1.0f; // HERE
}

extern "C" __global__ void race_of_blocks(float* out) {
    if (threadIdx.x == 0) out[0] += 1.0f; // HERE
}

extern "C" __global__ void race_of_a_reading_block(float* out) {
    float other = out[(blockIdx.x + 1) % gridDim.x];
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = other; // HERE
}

extern "C" __global__ void past_a_buffer(float* out, int n) {
    out[threadIdx.x + n - 63] = 1.0f; // HERE
}

extern "C" __global__ void before_a_buffer(float* out) {
    out[(int)threadIdx.x - 1] = 1.0f; // HERE
}

extern "C" __global__ void null(float* out, const float* x) {
    out[threadIdx.x] = x[threadIdx.x]; // HERE
}

extern "C" __global__ void past_dynamic(float* out) {
    extern __shared__ float raw[];
    raw[threadIdx.x] = 1.0f; // HERE
    out[threadIdx.x] = raw[threadIdx.x];
}

extern "C" __global__ void past_static(float* out) {
    __shared__ float cells[4][8];
    __shared__ float others[64];
    others[threadIdx.x] = 0.0f;
    cells[threadIdx.x / 16][threadIdx.x % 16] = 1.0f; // HERE
    __syncthreads();
    out[threadIdx.x] = cells[0][0] + others[threadIdx.x];
}

extern "C" __global__ void past_registers(float* out, int n) {
    float mine[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < n; i++) mine[i] += out[i]; // HERE
    out[threadIdx.x] = mine[n / 2];
}

extern "C" __global__ void misaligned(float* out, const float* x) {
    out[threadIdx.x] = reinterpret_cast<const float2*>(x + 1)[threadIdx.x].y; // HERE
}

extern "C" __global__ void misaligned_whole(float4* out, const float* x) {
    out[threadIdx.x] = *reinterpret_cast<const float4*>(x + 2); // HERE
}

extern "C" __global__ void uninitialised(float* out) {
    __shared__ float cells[64];
    if (threadIdx.x != 40) cells[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = cells[threadIdx.x]; // HERE
}

extern "C" __global__ void uninitialised_since_another_block(float* out) {
    extern __shared__ float raw[];
    if (blockIdx.x == 0) raw[threadIdx.x] = 1.0f;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = raw[threadIdx.x]; // HERE
}

extern "C" __global__ void divergent(float* out) {
    if (threadIdx.x < 32)
        __syncthreads(); // THERE
    else
        __syncthreads(); // HERE
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void deadlock(float* out) {
    if (threadIdx.x < 16)
        warp_sum(1.0f); // HERE
    else
        __syncthreads(); // THERE
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void exited(float* out, int n) {
    if (threadIdx.x >= n) return;
    out[threadIdx.x] = __any_sync(ALL, 0); // HERE
}

extern "C" __global__ void unnamed(float* out) {
    out[threadIdx.x] = __ballot_sync(0xffffu, 1); // HERE
}

extern "C" __global__ void from_unnamed(float* out) {
    float x = 0.0f;
    if (threadIdx.x < 16) x = __shfl_down_sync(0xffffu, 1.0f, 8); // HERE
    out[threadIdx.x] = x;
}

extern "C" __global__ void from_nowhere(float* out) { // the block has 48 threads
    out[threadIdx.x] = __shfl_xor_sync(ALL, 1.0f, 16); // HERE
}

extern "C" __global__ void mixed(float* out) {
    if (threadIdx.x % 2)
        __syncwarp(); // THERE
    else
        out[threadIdx.x] = __any_sync(ALL, 1); // HERE
}

extern "C" __global__ void not_waited_for(float* out, const float* x) {
    __shared__ __align__(16) float cells[256];
    emulator_cp_async(cells + 4 * threadIdx.x, x + 4 * threadIdx.x, 16); // THERE
    emulator_cp_wait(0); // waits only for committed groups; the copy is not committed
    __syncthreads();
    out[threadIdx.x] = cells[threadIdx.x]; // HERE
}

extern "C" __global__ void copy_misaligned(float* out, const float* x) {
    __shared__ __align__(16) float cells[260];
    emulator_cp_async(cells + 4 * threadIdx.x, x + 4 * threadIdx.x + 1, 16); // HERE
}

extern "C" __global__ void copy_past_a_buffer(float* out, const float* x, int n) {
    __shared__ __align__(16) float cells[4];
    if (threadIdx.x == 0) emulator_cp_async(cells, x + n, 16); // HERE
}

extern "C" __global__ void row_misaligned(unsigned* out) {
    extern __shared__ unsigned char raw[];
    for (int k = 0; k < 16; k++) raw[threadIdx.x * 16 + k] = 0;
    __syncwarp();
    unsigned r[4];
    emulator_ldmatrix(r, emulator_shared_address(raw) + threadIdx.x * 8, false); // HERE
    out[threadIdx.x] = r[0];
}

extern "C" __global__ void row_uninitialised(unsigned* out) {
    extern __shared__ unsigned char raw[];
    unsigned r[4];
    emulator_ldmatrix(r, emulator_shared_address(raw) + threadIdx.x * 16, false); // HERE
    out[threadIdx.x] = r[0];
}

extern "C" __global__ void shifted(int* out, int n) {
    out[threadIdx.x] = 1 << n; // HERE
}

extern "C" __global__ void overflown(int* out, int n) {
    out[threadIdx.x] = n * 65536; // HERE
}

extern "C" __global__ void divided(int* out, int n) {
    out[threadIdx.x] = 1 / (n - 64); // HERE
}
