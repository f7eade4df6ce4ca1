// Addressing policy of bi-level routing attention: a query looks at the regions that its own region chose.
// Keys past the grid are zeros.
#pragma once

#include "../core/block_addresses.h"
#include "../ops/routed_attention.h"
#include "rectangle.h"

namespace vitrail::VITRAIL_ISA {

template <class T>
class RoutedRegions {
  public:
    using Arguments = RoutedAttention;

    VITRAIL_INLINE explicit RoutedRegions(const RoutedAttention& a)
        : q_(a.q_regions),
          k_(a.k_regions),
          routes_(a.routes),
          weights_(static_cast<const T*>(a.weights)),
          topk_(a.topk),
          parts_((q_.size + kQueryBlock - 1) / kQueryBlock) {}

    VITRAIL_INLINE int64_t query_blocks() const { return q_.count * parts_; }
    VITRAIL_INLINE int64_t key_blocks() const { return k_.count; }
    VITRAIL_INLINE int64_t largest_key_block() const { return k_.size; }
    VITRAIL_INLINE int64_t visits() const { return query_blocks() * topk_; }  // of one image
    VITRAIL_INLINE int64_t most_visits() const { return topk_; }              // of one block of queries
    VITRAIL_INLINE bool weighted() const { return weights_ != nullptr; }
    VITRAIL_INLINE bool biased() const { return false; }

    // Writes the queries of a block that lie on the grid; returns how many.
    VITRAIL_OUTLINE int queries(int64_t block, Query* to) const {
        const int64_t part = block % parts_;
        const int64_t first = part_begin(q_.size, parts_, part);
        int n = 0;
        rectangle(q_, block / parts_)
            .each(first, part_begin(q_.size, parts_, part + 1) - first, [&](int64_t, int64_t y, int64_t x) {
                if (y < q_.grid_height && x < q_.grid_width) to[n++] = {y, x, 0};
            });
        return n;
    }

    VITRAIL_INLINE int64_t keys_in(int64_t) const { return k_.size; }

    VITRAIL_OUTLINE void keys(int64_t block, int64_t first, int64_t count, Key* to) const {
        rectangle(k_, block).each(first, count, [&](int64_t i, int64_t y, int64_t x) {
            to[i] = {y, x, y < k_.grid_height && x < k_.grid_width ? 0 : 1};
        });
    }

    // Calls visit(block of keys, weight, slot) for each block that the queries of a block look at.
    template <class Visit>
    VITRAIL_INLINE void for_each_visit(int64_t image, int64_t block, Visit visit) const {
        const int64_t first = block / parts_ * topk_, of_image = image * slots();
        for (int64_t slot = first; slot < first + topk_; ++slot)
            visit(int64_t(routes_[of_image + slot]), weights_ ? weights_[of_image + slot] : T(1), slot);
    }
    VITRAIL_INLINE int64_t slots() const { return q_.count * topk_; }

    VITRAIL_INLINE void bias(int64_t, int64_t, int64_t, T*) const {}
    VITRAIL_INLINE void add_bias(const T*, int64_t, int64_t, T*) const {}

    // Any region may look at any other.
    VITRAIL_INLINE int64_t units() const { return 1; }

  private:
    VITRAIL_INLINE static Rectangle rectangle(const Regions& regions, int64_t region) {
        return {region / regions.across * regions.height, region % regions.across * regions.width,
                regions.height, regions.width};
    }

    const Regions q_, k_;
    const int32_t* const routes_;
    const T* const weights_;
    const int64_t topk_;
    const int64_t parts_;  // blocks of queries per region
};

}  // namespace vitrail::VITRAIL_ISA
