// Addressing policy of bi-level routing attention: a query looks at the regions that its own region chose.
// Keys past the grid are zeros.
#pragma once

#include "../ops/routed_attention.h"
#include "block_policy.h"

namespace vitrail::VITRAIL_ISA {

template <class T>
class RoutedRegions : public Unbiased {
  public:
    using Arguments = RoutedAttention;

    VITRAIL_INLINE explicit RoutedRegions(const RoutedAttention& a)
        : q_(a.q_regions),
          k_(a.k_regions),
          routes_(a.routes),
          weights_(static_cast<const T*>(a.weights)),
          topk_(Place(a.topk)),
          parts_((q_.size + kQueryBlock - 1) / kQueryBlock) {}

    VITRAIL_INLINE Place query_regions() const { return q_.count; }
    VITRAIL_INLINE Place parts() const { return parts_; }
    VITRAIL_INLINE Place key_blocks() const { return k_.count; }
    VITRAIL_INLINE Place largest_key_block() const { return k_.size; }
    VITRAIL_INLINE Place largest_query_region() const { return q_.size; }
    VITRAIL_INLINE Place visits() const { return topk_; }  // of one region of queries
    VITRAIL_INLINE bool weighted() const { return weights_ != nullptr; }

    VITRAIL_INLINE Rectangle query_region(Place i) const { return q_.region(i); }
    VITRAIL_INLINE bool query_at(Place, Place y, Place x, Query& to) const {
        to = {y, x, 0};
        return q_.holds(y, x);
    }

    VITRAIL_INLINE Place keys_in(Place) const { return k_.size; }

    VITRAIL_OUTLINE void keys(Place block, Place first, Place count, Key* to) const {
        k_.region(block).each(first, count, [&](Place i, Place y, Place x) { to[i] = key_at(y, x); });
    }
    VITRAIL_INLINE Key key(Place block, Place i) const {
        return k_.region(block).at(i, [&](Place y, Place x) { return key_at(y, x); });
    }

    VITRAIL_INLINE Place slots() const { return q_.count * topk_; }
    VITRAIL_INLINE Place slot(Place region, Place visit) const { return region * topk_ + visit; }
    VITRAIL_INLINE Place visitor(Place slot) const { return slot / topk_; }
    VITRAIL_INLINE Place visited(int64_t image, Place slot) const {
        return Place(routes_[image * slots() + slot]);
    }
    VITRAIL_INLINE T weight(int64_t image, Place slot) const {
        return weights_ ? weights_[image * slots() + slot] : T(1);
    }

    // Any region may look at any other.
    VITRAIL_INLINE Place units() const { return 1; }

  private:
    // A grid that is cut into regions.
    struct Cut {
        Place grid_height, grid_width, height, width, size, across, count;

        VITRAIL_INLINE explicit Cut(const Regions& r)
            : grid_height(Place(r.grid_height)),
              grid_width(Place(r.grid_width)),
              height(Place(r.height)),
              width(Place(r.width)),
              size(Place(r.size)),
              across(Place(r.across)),
              count(Place(r.count)) {}

        VITRAIL_INLINE Rectangle region(Place i) const {
            return {i / across * height, i % across * width, height, width};
        }
        VITRAIL_INLINE bool holds(Place y, Place x) const { return y < grid_height && x < grid_width; }
    };

    VITRAIL_INLINE Key key_at(Place y, Place x) const { return {y, x, k_.holds(y, x) ? 0 : 1}; }

    Cut q_, k_;
    const int32_t* routes_;
    const T* weights_;
    Place topk_;
    Place parts_;  // blocks of queries per region
};

}  // namespace vitrail::VITRAIL_ISA
