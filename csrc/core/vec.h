// Vectors of the instruction set that this translation unit is compiled for.
#pragma once

#include <type_traits>
#include <utility>

#include "portable.h"

namespace vitrail::VITRAIL_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;  // vectors a micro-kernel holds per query row, by the number of registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
#endif

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
    using type = uint32_t;
};
template <>
struct BitsOf<double> {
    using type = uint64_t;
};

template <class T, int N>
struct VecOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

// At least four lanes, which packing and the row reductions count on; the compiler splits what is too wide.
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T)) < 4 ? 4 : kVectorBytes / int(sizeof(T));

template <int I>
struct Index {
    static constexpr int kValue = I;
    VITRAIL_INLINE constexpr operator int() const { return I; }
};

template <class Body, int... I>
VITRAIL_INLINE void unroll(std::integer_sequence<int, I...>, Body body) {
    (body(Index<I>()), ...);
}

// Calls body(0), ..., body(N - 1), whose arguments are constants. Arrays of vectors that are indexed by them
// stay in registers; in a loop, which the compiler unrolls late if at all, they may not.
template <int N, class Body>
VITRAIL_INLINE void unroll(Body body) {
    unroll(std::make_integer_sequence<int, N>(), body);
}

// Calls body(count), whose argument is a constant, for a count from 1 to Most.
template <int Most, class Body>
VITRAIL_INLINE void with_count(int count, Body body) {
    if (count == Most)
        body(Index<Most>());
    else if constexpr (Most > 1)
        with_count<Most - 1>(count, body);
}

template <class T, int N = kLanes<T>>
VITRAIL_INLINE Vec<T, N> load(const T* from) {
    Vec<T, N> v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
}

template <class T, class V>
VITRAIL_INLINE void store(T* to, const V& v) {
    __builtin_memcpy(to, &v, sizeof(v));
}

// Into the second-level cache: what is asked for here is needed a whole task later. Null asks for nothing.
VITRAIL_INLINE void prefetch(const void* from, int64_t bytes) {
    if (!from) return;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

VITRAIL_INLINE void prefetch_to_write(void* to, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<char*>(to) + i, 1, 2);
}

template <class T, int N = kLanes<T>>
VITRAIL_INLINE Vec<T, N> broadcast(T x) {
    return x - Vec<T, N>{};
}

// NaN in `b` wins, so that it reaches the result.
template <class V>
VITRAIL_INLINE V maximum(V a, V b) {
    return a > b ? a : b;
}

struct Add {
    template <class V>
    VITRAIL_INLINE V operator()(V a, V b) const {
        return a + b;
    }
};
struct Max {
    template <class V>
    VITRAIL_INLINE V operator()(V a, V b) const {
        return maximum(a, b);
    }
};

// The lanes of (a, b) cut into blocks of `Block` lanes: the blocks with even (Odd = 0) or odd numbers.
template <class T, int N, int Block, int Odd, int... I>
VITRAIL_INLINE Vec<T, N> every_other(Vec<T, N> a, Vec<T, N> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (I / Block * 2 * Block + I % Block + Odd * Block)...);
#else
    using Index = typename BitsOf<T>::type;
    return __builtin_shuffle(a, b, Vec<Index, N>{Index(I / Block * 2 * Block + I % Block + Odd * Block)...});
#endif
}

// Lane i of the result is lane First + i / Times: a few lanes, each repeated.
template <class T, int N, int Times, int First, int... I>
VITRAIL_INLINE Vec<T, N> repeat_lanes(Vec<T, N> a, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, a, (First + I / Times)...);
#else
    using Index = typename BitsOf<T>::type;
    return __builtin_shuffle(a, Vec<Index, N>{Index(First + I / Times)...});
#endif
}

// Combines neighbouring blocks of (a, b): 2N lanes become N.
template <int Block, class T, int N = kLanes<T>, class Op>
VITRAIL_INLINE Vec<T, N> fold(Vec<T, N> a, Vec<T, N> b, Op op) {
    const std::make_integer_sequence<int, N> lanes;
    return op(every_other<T, N, Block, 0>(a, b, lanes), every_other<T, N, Block, 1>(a, b, lanes));
}

template <class T>
VITRAIL_INLINE void transpose(Vec<T, 4> (&x)[4]) {
    constexpr std::make_integer_sequence<int, 4> quad;
    const Vec<T, 4> even[2] = {every_other<T, 4, 1, 0>(x[0], x[1], quad),
                               every_other<T, 4, 1, 0>(x[2], x[3], quad)};
    const Vec<T, 4> odd[2] = {every_other<T, 4, 1, 1>(x[0], x[1], quad),
                              every_other<T, 4, 1, 1>(x[2], x[3], quad)};
    x[0] = every_other<T, 4, 1, 0>(even[0], even[1], quad);
    x[1] = every_other<T, 4, 1, 0>(odd[0], odd[1], quad);
    x[2] = every_other<T, 4, 1, 1>(even[0], even[1], quad);
    x[3] = every_other<T, 4, 1, 1>(odd[0], odd[1], quad);
}

