// The attention core: packed keys and values, blocks of queries, online softmax.
//
// It knows nothing of grids, regions or windows. Keys arrive in packed blocks (pack_group), and a QueryBlock
// visits as many of them, in any order, as its addressing policy names.
//
// Packed layout of a block: its keys in groups of g <= lanes, each group a panel [units of head_dim][g], so
// that one vector holds G = lanes / g units of g keys; after the panels the values, as rows [key][value_dim
// padded to a vector], two keys to a row where they are multiplied in pairs. Blocks of few keys thus waste no
// lanes, and need not be merged first.
#pragma once

#include "panels.h"

namespace vitrail::VITRAIL_ISA {

constexpr int kRows = 4;        // query rows per micro-kernel
constexpr int kKeyBlock = 128;  // keys scored before they are weighed: in packed form they fit L1 or L2

// Keys per panel: a power of two from four lanes to a whole vector, which `keys` keys fill best.
template <class T>
VITRAIL_INLINE int group_size(int64_t keys) {
    int g = 4;
    while (g < kLanes<T> && g < keys) g *= 2;
    return g;
}

// The packed form of one head of one block of up to `keys` keys; sizes in numbers.
template <class E, int G>
struct BlockLayout {
    using T = typename Product<E>::T;
    static constexpr int kDepth = Product<E>::kDepth;
    static constexpr int kGroup = kLanes<T> / G;

    int64_t head_dim, value_dim, keys, units, panel, value_row;

    VITRAIL_INLINE BlockLayout(int64_t head_dim, int64_t value_dim, int64_t keys)
        : head_dim(head_dim),
          value_dim(value_dim),
          keys(keys),
          units(round_up((head_dim + kDepth - 1) / kDepth, G)),
          panel(units * kGroup * kDepth),
          value_row(round_up(value_dim, kLanes<T>)) {}

