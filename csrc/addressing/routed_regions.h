// Addressing policy of bi-level routing attention: a query looks at the regions that its own region chose.
//
// An addressing policy answers four questions, and nothing else in the library knows the answers: how many
// blocks of queries and of keys there are, which positions a block of queries covers, which positions a block
// of keys covers (or that one is a zero vector), and which blocks of keys a block of queries visits.
#pragma once

#include "../core/attention.h"
#include "../ops/routed_attention.h"

namespace vitrail::VITRAIL_ISA {

struct Position {
    int64_t row, column;  // row < 0: past the grid, a zero vector
};

template <class T>
class RoutedRegions {
  public:
    VITRAIL_INLINE explicit RoutedRegions(const RoutedAttention& a)
        : q_(a.q_regions),
          k_(a.k_regions),
          routes_(a.routes),
          weights_(static_cast<const T*>(a.weights)),
          topk_(a.topk),
          parts_((q_.size + kQueryBlock - 1) / kQueryBlock) {}

    VITRAIL_INLINE int64_t query_blocks() const { return q_.count * parts_; }
    VITRAIL_INLINE int64_t key_blocks() const { return k_.count; }
    VITRAIL_INLINE int64_t keys_per_block() const { return k_.size; }
    VITRAIL_INLINE int64_t visits() const { return query_blocks() * topk_; }  // of one image
    VITRAIL_INLINE bool weighted() const { return weights_ != nullptr; }

    // Writes the positions of a block's queries that lie on the grid; returns how many.
    VITRAIL_INLINE int queries(int64_t block, Position* to) const {
        const int64_t region = block / parts_, first = block % parts_ * kQueryBlock;
        Position all[kQueryBlock];
        const int64_t left = q_.size - first;
        const int count = left < kQueryBlock ? int(left) : kQueryBlock;
        positions(q_, region, first, count, all);
        int n = 0;
        for (int i = 0; i < count; ++i)
            if (all[i].row >= 0) to[n++] = all[i];
        return n;
    }

    // Writes the positions of keys [first, first + count) of a block.
    VITRAIL_INLINE void keys(int64_t block, int64_t first, int count, Position* to) const {
        positions(k_, block, first, count, to);
    }

    // Calls visit(block of keys, weight) for each block that the queries of a block look at.
    template <class Visit>
    VITRAIL_INLINE void for_each_visit(int64_t image, int64_t block, Visit visit) const {
        const int64_t slot = (image * q_.count + block / parts_) * topk_;
        for (int64_t j = slot; j < slot + topk_; ++j)
            visit(int64_t(routes_[j]), weights_ ? weights_[j] : T(1));
    }

  private:
    VITRAIL_INLINE static void positions(const Regions& regions, int64_t region, int64_t first, int count,
                                         Position* to) {
        const int64_t top = region / regions.across * regions.height;
        const int64_t left = region % regions.across * regions.width;
        int64_t y = first / regions.width, x = first % regions.width;
        for (int i = 0; i < count; ++i) {
            const bool inside = top + y < regions.grid_height && left + x < regions.grid_width;
            to[i] = {inside ? top + y : -1, left + x};
            if (++x == regions.width) {
                x = 0;
                ++y;
            }
        }
    }

    const Regions q_, k_;
    const int32_t* const routes_;
    const T* const weights_;
    const int64_t topk_;
    const int64_t parts_;  // blocks of queries per region
};

}  // namespace vitrail::VITRAIL_ISA
