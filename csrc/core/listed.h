// Attention of single queries, each to keys of a list of its own.
//
// Keys and values lie as rows, each padded with zeros to whole vectors. Queries have no keys in common that a
// tile could share, so a row is multiplied where it lies: a product costs as much as loading the row from the
// first-level cache. Queries therefore take their lists in steps side by side: where lists ascend, as a
// chooser writes them, the rows of one step lie close together whoever names them.
#pragma once

#include <type_traits>

#include "scalar.h"

namespace vitrail::VITRAIL_ISA {

template <class T>
VITRAIL_INLINE constexpr int64_t whole_vectors(int64_t n) {
    return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Rows of numbers that lists name.
template <class T>
struct Rows {
    T* data;
    int64_t stride;  // whole vectors

    VITRAIL_INLINE T* operator[](int64_t row) const { return data + row * stride; }
};

// Calls action(vectors, part, column) for parts of the rows of up to four vectors, which registers hold.
template <class T, class Action>
VITRAIL_INLINE void in_parts(Rows<T> rows, Action action) {
    constexpr int W = kLanes<std::remove_const_t<T>>;
    for (int64_t c = 0; c < rows.stride; c += 4 * W) {
        const Rows<T> part = {rows.data + c, rows.stride};
        switch ((rows.stride - c) / W) {
            case 1:
                action(std::integral_constant<int, 1>(), part, c);
                break;
            case 2:
                action(std::integral_constant<int, 2>(), part, c);
                break;
            case 3:
                action(std::integral_constant<int, 3>(), part, c);
                break;
            default:
                action(std::integral_constant<int, 4>(), part, c);
        }
    }
}

// Copies a row, with zeros up to whole vectors.
template <class S, class T>
VITRAIL_INLINE void widen_row(const S* from, int64_t size, T factor, T* to) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + W <= size; c += W) store(to + c, widen<W>(from + c) * factor);
    for (; c < size; c += 4) store(to + c, widen_some(from + c, size - c) * factor);
    for (; c < whole_vectors<T>(size); c += 4) store(to + c, Vec<T, 4>{});
}

template <class S, class T>
VITRAIL_INLINE void narrow_row(const T* from, int64_t size, T factor, S* to) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + W <= size; c += W) narrow<W>(to + c, load<T, W>(from + c) * factor);
    for (; c < size; c += 4) narrow_some(to + c, load<T, 4>(from + c) * factor, size - c);
}

// Products of x with N vectors of each of `Keys` rows. Each takes an equal share of the lanes, to be summed.
template <class T, int N, int Keys>
VITRAIL_INLINE Vec<T, kLanes<T>> products(const Vec<T, kLanes<T>>* x, Rows<const T> rows,
                                          const int32_t* list) {
    constexpr int W = kLanes<T>;
    if constexpr (Keys == 1) {
        const T* row = rows[*list];
        Vec<T, W> sum = x[0] * load(row);
        for (int j = 1; j < N; ++j) sum += x[j] * load(row + j * W);
        return sum;
    } else {
        return fold<W / Keys, T>(products<T, N, Keys / 2>(x, rows, list),
                                 products<T, N, Keys / 2>(x, rows, list + Keys / 2), Add());
    }
}

template <class T, int N>
__attribute__((noinline)) void multiply_listed_vectors(const T* x, Rows<const T> rows, const int32_t* list,
                                                       int count, bool add, T* to) {
    constexpr int W = kLanes<T>;
    Vec<T, W> part[N];
    for (int j = 0; j < N; ++j) part[j] = load(x + j * W);
    int i = 0;
    for (; i + W <= count; i += W) {
        Vec<T, W> sums = products<T, N, W>(part, rows, list + i);
        if (add) sums += load(to + i);
        store(to + i, sums);
    }
    for (; i < count; i += 4) {
        Vec<T, W> sums = products<T, N, 4>(part, rows, list + i);
        if constexpr (W >= 16) sums = fold<2, T>(sums, sums, Add());
        if constexpr (W >= 8) sums = fold<1, T>(sums, sums, Add());
        for (int j = 0; j < 4; ++j) to[i + j] = add ? to[i + j] + sums[j] : sums[j];
    }
}

