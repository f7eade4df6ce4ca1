// Channels in groups as lanes of vectors: a vector holds neighbouring groups, so that a weight of theirs is a
// vector as it lies in memory, whatever patch of channels it is multiplied with.
//
// Where vectors do not divide the groups, the last vector holds what is left of several columns next to each
// other (a column is whatever shares the weights: an image, a patch of channels, a block of strips), and its
// weights are repeated.
#pragma once

#include "../core/planes.h"

namespace vitrail::VITRAIL_ISA {

template <class T>
class GroupLanes {
    static constexpr int W = kLanes<T>;

  public:
    VITRAIL_INLINE explicit GroupLanes(int64_t groups) : full_(groups / W), rest_(int(groups % W)) {
        while (width_ < rest_) width_ *= 2;
    }

    // Vectors that the groups of one column need; all but the last are full, the last may be.
    VITRAIL_INLINE int64_t sets() const { return full_ + (rest_ > 0); }
    VITRAIL_INLINE bool full(int64_t set) const { return set < full_; }
    VITRAIL_INLINE int64_t full_sets() const { return full_; }
    // The lanes of one column, and how many columns a vector holds.
    VITRAIL_INLINE Lanes of(int64_t set) const {
        return full(set) ? Lanes{W, W, 1} : Lanes{rest_, width_, W / width_};
    }
    // Vectors that `columns` columns need.
    VITRAIL_INLINE int64_t vectors(int64_t set, int64_t columns) const {
        return (columns + of(set).copies - 1) / of(set).copies;
    }

  private:
    const int64_t full_;
    const int rest_;
    int width_ = 1;
};

}  // namespace vitrail::VITRAIL_ISA
