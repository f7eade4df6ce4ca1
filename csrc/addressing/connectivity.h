// Addressing policy of Sparsifiner: a query looks at the keys where its mixture of basis rows is largest.
#pragma once

#include "../core/select.h"
#include "../ops/connectivity.h"

namespace vitrail::VITRAIL_ISA {

// The rows that are mixed: |basis| of the keys, small entries zero, each row padded to whole vectors.
template <class T>
class BasisRows {
  public:
    static constexpr int kTogether = 64;  // keys that one task prepares
    static constexpr int kQuads = 4;      // groups of four keys that fill a cache line

    VITRAIL_INLINE explicit BasisRows(const Connectivity& c) : c_(c) {}

    VITRAIL_INLINE int64_t stride() const { return (c_.keys + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
    VITRAIL_INLINE int64_t size() const { return c_.rows * stride(); }
    VITRAIL_INLINE int64_t tasks() const { return (c_.keys + kTogether - 1) / kTogether; }

    VITRAIL_INLINE void prepare(int64_t image, int64_t task, T* rows) const {
        const int64_t first = task * kTogether;
        const int64_t end = stride() - first < kTogether ? stride() : first + kTogether;
        switch (c_.basis_storage) {
            case Storage::kFloat64:
                return copy(static_cast<const double*>(c_.basis), image, first, end, rows);
            case Storage::kBFloat16:
                return copy(static_cast<const BFloat16*>(c_.basis), image, first, end, rows);
            case Storage::kFloat16:
                return copy(static_cast<const Float16*>(c_.basis), image, first, end, rows);
            default:
                return copy(static_cast<const float*>(c_.basis), image, first, end, rows);
        }
    }

  private:
    // Four rows of four keys at a time, transposed: the numbers of a key are neighbours in the parameter that
    // the basis is a view of.
    template <class S>
    VITRAIL_INLINE void copy(const S* basis, int64_t image, int64_t first, int64_t end, T* to) const {
        for (int64_t key = first; key < end; key += 4 * kQuads) {
            const S* from[4 * kQuads] = {};
            for (int i = 0; i < 4 * kQuads && key + i < c_.keys; ++i)
                from[i] = basis + token(image, key + i) * c_.basis_token;
            for (int64_t r = 0; r < c_.rows; r += 4)
                for (int quad = 0; quad < 4 * kQuads && key + quad < end; quad += 4) {
                    Vec<T, 4> x[4] = {};
                    for (int i = 0; i < 4; ++i)
                        if (from[quad + i]) x[i] = entries(from[quad + i], r, c_.rows - r);
                    transpose(x);
                    for (int i = 0; i < 4 && r + i < c_.rows; ++i)
                        store(to + (r + i) * stride() + key + quad, x[i]);
                }
        }
    }

    // Entries of four rows, which `left` may cut off.
    template <class S>
    VITRAIL_INLINE Vec<T, 4> entries(const S* from, int64_t row, int64_t left) const {
        Vec<Compute<S>, 4> wide;
        if (c_.basis_row == 1) {
            wide = widen_some(from + row, left);
        } else {
            S some[4] = {};
            for (int i = 0; i < 4 && i < left; ++i) some[i] = from[(row + i) * c_.basis_row];
            wide = widen<4>(some);
        }
        const Vec<T, 4> x = __builtin_convertvector(wide, Vec<T, 4>);
        const Vec<T, 4> magnitude = x < 0 ? -x : x;
        return magnitude <= T(c_.basis_threshold) ? Vec<T, 4>{} : magnitude;
    }

    VITRAIL_INLINE static void transpose(Vec<T, 4> (&x)[4]) {
        constexpr std::make_integer_sequence<int, 4> quad;
        const Vec<T, 4> even[2] = {every_other<T, 4, 1, 0>(x[0], x[1], quad),
                                   every_other<T, 4, 1, 0>(x[2], x[3], quad)};
        const Vec<T, 4> odd[2] = {every_other<T, 4, 1, 1>(x[0], x[1], quad),
                                  every_other<T, 4, 1, 1>(x[2], x[3], quad)};
        x[0] = every_other<T, 4, 1, 0>(even[0], even[1], quad);
        x[1] = every_other<T, 4, 1, 0>(odd[0], odd[1], quad);
        x[2] = every_other<T, 4, 1, 1>(even[0], even[1], quad);
        x[3] = every_other<T, 4, 1, 1>(odd[0], odd[1], quad);
    }

    VITRAIL_INLINE int64_t token(int64_t image, int64_t key) const {
        if (!c_.candidates) return key;
        const int64_t at = image * c_.candidates_image + key * c_.candidates_key;
        const int64_t token = c_.wide_candidates ? static_cast<const int64_t*>(c_.candidates)[at]
                                                 : static_cast<const int32_t*>(c_.candidates)[at];
        if (token >= 0 && token < c_.tokens) return token;
        __atomic_store_n(c_.wrong_candidate, true, __ATOMIC_RELAXED);
        return 0;
    }

    const Connectivity& c_;
};

// Chooses the keys of one query after another.
template <class T>
class Chooser {
    static constexpr int W = kLanes<T>;
    static constexpr int kMixed = 8;  // rows that are mixed in one pass
    using V = Vec<T, W>;
    using I = Vec<Order<T>, W>;

  public:
    // Numbers that a row of logits must have room for.
    VITRAIL_INLINE static int64_t logit_row(const Connectivity& c) { return (c.rows + W - 1) / W * W; }

    // Bytes of scratch that the constructor must be given.
    VITRAIL_INLINE static int64_t scratch_size(const Connectivity& c) {
        return int64_t(sizeof(T)) * (3 * logit_row(c) + BasisRows<T>(c).stride()) +
               int64_t(sizeof(int32_t)) * (logit_row(c) + 16);
    }

    VITRAIL_INLINE Chooser(const Connectivity& c, void* scratch)
        : c_(c),
          logit_row_(logit_row(c)),
          score_row_(BasisRows<T>(c).stride()),
          exponentials_(static_cast<T*>(scratch)),
          coefficients_(exponentials_ + logit_row_),
          logits_(reinterpret_cast<Order<T>*>(coefficients_ + logit_row_)),
          scores_(logits_ + logit_row_),
          kept_(reinterpret_cast<int32_t*>(scores_ + score_row_)) {}

    // Writes the numbers of a query's keys, ascending; returns how many there are. `to` has room for a vector
    // more than that. The row of logits is overwritten beyond its end.
    VITRAIL_INLINE int choose(T* logits, const T* rows, int32_t* to) {
        const int kept = keep_coefficients(logits);
        T sum = 0;
        for (int i = 0; i < kept; ++i) sum += coefficients_[i];
        score_cut_.aim(T(0), sum, c_.num_keys);
        int64_t above[2] = {};
        mix(kept, rows, above);
        if (c_.num_keys == 0) return above_threshold(to);
        const Cut<T> cut = score_cut_.find(scores_, score_row_, c_.keys, c_.num_keys, above);
        return int(write_places<T>(scores_, score_row_, cut, to));
    }

  private:
    // The coefficients that count, and in which rows they stand; returns how many.
    VITRAIL_INLINE int keep_coefficients(T* logits) {
        constexpr T log2e = T(1.44269504088896340736);
        for (int64_t i = c_.rows; i < logit_row_; ++i) logits[i] = logits[0];
        V top = load(logits), sum = {}, squares = {}, total = {};
        for (int64_t i = 0; i < logit_row_; i += W) {
            const V logit = load(logits + i);
            top = maximum(top, logit);
            sum += logit;
            squares += logit * logit;
            store(logits_ + i, ordered<T>(logit));
        }
        top = reduce<T>(top, Max());
        const T mean = reduce<T>(sum, Add())[0] / T(logit_row_);
        const T variance = reduce<T>(squares, Add())[0] / T(logit_row_) - mean * mean;
        logit_cut_.aim(mean, root(variance), c_.num_coefficients);
        for (int64_t i = c_.rows; i < logit_row_; ++i) {
            logits[i] = -T(__builtin_inf());
            logits_[i] = kLeast<T>;
        }
        I above[2] = {};
        for (int64_t i = 0; i < logit_row_; i += W) {
            const V e = exp2_negative<W>((load(logits + i) - top) * log2e);
            total += e;
            store(exponentials_ + i, e);
            for (int j = 0; j < 2; ++j) above[j] -= load<Order<T>, W>(logits_ + i) > logit_cut_.guess(j);
        }
        const T scale = T(1) / reduce<T>(total, Add())[0];
        const bool some = c_.num_coefficients > 0 && c_.num_coefficients < c_.rows;
        if (!some) {
            const T threshold = c_.num_coefficients > 0 ? T(0) : T(c_.coefficient_threshold);
            int kept = 0;
            for (int64_t i = 0; i < c_.rows; ++i) {
                const T coefficient = exponentials_[i] * scale;
                coefficients_[kept] = coefficient;
                kept_[kept] = int32_t(i);
                kept += !(coefficient <= threshold);
            }
            return kept;
        }
        const int64_t counts[2] = {reduce<Order<T>>(above[0], Add())[0],
                                   reduce<Order<T>>(above[1], Add())[0]};
        const Cut<T> cut = logit_cut_.find(logits_, logit_row_, c_.rows, c_.num_coefficients, counts);
        const int kept = int(write_places<T>(logits_, logit_row_, cut, kept_));
        for (int i = 0; i < kept; ++i) coefficients_[i] = exponentials_[kept_[i]] * scale;
        return kept;
    }

    // Scores of all keys, and how many are above each guess of where their cut lies.
    VITRAIL_INLINE void mix(int kept, const T* rows, int64_t (&above)[2]) {
        int first = 0;
        for (; kept - first > kMixed; first += kMixed) mix_some<kMixed, false>(kMixed, first, rows, above);
        mix_some<kMixed, true>(kept - first, first, rows, above);
        for (int64_t i = c_.keys; i < score_row_; ++i) scores_[i] = kLeast<T>;
    }

    template <int N, bool kLast>
    VITRAIL_INLINE void mix_some(int count, int first, const T* rows, int64_t (&above)[2]) {
        if (count == N)
            mix_rows<N, kLast>(first, rows, above);
        else if constexpr (N > 0)
            mix_some<N - 1, kLast>(count, first, rows, above);
    }

    // Adds N rows, in the order of the basis, so that sums round as a product with all rows would.
    template <int N, bool kLast>
    __attribute__((noinline)) void mix_rows(int first, const T* rows, int64_t (&above)[2]) {
        const T* row[N + 1];
        V coefficient[N + 1];
        for (int j = 0; j < N; ++j) {
            row[j] = rows + kept_[first + j] * score_row_;
            coefficient[j] = broadcast(coefficients_[first + j]);
        }
        T* const sums = reinterpret_cast<T*>(scores_);
        I counts[2] = {};
        for (int64_t i = 0; i < score_row_; i += W) {
            V sum = {};
            if (first > 0) sum = load(sums + i);
            for (int j = 0; j < N; ++j) sum += coefficient[j] * load(row[j] + i);
            if constexpr (kLast) {
                const I x = ordered_magnitude<T>(sum);
                for (int j = 0; j < 2; ++j) counts[j] -= x > score_cut_.guess(j);
                store(scores_ + i, x);
            } else {
                store(sums + i, sum);
            }
        }
        if constexpr (kLast)
            for (int j = 0; j < 2; ++j) above[j] = reduce<Order<T>>(counts[j], Add())[0];
    }

    VITRAIL_INLINE int above_threshold(int32_t* to) const {
        const T threshold = T(c_.score_threshold);
        const T* const scores = reinterpret_cast<const T*>(scores_);
        int count = 0;
        for (int64_t i = 0; i < c_.keys; ++i) {
            to[count] = int32_t(i);
            count += scores[i] > threshold;
        }
        return count;
    }

    const Connectivity& c_;
    const int64_t logit_row_, score_row_;
    T *const exponentials_, *const coefficients_;
    Order<T>*const logits_, *const scores_;
    int32_t* const kept_;
    CutSearch<T> logit_cut_, score_cut_;
};

}  // namespace vitrail::VITRAIL_ISA
