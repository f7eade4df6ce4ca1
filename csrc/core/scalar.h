// Storage types and their conversion to and from the type that attention is computed in.
//
// bfloat16 and float16 travel as bit patterns and are converted with integer arithmetic, a vector at a time,
// so that no compiler support for them is needed and every instruction set rounds alike (to nearest even).
#pragma once

#include "tensors.h"
#include "vec.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vitrail::VITRAIL_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class S>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <int N>
VITRAIL_INLINE Vec<uint32_t, N> load_half_bits(const void* from) {
#if defined(__AVX512F__)  // GCC makes five instructions of this one
    if constexpr (N == 16)
        return (Vec<uint32_t, N>)_mm512_maskz_cvtepu16_epi32(
            0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#endif
    Vec<uint16_t, N> h;
    __builtin_memcpy(&h, from, sizeof(h));
    return __builtin_convertvector(h, Vec<uint32_t, N>);
}

template <int N>
VITRAIL_INLINE void store_half_bits(void* to, Vec<uint32_t, N> bits) {
    const Vec<uint16_t, N> h = __builtin_convertvector(bits, Vec<uint16_t, N>);
    __builtin_memcpy(to, &h, sizeof(h));
}

template <int N>
VITRAIL_INLINE Vec<float, N> widen(const float* from) {
    return load<float, N>(from);
}

template <int N>
VITRAIL_INLINE Vec<double, N> widen(const double* from) {
    return load<double, N>(from);
}

template <int N>
VITRAIL_INLINE Vec<float, N> widen(const BFloat16* from) {
    return (Vec<float, N>)(load_half_bits<N>(from) << 16);
}

// The exponent is re-biased by a multiplication, which also makes subnormal halves normal.
template <int N>
VITRAIL_INLINE Vec<float, N> widen(const Float16* from) {
    using Bits = Vec<uint32_t, N>;
    const Bits h = load_half_bits<N>(from);
    const Bits magnitude = (h & 0x7fffu) << 13;
    const Bits infinite = (Bits)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    const Vec<float, N> value = (Vec<float, N>)magnitude * 0x1p112f;
    return (Vec<float, N>)((Bits)value | infinite | ((h & 0x8000u) << 16));
}

template <int N>
VITRAIL_INLINE void narrow(float* to, Vec<float, N> v) {
    store(to, v);
}

template <int N>
VITRAIL_INLINE void narrow(double* to, Vec<double, N> v) {
    store(to, v);
}

template <int N>
VITRAIL_INLINE Vec<uint32_t, N> bfloat16_bits(Vec<float, N> v) {
    using Bits = Vec<uint32_t, N>;
    const Bits x = (Bits)v;
    const Bits rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
    return v == v ? rounded : Bits{} + 0x7fc0u;
}

template <int N>
VITRAIL_INLINE void narrow(BFloat16* to, Vec<float, N> v) {
    store_half_bits<N>(to, bfloat16_bits<N>(v));
}

// Values are rounded by adding a power of two whose last place is that of the half; halves below 2^-14
// share one last place.
template <int N>
VITRAIL_INLINE void narrow(Float16* to, Vec<float, N> v) {
    using Bits = Vec<uint32_t, N>;
    const Bits x = (Bits)v;
    const Bits sign = (x >> 16) & 0x8000u;
    const Bits magnitude = x & 0x7fffffffu;
    const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits subnormal = (Bits)((Vec<float, N>)magnitude + 0.5f) - 0x3f000000u;
    Bits half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
    store_half_bits<N>(to, half | sign);
}

// Four elements, of which only the first `count` exist in memory; the others are zero.
template <class S>
VITRAIL_INLINE Vec<Compute<S>, 4> widen_some(const S* from, int64_t count) {
    if (count >= 4) return widen<4>(from);
    S some[4] = {};
    __builtin_memcpy(some, from, count * sizeof(S));
    return widen<4>(some);
}

template <class S>
VITRAIL_INLINE void narrow_some(S* to, Vec<Compute<S>, 4> v, int64_t count) {
    if (count >= 4) return narrow<4>(to, v);
    S some[4];
    narrow<4>(some, v);
    __builtin_memcpy(to, some, count * sizeof(S));
}

// Calls action with a value of the storage type.
template <class Action>
VITRAIL_INLINE auto with_storage(Storage storage, Action action) {
    switch (storage) {
        case Storage::kFloat64:
            return action(double());
        case Storage::kBFloat16:
            return action(BFloat16());
        case Storage::kFloat16:
            return action(Float16());
        default:
            return action(float());
    }
}

}  // namespace vitrail::VITRAIL_ISA
