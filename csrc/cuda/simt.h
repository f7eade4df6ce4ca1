// What kernels are written in: CUDA, and its instructions that C++ has no words for. On the host
// (VITRAIL_EMULATE) the same names run under emulation.h.
//
// A warp multiplies tiles whose elements are spread over its lanes as the PTX manual lays them ("Matrix
// Fragments for mma.m16n8k16" and "mma.m16n8k8"); with g = lane / 4 and t = lane % 4, an accumulator's four
// numbers are those of (row g, columns 2t and 2t + 1) and (row g + 8, the same columns).
#pragma once

#if defined(VITRAIL_EMULATE)
#include <algorithm>
#include <cmath>

#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#endif

namespace vitrail::cuda {

#define VITRAIL_DEVICE __device__ __forceinline__

constexpr int kWarp = 32;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// --- numbers ---

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// --- threads ---

#if defined(VITRAIL_EMULATE)

// Grids and blocks have one dimension.
struct Number {
    unsigned (*get)();
    operator unsigned() const { return get(); }
};
struct Dimension {
    Number x;
};
inline constexpr Dimension threadIdx = {{+[] { return unsigned(emulation::block().thread()); }}};
inline constexpr Dimension blockDim = {{+[] { return unsigned(emulation::block().threads()); }}};
inline constexpr Dimension blockIdx = {{+[] { return emulation::block().index(); }}};

inline void __syncthreads() {
    emulation::block().barrier();
}

inline void* shared_memory() {
    return emulation::block().shared();
}

template <class T>
T __shfl_sync(unsigned, T x, int from) {
    struct Request {
        T mine, theirs;
        int from;
    } request = {x, x, from};
    emulation::block().together(&request, [](void** lanes) {
        for (int i = 0; i < kWarp; ++i) {
            auto* const to = static_cast<Request*>(lanes[i]);
            to->theirs = static_cast<Request*>(lanes[to->from % kWarp])->mine;
        }
    });
    return request.theirs;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
    return __shfl_sync(mask, x, int(threadIdx.x) % kWarp ^ bits);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    unsigned pair[2] = {x, 0};
    emulation::block().together(pair, [](void** lanes) {
        unsigned all = 0;
        for (int i = 0; i < kWarp; ++i) all |= *static_cast<unsigned*>(lanes[i]) << i;
        for (int i = 0; i < kWarp; ++i) static_cast<unsigned*>(lanes[i])[1] = all;
    });
    return pair[1];
}
using std::min;
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline void __syncwarp() {
    __ballot_sync(0xffffffffu, true);
}
// Only one thread of the host runs a block.
inline uint32_t atomicOr(uint32_t* to, uint32_t bits) {
    const uint32_t before = *to;
    *to |= bits;
    return before;
}
inline uint32_t atomicAdd(uint32_t* to, uint32_t more) {
    const uint32_t before = *to;
    *to += more;
    return before;
}
inline uint32_t atomicMax(uint32_t* to, uint32_t other) {
    const uint32_t before = *to;
    if (other > before) *to = other;
    return before;
}
// Four of the eight bytes of x (0 to 3) and y (4 to 7), the lowest first.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t which) {
    const uint64_t bytes = x | uint64_t(y) << 32;
    uint32_t to = 0;
    for (int i = 0; i < 4; ++i) to |= uint32_t(bytes >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return to;
}
template <class T, class Op>
T reduce_on_host(T x, Op op) {
    T pair[2] = {x, x};
    emulation::block().together(pair, [op](void** lanes) {
        T all = *static_cast<T*>(lanes[0]);
        for (int i = 1; i < kWarp; ++i) all = op(all, *static_cast<T*>(lanes[i]));
        for (int i = 0; i < kWarp; ++i) static_cast<T*>(lanes[i])[1] = all;
    });
    return pair[1];
}
template <class T>
T __reduce_add_sync(unsigned, T x) {
    return reduce_on_host(x, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned, T x) {
    return reduce_on_host(x, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
T __reduce_max_sync(unsigned, T x) {
    return reduce_on_host(x, [](T a, T b) { return a > b ? a : b; });
}

#else

VITRAIL_DEVICE void* shared_memory() {
    extern __shared__ __align__(128) unsigned char vitrail_shared[];
    return vitrail_shared;
}

#endif

// --- conversions ---

#if defined(VITRAIL_EMULATE)

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float widen(BFloat16 x) {
    return float_of(uint32_t(x.bits) << 16);
}
inline float widen(Float16 x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                            : exponent     ? std::ldexp(float(mantissa + 1024), exponent - 25)
                                           : std::ldexp(float(mantissa), -24);
    return x.bits >> 15 ? -magnitude : magnitude;
}
inline void narrow(float x, BFloat16& to) {
    const uint32_t bits = bits_of(x);
    to.bits = x == x ? uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16) : 0x7fff;
}
inline void narrow(float x, Float16& to) {
    const uint16_t sign = bits_of(x) >> 31 << 15;
    const float magnitude = std::fabs(x);
    if (!(magnitude == magnitude)) {
        to.bits = 0x7fff;
    } else if (magnitude >= 65520.0f) {
        to.bits = sign | 0x7c00;
    } else {
        int exponent = -13;  // of zero, as of the smallest numbers
        if (magnitude > 0) std::frexp(magnitude, &exponent);
        const int last = exponent < -13 ? -24 : exponent - 11;  // of the last place
        const int units = int(std::nearbyint(std::ldexp(magnitude, -last)));
        to.bits = sign | uint16_t(last == -24 ? units : ((last + 24) << 10) + units);
    }
}
// To 10 bits of mantissa, halves away from zero.
inline uint32_t to_tf32(float x) {
    return x == x ? (bits_of(x) + 0x1000u) & ~0x1fffu : 0x7fffffffu;
}
inline float exp2_fast(float x) {
    return std::exp2(x);
}

#else

VITRAIL_DEVICE uint32_t bits_of(float x) {
    return __float_as_uint(x);
}
VITRAIL_DEVICE float float_of(uint32_t bits) {
    return __uint_as_float(bits);
}
VITRAIL_DEVICE float widen(BFloat16 x) {
    return __uint_as_float(uint32_t(x.bits) << 16);
}
VITRAIL_DEVICE float widen(Float16 x) {
    float to;
    asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(x.bits));
    return to;
}
VITRAIL_DEVICE void narrow(float x, BFloat16& to) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
VITRAIL_DEVICE void narrow(float x, Float16& to) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
VITRAIL_DEVICE uint32_t to_tf32(float x) {
    uint32_t to;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(to) : "f"(x));
    return to;
}
VITRAIL_DEVICE float exp2_fast(float x) {
    float to;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(to) : "f"(x));
    return to;
}

