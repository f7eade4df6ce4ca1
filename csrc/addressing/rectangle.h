// A rectangle of tokens, counted row by row.
#pragma once

#include "../core/portable.h"

namespace vitrail::VITRAIL_ISA {

struct Rectangle {
    Place top, left, height, width;

    VITRAIL_INLINE Place size() const { return height * width; }

    // Calls visit(i, row, column) for the tokens first + i, 0 <= i < count.
    template <class Visit>
    VITRAIL_INLINE void each(Place first, Place count, Visit visit) const {
        Place y = first / width, x = first % width;
        for (Place i = 0; i < count; ++i) {
            visit(i, top + y, left + x);
            if (++x == width) {
                x = 0;
                ++y;
            }
        }
    }

    // Calls visit(row, column) for one token.
    template <class Visit>
    VITRAIL_INLINE auto at(Place i, Visit visit) const {
        return visit(top + i / width, left + i % width);
    }
};

}  // namespace vitrail::VITRAIL_ISA