// Reduces each of four vectors to one number; lanes 0..3 of the result hold them.
template <class T, class Op, int N = kLanes<T>>
VITRAIL_INLINE Vec<T, N> reduce_rows(const Vec<T, N> (&v)[4], Op op) {
    Vec<T, N> x = fold<N / 4, T>(fold<N / 2, T>(v[0], v[1], op), fold<N / 2, T>(v[2], v[3], op), op);
    if constexpr (N >= 16) x = fold<N / 8, T>(x, x, op);
    if constexpr (N >= 8) x = fold<1, T>(x, x, op);
    return x;
}

// The sum, or the like, of all lanes, in every lane.
template <class T, class Op, int Block = kLanes<T> / 2>
VITRAIL_INLINE Vec<T, kLanes<T>> reduce(Vec<T, kLanes<T>> x, Op op) {
    x = fold<Block, T>(x, x, op);
    if constexpr (Block > 1) return reduce<T, Op, Block / 2>(x, op);
    return x;
}

// 2^x for x <= 0. Below the range of normal numbers it is exactly 0; NaN stays NaN.
// The magic number rounds x to an integer n, whose bits then sit at the bottom of t; the polynomial is 2^f on
// [-1/2, 1/2] (float: fitted, 1 ulp; double: the exponential series, 1e-16).
template <int N>
VITRAIL_INLINE Vec<float, N> exp2_negative(Vec<float, N> x) {
    using Bits = Vec<uint32_t, N>;
    x = maximum(broadcast<float, N>(-127.0f), x);
    const Vec<float, N> t = x + 0x1.8p23f;
    const Vec<float, N> f = x - (t - 0x1.8p23f);
    Vec<float, N> p = f * 1.53533620e-4f + 1.33988750e-3f;
    p = p * f + 9.61843692e-3f;
    p = p * f + 5.55033237e-2f;
    p = p * f + 2.40226471e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return (Vec<float, N>)((Bits)p + ((Bits)t << 23));
}

template <int N>
VITRAIL_INLINE Vec<double, N> exp2_negative(Vec<double, N> x) {
    using Bits = Vec<uint64_t, N>;
    constexpr double ln2 = 0.693147180559945309417;
    x = maximum(broadcast<double, N>(-1023.0), x);
    const Vec<double, N> t = x + 0x1.8p52;
    const Vec<double, N> y = (x - (t - 0x1.8p52)) * ln2;
    Vec<double, N> p = broadcast<double, N>(1.0);
    for (int k = 13; k > 0; --k) p = p * y * (1.0 / k) + 1.0;
    return (Vec<double, N>)((Bits)p + ((Bits)t << 52));
}

// log2(x) for x >= 0; NaN and infinity stay what they are. The mantissa, between the square roots of 1/2 and
// 2, goes through the series of the inverse hyperbolic tangent.
template <class T, int N>
VITRAIL_INLINE Vec<T, N> log2_positive(Vec<T, N> x) {
    using Bit = typename BitsOf<T>::type;
    using Bits = Vec<Bit, N>;
    constexpr bool wide = sizeof(T) == 8;
    constexpr int mantissa = wide ? 52 : 23, terms = wide ? 10 : 5;
    constexpr Bit half_root = wide ? Bit(0x3fe6a09e667f3bcdu) : Bit(0x3f3504f3u);
    constexpr T log2_e = T(1.44269504088896340736);
    const auto exponent = (Vec<std::make_signed_t<Bit>, N>)((Bits)x - half_root) >> mantissa;
    const Vec<T, N> m = (Vec<T, N>)((Bits)x - ((Bits)exponent << mantissa));
    const Vec<T, N> t = (m - T(1)) / (m + T(1)), t2 = t * t;
    Vec<T, N> sum = broadcast<T, N>(T(2) / (2 * terms - 1));
    for (int k = terms - 1; k > 0; --k) sum = sum * t2 + T(2) / (2 * k - 1);
    const Vec<T, N> log = __builtin_convertvector(exponent, Vec<T, N>) + t * sum * log2_e;
    const T infinity = T(__builtin_inf());
    const Vec<T, N> finite = x < infinity ? log : x;
    return x > T(0) ? finite : (x == T(0) ? broadcast<T, N>(-infinity) : x);
}

}  // namespace vitrail::VITRAIL_ISA