#endif

VITRAIL_DEVICE float widen(float x) {
    return x;
}
VITRAIL_DEVICE void narrow(float x, float& to) {
    to = x;
}

// Two numbers in one register, the first in the lower half.
template <class S>
VITRAIL_DEVICE uint32_t pair_of(float low, float high) {
    S x, y;
    narrow(low, x);
    narrow(high, y);
    return uint32_t(x.bits) | uint32_t(y.bits) << 16;
}
#if !defined(VITRAIL_EMULATE)
template <>
VITRAIL_DEVICE uint32_t pair_of<BFloat16>(float low, float high) {
    uint32_t to;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(to) : "f"(high), "f"(low));
    return to;
}
template <>
VITRAIL_DEVICE uint32_t pair_of<Float16>(float low, float high) {
    uint32_t to;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(to) : "f"(high), "f"(low));
    return to;
}
#endif

// --- copies from global to shared memory, of 16, 8 or 4 bytes each, and so aligned ---

#if defined(VITRAIL_EMULATE)

template <int kBytes = 16>
void copy_async(void* to, const void* from) {
    if ((uintptr_t(to) | uintptr_t(from)) % kBytes) std::abort();
    emulation::block().copy_later({to, from, kBytes});
}
inline void commit_copies() {
    emulation::block().commit_copies();
}
template <int kLeft>
void wait_for_copies() {
    emulation::block().wait_for_copies(kLeft);
}

#else

VITRAIL_DEVICE uint32_t shared_address(const void* p) {
    return uint32_t(__cvta_generic_to_shared(p));
}
template <int kBytes = 16>
VITRAIL_DEVICE void copy_async(void* to, const void* from) {
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from),
                     "n"(kBytes)
                     : "memory");
}
VITRAIL_DEVICE void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kLeft groups of this thread are under way.
template <int kLeft>
VITRAIL_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif

// --- tiles ---

