// Products of maps whose columns are the channels of one head, and whose rows are tokens: X^T Y, a sum over
// tokens, and X M for a matrix M of that head.
#pragma once

#include "panels.h"
#include "tensors.h"

namespace vitrail::VITRAIL_ISA {

// The tokens of an image, as they follow each other in memory, from a channel on.
template <class S>
struct TokenRows {
    S* data;
    int64_t row, column, width;

    VITRAIL_INLINE TokenRows(const Grid& grid, int64_t image, int64_t channel, int64_t width)
        : data(static_cast<S*>(grid.data) + image * grid.image + channel),
          row(grid.row),
          column(grid.column),
          width(width) {}

    // Whether one stride leads from each token to the next.
    VITRAIL_INLINE bool even() const { return row == width * column; }
    VITRAIL_INLINE S* at(int64_t token) const {
        return even() ? data + token * column : data + token / width * row + token % width * column;
    }
};

// Sums and matrices are rows of `columns` numbers, the channels padded to whole vectors.
template <class S>
class TokenProducts {
    using T = Compute<S>;
    using P = Packed<S>;
    static constexpr int W = kLanes<T>, D = Product<P>::kDepth;
    static constexpr int64_t kTokens = 64;  // multiplied at a time: what is packed of them fits L1
    // Numbers are multiplied as they are stored: where they need not be padded, they need not be packed.
    static constexpr bool kAsTheyLie = sizeof(P) == sizeof(S);

  public:
    VITRAIL_INLINE explicit TokenProducts(int64_t channels)
        : channels(channels), columns(round_up(channels, W)), rows(round_up(channels, D)) {}

    VITRAIL_INLINE int64_t sums_size() const { return channels * columns; }
    VITRAIL_INLINE int64_t matrix_size() const { return rows * columns; }
    VITRAIL_INLINE int64_t scratch_bytes() const { return kTokens * columns * (2 * sizeof(P) + sizeof(T)); }

    // sums[i][j] = sum over tokens [first, last) of x[i] * y[j]
    void sum(const TokenRows<S>& x, const TokenRows<S>& y, int64_t first, int64_t last, T* sums,
             void* scratch) const {
        P* const packed = static_cast<P*>(scratch);
        const bool direct = kAsTheyLie && D == 1 && columns == channels && x.even() && y.even();
        for (int64_t token = first; token < last; token += kTokens) {
            const int64_t count = last - token < kTokens ? last - token : kTokens, step = D * columns;
            Factors<P> f = {packed, D, step, packed + kTokens * columns, step, (count + D - 1) / D};
            if (direct) {
                f.a = reinterpret_cast<const P*>(x.at(token));
                f.a_step = x.column;
                f.b = reinterpret_cast<const P*>(y.at(token));
                f.b_step = y.column;
            } else {
                pack(x, token, count, packed);
                pack(y, token, count, packed + kTokens * columns);
            }
            multiply<P>(channels, columns / W, f, sums, columns, token > first);
        }
    }

    // to[j] = sum over i of x[i] * matrix[i][j], for tokens [first, last); the matrix is packed.
    void apply(const TokenRows<S>& x, const P* matrix, const TokenRows<S>& to, int64_t first, int64_t last,
               void* scratch) const {
        T* const tile = static_cast<T*>(scratch);
        P* const packed = reinterpret_cast<P*>(tile + kTokens * columns);
        const bool direct = kAsTheyLie && rows == channels && x.even();
        const bool in_place = sizeof(S) == sizeof(T) && columns == channels && to.even();
        for (int64_t token = first; token < last; token += kTokens) {
            const int64_t count = last - token < kTokens ? last - token : kTokens;
            Factors<P> f = {packed, columns, D, matrix, D * columns, rows / D};
            if (direct) {
                f.a = reinterpret_cast<const P*>(x.at(token));
                f.a_row = x.column;
            } else {
                for (int64_t i = 0; i < count; ++i)
                    pack_units(x.at(token + i), channels, T(1), packed + i * columns, columns / D);
            }
            if (in_place) {
                multiply<P>(count, columns / W, f, reinterpret_cast<T*>(to.at(token)), to.column, false);
                continue;
            }
            multiply<P>(count, columns / W, f, tile, columns, false);
            for (int64_t i = 0; i < count; ++i) store_channels(tile + i * columns, to.at(token + i));
        }
    }

    // Packs a matrix of `channels` rows.
    VITRAIL_INLINE void pack_matrix(const T* from, P* to) const {
        for (int64_t i = 0; i < channels; i += D)
            for (int64_t j = 0; j < columns; j += W) {
                Vec<T, W> row[D] = {};
                for (int d = 0; d < D && i + d < channels; ++d) row[d] = load(from + (i + d) * columns + j);
                P* const at = to + i * columns + D * j;
                if constexpr (D == 1)
                    store(at, row[0]);
                else
                    store(at, bfloat16_bits<W>(row[0]) | bfloat16_bits<W>(row[1]) << 16);
            }
    }

    const int64_t channels, columns, rows;

  private:
    VITRAIL_INLINE void pack(const TokenRows<S>& x, int64_t first, int64_t count, P* to) const {
        for (int64_t i = 0; i < count; i += D) {
            if constexpr (D == 1) {
                pack_row(x.at(first + i), channels, T(1), to + i * columns, columns);
            } else {
                const S* pair[2] = {x.at(first + i), i + 1 < count ? x.at(first + i + 1) : nullptr};
                pack_pair(pair, channels, to + i * columns, columns);
            }
        }
    }

    VITRAIL_INLINE void store_channels(const T* from, S* to) const {
        int64_t i = 0;
        for (; i + W <= channels; i += W) narrow<W>(to + i, load(from + i));
        for (; i < channels; i += 4) narrow_some(to + i, load<T, 4>(from + i), channels - i);
    }
};

}  // namespace vitrail::VITRAIL_ISA
