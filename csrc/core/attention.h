// The attention core: blocks of queries, online softmax.
//
// It knows nothing of grids, regions or windows. Keys arrive in packed blocks (packed_keys.h), and a
// QueryBlock visits as many of them, in any order, as its addressing policy names.
#pragma once

#include "packed_keys.h"

namespace vitrail::VITRAIL_ISA {

constexpr int kRows = 4;        // query rows per micro-kernel
constexpr int kKeyBlock = 128;  // keys scored before they are weighed: in packed form they fit L1 or L2

// Up to kQueryBlock query rows of one head, on their way through the blocks of keys that they may look at.
// Scores are kept in units of log2.
template <class E, int G>
class QueryBlock {
    using P = Product<E>;
    using T = typename P::T;
    static constexpr int W = kLanes<T>;
    static constexpr int g = W / G;
    static constexpr int kGroups = kKeyBlock / g;
    static constexpr int kScores = kKeyBlock + kTileVectors * g;
    static constexpr bool kPaired = P::kDepth > 1;
    static constexpr int kSpare = BlockLayout<E, G>::kSpare;  // keys of a spare group, at most
    static constexpr int kSpares = 4, kSpareRow = kSpare + 1 + kSpare % 2;
    using V = Vec<T, W>;

  public:
    // Numbers of E, and of T, that the constructor's scratch must have.
    VITRAIL_INLINE static int64_t queries_size(const BlockLayout<E, G>& layout) {
        return kQueryBlock * query_row(layout);
    }
    VITRAIL_INLINE static int64_t output_size(const BlockLayout<E, G>& layout) {
        return kQueryBlock * layout.value_row;
    }

    VITRAIL_INLINE QueryBlock(const BlockLayout<E, G>& layout, T scale, bool weighted, E* queries, T* output)
        : layout_(layout),
          scale_(scale * T(1.44269504088896340736)),
          weighted_(weighted),
          query_row_(query_row(layout)),
          q_(queries),
          out_(output) {}

    // `bias`, which may be null, has a row of `bias_row` numbers for each query: what is added to its scores.
    VITRAIL_INLINE void begin(int rows, const T* bias, int64_t bias_row) {
        rows_ = rows;
        bias_ = bias;
        bias_row_ = bias_row;
        seen_ = 0;
        started_ = false;
        const int padded = int(round_up(rows, kRows));
        for (int64_t i = rows * query_row_; i < padded * query_row_; ++i) q_[i] = E{};
        for (int r = 0; r < padded; ++r) {
            max_[r] = kLowest;
            sum_[r] = 0;
        }
    }

    // The queries of the tokens, channels from `channel` on.
    template <class S>
    VITRAIL_OUTLINE void load_queries(const void* const* tokens, int64_t channel) {
        for (int row = 0; row < rows_; ++row) {
            const S* const from = static_cast<const S*>(tokens[row]) + channel;
            E* const to = q_ + row * query_row_;
            if constexpr (G == 1) {
                pack_units(from, layout_.head_dim, scale_, to, query_row_ / P::kDepth);
            } else {  // each unit once per key of a group, as the panels have it
                for (int64_t c = 0; c < layout_.head_dim; c += W * P::kDepth) {
                    alignas(64) E units[W * P::kDepth];
                    const int64_t left = layout_.head_dim - c;
                    pack_units(from + c, left < W * P::kDepth ? left : W * P::kDepth, scale_, units, W);
                    repeat_units(units, layout_.units - c / P::kDepth, to + c * g,
                                 std::make_integer_sequence<int, g>());
                }
            }
        }
    }

    // Scores of these `keys` keys are multiplied by `weight`, their values too.
    VITRAIL_INLINE void visit(const E* block, int64_t keys, T weight) {
        const E* values = block + layout_.values();
        for (int64_t first = 0; first < keys; first += g) {
            if (groups_ == kGroups) flush();
            const int count = keys - first < g ? int(keys - first) : g;
            const E* const panel = block + first / g * layout_.panel;
            const E* const value = values + first * layout_.value_row;
            if (count <= kSpare) {
                if (spares_ == kSpares) flush();
                spare_[spares_++] = {panel, value, count, weight};
                spare_keys_ += count;
                continue;
            }
            panel_[groups_] = panel;
            values_[groups_] = value;
            count_[groups_] = count;
            if (weighted_) store(lane_weight_ + groups_ * g, broadcast<T, g>(weight));
            ++groups_;
        }
    }

    // Takes the keys visited so far into the result; their packed form may then be overwritten.
    VITRAIL_INLINE void flush() {
        if (groups_ + spares_ > 0) attend();
    }
    VITRAIL_OUTLINE void attend();

