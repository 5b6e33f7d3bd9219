// CUDA's built-in names for kernels that run on the CPU. The compiler includes this file before a kernel's source, to
// declare what NVRTC provides without an #include. No standard header is included, so kernels cannot use standard names
// by mistake.
//
// __global__, __launch_bounds__ and __shared__ are not macros: emulator.py finds them in the preprocessed text.
#pragma once

#define CUDA_EMULATOR 1
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

typedef __SIZE_TYPE__ size_t;

// ---- Vector types -----------------------------------------------------------------------------------------------

#define EMULATOR_VECTORS(Type, name)                                               \
    struct alignas(2 * sizeof(Type)) name##2 { Type x, y; };                       \
    struct alignas(16) name##4 { Type x, y, z, w; };                               \
    inline name##2 make_##name##2(Type x, Type y) { return {x, y}; }               \
    inline name##4 make_##name##4(Type x, Type y, Type z, Type w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };

// ---- Thread and block indices -----------------------------------------------------------------------------------
// They are const because they do not change while a thread runs, so kernels may keep them in registers across barriers.
// The runtime defines them as variables, which it sets before it starts or resumes a thread.

extern "C" {
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
extern unsigned char emulator_dynamic_shared[];
}
constexpr int warpSize = 32;

// ---- Replacements of PTX instructions ---------------------------------------------------------------------------
// emulator_cp_async: copy 4, 8 or 16 bytes when the thread waits for their group; a null source writes zeros.
// emulator_cp_wait: perform the thread's committed copies, except those of its latest `keep` groups.
// emulator_mma_bf16: mma.m16n8k16 with bf16 operands, d += a b in float.
// emulator_ldmatrix: load four 8 x 8 matrices of 16-bit elements; lane i passes the address of row i % 8, matrix i / 8.
// Shared addresses have 32 bits, as on the device.

extern "C" {
void emulator_cp_async(void* shared, const void* global, int bytes);
void emulator_cp_commit();
void emulator_cp_wait(int keep);
void emulator_mma_bf16(float* d, const unsigned* a, const unsigned* b);
void emulator_ldmatrix(unsigned* r, unsigned address, bool transposed);
unsigned emulator_shared_address(const void* shared);
void* emulator_shared_pointer(unsigned address);
}

// ---- Barriers ---------------------------------------------------------------------------------------------------

// A barrier is identified by file and line. These functions are inlined, so debug information names the kernel's line.
#define EMULATOR_PLACE const char* file = __builtin_FILE(), int line = __builtin_LINE()

extern "C" int emulator_barrier(int predicate, int* any, int* count, const char* file, int line);

__forceinline__ void __syncthreads(EMULATOR_PLACE) {
    int any, count;
    emulator_barrier(0, &any, &count, file, line);
}
__forceinline__ int __syncthreads_and(int predicate, EMULATOR_PLACE) {
    int any, count;
    return emulator_barrier(predicate, &any, &count, file, line);
}
__forceinline__ int __syncthreads_or(int predicate, EMULATOR_PLACE) {
    int any, count;
    emulator_barrier(predicate, &any, &count, file, line);
    return any;
}
__forceinline__ int __syncthreads_count(int predicate, EMULATOR_PLACE) {
    int any, count;
    emulator_barrier(predicate, &any, &count, file, line);
    return count;
}

// ---- Warps ------------------------------------------------------------------------------------------------------

extern "C" {
int emulator_lane();
void emulator_warp_sync(unsigned mask);
void emulator_shuffle(unsigned mask, const void* input, void* output, int bytes, int source);
unsigned emulator_ballot(unsigned mask, int predicate);
}

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { emulator_warp_sync(mask); }
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) { return emulator_ballot(mask, predicate); }
__forceinline__ int __any_sync(unsigned mask, int predicate) { return emulator_ballot(mask, predicate) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return emulator_ballot(mask, !predicate) == 0; }

