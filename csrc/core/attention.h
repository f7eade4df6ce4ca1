// The attention core: packed keys and values, blocks of queries, online softmax.
//
// It knows nothing of grids, regions or windows. Keys arrive in packed blocks (pack_group), and a QueryBlock
// visits as many of them, in any order, as its addressing policy names.
//
// Packed layout of a block: its keys in groups of g <= lanes, each group a panel [head_dim][g], so that one
// vector holds G = lanes / g channels of g keys; after the panels the values, as rows
// [key][value_dim padded to a vector]. Blocks of few keys thus waste no lanes, and need not be merged first.
#pragma once

#include "scalar.h"

namespace vitrail::VITRAIL_ISA {

constexpr int kRows = 4;         // query rows per micro-kernel
constexpr int kQueryBlock = 64;  // query rows that share one pass over their keys
constexpr int kKeyBlock = 128;   // keys scored before they are weighed: in packed form they fit L1 or L2

VITRAIL_INLINE constexpr int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// Keys per panel: a power of two from four lanes to a whole vector, which `keys` keys fill best.
template <class T>
VITRAIL_INLINE int group_size(int64_t keys) {
    int g = 4;
    while (g < kLanes<T> && g < keys) g *= 2;
    return g;
}

// The packed form of one head of one block of keys; sizes in elements of T.
template <class T, int G>
struct BlockLayout {
    static constexpr int kGroup = kLanes<T> / G;

    int64_t head_dim, value_dim, keys, panel, value_row;

    VITRAIL_INLINE BlockLayout(int64_t head_dim, int64_t value_dim, int64_t keys)
        : head_dim(head_dim),
          value_dim(value_dim),
          keys(keys),
          panel(round_up(head_dim * kGroup, kLanes<T>)),
          value_row(round_up(value_dim, kLanes<T>)) {}

    VITRAIL_INLINE int64_t values() const { return (keys + kGroup - 1) / kGroup * panel; }
    VITRAIL_INLINE int64_t size() const { return values() + keys * value_row; }
};

// Packs keys [first, first + count) of a block, count <= kGroup; a null pointer stands for a zero vector.
template <class S, class T, int G>
VITRAIL_INLINE void pack_group(const BlockLayout<T, G>& layout, const S* const* k, const S* const* v,
                               int64_t first, int count, T* block) {
    constexpr int g = BlockLayout<T, G>::kGroup;
    constexpr std::make_integer_sequence<int, 4> quad;
    const int64_t channels = layout.panel / g;
    T* panel = block + first / g * layout.panel;
    for (int key = 0; key < g; key += 4) {
        for (int64_t c = 0; c < channels; c += 4) {
            Vec<T, 4> row[4] = {};
            for (int i = 0; i < 4; ++i)
                if (key + i < count && k[key + i] && c < layout.head_dim)
                    row[i] = widen_some(k[key + i] + c, layout.head_dim - c);
            const Vec<T, 4> even[2] = {every_other<T, 4, 1, 0>(row[0], row[1], quad),
                                       every_other<T, 4, 1, 0>(row[2], row[3], quad)};
            const Vec<T, 4> odd[2] = {every_other<T, 4, 1, 1>(row[0], row[1], quad),
                                      every_other<T, 4, 1, 1>(row[2], row[3], quad)};
            const Vec<T, 4> channel[4] = {every_other<T, 4, 1, 0>(even[0], even[1], quad),
                                          every_other<T, 4, 1, 0>(odd[0], odd[1], quad),
                                          every_other<T, 4, 1, 1>(even[0], even[1], quad),
                                          every_other<T, 4, 1, 1>(odd[0], odd[1], quad)};
            for (int i = 0; i < 4 && c + i < channels; ++i) store(panel + (c + i) * g + key, channel[i]);
        }
    }
    for (int key = 0; key < count; ++key) {
        T* row = block + layout.values() + (first + key) * layout.value_row;
        for (int64_t c = 0; c < layout.value_row; c += 4) {
            Vec<T, 4> values = {};
            if (v[key] && c < layout.value_dim) values = widen_some(v[key] + c, layout.value_dim - c);
            store(row + c, values);
        }
    }
}

// Up to kQueryBlock query rows of one head, on their way through the blocks of keys that they may look at.
// Scores are kept in units of log2: the queries are scaled by log2(e) when they are loaded.
template <class T, int G>
class QueryBlock {
    static constexpr int W = kLanes<T>;
    static constexpr int g = W / G;
    static constexpr int kGroups = kKeyBlock / g;
    static constexpr int kScores = kKeyBlock + kTileVectors * g;
    using V = Vec<T, W>;

  public:
    // Elements of T that the constructor's scratch must have.
    VITRAIL_INLINE static int64_t scratch_size(const BlockLayout<T, G>& layout) {
        return kQueryBlock * (query_row(layout) + layout.value_row);
    }