    // After the last key: the factors of the outputs, and the log-sum-exps.
    VITRAIL_OUTLINE void finish() {
        constexpr T ln2 = T(0.69314718055994530942);
        for (int row = 0; row < rows_; row += W) {
            const V sum = load(sum_ + row);
            store(max_ + row, (load(max_ + row) + log2_positive<T, W>(sum)) * ln2);
            store(sum_ + row, T(1) / sum);
        }
    }

    // Results, to tokens as well, and the log-sum-exps.
    template <class S>
    VITRAIL_OUTLINE void store_results(void* const* tokens, int64_t channel, void* const* lse,
                                       int64_t head) const {
        for (int row = 0; row < rows_; ++row) {
            S* const to = static_cast<S*>(tokens[row]) + channel;
            const T* const from = out_ + row * layout_.value_row;
            int64_t c = 0;
            for (; c + W <= layout_.value_dim; c += W) narrow<W>(to + c, load(from + c) * sum_[row]);
            for (; c < layout_.value_dim; c += 4)
                narrow_some(to + c, load<T, 4>(from + c) * sum_[row], layout_.value_dim - c);
            static_cast<T*>(lse[row])[head] = max_[row];
        }
    }

  private:
    static constexpr T kLowest = sizeof(T) == 4 ? T(-3.4e38) : T(-1.7e308);

    VITRAIL_INLINE static int64_t query_row(const BlockLayout<E, G>& layout) {
        return G == 1 ? layout.spare_row : layout.panel;
    }

    // Each unit once per key of a group, as the panels have it.
    template <int... I>
    VITRAIL_INLINE static void repeat_units(const E* units, int64_t count, E* to,
                                            std::integer_sequence<int, I...>) {
        const V x = load<T, W>(reinterpret_cast<const T*>(units));
        const std::make_integer_sequence<int, W> lanes;
        ((I * G < count ? store(to + I * W * P::kDepth, repeat_lanes<T, W, g, I * G>(x, lanes)) : void()),
         ...);
    }

    // The three steps of R rows: scores, their maxima, and the rest. `hand` is 0 or 1: the scores of the next
    // rows are computed in the other one before the weights of these, which wait for the maxima.
    template <int R>
    VITRAIL_INLINE void score(int row, int hand) {
        const E* const q = q_ + row * query_row_;
        int first = 0;
        if constexpr (G == 4)
            for (; groups_ > first; first += 4) score_tile<R, 4>(q, first, hand);
        if constexpr (G == 1 && kTileVectors >= 4) {
            if constexpr (kPaired)  // others would leave no registers to the exponential
                for (; groups_ - first > 3; first += 4) score_tile<R, 4>(q, first, hand);
            for (; groups_ - first == 3 || groups_ - first > 4; first += 3) score_tile<R, 3>(q, first, hand);
        }
        for (; groups_ - first > 1 || (G == 2 && groups_ > first); first += 2)
            score_tile<R, 2>(q, first, hand);
        if constexpr (G == 1)
            for (; groups_ > first; ++first) score_tile<R, 1>(q, first, hand);
        adjust<R>(row, groups_ * g, hand);
        if constexpr (kSpare > 0) score_spares<R>(row, hand);
    }

    template <int R>
    VITRAIL_OUTLINE void score_first(int row) {
        score<R>(row, 0);
    }

    template <int R>
    VITRAIL_INLINE V find_maxima(int row, int hand) const {
        V top[kRows];
        for (int r = 0; r < kRows; ++r) top[r] = broadcast(kLowest);
        for (int i = 0; i < groups_ * g; i += W)
            for (int r = 0; r < R; ++r) top[r] = maximum(top[r], load(scores_[hand][r] + i));
        V now = maximum(load(max_ + row), reduce_rows<T>(top, Max()));
        if constexpr (kSpare > 0)
            for (int i = 0; i < spare_keys_; ++i) now = maximum(now, spare_scores_[hand][i]);
        return now;
    }

    template <int R>
    VITRAIL_INLINE void weigh(int row, V now, int hand) {
        const V rescale = soften<R>(row, now, hand);
        T* const out = out_ + row * layout_.value_row;
        int64_t column = 0;
        if constexpr (kTileVectors >= 4)
            for (; column + 4 * W <= layout_.value_row; column += 4 * W)
                value_tile<R, 4>(out, column, rescale, hand);
        for (; column + 2 * W <= layout_.value_row; column += 2 * W)
            value_tile<R, 2>(out, column, rescale, hand);
        for (; column < layout_.value_row; column += W) value_tile<R, 1>(out, column, rescale, hand);
    }

