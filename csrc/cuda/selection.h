// The largest of a row of numbers, for a warp: none is sorted, a threshold is searched for that as many
// exceed as are wanted.
//
// Numbers are compared as integers: those of IEEE 754 keep their order if the magnitude of negative ones is
// inverted, and then any bits, NaN too, have a place in one total order (as in core/select.h).
#pragma once

#include <climits>

#include "tiles.h"

namespace vitrail::cuda {

// Never the least integer, which is less than all numbers.
VITRAIL_DEVICE int ordered(float x) {
    const int bits = int(bits_of(x)), order = bits ^ (bits >> 31 & INT_MAX);
    return order > INT_MIN ? order : INT_MIN + 1;
}
VITRAIL_DEVICE float number_of(int order) {
    return float_of(uint32_t(order ^ (order >> 31 & INT_MAX)));
}

VITRAIL_DEVICE unsigned lanes_below() {
    return (1u << lane()) - 1u;
}

// Numbers above the threshold are chosen, and the first `ties` of those that equal it.
struct Cut {
    int threshold, ties;

    // Which lanes' numbers are chosen, the first lane's first; `some`: whether this lane has one. Rows are
    // walked through from the front.
    VITRAIL_DEVICE unsigned chosen(bool some, int x) {
        const unsigned equal = __ballot_sync(0xffffffffu, some && x == threshold);
        const bool early = __popc(equal & lanes_below()) < ties;
        const unsigned all = __ballot_sync(0xffffffffu, some && (x > threshold || (x == threshold && early)));
        ties -= __popc(equal) < ties ? __popc(equal) : ties;
        return all;
    }
};

VITRAIL_DEVICE int count_above(const int* row, int count, int threshold) {
    int above = 0;
#pragma unroll 4
    for (int i = lane(); i < count; i += kWarp) above += row[i] > threshold;
    return __reduce_add_sync(0xffffffffu, above);
}

// The cut above which `wanted` numbers of a row stand, at least one. A lane reads every 32nd, from its own
// on.
VITRAIL_DEVICE Cut find_cut(const int* row, int count, int wanted) {
    if (wanted >= count) return {INT_MIN, 0};
    int low = INT_MAX, high = INT_MIN;
    for (int i = lane(); i < count; i += kWarp) {
        low = row[i] < low ? row[i] : low;
        high = row[i] > high ? row[i] : high;
    }
    // more than the wanted numbers lie above `low`, fewer above `high`
    low = __reduce_min_sync(0xffffffffu, low) - 1;
    high = __reduce_max_sync(0xffffffffu, high);
    int above_high = 0;
    for (int step = 0; unsigned(high) - unsigned(low) > 1; ++step) {
        // Halves the range of numbers, which is soon done where they are spread evenly, then that of
        // integers, which is done in 32 steps whatever they are.
        int threshold = ordered(0.5f * number_of(low) + 0.5f * number_of(high));
        if (step >= 12 || threshold <= low || threshold >= high)
            threshold = int(unsigned(low) + (unsigned(high) - unsigned(low)) / 2);
        const int above = count_above(row, count, threshold);
        if (above == wanted) return {threshold, 0};
        if (above > wanted) {
            low = threshold;
        } else {
            high = threshold;
            above_high = above;
        }
    }
    return {high, wanted - above_high};
}

}  // namespace vitrail::cuda