// Lanes form segments of `width`; a lane whose source lies outside its segment gets its own value.
#define EMULATOR_SHUFFLES(Type)                                                                             \
    __forceinline__ Type emulator_shuffled(unsigned mask, Type value, int source) {                         \
        Type result;                                                                                        \
        emulator_shuffle(mask, &value, &result, sizeof value, source);                                      \
        return result;                                                                                      \
    }                                                                                                       \
    __forceinline__ Type __shfl_sync(unsigned mask, Type value, int source, int width = 32) {               \
        int first = emulator_lane() & ~(width - 1);                                                         \
        return emulator_shuffled(mask, value, first | (source & (width - 1)));                              \
    }                                                                                                       \
    __forceinline__ Type __shfl_xor_sync(unsigned mask, Type value, int bits, int width = 32) {             \
        int lane = emulator_lane(), source = lane ^ bits;                                                   \
        return emulator_shuffled(mask, value, source > (lane | (width - 1)) ? lane : source);               \
    }                                                                                                       \
    __forceinline__ Type __shfl_down_sync(unsigned mask, Type value, unsigned by, int width = 32) {         \
        int lane = emulator_lane(), source = lane + (int)by;                                                \
        return emulator_shuffled(mask, value, source > (lane | (width - 1)) ? lane : source);               \
    }                                                                                                       \
    __forceinline__ Type __shfl_up_sync(unsigned mask, Type value, unsigned by, int width = 32) {           \
        int lane = emulator_lane(), source = lane - (int)by;                                                \
        return emulator_shuffled(mask, value, source < (lane & ~(width - 1)) ? lane : source);              \
    }
EMULATOR_SHUFFLES(int)
EMULATOR_SHUFFLES(unsigned)
EMULATOR_SHUFFLES(long long)
EMULATOR_SHUFFLES(unsigned long long)
EMULATOR_SHUFFLES(float)
EMULATOR_SHUFFLES(double)

// ---- Loads and stores with a cache hint -------------------------------------------------------------------------

#define EMULATOR_HINTS(Type)                                          \
    __forceinline__ Type __ldg(const Type* p) { return *p; }          \
    __forceinline__ Type __ldcs(const Type* p) { return *p; }         \
    __forceinline__ Type __ldcg(const Type* p) { return *p; }         \
    __forceinline__ void __stcs(Type* p, Type value) { *p = value; }  \
    __forceinline__ void __stcg(Type* p, Type value) { *p = value; }
EMULATOR_HINTS(unsigned short)
EMULATOR_HINTS(int)
EMULATOR_HINTS(unsigned)
EMULATOR_HINTS(long long)
EMULATOR_HINTS(unsigned long long)
EMULATOR_HINTS(float)
EMULATOR_HINTS(double)
EMULATOR_HINTS(float2)
EMULATOR_HINTS(float4)
EMULATOR_HINTS(int2)
EMULATOR_HINTS(int4)
EMULATOR_HINTS(uint2)
EMULATOR_HINTS(uint4)

// ---- Arithmetic -------------------------------------------------------------------------------------------------

#define EMULATOR_MATH1(name)                    \
    extern "C" float name##f(float) noexcept;   \
    extern "C" double name(double) noexcept;    \
    inline float name(float x) { return name##f(x); }
EMULATOR_MATH1(exp) EMULATOR_MATH1(exp2) EMULATOR_MATH1(expm1) EMULATOR_MATH1(log) EMULATOR_MATH1(log2)
EMULATOR_MATH1(log1p) EMULATOR_MATH1(tanh) EMULATOR_MATH1(sqrt) EMULATOR_MATH1(sin) EMULATOR_MATH1(cos)
EMULATOR_MATH1(erf) EMULATOR_MATH1(fabs) EMULATOR_MATH1(floor) EMULATOR_MATH1(ceil) EMULATOR_MATH1(trunc)
EMULATOR_MATH1(round) EMULATOR_MATH1(rint)

#define EMULATOR_MATH2(name)                           \
    extern "C" float name##f(float, float) noexcept;   \
    extern "C" double name(double, double) noexcept;   \
    inline float name(float x, float y) { return name##f(x, y); }
EMULATOR_MATH2(pow) EMULATOR_MATH2(fmax) EMULATOR_MATH2(fmin) EMULATOR_MATH2(fmod) EMULATOR_MATH2(copysign)

extern "C" float fmaf(float, float, float) noexcept;
extern "C" double fma(double, double, double) noexcept;

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x) != 0; }
inline bool isinf(double x) { return __builtin_isinf(x) != 0; }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }

