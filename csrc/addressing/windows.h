// Addressing policy of window attention: a query looks at the tokens of its own window.
//
// Windows cover the grid and may reach past it, where there are keys (source 1) but no queries. Shifted ones
// begin at the shift; the pieces that this leaves at both borders are windows of their own. No key belongs to
// two windows: a block of keys is a window, and its queries are cut into blocks.
#pragma once

#include "../ops/window_attention.h"
#include "block_policy.h"

namespace vitrail::VITRAIL_ISA {

template <class T>
class Windows : public OneVisit<T> {
  public:
    using Arguments = WindowAttention;

    VITRAIL_INLINE explicit Windows(const WindowAttention& a)
        : grid_height_(Place(a.grid_height)),
          grid_width_(Place(a.grid_width)),
          height_(Place(a.height)),
          width_(Place(a.width)),
          rows_(Place(a.grid_height), Place(a.height), Place(a.down)),
          columns_(Place(a.grid_width), Place(a.width), Place(a.right)),
          parts_((height_ * width_ + kQueryBlock - 1) / kQueryBlock),
          padded_((a.k[1].data || a.v[1].data) && (a.grid_height % a.height || a.grid_width % a.width)),
          biased_(a.bias != nullptr) {}

    VITRAIL_INLINE Place query_regions() const { return key_blocks(); }
    VITRAIL_INLINE Place parts() const { return parts_; }
    VITRAIL_INLINE Place key_blocks() const { return rows_.count * columns_.count; }
    VITRAIL_INLINE Place largest_key_block() const { return height_ * width_; }
    VITRAIL_INLINE Place largest_query_region() const { return height_ * width_; }
    VITRAIL_INLINE Place slots() const { return key_blocks(); }
    VITRAIL_INLINE bool biased() const { return biased_; }

    VITRAIL_INLINE Rectangle query_region(Place i) const { return rectangle(i); }
    VITRAIL_INLINE bool query_at(Place region, Place y, Place x, Query& to) const {
        to = {y, x, place(region, y, x)};
        return holds(y, x);
    }

    VITRAIL_INLINE Place keys_in(Place block) const { return rectangle(block).size(); }

    VITRAIL_OUTLINE void keys(Place block, Place first, Place count, Key* to) const {
        rectangle(block).each(first, count, [&](Place i, Place y, Place x) { to[i] = key_at(y, x); });
    }
    VITRAIL_INLINE Key key(Place block, Place i) const {
        return rectangle(block).at(i, [&](Place y, Place x) { return key_at(y, x); });
    }

    // Where a query has its biases: calls visit(first key, its place in the tables, count) for the keys of a
    // block. The same for one key: the place of a row, and within it.
    template <class Visit>
    VITRAIL_OUTLINE void each_bias(Place head, Place place, Place block, Visit visit) const {
        const int64_t row = bias_row(head, place);
        const Rectangle r = rectangle(block);
        const Place y0 = rows_.place(block / columns_.count), x0 = columns_.place(block % columns_.count);
        if (r.width == width_) return visit(0, row + y0 * width_, r.size());
        for (Place y = 0; y < r.height; ++y) visit(y * r.width, row + (y0 + y) * width_ + x0, r.width);
    }
    VITRAIL_INLINE int64_t bias_row(Place head, Place place) const {
        const int64_t tokens = int64_t(height_) * width_;
        return (head * tokens + place) * tokens;
    }
    VITRAIL_INLINE Place bias_column(Place block, Place key) const {
        return rectangle(block).at(key, [&](Place y, Place x) { return place(block, y, x); });
    }

    // The key that stands at a place of a window, if that is not cut off there.
    VITRAIL_INLINE bool at_place(Place window, Place place, Key& to) const {
        const Rectangle r = rectangle(window);
        const Place y = place / width_ - rows_.place(window / columns_.count);
        const Place x = place % width_ - columns_.place(window % columns_.count);
        to = key_at(r.top + y, r.left + x);
        return place < height_ * width_ && y >= 0 && y < r.height && x >= 0 && x < r.width;
    }

    // Windows share nothing but the bias and the padding.
    VITRAIL_INLINE Place units() const { return biased_ || padded_ ? 1 : key_blocks(); }

  private:
    // The windows along one side of the grid.
    struct Side {
        Place size, shift, count, length;

        VITRAIL_INLINE Side(Place tokens, Place size, Place shift)
            : size(size),
              shift(shift),
              count((tokens + size - 1) / size + (shift > 0 && tokens > 0)),
              length(Place(round_up(tokens, size))) {}

        VITRAIL_INLINE Place begin(Place i) const {
            if (shift == 0) return i * size;
            return i == 0 ? 0 : i == count ? length : shift + (i - 1) * size;
        }
        // Where the first token of window `i` stands in a window that is not cut off.
        VITRAIL_INLINE Place place(Place i) const { return shift > 0 && i == 0 ? size - shift : 0; }
    };

    VITRAIL_INLINE Rectangle rectangle(Place window) const {
        const Place y = window / columns_.count, x = window % columns_.count;
        return {rows_.begin(y), columns_.begin(x), rows_.begin(y + 1) - rows_.begin(y),
                columns_.begin(x + 1) - columns_.begin(x)};
    }
    VITRAIL_INLINE bool holds(Place y, Place x) const { return y < grid_height_ && x < grid_width_; }
    VITRAIL_INLINE Key key_at(Place y, Place x) const { return {y, x, holds(y, x) ? 0 : 1}; }

    // Of a token, in a window that is not cut off.
    VITRAIL_INLINE Place place(Place window, Place y, Place x) const {
        const Place row = window / columns_.count, column = window % columns_.count;
        return (y - rows_.begin(row) + rows_.place(row)) * width_ + x - columns_.begin(column) +
               columns_.place(column);
    }

    Place grid_height_, grid_width_, height_, width_;
    Side rows_, columns_;
    Place parts_;  // blocks of queries per window
    bool padded_;  // with a key or a value of its own
    bool biased_;
};

}  // namespace vitrail::VITRAIL_ISA