// Products of x with the rows of a list. The list holds valid numbers, and `to` has room, up to a multiple
// of 4.
template <class T>
VITRAIL_INLINE void multiply_listed(const T* x, Rows<const T> rows, const int32_t* list, int count, T* to) {
    in_parts(rows, [&](auto vectors, Rows<const T> part, int64_t column) {
        multiply_listed_vectors<T, vectors()>(x + column, part, list, count, column > 0, to);
    });
}

template <class T, int N>
__attribute__((noinline)) void sum_listed_vectors(const T* weights, Rows<const T> rows, const int32_t* list,
                                                  int count, T* to) {
    constexpr int W = kLanes<T>;
    // two sets of sums: one alone would wait for its own additions
    Vec<T, W> even[N], odd[N] = {};
    for (int j = 0; j < N; ++j) even[j] = load(to + j * W);
    int i = 0;
    for (; i + 2 <= count; i += 2) {
        const T *row = rows[list[i]], *next = rows[list[i + 1]];
        const Vec<T, W> weight = broadcast(weights[i]), next_weight = broadcast(weights[i + 1]);
        for (int j = 0; j < N; ++j) {
            even[j] += weight * load(row + j * W);
            odd[j] += next_weight * load(next + j * W);
        }
    }
    if (i < count) {
        const T* row = rows[list[i]];
        const Vec<T, W> weight = broadcast(weights[i]);
        for (int j = 0; j < N; ++j) even[j] += weight * load(row + j * W);
    }
    for (int j = 0; j < N; ++j) store(to + j * W, even[j] + odd[j]);
}

// Adds the weighted sum of the rows of a list.
template <class T>
VITRAIL_INLINE void sum_listed(const T* weights, Rows<const T> rows, const int32_t* list, int count, T* to) {
    in_parts(rows, [&](auto vectors, Rows<const T> part, int64_t column) {
        sum_listed_vectors<T, vectors()>(weights, part, list, count, to + column);
    });
}

template <class T, int N>
__attribute__((noinline)) void add_to_listed_vectors(const T* weights, const T* x, Rows<T> rows,
                                                     const int32_t* list, int count) {
    constexpr int W = kLanes<T>;
    Vec<T, W> part[N];
    for (int j = 0; j < N; ++j) part[j] = load(x + j * W);
    for (int i = 0; i < count; ++i) {
        T* const row = rows[list[i]];
        const Vec<T, W> weight = broadcast(weights[i]);
        for (int j = 0; j < N; ++j) store(row + j * W, load(row + j * W) + weight * part[j]);
    }
}

// Adds x to the rows of a list, times each one's weight.
template <class T>
VITRAIL_INLINE void add_to_listed(const T* weights, const T* x, Rows<T> rows, const int32_t* list,
                                  int count) {
    in_parts(rows, [&](auto vectors, Rows<T> part, int64_t column) {
        add_to_listed_vectors<T, vectors()>(weights, x + column, part, list, count);
    });
}

// A block of queries of one head with their lists. Scores are kept in units of log2.
template <class T>
class ListedQueries {
    static constexpr int W = kLanes<T>;
    static constexpr int kStep = 64;  // keys that a query takes before the next query has its turn
    static constexpr int kMaxRows = 32;
    using V = Vec<T, W>;

  public:
    // Queries of lists of up to `slots` keys that fit the second-level cache together.
    VITRAIL_INLINE static int rows_together(int64_t slots) {
        const int64_t rows = (int64_t(1) << 18) / (slots * int64_t(sizeof(T) + sizeof(int32_t)) + 1);
        return rows < 4 ? 4 : rows > kMaxRows ? kMaxRows : int(rows);
    }

    // Bytes of scratch that the constructor must be given.
    VITRAIL_INLINE static int64_t scratch_size(int64_t head_dim, int64_t value_dim, int64_t slots) {
        return rows_together(slots) * (int64_t(sizeof(T)) * (whole_vectors<T>(head_dim) +
                                                             whole_vectors<T>(value_dim) + slot_row(slots)) +
                                       int64_t(sizeof(int32_t)) * slot_row(slots));
    }

