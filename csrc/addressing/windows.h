// Addressing policy of window attention: a query looks at the tokens of its own window.
//
// Windows cover the grid and may reach past it, where there are keys (source 1) but no queries. Shifted ones
// begin at the shift; the pieces that this leaves at both borders are windows of their own. No key belongs to
// two windows: a block of keys is a window, and its queries are cut into blocks.
#pragma once

#include "../core/block_addresses.h"
#include "../ops/window_attention.h"
#include "rectangle.h"

namespace vitrail::VITRAIL_ISA {

template <class T>
class Windows {
  public:
    using Arguments = WindowAttention;

    VITRAIL_INLINE explicit Windows(const WindowAttention& a)
        : grid_height_(a.grid_height),
          grid_width_(a.grid_width),
          height_(a.height),
          width_(a.width),
          rows_(a.grid_height, a.height, a.down),
          columns_(a.grid_width, a.width, a.right),
          parts_((a.height * a.width + kQueryBlock - 1) / kQueryBlock),
          padded_((a.k[1].data || a.v[1].data) && (a.grid_height % a.height || a.grid_width % a.width)),
          bias_(static_cast<const T*>(a.bias)) {}

    VITRAIL_INLINE int64_t query_blocks() const { return key_blocks() * parts_; }
    VITRAIL_INLINE int64_t key_blocks() const { return rows_.count * columns_.count; }
    VITRAIL_INLINE int64_t largest_key_block() const { return height_ * width_; }
    VITRAIL_INLINE int64_t visits() const { return query_blocks(); }  // of one image
    VITRAIL_INLINE int64_t most_visits() const { return 1; }          // of one block of queries
    VITRAIL_INLINE bool weighted() const { return false; }
    VITRAIL_INLINE bool biased() const { return bias_ != nullptr; }

    // Writes the queries of a block that lie on the grid; returns how many.
    VITRAIL_OUTLINE int queries(int64_t block, Query* to) const {
        const Rectangle window = rectangle(block / parts_);
        const int64_t part = block % parts_, size = window.size();
        const int64_t first = part_begin(size, parts_, part);
        const int64_t y0 = rows_.place(block / parts_ / columns_.count) - window.top;
        const int64_t x0 = columns_.place(block / parts_ % columns_.count) - window.left;
        int n = 0;
        window.each(first, part_begin(size, parts_, part + 1) - first, [&](int64_t, int64_t y, int64_t x) {
            if (y < grid_height_ && x < grid_width_) to[n++] = {y, x, (y0 + y) * width_ + x0 + x};
        });
        return n;
    }

    VITRAIL_INLINE int64_t keys_in(int64_t block) const { return rectangle(block).size(); }

    VITRAIL_OUTLINE void keys(int64_t block, int64_t first, int64_t count, Key* to) const {
        rectangle(block).each(first, count, [&](int64_t i, int64_t y, int64_t x) {
            to[i] = {y, x, y < grid_height_ && x < grid_width_ ? 0 : 1};
        });
    }

    // Calls visit(block of keys, weight, slot) for each block that the queries of a block look at.
    template <class Visit>
    VITRAIL_INLINE void for_each_visit(int64_t, int64_t block, Visit visit) const {
        visit(block / parts_, T(1), 0);
    }
    VITRAIL_INLINE int64_t slots() const { return 0; }

    // Writes what is added to the scores of a query, by its place, with the keys of a block.
    VITRAIL_OUTLINE void bias(int64_t head, int64_t place, int64_t block, T* to) const {
        const T* const row = bias_ + (head * height_ * width_ + place) * height_ * width_;
        each_run(block, [&](int64_t key, int64_t key_place, int64_t count) {
            int64_t i = 0;
            for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + key + i, load(row + key_place + i));
            for (; i < count; ++i) to[key + i] = row[key_place + i];
        });
    }

    // Adds what such a row holds to a table of all places.
    VITRAIL_OUTLINE void add_bias(const T* from, int64_t place, int64_t block, T* table) const {
        T* const row = table + place * height_ * width_;
        each_run(block, [&](int64_t key, int64_t key_place, int64_t count) {
            for (int64_t i = 0; i < count; ++i) row[key_place + i] += from[key + i];
        });
    }

    // Windows share nothing but the bias and the padding.
    VITRAIL_INLINE int64_t units() const { return bias_ || padded_ ? 1 : key_blocks(); }

  private:
    // The windows along one side of the grid.
    struct Side {
        int64_t size, shift, count, length;

        VITRAIL_INLINE Side(int64_t tokens, int64_t size, int64_t shift)
            : size(size),
              shift(shift),
              count((tokens + size - 1) / size + (shift > 0 && tokens > 0)),
              length(round_up(tokens, size)) {}

        VITRAIL_INLINE int64_t begin(int64_t i) const {
            if (shift == 0) return i * size;
            return i == 0 ? 0 : i == count ? length : shift + (i - 1) * size;
        }
        // Where the first token of window `i` stands in a window that is not cut off.
        VITRAIL_INLINE int64_t place(int64_t i) const { return shift > 0 && i == 0 ? size - shift : 0; }
    };

    VITRAIL_INLINE Rectangle rectangle(int64_t window) const {
        const int64_t y = window / columns_.count, x = window % columns_.count;
        return {rows_.begin(y), columns_.begin(x), rows_.begin(y + 1) - rows_.begin(y),
                columns_.begin(x + 1) - columns_.begin(x)};
    }

    // Calls visit(key, place, count) for stretches of keys of a window that lie in one row of places.
    template <class Visit>
    VITRAIL_INLINE void each_run(int64_t window, Visit visit) const {
        const Rectangle r = rectangle(window);
        if (r.width == width_) return visit(0, rows_.place(window / columns_.count) * width_, r.size());
        const int64_t y0 = rows_.place(window / columns_.count);
        const int64_t x0 = columns_.place(window % columns_.count);
        for (int64_t y = 0; y < r.height; ++y) visit(y * r.width, (y0 + y) * width_ + x0, r.width);
    }

    const int64_t grid_height_, grid_width_, height_, width_;
    const Side rows_, columns_;
    const int64_t parts_;  // blocks of queries per window
    const bool padded_;    // with a key or a value of its own
    const T* const bias_;
};

}  // namespace vitrail::VITRAIL_ISA
