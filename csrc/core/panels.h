// Packing of tokens, each a row of channels, for the micro-kernels.
//
// Numbers are packed in the type that they are multiplied in (see Product): their own where the processor
// multiplies it fast, else the one that sums are kept in. A unit is what the micro-kernels read at once: one
// number, or a pair of bfloat16 numbers. A missing token is a null pointer and counts as zeros.
#pragma once

#include "gemm.h"
#include "parts.h"

namespace vitrail::VITRAIL_ISA {

template <class S>
struct PackedOf {
    using type = Compute<S>;
};
#if defined(__AVX512BF16__)
template <>
struct PackedOf<BFloat16> {
    using type = BFloat16;
};
#endif
template <class S>
using Packed = typename PackedOf<S>::type;

// Four units of a row, from channel `c` on; those past the last channel are zero. Pairs travel as the bits of
// a number.
template <class E, class S>
VITRAIL_INLINE Vec<Compute<S>, 4> four_units(const S* row, int64_t c, int64_t channels) {
    if constexpr (Product<E>::kDepth == 1) {
        return widen_some(row + c, channels - c);
    } else {
        E some[8] = {};
        if (channels - c >= 8) return load<float, 4>(reinterpret_cast<const float*>(row + c));
        __builtin_memcpy(some, row + c, (channels - c) * sizeof(E));
        return load<float, 4>(reinterpret_cast<const float*>(some));
    }
}

// Four rows become columns: unit u of row i goes to to[u * step + i], units [0, units).
template <class E, class S>
VITRAIL_INLINE void pack_four_columns(const S* const (&rows)[4], int64_t channels, int64_t units,
                                      Compute<S>* to, int64_t step) {
    using T = Compute<S>;
    constexpr int depth = Product<E>::kDepth;
    const auto block = [&](Vec<T, 4>(&row)[4], int64_t u) {
        transpose<T>(row);
        for (int i = 0; i < 4; ++i)
            if (u + i < units) store(to + (u + i) * step, row[i]);
    };
    int64_t u = 0;
    if (rows[0] && rows[1] && rows[2] && rows[3])
        for (; u + 4 <= units && (u + 4) * depth <= channels; u += 4) {
            Vec<T, 4> row[4];
            for (int i = 0; i < 4; ++i) row[i] = four_units<E>(rows[i], u * depth, u * depth + 4 * depth);
            block(row, u);
        }
    for (; u < units; u += 4) {
        Vec<T, 4> row[4] = {};
        for (int i = 0; i < 4; ++i)
            if (rows[i] && u * depth < channels) row[i] = four_units<E>(rows[i], u * depth, channels);
        block(row, u);
    }
}

// A row, padded with zeros to `width` numbers (a multiple of a vector), each multiplied by `scale`.
template <class S, class T = Compute<S>>
VITRAIL_INLINE void pack_row(const S* row, int64_t channels, T scale, T* to, int64_t width) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    if (row)
        for (; c + W <= channels; c += W) store(to + c, widen<W>(row + c) * scale);
    for (; c < width; c += 4) {
        Vec<T, 4> x = {};
        if (row && c < channels) x = widen_some(row + c, channels - c) * scale;
        store(to + c, x);
    }
}

// A row of `units` units (a multiple of a vector): numbers multiplied by `scale`, pairs as they are.
template <class E, class S>
VITRAIL_INLINE void pack_units(const S* row, int64_t channels, Compute<S> scale, E* to, int64_t units) {
    if constexpr (Product<E>::kDepth == 1) {
        pack_row(row, channels, scale, to, units);
    } else {
        using T = Compute<S>;
        constexpr int chunk = kLanes<T> * Product<E>::kDepth;
        for (int64_t c = 0; c < units * Product<E>::kDepth; c += chunk) {
            const int64_t left = row ? channels - c : 0;
            Vec<T, kLanes<T>> bits = {};
            if (left >= chunk)
                bits = load(reinterpret_cast<const T*>(row + c));
            else if (left > 0)
                __builtin_memcpy(&bits, row + c, left * sizeof(E));
            store(to + c, bits);
        }
    }
}

// Two rows become one of pairs: (row 0, channel 0), (row 1, channel 0), (row 0, channel 1), ...
VITRAIL_INLINE void pack_pair(const BFloat16* const (&rows)[2], int64_t channels, BFloat16* to,
                              int64_t width) {
    constexpr int W = kLanes<float>;
    using Bits = Vec<uint32_t, W>;
    for (int64_t c = 0; c < width; c += W) {
        Bits half[2] = {};
        for (int i = 0; i < 2; ++i) {
            if (!rows[i] || c >= channels) continue;
            if (c + W <= channels) {
                half[i] = load_half_bits<W>(rows[i] + c);
            } else {
                BFloat16 some[W] = {};
                __builtin_memcpy(some, rows[i] + c, (channels - c) * sizeof(BFloat16));
                half[i] = load_half_bits<W>(some);
            }
        }
        const Bits pairs = half[0] | half[1] << 16;
        __builtin_memcpy(to + 2 * c, &pairs, sizeof(pairs));
    }
}

}  // namespace vitrail::VITRAIL_ISA