// Four 8 x 8 tiles of halves from shared memory: lanes 8i to 8i + 7 name the rows of tile i, of 16 bytes each
// and so aligned. Lane l gets elements 2t and 2t + 1 of row g of every tile; transposed, of column g.
template <bool kTransposed>
VITRAIL_DEVICE void load_tiles(const void* row, uint32_t (&to)[4]) {
#if defined(VITRAIL_EMULATE)
    struct Request {
        const uint16_t* row;
        uint32_t* to;
    } request = {static_cast<const uint16_t*>(row), to};
    if (uintptr_t(row) % 16) std::abort();
    emulation::block().together(&request, [](void** lanes) {
        for (int lane = 0; lane < kWarp; ++lane)
            for (int tile = 0; tile < 4; ++tile) {
                const int g = lane / 4, t = lane % 4;
                const auto at = [&](int y, int x) {
                    return uint32_t(static_cast<Request*>(lanes[8 * tile + y])->row[x]);
                };
                static_cast<Request*>(lanes[lane])->to[tile] = kTransposed
                                                                   ? at(2 * t, g) | at(2 * t + 1, g) << 16
                                                                   : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
            }
    });
#else
    const uint32_t address = shared_address(row);
    if constexpr (kTransposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
#endif
}

#if defined(VITRAIL_EMULATE)
// c += a b for 16 x K by K x 8, one or two numbers in a register.
template <class S, int K>
void multiply_on_host(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        float* c;
        const uint32_t *a, *b;
    } mine = {c, a, b};
    emulation::block().together(&mine, [](void** lanes) {
        float left[16][K], right[K][8];
        const auto number = [](uint32_t bits, int i) {
            if constexpr (sizeof(S) == 2)
                return widen(S{uint16_t(bits >> 16 * i)});
            else
                return float_of(bits & ~0x1fffu);
        };
        constexpr int n = K == 16 ? 2 : 1;  // numbers in a register
        for (int lane = 0; lane < kWarp; ++lane) {
            const auto* x = static_cast<Operands*>(lanes[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < n; ++i) {
                for (int r = 0; r < 4; ++r)
                    left[g + r % 2 * 8][n * t + i + r / 2 * (K / 2)] = number(x->a[r], i);
                for (int r = 0; r < 2; ++r) right[n * t + i + r * (K / 2)][g] = number(x->b[r], i);
            }
        }
        for (int lane = 0; lane < kWarp; ++lane)
            for (int r = 0; r < 4; ++r) {
                const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
                float& sum = static_cast<Operands*>(lanes[lane])->c[r];
                for (int k = 0; k < K; ++k) sum += left[row][k] * right[k][column];
            }
    });
}
#endif

// c += a b: 16 x 16 by 16 x 8 for half types, 16 x 8 by 8 x 8 in TF32 for float.
template <class S>
VITRAIL_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(VITRAIL_EMULATE)
#define VITRAIL_MULTIPLY(S, K, shape)                                                        \
    template <>                                                                              \
    inline void multiply<S>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        multiply_on_host<S, K>(c, a, b);                                                     \
    }
#else
#define VITRAIL_MULTIPLY(S, K, shape)                                                                \
    template <>                                                                                      \
    VITRAIL_DEVICE void multiply<S>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        asm volatile("mma.sync.aligned." shape                                                       \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "                      \
                     "%2, %3};"                                                                      \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
    }
#endif
VITRAIL_MULTIPLY(BFloat16, 16, "m16n8k16.row.col.f32.bf16.bf16.f32")
VITRAIL_MULTIPLY(Float16, 16, "m16n8k16.row.col.f32.f16.f16.f32")
VITRAIL_MULTIPLY(float, 8, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef VITRAIL_MULTIPLY

// Half the depth, for half types: 16 x 8 by 8 x 8. The operands are the first halves of those above.
template <class S>
VITRAIL_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
#if defined(VITRAIL_EMULATE)
    multiply<S>(c, {a[0], a[1], 0, 0}, {b[0], 0});
#else
#define VITRAIL_MULTIPLY(shape)                                                                   \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]))
    if constexpr (std::is_same_v<S, BFloat16>)
        VITRAIL_MULTIPLY("m16n8k8.row.col.f32.bf16.bf16.f32");
    else
        VITRAIL_MULTIPLY("m16n8k8.row.col.f32.f16.f16.f32");
#undef VITRAIL_MULTIPLY
#endif
}

}  // namespace vitrail::cuda
