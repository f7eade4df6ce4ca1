// How many things are cut into parts.
#pragma once

#include "portable.h"

namespace vitrail::VITRAIL_ISA {

constexpr int kQueryBlock = 64;  // query rows that share one pass over their keys

VITRAIL_INLINE constexpr int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// `size` things in `parts` even parts: where part `i` begins.
VITRAIL_INLINE constexpr Place part_begin(Place size, Place parts, Place i) {
    return size / parts * i + (i < size % parts ? i : size % parts);
}

}  // namespace vitrail::VITRAIL_ISA