    VITRAIL_INLINE QueryBlock(const BlockLayout<T, G>& layout, bool weighted, T* scratch)
        : layout_(layout),
          weighted_(weighted),
          query_row_(query_row(layout)),
          q_(scratch),
          out_(scratch + kQueryBlock * query_row_) {}

    VITRAIL_INLINE void begin(int rows) {
        rows_ = rows;
        groups_ = 0;
        partial_ = false;
        const int padded = int(round_up(rows, kRows));
        for (int64_t i = rows * query_row_; i < padded * query_row_; ++i) q_[i] = 0;
        for (int64_t i = 0; i < padded * layout_.value_row; i += W) store(out_ + i, V{});
        for (int r = 0; r < padded; ++r) {
            max_[r] = -T(__builtin_inf());
            sum_[r] = 0;
        }
    }

    template <class S>
    VITRAIL_INLINE void load_query(int row, const S* from, T scale) {
        const T log2_scale = scale * T(1.44269504088896340736);
        T* to = q_ + row * query_row_;
        for (int64_t c = 0; c < layout_.head_dim; c += 4) {
            const Vec<T, 4> x = widen_some(from + c, layout_.head_dim - c) * log2_scale;
            if constexpr (G == 1) {
                store(to + c, x);
            } else {  // each channel once per key of a group, as the panels have it
                for (int i = 0; i < 4 && (c + i) * g < layout_.panel; ++i)
                    store(to + (c + i) * g, broadcast<T, g>(x[i]));
            }
        }
    }

    // Scores of these keys are multiplied by `weight`, their values too.
    VITRAIL_INLINE void visit(const T* block, T weight) {
        const T* values = block + layout_.values();
        for (int64_t first = 0; first < layout_.keys; first += g) {
            if (groups_ == kGroups) flush();
            const int count = layout_.keys - first < g ? int(layout_.keys - first) : g;
            panel_[groups_] = block + first / g * layout_.panel;
            values_[groups_] = values + first * layout_.value_row;
            count_[groups_] = count;
            if (weighted_) store(lane_weight_ + groups_ * g, broadcast<T, g>(weight));
            store(lane_mask_ + groups_ * g, Vec<T, g>{});
            if (count < g) {
                for (int lane = count; lane < g; ++lane) lane_mask_[groups_ * g + lane] = -T(__builtin_inf());
                partial_ = true;
            }
            ++groups_;
        }
    }

    // Takes the keys visited so far into the result; their packed form may then be overwritten.
    VITRAIL_INLINE void flush() {
        if (groups_ > 0) attend();
    }

    template <class S>
    VITRAIL_INLINE void store_output(int row, S* to) const {
        const T scale = T(1) / sum_[row];
        const T* from = out_ + row * layout_.value_row;
        for (int64_t c = 0; c < layout_.value_dim; c += 4)
            narrow_some(to + c, load<T, 4>(from + c) * scale, layout_.value_dim - c);
    }

    VITRAIL_INLINE T log_sum_exp(int row) const {
        constexpr T ln2 = T(0.69314718055994530942);
        if constexpr (sizeof(T) == 4) return ln2 * (max_[row] + __builtin_log2f(sum_[row]));
        return ln2 * (max_[row] + T(__builtin_log2(sum_[row])));
    }

  private:
    VITRAIL_INLINE static int64_t query_row(const BlockLayout<T, G>& layout) {
        return G == 1 ? round_up(layout.head_dim, 4) : layout.panel;
    }

    __attribute__((noinline)) void attend() {
        const int lanes = groups_ * g;
        const int padded = int(round_up(lanes, W));
        if (padded > lanes) partial_ = true;
        if (weighted_ || partial_)
            for (int lane = lanes; lane < padded; lane += 4) {
                store(lane_weight_ + lane, Vec<T, 4>{});
                store(lane_mask_ + lane, broadcast<T, 4>(-T(__builtin_inf())));
            }
        for (int row = 0; row < rows_; row += kRows) {
            score(q_ + row * query_row_);
            T rescale[kRows];
            soften(row, padded, rescale);
            accumulate(out_ + row * layout_.value_row, rescale);
        }
        groups_ = 0;
        partial_ = false;
    }

    VITRAIL_INLINE void score(const T* q) {
        int first = 0;
        if constexpr (kTileVectors >= 4)
            for (; groups_ - first > 2 || (G == 4 && groups_ > first); first += 4) score_tile<4>(q, first);
        for (; groups_ - first > 1 || (G == 2 && groups_ > first); first += 2) score_tile<2>(q, first);
        if constexpr (G == 1)
            for (; groups_ > first; ++first) score_tile<1>(q, first);
    }

