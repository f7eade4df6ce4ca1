// Addressing policy of semantic attention: the semantic tokens of a window look at one another and at a patch
// of the image.
//
// There is one patch for each window; patches are spread evenly over the image, and may overlap. A block of
// keys are the tokens of a window (source 1), then those of its patch (source 0).
#pragma once

#include "../ops/semantic_attention.h"
#include "block_policy.h"

namespace vitrail::VITRAIL_ISA {

template <class T>
class Patches : public OneVisit<T>, public Unbiased {
  public:
    using Arguments = SemanticAttention;

    VITRAIL_INLINE explicit Patches(const SemanticAttention& a)
        : window_{0, 0, Place(a.window_height), Place(a.window_width)},
          patch_{0, 0, Place(a.patch_height), Place(a.patch_width)},
          down_(Place(a.grid_height / a.window_height)),
          across_(Place(a.grid_width / a.window_width)),
          free_rows_(Place(a.image_height - a.patch_height)),
          free_columns_(Place(a.image_width - a.patch_width)),
          parts_((window_.size() + kQueryBlock - 1) / kQueryBlock) {}

    VITRAIL_INLINE Place query_regions() const { return key_blocks(); }
    VITRAIL_INLINE Place parts() const { return parts_; }
    VITRAIL_INLINE Place key_blocks() const { return down_ * across_; }
    VITRAIL_INLINE Place largest_key_block() const { return window_.size() + patch_.size(); }
    VITRAIL_INLINE Place largest_query_region() const { return window_.size(); }
    VITRAIL_INLINE Place slots() const { return key_blocks(); }

    VITRAIL_INLINE Rectangle query_region(Place i) const { return window(i); }
    VITRAIL_INLINE bool query_at(Place, Place y, Place x, Query& to) const {
        to = {y, x, 0};
        return true;
    }

    VITRAIL_INLINE Place keys_in(Place) const { return largest_key_block(); }

    VITRAIL_OUTLINE void keys(Place block, Place first, Place count, Key* to) const {
        const Place own = window_.size();
        if (first < own) {
            const Place some = own - first < count ? own - first : count;
            window(block).each(first, some, [&](Place i, Place y, Place x) { to[i] = {y, x, 1}; });
            first += some;
            count -= some;
            to += some;
        }
        patch(block).each(first - own, count, [&](Place i, Place y, Place x) { to[i] = {y, x, 0}; });
    }
    VITRAIL_INLINE Key key(Place block, Place i) const {
        const Place own = window_.size();
        const int source = i < own ? 1 : 0;
        return (source ? window(block) : patch(block)).at(i - (source ? 0 : own), [&](Place y, Place x) {
            return Key{y, x, source};
        });
    }

    // Calls visit(block of keys, key) for every patch that a token of the image is in.
    template <class Visit>
    VITRAIL_INLINE void each_block_with(Place y, Place x, Visit visit) const {
        for (Place block = 0; block < key_blocks(); ++block) {
            const Rectangle r = patch(block);
            if (y < r.top || y >= r.top + r.height) {
                block += across_ - 1 - block % across_;  // nor is it in the others of this row
                continue;
            }
            if (x >= r.left && x < r.left + r.width)
                visit(block, window_.size() + (y - r.top) * r.width + x - r.left);
        }
    }

    // Patches overlap.
    VITRAIL_INLINE Place units() const { return 1; }

  private:
    VITRAIL_INLINE Rectangle window(Place i) const {
        return {i / across_ * window_.height, i % across_ * window_.width, window_.height, window_.width};
    }

    VITRAIL_INLINE Rectangle patch(Place i) const {
        const Place rows = down_ > 1 ? down_ - 1 : 1, columns = across_ > 1 ? across_ - 1 : 1;
        return {Place(int64_t(i / across_) * free_rows_ / rows),
                Place(int64_t(i % across_) * free_columns_ / columns), patch_.height, patch_.width};
    }

    Rectangle window_, patch_;
    Place down_, across_;             // windows
    Place free_rows_, free_columns_;  // of the image, beside a patch
    Place parts_;                     // blocks of queries per window
};

}  // namespace vitrail::VITRAIL_ISA