#define EMULATOR_EXTREMES(Type)                                    \
    inline Type max(Type a, Type b) { return a < b ? b : a; }      \
    inline Type min(Type a, Type b) { return b < a ? b : a; }
EMULATOR_EXTREMES(int)
EMULATOR_EXTREMES(unsigned)
EMULATOR_EXTREMES(long)
EMULATOR_EXTREMES(unsigned long)
EMULATOR_EXTREMES(long long)
EMULATOR_EXTREMES(unsigned long long)
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline int abs(int a) { return a < 0 ? -a : a; }
inline float abs(float a) { return fabsf(a); }
inline double abs(double a) { return fabs(a); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

#define EMULATOR_BITS(name, To, From)         \
    inline To name(From value) {              \
        To bits;                              \
        __builtin_memcpy(&bits, &value, sizeof bits); \
        return bits;                          \
    }
EMULATOR_BITS(__float_as_int, int, float)
EMULATOR_BITS(__float_as_uint, unsigned, float)
EMULATOR_BITS(__int_as_float, float, int)
EMULATOR_BITS(__uint_as_float, float, unsigned)
EMULATOR_BITS(__double_as_longlong, long long, double)
EMULATOR_BITS(__longlong_as_double, double, long long)

// ---- Table of the program's kernels, whose entries emulator.py appends to the source -----------------------------

namespace emulator {

template <class T> struct Kind { static_assert(!sizeof(T), "a kernel takes pointers, int, long long and float"); };
template <class T> struct Kind<T*> { static constexpr const char* name = "P"; };
template <> struct Kind<int> { static constexpr const char* name = "i4"; };
template <> struct Kind<long long> { static constexpr const char* name = "i8"; };
template <> struct Kind<float> { static constexpr const char* name = "f4"; };

template <class... Arguments> struct Signature {
    static constexpr const char* kinds[] = {Kind<Arguments>::name..., nullptr};
};
template <class... Arguments> constexpr const char* const* kinds(void (*)(Arguments...)) {
    return Signature<Arguments...>::kinds;
}

// A constructor called with braces, because these evaluate the arguments from left to right. A slot has 8 bytes.
template <class... Arguments> struct Call {
    Call(void (*kernel)(Arguments...), Arguments... arguments) { kernel(arguments...); }
};
template <class... Arguments>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(Arguments...), const unsigned long long* slots) {
    Call<Arguments...>{kernel, *(const Arguments*)slots++...};
}
template <auto kernel> void call_kernel(const unsigned long long* slots) { call(kernel, slots); }

constexpr int launch_bounds(int threads = 1024, int = 0, int = 0) { return threads; }

struct Kernel {
    const char* name;
    const char* const* kinds;
    int bound;  // maximum number of threads per block
    void (*call)(const unsigned long long* slots);
};
template <auto kernel> constexpr Kernel entry(const char* name, int bound) {
    return {name, kinds(kernel), bound, call_kernel<kernel>};
}

}  // namespace emulator

extern "C" const emulator::Kernel emulator_kernels[];

// The addresses of the program's image: its start, its zero-initialized data (static shared memory), and its end.
extern "C" __attribute__((visibility("hidden"))) unsigned char __ehdr_start[], __bss_start[], _end[];
extern "C" __attribute__((no_sanitize("thread"))) void emulator_image(unsigned char** places) {
    places[0] = __ehdr_start;
    places[1] = __bss_start;
    places[2] = _end;
}