    // Scores of R rows and N groups; past the last group the last one is repeated, and masked later.
    template <int R, int N>
    VITRAIL_INLINE void score_tile(const E* q, int first, int hand) {
        if constexpr (N % G == 0) {
            const E* panel[N];
            for (int j = 0; j < N; ++j) panel[j] = panel_[first + j < groups_ ? first + j : groups_ - 1];
            V acc[R][N] = {};
            const int64_t steps = layout_.units / G;
            for (int64_t c = 0; c < steps; ++c) {
                typename P::B k[N];
                for (int j = 0; j < N; ++j) k[j] = P::load_b(panel[j] + c * W * P::kDepth);
                for (int r = 0; r < R; ++r) {
                    typename P::A x;
                    if constexpr (G == 1)
                        x = P::load_a(q + r * query_row_ + c * P::kDepth);
                    else
                        x = P::load_b(q + r * query_row_ + c * W * P::kDepth);
                    for (int j = 0; j < N; ++j) acc[r][j] = P::add(x, k[j], acc[r][j]);
                }
            }
            for (int r = 0; r < R; ++r) {
                T* to = scores_[hand][r] + first * g;
                for (int j = 0; j < N; j += G) {
                    V s;
                    if constexpr (G == 1) s = acc[r][j];
                    if constexpr (G == 2) s = fold<W / 2, T>(acc[r][j], acc[r][j + 1], Add());
                    if constexpr (G == 4)
                        s = fold<W / 4, T>(fold<W / 2, T>(acc[r][j], acc[r][j + 1], Add()),
                                           fold<W / 2, T>(acc[r][j + 2], acc[r][j + 3], Add()), Add());
                    store(to + j * g, kPaired ? s * scale_ : s);
                }
            }
        }
    }

    // Scores of spare keys: a vector each, whose lanes are rows.
    template <int R>
    VITRAIL_INLINE void score_spares(int row, int hand) {
        constexpr T log2_e = T(1.44269504088896340736);
        int64_t lane = seen_ + groups_ * g;
        V* to = spare_scores_[hand];
        for (int i = 0; i < spares_; ++i)
            for (int key = 0; key < spare_[i].count; ++key, ++lane) {
                const E* const k = spare_[i].keys + key * query_row_;
                V sum[kRows] = {};
                for (int64_t c = 0; c < query_row_; c += W * P::kDepth)
                    for (int r = 0; r < R; ++r)
                        sum[r] = P::add(P::load_b(q_ + (row + r) * query_row_ + c), P::load_b(k + c), sum[r]);
                V s = reduce_rows<T>(sum, Add());
                if (kPaired) s *= scale_;
                if (weighted_) s *= spare_[i].weight;
                if (bias_)
                    for (int r = 0; r < R; ++r) s[r] += bias_[(row + r) * bias_row_ + lane] * log2_e;
                *to++ = s;
            }
    }

    // What is not the same for all keys: weights, biases, and lanes without a key.
    template <int R>
    VITRAIL_INLINE void adjust(int row, int lanes, int hand) {
        auto& scores = scores_[hand];
        constexpr T log2_e = T(1.44269504088896340736);
        if (weighted_)
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < lanes; i += g)
                    store(scores[r] + i, load<T, g>(scores[r] + i) * load<T, g>(lane_weight_ + i));
        if (bias_)
            for (int r = 0; r < R; ++r) {
                const T* const bias = bias_ + (row + r) * bias_row_ + seen_;
                for (int i = 0; i < lanes; i += g)
                    store(scores[r] + i, load<T, g>(scores[r] + i) + load<T, g>(bias + i) * log2_e);
            }
        for (int group = 0; group < groups_; ++group)
            if (count_[group] < g) mask<R>(group * g, count_[group], hand);
        for (int i = lanes; i < int(round_up(lanes, W)); i += g) mask<R>(i, 0, hand);
    }

    // Of the g lanes from `first` on, `count` have a key.
    template <int R>
    VITRAIL_INLINE void mask(int first, int count, int hand) {
        auto& scores = scores_[hand];
        using Bit = typename BitsOf<T>::type;
        Vec<Bit, g> lane;
        for (int i = 0; i < g; ++i) lane[i] = Bit(i);
        for (int r = 0; r < R; ++r) {
            const Vec<T, g> s = load<T, g>(scores[r] + first);
            store(scores[r] + first, lane < Bit(count) ? s : broadcast<T, g>(-T(__builtin_inf())));
        }
    }