    VITRAIL_INLINE ListedQueries(int64_t head_dim, int64_t value_dim, int64_t slots, void* scratch)
        : head_dim_(head_dim),
          value_dim_(value_dim),
          slot_row_(slot_row(slots)),
          q_{static_cast<T*>(scratch), whole_vectors<T>(head_dim)},
          out_{q_[rows_together(slots)], whole_vectors<T>(value_dim)},
          scores_{out_[rows_together(slots)], slot_row_},
          lists_(reinterpret_cast<int32_t*>(scores_[rows_together(slots)])) {}

    template <class S>
    VITRAIL_INLINE void load_query(int row, const S* from, T scale) {
        widen_row(from, head_dim_, scale * T(1.44269504088896340736), q_[row]);
    }

    // Where to write a query's list: `slots` numbers and a whole vector more.
    VITRAIL_INLINE int32_t* list(int row) const { return lists_ + row * slot_row_; }

    // Says how many numbers the list holds.
    VITRAIL_INLINE void set_count(int row, int count) {
        count_[row] = count;
        for (int i = count; i % 4 != 0; ++i) list(row)[i] = 0;
    }

    // Attends with queries [0, rows), in place of all earlier ones. `zero_keys` keys of zeros, whose values
    // are zeros, count with each list.
    VITRAIL_INLINE void attend(int rows, Rows<const T> keys, Rows<const T> values, T zero_keys = 0) {
        const int most = most_keys(rows);
        for (int step = 0; step < most; step += kStep)
            for (int r = 0; r < rows; ++r)
                if (const int n = keys_in_step(r, step); n > 0)
                    multiply_listed(q_[r], keys, list(r) + step, n, scores_[r] + step);
        for (int r = 0; r < rows; ++r) {
            soften(r, zero_keys);
            for (int64_t c = 0; c < out_.stride; c += W) store(out_[r] + c, V{});
        }
        for (int step = 0; step < most; step += kStep)
            for (int r = 0; r < rows; ++r)
                if (const int n = keys_in_step(r, step); n > 0)
                    sum_listed(scores_[r] + step, values, list(r) + step, n, out_[r]);
    }

    // A query without keys gives zeros.
    template <class S>
    VITRAIL_INLINE void store_output(int row, S* to) const {
        narrow_row(out_[row], value_dim_, sum_[row] > 0 || sum_[row] != sum_[row] ? T(1) / sum_[row] : T(0),
                   to);
    }

    VITRAIL_INLINE T log_sum_exp(int row) const {
        constexpr T ln2 = T(0.69314718055994530942);
        if constexpr (sizeof(T) == 4) return ln2 * (max_[row] + __builtin_log2f(sum_[row]));
        return ln2 * (max_[row] + T(__builtin_log2(sum_[row])));
    }

  private:
    VITRAIL_INLINE static int64_t slot_row(int64_t slots) { return whole_vectors<T>(slots) + 16; }

    VITRAIL_INLINE int most_keys(int rows) const {
        int most = 0;
        for (int r = 0; r < rows; ++r)
            if (count_[r] > most) most = count_[r];
        return most;
    }

    VITRAIL_INLINE int keys_in_step(int row, int step) const {
        return count_[row] - step < kStep ? count_[row] - step : kStep;
    }

    // Turns a query's scores into weights relative to their maximum.
    VITRAIL_INLINE void soften(int row, T zero_keys) {
        T* const scores = scores_[row];
        const int count = count_[row];
        const int padded = int(whole_vectors<T>(count));
        for (int i = count; i < padded; ++i) scores[i] = -T(__builtin_inf());
        V top = broadcast(zero_keys > 0 ? T(0) : -T(__builtin_inf())), total = {};
        for (int i = 0; i < padded; i += W) top = maximum(top, load(scores + i));
        top = reduce<T>(top, Max());
        for (int i = 0; i < padded; i += W) {
            const V p = exp2_negative<W>(load(scores + i) - top);
            total += p;
            store(scores + i, p);
        }
        max_[row] = top[0];
        sum_[row] = reduce<T>(total, Add())[0];
        if (zero_keys > 0) sum_[row] += zero_keys * exp2_negative<W>(-top)[0];
    }

    const int64_t head_dim_, value_dim_, slot_row_;
    const Rows<T> q_, out_, scores_;
    int32_t* const lists_;
    int count_[kMaxRows];
    T max_[kMaxRows], sum_[kMaxRows];
};

}  // namespace vitrail::VITRAIL_ISA
