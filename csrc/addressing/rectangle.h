// A rectangle of tokens, counted row by row.
#pragma once

#include "../core/vec.h"

namespace vitrail::VITRAIL_ISA {

struct Rectangle {
    int64_t top, left, height, width;

    VITRAIL_INLINE int64_t size() const { return height * width; }

    // Calls visit(i, row, column) for the tokens first + i, 0 <= i < count.
    template <class Visit>
    VITRAIL_INLINE void each(int64_t first, int64_t count, Visit visit) const {
        int64_t y = first / width, x = first % width;
        for (int64_t i = 0; i < count; ++i) {
            visit(i, top + y, left + x);
            if (++x == width) {
                x = 0;
                ++y;
            }
        }
    }
};

}  // namespace vitrail::VITRAIL_ISA
