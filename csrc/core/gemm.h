// The dense product, C = A B: one micro-kernel for all of them.
//
// A tile of C (rows x vectors of columns) stays in registers while the kernel walks along the depth. A is
// read element by element (any strides, so that A may be a transpose), B by rows of vectors that lie `b_step`
// apart. bfloat16 is multiplied in pairs along the depth: an "element" of A is two neighbouring numbers, a
// "row" of B holds the two rows of a pair interleaved, (row 2k, column 0), (row 2k + 1, column 0), (row 2k,
// column 1), ...; sums are float32.
#pragma once

#include "scalar.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace vitrail::VITRAIL_ISA {

// Rows and vectors of a tile: as many sums as registers allow, with room for a row of B and an element of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 12, kTileColumns = 2;
#else
constexpr int kTileRows = 6, kTileColumns = 2;
#endif

// How numbers of a storage type are multiplied: depth of an element, its operands, and a * b + c.
template <class S>
struct Product {
    using T = S;
    static constexpr int kDepth = 1;
    using V = Vec<T, kLanes<T>>;
    using A = V;
    using B = V;

    VITRAIL_INLINE static A load_a(const S* from) { return broadcast(*from); }
    VITRAIL_INLINE static B load_b(const S* from) { return load(from); }
    VITRAIL_INLINE static V add(const A& a, const B& b, V c) { return c + a * b; }
};

template <>
struct Product<BFloat16> {
    using T = float;
    static constexpr int kDepth = 2;
    using V = Vec<T, kLanes<T>>;
    using Bits = Vec<uint32_t, kLanes<T>>;
#if defined(__AVX512BF16__)
    using A = Bits;
    using B = Bits;

    VITRAIL_INLINE static A load_a(const BFloat16* from) {
        uint32_t pair;
        __builtin_memcpy(&pair, from, sizeof(pair));
        return pair - Bits{};
    }
    VITRAIL_INLINE static B load_b(const BFloat16* from) {
        return load<uint32_t, kLanes<T>>(reinterpret_cast<const uint32_t*>(from));
    }
    VITRAIL_INLINE static V add(const A& a, const B& b, V c) {
        return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
    VITRAIL_INLINE static void store_a(BFloat16* to, V v) { store(to, _mm512_cvtneps_pbh((__m512)v)); }
#else
    struct A {
        V even, odd;
    };
    using B = A;

    VITRAIL_INLINE static A widen_pairs(Bits pairs) { return {(V)(pairs << 16), (V)(pairs & 0xffff0000u)}; }
    VITRAIL_INLINE static A load_a(const BFloat16* from) {
        uint32_t pair;
        __builtin_memcpy(&pair, from, sizeof(pair));
        return widen_pairs(pair - Bits{});
    }
    VITRAIL_INLINE static B load_b(const BFloat16* from) {
        Bits pairs;
        __builtin_memcpy(&pairs, from, sizeof(pairs));
        return widen_pairs(pairs);
    }
    VITRAIL_INLINE static V add(const A& a, const B& b, V c) { return c + a.even * b.even + a.odd * b.odd; }
#endif
};

// The operands of a product. Strides are in numbers of the storage type; `b_step` is that of a row (of
// pairs).
template <class S>
struct Factors {
    const S* a;
    int64_t a_row, a_step;
    const S* b;
    int64_t b_step;
    int64_t depth;  // in elements: pairs for bfloat16
};

// M rows and N vectors of columns of C, which is written or added to.
template <class S, int M, int N>
__attribute__((noinline)) void multiply_tile(const Factors<S>& f, Compute<S>* c, int64_t c_row, bool add) {
    using P = Product<S>;
    using T = typename P::T;
    constexpr int W = kLanes<T>, kPointers = (M + 3) / 4;
    typename P::V sum[M][N] = {};
    const auto for_each = [](auto action) VITRAIL_INLINED {
        unroll<M>([&](auto r) VITRAIL_INLINED { unroll<N>([&](auto j) VITRAIL_INLINED { action(r, j); }); });
    };
    if (add) for_each([&](auto r, auto j) VITRAIL_INLINED { sum[r][j] = load(c + r * c_row + j * W); });
    // One pointer for four rows of A: the processor adds the rest to it for free.
    const S* a[kPointers];
    unroll<kPointers>([&](auto i) VITRAIL_INLINED { a[i] = f.a + 4 * i * f.a_row; });
    const int64_t row = f.a_row, row3 = 3 * f.a_row, a_step = f.a_step, b_step = f.b_step;
    const S* b = f.b;
#pragma GCC unroll 2
    for (int64_t i = 0; i < f.depth; ++i) {
        typename P::B x[N];
        unroll<N>([&](auto j) VITRAIL_INLINED { x[j] = P::load_b(b + j * W * P::kDepth); });
        b += b_step;
        unroll<M>([&](auto r) VITRAIL_INLINED {
            const typename P::A y = P::load_a(a[r / 4] + (r % 4 == 3 ? row3 : r % 4 * row));
            unroll<N>([&](auto j) VITRAIL_INLINED { sum[r][j] = P::add(y, x[j], sum[r][j]); });
        });
        unroll<kPointers>([&](auto j) VITRAIL_INLINED { a[j] += a_step; });
    }
    for_each([&](auto r, auto j) VITRAIL_INLINED { store(c + r * c_row + j * W, sum[r][j]); });
}

// `rows` rows and `vectors` vectors of columns of C. Every element sums in the order of the depth, whatever
// the tiles, so that results depend neither on the shape of a call nor on the number of threads.
template <class S>
VITRAIL_INLINE void multiply(int64_t rows, int64_t vectors, Factors<S> f, Compute<S>* c, int64_t c_row,
                             bool add) {
    using P = Product<S>;
    constexpr int W = kLanes<typename P::T>;
    // even tiles: a last one of few rows could not hide the latency of its sums
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const S* const first = f.a;
    for (int64_t column = 0; column < vectors;) {
        const int wide = vectors - column < kTileColumns ? int(vectors - column) : kTileColumns;
        int64_t row = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int count = int((rows - row + tiles - tile - 1) / (tiles - tile));
            f.a = first + row * f.a_row;
            with_count<kTileColumns>(wide, [&](auto n) VITRAIL_INLINED {
                with_count<kTileRows>(count, [&](auto m) VITRAIL_INLINED {
                    multiply_tile<S, decltype(m)::kValue, decltype(n)::kValue>(
                        f, c + row * c_row + column * W, c_row, add);
                });
            });
            row += count;
        }
        f.b += wide * W * P::kDepth;
        column += wide;
    }
}

}  // namespace vitrail::VITRAIL_ISA