    // Scores of kRows rows and N groups; past the last group the last one is repeated, and masked later.
    template <int N>
    VITRAIL_INLINE void score_tile(const T* q, int first) {
        if constexpr (N % G == 0) {
            const T* panel[N];
            for (int j = 0; j < N; ++j) panel[j] = panel_[first + j < groups_ ? first + j : groups_ - 1];
            V acc[kRows][N] = {};
            const int64_t steps = layout_.panel / W;
            for (int64_t c = 0; c < steps; ++c) {
                V k[N];
                for (int j = 0; j < N; ++j) k[j] = load(panel[j] + c * W);
                for (int r = 0; r < kRows; ++r) {
                    V x;
                    if constexpr (G == 1)
                        x = broadcast(q[r * query_row_ + c]);
                    else
                        x = load(q + r * query_row_ + c * W);
                    for (int j = 0; j < N; ++j) acc[r][j] += x * k[j];
                }
            }
            for (int r = 0; r < kRows; ++r) {
                T* to = scores_[r] + first * g;
                if constexpr (G == 1)
                    for (int j = 0; j < N; ++j) store(to + j * W, acc[r][j]);
                if constexpr (G == 2)
                    for (int j = 0; j < N; j += 2)
                        store(to + j * g, fold<W / 2, T>(acc[r][j], acc[r][j + 1], Add()));
                if constexpr (G == 4)
                    for (int j = 0; j < N; j += 4)
                        store(to + j * g,
                              fold<W / 4, T>(fold<W / 2, T>(acc[r][j], acc[r][j + 1], Add()),
                                             fold<W / 2, T>(acc[r][j + 2], acc[r][j + 3], Add()), Add()));
            }
        }
    }

    // Turns the scores of kRows rows into weights relative to the row's new maximum.
    VITRAIL_INLINE void soften(int row, int lanes, T* rescale) {
        V top[kRows], total[kRows] = {};
        for (int r = 0; r < kRows; ++r) top[r] = broadcast(-T(__builtin_inf()));
        for (int i = 0; i < lanes; i += W) {
            for (int r = 0; r < kRows; ++r) {
                V s = load(scores_[r] + i);
                if (weighted_ || partial_) {
                    if (weighted_) s *= load(lane_weight_ + i);
                    if (partial_) s += load(lane_mask_ + i);
                    store(scores_[r] + i, s);
                }
                top[r] = maximum(top[r], s);
            }
        }
        const V before = widen_rows(max_ + row);
        const V now = maximum(before, reduce_rows<T>(top, Max()));
        const V factor = exp2_negative<W>(before - now);
        for (int i = 0; i < lanes; i += W) {
            for (int r = 0; r < kRows; ++r) {
                V p = exp2_negative<W>(load(scores_[r] + i) - broadcast(T(now[r])));
                total[r] += p;
                if (weighted_) p *= load(lane_weight_ + i);
                store(scores_[r] + i, p);
            }
        }
        const V sums = widen_rows(sum_ + row) * factor + reduce_rows<T>(total, Add());
        for (int r = 0; r < kRows; ++r) {
            max_[row + r] = now[r];
            sum_[row + r] = sums[r];
            rescale[r] = factor[r];
        }
    }

    VITRAIL_INLINE static V widen_rows(const T* rows) {
        V v = {};
        for (int r = 0; r < kRows; ++r) v[r] = rows[r];
        return v;
    }

    VITRAIL_INLINE void accumulate(T* out, const T* rescale) {
        int64_t column = 0;
        if constexpr (kTileVectors >= 4)
            for (; column + 4 * W <= layout_.value_row; column += 4 * W) value_tile<4>(out, column, rescale);
        for (; column + 2 * W <= layout_.value_row; column += 2 * W) value_tile<2>(out, column, rescale);
        for (; column < layout_.value_row; column += W) value_tile<1>(out, column, rescale);
    }

    template <int N>
    VITRAIL_INLINE void value_tile(T* out, int64_t column, const T* rescale) {
        const int64_t stride = layout_.value_row;
        V acc[kRows][N];
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < N; ++j) acc[r][j] = load(out + r * stride + column + j * W) * rescale[r];
        for (int group = 0; group < groups_; ++group) {
            const T* v = values_[group] + column;
            const int count = count_[group];
            for (int key = 0; key < count; ++key, v += stride) {
                V x[N];
                for (int j = 0; j < N; ++j) x[j] = load(v + j * W);
                for (int r = 0; r < kRows; ++r) {
                    const V p = broadcast(scores_[r][group * g + key]);
                    for (int j = 0; j < N; ++j) acc[r][j] += p * x[j];
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int j = 0; j < N; ++j) store(out + r * stride + column + j * W, acc[r][j]);
    }

    const BlockLayout<T, G> layout_;
    const bool weighted_;
    const int64_t query_row_;
    T* const q_;
    T* const out_;
    int rows_ = 0, groups_ = 0;
    bool partial_ = false;
    const T* panel_[kGroups];
    const T* values_[kGroups];
    int count_[kGroups];
    T max_[kQueryBlock], sum_[kQueryBlock];
    alignas(64) T scores_[kRows][kScores];
    alignas(64) T lane_weight_[kScores], lane_mask_[kScores];
};

}  // namespace vitrail::VITRAIL_ISA
