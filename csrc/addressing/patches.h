// Addressing policy of semantic attention: the semantic tokens of a window look at one another and at a patch
// of the image.
//
// There is one patch for each window; patches are spread evenly over the image, and may overlap. A block of
// keys are the tokens of a window (source 1), then those of its patch (source 0).
#pragma once

#include "../core/block_addresses.h"
#include "../ops/semantic_attention.h"
#include "rectangle.h"

namespace vitrail::VITRAIL_ISA {

template <class T>
class Patches {
  public:
    using Arguments = SemanticAttention;

    VITRAIL_INLINE explicit Patches(const SemanticAttention& a)
        : window_{0, 0, a.window_height, a.window_width},
          patch_{0, 0, a.patch_height, a.patch_width},
          down_(a.grid_height / a.window_height),
          across_(a.grid_width / a.window_width),
          free_rows_(a.image_height - a.patch_height),
          free_columns_(a.image_width - a.patch_width),
          parts_((window_.size() + kQueryBlock - 1) / kQueryBlock) {}

    VITRAIL_INLINE int64_t query_blocks() const { return key_blocks() * parts_; }
    VITRAIL_INLINE int64_t key_blocks() const { return down_ * across_; }
    VITRAIL_INLINE int64_t largest_key_block() const { return window_.size() + patch_.size(); }
    VITRAIL_INLINE int64_t visits() const { return query_blocks(); }  // of one image
    VITRAIL_INLINE int64_t most_visits() const { return 1; }          // of one block of queries
    VITRAIL_INLINE bool weighted() const { return false; }
    VITRAIL_INLINE bool biased() const { return false; }

    VITRAIL_OUTLINE int queries(int64_t block, Query* to) const {
        const int64_t part = block % parts_, size = window_.size();
        const int64_t first = part_begin(size, parts_, part);
        const int64_t count = part_begin(size, parts_, part + 1) - first;
        window(block / parts_).each(first, count, [&](int64_t i, int64_t y, int64_t x) {
            to[i] = {y, x, 0};
        });
        return int(count);
    }

    VITRAIL_INLINE int64_t keys_in(int64_t) const { return largest_key_block(); }

    VITRAIL_OUTLINE void keys(int64_t block, int64_t first, int64_t count, Key* to) const {
        const int64_t own = window_.size();
        if (first < own) {
            const int64_t some = own - first < count ? own - first : count;
            window(block).each(first, some, [&](int64_t i, int64_t y, int64_t x) { to[i] = {y, x, 1}; });
            first += some;
            count -= some;
            to += some;
        }
        patch(block).each(first - own, count, [&](int64_t i, int64_t y, int64_t x) { to[i] = {y, x, 0}; });
    }

    // Calls visit(block of keys, weight, slot) for each block that the queries of a block look at.
    template <class Visit>
    VITRAIL_INLINE void for_each_visit(int64_t, int64_t block, Visit visit) const {
        visit(block / parts_, T(1), 0);
    }
    VITRAIL_INLINE int64_t slots() const { return 0; }

    VITRAIL_INLINE void bias(int64_t, int64_t, int64_t, T*) const {}
    VITRAIL_INLINE void add_bias(const T*, int64_t, int64_t, T*) const {}

    // Patches overlap.
    VITRAIL_INLINE int64_t units() const { return 1; }

  private:
    VITRAIL_INLINE Rectangle window(int64_t i) const {
        return {i / across_ * window_.height, i % across_ * window_.width, window_.height, window_.width};
    }

    VITRAIL_INLINE Rectangle patch(int64_t i) const {
        const int64_t rows = down_ > 1 ? down_ - 1 : 1, columns = across_ > 1 ? across_ - 1 : 1;
        return {i / across_ * free_rows_ / rows, i % across_ * free_columns_ / columns, patch_.height,
                patch_.width};
    }

    const Rectangle window_, patch_;
    const int64_t down_, across_;             // windows
    const int64_t free_rows_, free_columns_;  // of the image, beside a patch
    const int64_t parts_;                     // blocks of queries per window
};

}  // namespace vitrail::VITRAIL_ISA