    VITRAIL_INLINE int64_t groups() const { return (keys + kGroup - 1) / kGroup; }
    VITRAIL_INLINE int64_t values() const { return groups() * panel; }
    VITRAIL_INLINE int64_t size() const { return values() + round_up(keys, kDepth) * value_row; }
};

// Packs keys [first, first + count) of a block, count <= kGroup, channels from `k_channel` and `v_channel`
// on.
template <class S, int G>
VITRAIL_OUTLINE void pack_group(const BlockLayout<Packed<S>, G>& layout, const void* const* k,
                                int64_t k_channel, const void* const* v, int64_t v_channel, int64_t first,
                                int count, Packed<S>* block) {
    using T = Compute<S>;
    using E = Packed<S>;
    constexpr int g = BlockLayout<E, G>::kGroup, depth = BlockLayout<E, G>::kDepth;
    const auto at = [](const void* token, int64_t channel) {
        return token ? static_cast<const S*>(token) + channel : nullptr;
    };
    E* const panel = block + first / g * layout.panel;
    for (int key = 0; key < g; key += 4) {
        const S* rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = key + i < count ? at(k[key + i], k_channel) : nullptr;
        pack_four_columns<E>(rows, layout.head_dim, layout.units, reinterpret_cast<T*>(panel) + key, g);
    }
    E* row = block + layout.values() + first * layout.value_row;
    for (int key = 0; key < count; key += depth, row += depth * layout.value_row) {
        if constexpr (depth == 1) {
            pack_row(at(v[key], v_channel), layout.value_dim, T(1), row, layout.value_row);
        } else {
            const S* const pair[2] = {at(v[key], v_channel),
                                      key + 1 < count ? at(v[key + 1], v_channel) : nullptr};
            pack_pair(pair, layout.value_dim, row, layout.value_row);
        }
    }
}

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
        const int padded = int(round_up(rows, kRows));
        for (int64_t i = rows * query_row_; i < padded * query_row_; ++i) q_[i] = E{};
        for (int r = 0; r < padded; ++r) {
            max_[r] = kLowest;
            sum_[r] = 0;
        }
    }

    template <class S>
    VITRAIL_OUTLINE void load_query(int row, const S* from) {
        E* const to = q_ + row * query_row_;
        constexpr int chunk = W * P::kDepth;
        for (int64_t c = 0; c < layout_.units * P::kDepth; c += chunk) {
            const int64_t left = layout_.head_dim - c;
            const int64_t count = left < chunk ? left : chunk;
            if constexpr (G == 1) {
                load_units(from + c, count, to + c);
            } else {
                alignas(64) E units[chunk];
                load_units(from + c, count, units);
                repeat_units(units, layout_.units - c / P::kDepth, to + c * g,
                             std::make_integer_sequence<int, g>());
            }
        }
    }

    // Scores of these `keys` keys are multiplied by `weight`, their values too.
    VITRAIL_INLINE void visit(const E* block, int64_t keys, T weight) {
        const E* values = block + layout_.values();
        for (int64_t first = 0; first < keys; first += g) {
            if (groups_ == kGroups) flush();
            const int count = keys - first < g ? int(keys - first) : g;
            panel_[groups_] = block + first / g * layout_.panel;
            values_[groups_] = values + first * layout_.value_row;
            count_[groups_] = count;
            if (weighted_) store(lane_weight_ + groups_ * g, broadcast<T, g>(weight));
            ++groups_;
        }
    }

    // Takes the keys visited so far into the result; their packed form may then be overwritten.
    VITRAIL_INLINE void flush() {
        if (groups_ > 0) attend();
    }
    VITRAIL_OUTLINE void attend();

    // After the last key: the factors of the outputs, and the log-sum-exps.
    VITRAIL_OUTLINE void finish() {
        constexpr T ln2 = T(0.69314718055994530942);
        for (int row = 0; row < rows_; row += W) {
            const V sum = load(sum_ + row);
            store(lse_ + row, (load(max_ + row) + log2_positive<T, W>(sum)) * ln2);
            store(sum_ + row, T(1) / sum);
        }
    }

    template <class S>
    VITRAIL_OUTLINE void store_output(int row, S* to) const {
        const T* const from = out_ + row * layout_.value_row;
        int64_t c = 0;
        for (; c + W <= layout_.value_dim; c += W) narrow<W>(to + c, load(from + c) * sum_[row]);
        for (; c < layout_.value_dim; c += 4)
            narrow_some(to + c, load<T, 4>(from + c) * sum_[row], layout_.value_dim - c);
    }

    VITRAIL_INLINE T log_sum_exp(int row) const { return lse_[row]; }

  private:
    static constexpr T kLowest = sizeof(T) == 4 ? T(-3.4e38) : T(-1.7e308);

    VITRAIL_INLINE static int64_t query_row(const BlockLayout<E, G>& layout) {
        return G == 1 ? round_up(layout.units, W) * P::kDepth : layout.panel;
    }

    // W units, of which `count` numbers exist.
    template <class S>
    VITRAIL_INLINE void load_units(const S* from, int64_t count, E* to) const {
        if constexpr (kPaired) {
            if (count == W * P::kDepth) return store(to, load<T, W>(reinterpret_cast<const T*>(from)));
            store(to, V{});
            __builtin_memcpy(to, from, count * sizeof(E));
        } else {
            pack_row(from, count, scale_, to, W);
        }
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

    template <int R>
    VITRAIL_INLINE void attend_rows(int row) {
        const int lanes = groups_ * g;
        score<R>(q_ + row * query_row_);
        adjust<R>(row, lanes);
        V rescale = soften<R>(row, int(round_up(lanes, W)));
        T* const out = out_ + row * layout_.value_row;
        int64_t column = 0;
        if constexpr (kTileVectors >= 4)
            for (; column + 4 * W <= layout_.value_row; column += 4 * W)
                value_tile<R, 4>(out, column, rescale);
        for (; column + 2 * W <= layout_.value_row; column += 2 * W) value_tile<R, 2>(out, column, rescale);
        for (; column < layout_.value_row; column += W) value_tile<R, 1>(out, column, rescale);
    }

    template <int R>
    VITRAIL_INLINE void score(const E* q) {
        int first = 0;
        if constexpr (kTileVectors >= 4) {
            for (; groups_ - first > 3 || (G == 4 && groups_ > first); first += 4) score_tile<R, 4>(q, first);
            if constexpr (G == 1)
                if (groups_ - first == 3) return score_tile<R, 3>(q, first);
        }
        for (; groups_ - first > 1 || (G == 2 && groups_ > first); first += 2) score_tile<R, 2>(q, first);
        if constexpr (G == 1)
            for (; groups_ > first; ++first) score_tile<R, 1>(q, first);
    }

    // Scores of R rows and N groups; past the last group the last one is repeated, and masked later.
    template <int R, int N>
    VITRAIL_INLINE void score_tile(const E* q, int first) {
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
                T* to = scores_[r] + first * g;
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

    // What is not the same for all keys: weights, biases, and lanes without a key.
    template <int R>
    VITRAIL_INLINE void adjust(int row, int lanes) {
        constexpr T log2_e = T(1.44269504088896340736);
        if (weighted_)
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < lanes; i += g)
                    store(scores_[r] + i, load<T, g>(scores_[r] + i) * load<T, g>(lane_weight_ + i));
        if (bias_)
            for (int r = 0; r < R; ++r) {
                const T* const bias = bias_ + (row + r) * bias_row_ + seen_;
                for (int i = 0; i < lanes; i += g)
                    store(scores_[r] + i, load<T, g>(scores_[r] + i) + load<T, g>(bias + i) * log2_e);
            }
        for (int group = 0; group < groups_; ++group)
            if (count_[group] < g) mask<R>(group * g, count_[group]);
        for (int i = lanes; i < int(round_up(lanes, W)); i += g) mask<R>(i, 0);
    }

    // Of the g lanes from `first` on, `count` have a key.
    template <int R>
    VITRAIL_INLINE void mask(int first, int count) {
        using Bit = typename BitsOf<T>::type;
        Vec<Bit, g> lane;
        for (int i = 0; i < g; ++i) lane[i] = Bit(i);
        for (int r = 0; r < R; ++r) {
            const Vec<T, g> s = load<T, g>(scores_[r] + first);
            store(scores_[r] + first, lane < Bit(count) ? s : broadcast<T, g>(-T(__builtin_inf())));
        }
    }

    // Turns the scores of R rows into weights relative to the row's new maximum; returns what the outputs so
    // far must be multiplied by.
    template <int R>
    VITRAIL_INLINE V soften(int row, int lanes) {
        V top[kRows], total[kRows] = {};
        for (int r = 0; r < kRows; ++r) top[r] = broadcast(kLowest);
        for (int i = 0; i < lanes; i += W)
            for (int r = 0; r < R; ++r) top[r] = maximum(top[r], load(scores_[r] + i));
        const V before = load_rows<R>(max_ + row);
        const V now = maximum(before, reduce_rows<T>(top, Max()));
        for (int i = 0; i < lanes; i += W) {
            for (int r = 0; r < R; ++r) {
                V p = exp2_negative<W>(load(scores_[r] + i) - broadcast(T(now[r])));
                total[r] += p;
                if (weighted_) p *= load(lane_weight_ + i);
                if constexpr (kPaired)
                    P::store_a(weights_[r] + i, p);
                else
                    store(scores_[r] + i, p);
            }
        }
        const V factor = exp2_negative<W>(before - now);
        const V sums = load_rows<R>(sum_ + row) * factor + reduce_rows<T>(total, Add());
        for (int r = 0; r < R; ++r) {
            max_[row + r] = now[r];
            sum_[row + r] = sums[r];
        }
        return factor;
    }

    template <int R>
    VITRAIL_INLINE static V load_rows(const T* rows) {
        V v = {};
        for (int r = 0; r < R; ++r) v[r] = rows[r];
        return v;
    }

    template <int R, int N>
    VITRAIL_INLINE void value_tile(T* out, int64_t column, V rescale) {
        const int64_t stride = layout_.value_row;
        V acc[R][N] = {};
        if (seen_ > 0)
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < N; ++j) acc[r][j] = load(out + r * stride + column + j * W) * rescale[r];
        for (int group = 0; group < groups_; ++group) {
            const E* v = values_[group] + column * P::kDepth;
            const int count = count_[group];
            for (int key = 0; key < count; key += P::kDepth, v += stride * P::kDepth) {
                typename P::B x[N];
                for (int j = 0; j < N; ++j) x[j] = P::load_b(v + j * W * P::kDepth);
                for (int r = 0; r < R; ++r) {
                    const typename P::A p = P::load_a(weight(r) + group * g + key);
                    for (int j = 0; j < N; ++j) acc[r][j] = P::add(p, x[j], acc[r][j]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < N; ++j) store(out + r * stride + column + j * W, acc[r][j]);
    }

    VITRAIL_INLINE const E* weight(int r) const {
        if constexpr (kPaired)
            return weights_[r];
        else
            return scores_[r];
    }

    const BlockLayout<E, G> layout_;
    const T scale_;  // of queries, or of scores where queries are packed as they are
    const bool weighted_;
    const int64_t query_row_;
    E* const q_;
    T* const out_;
    const T* bias_ = nullptr;
    int64_t bias_row_ = 0;
    int rows_ = 0, groups_ = 0;
    int64_t seen_ = 0;  // lanes before the current groups
    const E* panel_[kGroups];
    const E* values_[kGroups];
    int count_[kGroups];
    alignas(64) T max_[kQueryBlock], sum_[kQueryBlock], lse_[kQueryBlock];
    alignas(64) T scores_[kRows][kScores];
    alignas(64) E weights_[kPaired ? kRows : 1][kPaired ? kScores : 1];
    alignas(64) T lane_weight_[kScores];
};

template <class E, int G>
void QueryBlock<E, G>::attend() {
    int row = 0;
    for (; row + kRows <= rows_; row += kRows) attend_rows<kRows>(row);
    if (rows_ - row == 1) attend_rows<1>(row);
    if (rows_ - row > 1) attend_rows<kRows>(row);
    seen_ += groups_ * g;
    groups_ = 0;
}

// What is not inline is compiled once, in attention_kernel.cpp, for all operators. How storage types and
// groupings (G) meet:
#if defined(__AVX512F__)
#define VITRAIL_GROUPINGS(M, S) M(S, 1) M(S, 2) M(S, 4)
#define VITRAIL_GROUPINGS64(M, S) M(S, 1) M(S, 2)
#elif defined(__AVX2__)
#define VITRAIL_GROUPINGS(M, S) M(S, 1) M(S, 2)
#define VITRAIL_GROUPINGS64(M, S) M(S, 1)
#else
#define VITRAIL_GROUPINGS(M, S) M(S, 1)
#define VITRAIL_GROUPINGS64(M, S) M(S, 1)
#endif
#define VITRAIL_ALL_GROUPINGS(M) \
    VITRAIL_GROUPINGS(M, float)  \
    VITRAIL_GROUPINGS(M, BFloat16) VITRAIL_GROUPINGS(M, Float16) VITRAIL_GROUPINGS64(M, double)

#define VITRAIL_STORAGE_PARTS(S, G)                                                               \
    template void pack_group<S, G>(const BlockLayout<Packed<S>, G>&, const void* const*, int64_t, \
                                   const void* const*, int64_t, int64_t, int, Packed<S>*);        \
    template void QueryBlock<Packed<S>, G>::load_query<S>(int, const S*);                         \
    template void QueryBlock<Packed<S>, G>::store_output<S>(int, S*) const;
#define VITRAIL_BLOCK_PARTS(E, G)             \
    template void QueryBlock<E, G>::attend(); \
    template void QueryBlock<E, G>::finish();
#if defined(__AVX512BF16__)
#define VITRAIL_ALL_BLOCKS(M)   \
    VITRAIL_GROUPINGS(M, float) \
    VITRAIL_GROUPINGS(M, BFloat16) VITRAIL_GROUPINGS64(M, double)
#else
#define VITRAIL_ALL_BLOCKS(M) VITRAIL_GROUPINGS(M, float) VITRAIL_GROUPINGS64(M, double)
#endif

#define VITRAIL_EXTERN_STORAGE_PARTS(S, G)                                                               \
    extern template void pack_group<S, G>(const BlockLayout<Packed<S>, G>&, const void* const*, int64_t, \
                                          const void* const*, int64_t, int64_t, int, Packed<S>*);        \
    extern template void QueryBlock<Packed<S>, G>::load_query<S>(int, const S*);                         \
    extern template void QueryBlock<Packed<S>, G>::store_output<S>(int, S*) const;
#define VITRAIL_EXTERN_BLOCK_PARTS(E, G)             \
    extern template void QueryBlock<E, G>::attend(); \
    extern template void QueryBlock<E, G>::finish();

VITRAIL_ALL_GROUPINGS(VITRAIL_EXTERN_STORAGE_PARTS)
VITRAIL_ALL_BLOCKS(VITRAIL_EXTERN_BLOCK_PARTS)

}  // namespace vitrail::VITRAIL_ISA