    // Turns scores into weights relative to the rows' new maxima; returns what the outputs so far must be
    // multiplied by. Only the first R lanes of vectors of rows count.
    template <int R>
    VITRAIL_INLINE V soften(int row, V now, int hand) {
        V total[kRows] = {};
        for (int i = 0; i < groups_ * g; i += W) {
            for (int r = 0; r < R; ++r) {
                V p = exp2_negative<W>(load(scores_[hand][r] + i) - broadcast(T(now[r])));
                total[r] += p;
                if (weighted_) p *= load(lane_weight_ + i);
                store_weights(weights(hand, r) + i, p);
            }
        }
        const V factor = exp2_negative<W>(load(max_ + row) - now);
        V sums = load(sum_ + row) * factor + reduce_rows<T>(total, Add());
        if constexpr (kSpare > 0)
            for (int i = 0, n = 0; i < spares_; ++i)
                for (int key = 0; key < spare_[i].count; ++key) {
                    V p = exp2_negative<W>(spare_scores_[hand][n++] - now);
                    sums += p;
                    if (weighted_) p *= spare_[i].weight;
                    alignas(64) E rounded[W];
                    store_weights(rounded, p);
                    for (int r = 0; r < R; ++r) spare_weights_[i][r][key] = rounded[r];
                }
        __builtin_memcpy(max_ + row, &now, R * sizeof(T));
        __builtin_memcpy(sum_ + row, &sums, R * sizeof(T));
        return factor;
    }

    template <int R, int N>
    VITRAIL_INLINE void value_tile(T* out, int64_t column, V rescale, int hand) {
        const int64_t stride = layout_.value_row;
        V acc[R][N] = {};
        if (started_)
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < N; ++j) acc[r][j] = load(out + r * stride + column + j * W) * rescale[r];
        for (int group = 0; group < groups_; ++group) {
            const E* v = values_[group] + column * P::kDepth;
            const int count = count_[group];
            for (int key = 0; key < count; key += P::kDepth, v += stride * P::kDepth)
                add_value<R, N>(v, weights(hand, 0) + group * g + key, kScores, acc);
        }
        if constexpr (kSpare > 0)
            for (int i = 0; i < spares_; ++i) {
                const E* v = spare_[i].values + column * P::kDepth;
                for (int key = 0; key < spare_[i].count; key += P::kDepth, v += stride * P::kDepth)
                    add_value<R, N>(v, spare_weights_[i][0] + key, kSpareRow, acc);
            }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < N; ++j) store(out + r * stride + column + j * W, acc[r][j]);
    }

    // One key (or pair), whose weights lie `step` apart.
    template <int R, int N>
    VITRAIL_INLINE static void add_value(const E* v, const E* weights, int64_t step, V (&acc)[R][N]) {
        typename P::B x[N];
        for (int j = 0; j < N; ++j) x[j] = P::load_b(v + j * W * P::kDepth);
        for (int r = 0; r < R; ++r) {
            const typename P::A p = P::load_a(weights + r * step);
            for (int j = 0; j < N; ++j) acc[r][j] = P::add(p, x[j], acc[r][j]);
        }
    }

    // Weights are rounded to pairs, or take the place of the scores.
    VITRAIL_INLINE static void store_weights(E* to, V p) {
        if constexpr (kPaired)
            P::store_a(to, p);
        else
            store(to, p);
    }
    VITRAIL_INLINE E* weights(int hand, int r) {
        if constexpr (kPaired)
            return weights_[r];
        else
            return scores_[hand][r];
    }

    struct Spare {
        const E *keys, *values;
        int count;
        T weight;
    };

    const BlockLayout<E, G> layout_;
    const T scale_;  // of queries, or of scores where queries are packed as they are
    const bool weighted_;
    const int64_t query_row_;
    E* const q_;
    T* const out_;
    const T* bias_ = nullptr;
    int64_t bias_row_ = 0;
    int rows_ = 0, groups_ = 0, spares_ = 0, spare_keys_ = 0;
    int64_t seen_ = 0;      // lanes before the current groups
    bool started_ = false;  // whether there are outputs
    const E* panel_[kGroups];
    const E* values_[kGroups];
    int count_[kGroups];
    Spare spare_[kSpares];
    E spare_weights_[kSpares][kRows][kSpareRow] = {};
    V spare_scores_[2][kSpares * kSpare + 1];
    alignas(64) T max_[kQueryBlock + W], sum_[kQueryBlock + W];
    alignas(64) T scores_[2][kRows][kScores];
    alignas(64) E weights_[kPaired ? kRows : 1][kPaired ? kScores : 1];
    alignas(64) T lane_weight_[kScores];
};

template <class E, int G>
void QueryBlock<E, G>::attend() {
    // a single last row is not worth four
    const int last = rows_ % kRows == 1 ? rows_ - 1 : rows_;
    int hand = 0;
    if (last > 0) score_first<kRows>(0);
    for (int row = 0; row < last; row += kRows, hand ^= 1) {
        const V now = find_maxima<kRows>(row, hand);
        if (row + kRows < last) score<kRows>(row + kRows, hand ^ 1);
        weigh<kRows>(row, now, hand);
    }
    if (last < rows_) {
        score_first<1>(last);
        weigh<1>(last, find_maxima<1>(last, 0), 0);
    }
    seen_ += groups_ * g;
    groups_ = spares_ = spare_keys_ = 0;
    started_ = true;
}

}  // namespace vitrail::VITRAIL_ISA
