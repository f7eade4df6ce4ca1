// Packing of planes: rows and columns of places, at each a vector of neighbouring channels, which become
// lanes.
#pragma once

#include "panels.h"

namespace vitrail::VITRAIL_ISA {

// Where the channels of row 0 and column 0 lie; strides in elements.
template <class S>
struct Plane {
    const S* data;
    int64_t row, column;
};

template <class S>
VITRAIL_INLINE Plane<S> zeros() {
    alignas(64) static const S vector[kLanes<Compute<S>>] = {};
    return {vector, 0, 0};
}

// What of a vector becomes lanes: `count` numbers and zeros up to `width`, which is the whole vector or a
// power of two; all that `copies` times.
struct Lanes {
    int count, width, copies;
};

// Neighbouring numbers as lanes.
template <class S, class T = Compute<S>>
VITRAIL_INLINE Vec<T, kLanes<T>> spread(const S* from, Lanes lanes) {
    constexpr int W = kLanes<T>;
    if (lanes.count == W) return widen<W>(from);
    T row[W + 4] = {};
    for (int copy = 0; copy < lanes.copies; ++copy)
        for (int lane = 0; lane < lanes.count; lane += 4)
            store(row + copy * lanes.width + lane, widen_some(from + lane, lanes.count - lane));
    return load(row);
}

// `count` lanes, at most four; the others are zero.
template <class S, int Depth>
VITRAIL_INLINE auto pack_some(const S* const (&from)[Depth], int count) {
    if constexpr (Depth == 1) {
        return widen_some(from[0], count);
    } else {
        S some[Depth][4] = {};
        for (int i = 0; i < Depth; ++i)
            if (count >= 4)
                __builtin_memcpy(some[i], from[i], sizeof(some[i]));
            else
                for (int lane = 0; lane < count; ++lane) some[i][lane] = from[i][lane];
        return load_half_bits<4>(some[0]) | load_half_bits<4>(some[1]) << 16;
    }
}

// Packs `count` vectors (or pairs: of the first source and the second), one operand each, `to_step` apart.
template <class S, int Depth>
VITRAIL_INLINE void pack_line(const S* const (&source)[Depth], const int64_t (&steps)[Depth], int64_t count,
                              Lanes lanes, Packed<S>* to, int64_t to_step) {
    using P = Packed<S>;
    using T = Compute<S>;
    constexpr int W = kLanes<T>;
    static_assert(Depth == Product<P>::kDepth);
    const S* from[Depth];
    for (int i = 0; i < Depth; ++i) from[i] = source[i];
    const auto advance = [&] {
        for (int i = 0; i < Depth; ++i) from[i] += steps[i];
        to += to_step;
    };
    if (lanes.count == W) {
        for (int64_t i = 0; i < count; ++i, advance()) {
            if constexpr (Depth == 1)
                store(to, widen<W>(from[0]));
            else
                store(to, load_half_bits<W>(from[0]) | load_half_bits<W>(from[1]) << 16);
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i, advance()) {
        for (int lane = 0; lane < lanes.width; lane += 4) {
            const int left = lanes.count > lane ? lanes.count - lane : 0;
            const S* some[Depth];
            for (int d = 0; d < Depth; ++d) some[d] = from[d] + (left > 0 ? lane : 0);
            const auto x = pack_some<S, Depth>(some, left);
            const int size = lanes.width < 4 ? lanes.width : 4;
            for (int copy = 0; copy < lanes.copies; ++copy) {
                P* const at = to + (copy * lanes.width + lane) * Depth;
                if (size == 4)
                    store(at, x);
                else
                    __builtin_memcpy(at, &x, size * Depth * sizeof(P));
            }
        }
    }
}

// Packs a plane (or a pair of planes); strides of what is packed in elements of it.
template <class S, int Depth>
VITRAIL_INLINE void pack_plane(const Plane<S> (&planes)[Depth], int64_t rows, int64_t columns, Lanes lanes,
                               Packed<S>* to, int64_t to_row, int64_t to_column) {
    // Along the shorter stride, which memory is read faster by.
    const int64_t row = planes[0].row, column = planes[0].column;
    const bool by_rows = (column < 0 ? -column : column) <= (row < 0 ? -row : row);
    const S* from[Depth];
    int64_t steps[Depth];
    for (int i = 0; i < Depth; ++i) {
        from[i] = planes[i].data;
        steps[i] = by_rows ? planes[i].column : planes[i].row;
    }
    for (int64_t line = 0; line < (by_rows ? rows : columns); ++line) {
        pack_line<S>(from, steps, by_rows ? columns : rows, lanes, to, by_rows ? to_column : to_row);
        for (int i = 0; i < Depth; ++i) from[i] += by_rows ? planes[i].row : planes[i].column;
        to += by_rows ? to_row : to_column;
    }
}

}  // namespace vitrail::VITRAIL_ISA
