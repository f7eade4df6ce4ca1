// depthwise_conv for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
//
// Lanes are channels. Sums of several places of a row stay in registers, so that a place, once loaded, serves
// all taps of a row of the kernel; what lies past the grid is left out. Maps are read where they lie, unless
// they change on the way or are narrower than a vector: then a task first prepares its rows, and those beside
// them.
#include "../core/activation.h"
#include "depthwise_conv.h"

namespace vitrail::VITRAIL_ISA {
namespace {

// Places and sets (vectors of channels) whose sums are in registers; beside them are the taps of a row of the
// kernel, and a place.
constexpr int kPlaces = 7;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSets = 2;
#else
constexpr int kSets = 1;
#endif

// Of the weights of the sets that a task computes side by side: a part of the first-level cache.
constexpr int64_t kWeightBytes = int64_t(8) << 10;
// Of rows that are prepared: a part of the second-level cache.
constexpr int64_t kPreparedBytes = int64_t(256) << 10;
constexpr int64_t kPreparedSets = 12;
// A map is cut into blocks of rows until there are this many tasks.
constexpr int64_t kManyTasks = 32;

// The part of a map that a tile reads: `data` is the place of the first sum's first tap, which may lie
// outside. Of the kernel's rows [first_row, last_row) are on the map, and of the tile's places [first, last).
template <class S>
struct Source {
    const S* data;
    int64_t row, column;
    int64_t first_row, last_row, first, last;
};

// Of a set: its bias, then a vector for each tap.
template <class T>
struct Weights {
    const T* data;
    int64_t set, width;
};

// Where the sums go, after the residual (or null) has been added; strides of places and sets.
template <class S>
struct Target {
    S* data;
    int64_t place, set;
    const S* residual;
    int64_t residual_place;
};

// N neighbouring sums of each of G sets. Taps are taken K at a time from each row of the kernel.
template <class From, class S, int K, int N, int G>
__attribute__((noinline)) void convolve_tile(const Source<From>& x, const Weights<Compute<S>>& weights,
                                             const Target<S>& to) {
    using T = Compute<S>;
    constexpr int W = kLanes<T>;
    const auto for_each = [](auto action) VITRAIL_INLINED {
        unroll<G>([&](auto g) VITRAIL_INLINED { unroll<N>([&](auto n) VITRAIL_INLINED { action(g, n); }); });
    };
    Vec<T, W> sum[G][N];
    for_each([&](auto g, auto n) VITRAIL_INLINED { sum[g][n] = load(weights.data + g * weights.set); });
    const int64_t column = x.column;
    const uint64_t count = uint64_t(x.last - x.first);
    for (int64_t row = x.first_row; row < x.last_row; ++row) {
        const T* taps = weights.data + (1 + row * weights.width) * W;
        for (int64_t first = 0; first < weights.width; first += K, taps += K * W) {
            const From* from = x.data + row * x.row + first * column;
            Vec<T, W> tap[G][K];
            unroll<G>([&](auto g) VITRAIL_INLINED {
                unroll<K>([&](auto k) VITRAIL_INLINED { tap[g][k] = load(taps + g * weights.set + k * W); });
            });
            unroll<N + K - 1>([&](auto i) VITRAIL_INLINED {
                if (uint64_t(first + i - x.first) < count) {
                    unroll<G>([&](auto g) VITRAIL_INLINED {
                        const Vec<T, W> place = widen<W>(from + g * W);
                        unroll<K>([&](auto k) VITRAIL_INLINED {
                            constexpr int n = decltype(i)::kValue - decltype(k)::kValue;
                            if constexpr (n >= 0 && n < N) sum[g][n] += place * tap[g][k];
                        });
                    });
                }
                from += column;
            });
        }
    }
    if (to.residual)
        for_each([&](auto g, auto n) VITRAIL_INLINED {
            sum[g][n] += widen<W>(to.residual + g * to.set + n * to.residual_place);
        });
    for_each([&](auto g, auto n)
                 VITRAIL_INLINED { narrow<W>(to.data + g * to.set + n * to.place, sum[g][n]); });
}

template <class From, class S>
VITRAIL_INLINE void convolve_places(int sets, int places, const Source<From>& x,
                                    const Weights<Compute<S>>& weights, const Target<S>& to) {
    const int64_t width = weights.width;
    const auto with = [&](auto taps) VITRAIL_INLINED {
        with_count<kSets>(sets, [&](auto g) VITRAIL_INLINED {
            with_count<kPlaces>(places, [&](auto n) VITRAIL_INLINED {
                convolve_tile<From, S, decltype(taps)::kValue, decltype(n)::kValue, decltype(g)::kValue>(
                    x, weights, to);
            });
        });
    };
    if (width % 7 == 0)
        with(Index<7>());
    else if (width % 5 == 0)
        with(Index<5>());
    else if (width % 3 == 0)
        with(Index<3>());
    else
        with(Index<1>());
}

template <class S>
class Kernel {
    using T = Compute<S>;
    static constexpr int W = kLanes<T>;
    using V = Vec<T, W>;

  public:
    explicit Kernel(const DepthwiseConv& a)
        : a_(a),
          sets_((a.channels + W - 1) / W),
          whole_(a.channels / W),
          weights_((1 + a.kernel_height * a.kernel_width) * W),
          prepares_(a.scale || a.shift || a.activation != Activation::kNone || a.channels < W),
          group_(group_of(weights_, sets_, prepares_)),
          groups_((sets_ + group_ - 1) / group_),
          blocks_(blocks_of(a, a.images * groups_, prepares_ ? group_ : 0)),
          most_rows_((a.height + blocks_ - 1) / blocks_ + a.kernel_height - 1) {}

    DepthwiseConvPlan plan() const {
        const int64_t prepared = prepares_ ? most_rows_ * a_.width * group_ * W : 0;
        return {a_.images * blocks_ * groups_, (group_ * weights_ + prepared) * int64_t(sizeof(T))};
    }

    void convolve(void* scratch, int64_t begin, int64_t end) const {
        T* const weights = static_cast<T*>(scratch);
        T* const prepared = weights + group_ * weights_;
        S tile[2 * kPlaces * W] = {};
        for (int64_t task = begin; task < end; ++task) {
            const int64_t group = task % groups_, block = task / groups_ % blocks_;
            const int64_t image = task / groups_ / blocks_;
            const int64_t first = group * group_, last = first + group_ < sets_ ? first + group_ : sets_;
            const int64_t row = a_.height * block / blocks_, end_row = a_.height * (block + 1) / blocks_;
            for (int64_t set = first; set < last; ++set)
                pack_weight(image, lanes_of(set), weights + (set - first) * weights_);
            const int64_t above = row - a_.kernel_height / 2, top = above < 0 ? 0 : above;
            if (prepares_) {
                const int64_t below = end_row + a_.kernel_height / 2;
                prepare(image, first, last, top, below < a_.height ? below : a_.height, prepared);
            }
            const int64_t column = group_ * W;
            if (prepares_)
                convolve_rows(image, first, last, row, end_row, prepared - top * a_.width * column,
                              a_.width * column, column, weights, tile);
            else
                convolve_rows(image, first, last, row, end_row, at<const S>(a_.x, image, 0, 0), a_.x.row,
                              a_.x.column, weights, tile);
        }
    }

  private:
    // A vector of channels, of which lanes [first, last) are its own: the last vector overlaps the one
    // before.
    struct Lanes {
        int64_t channel, first, last;
    };

    Lanes lanes_of(int64_t set) const {
        const int64_t channel = set * W, left = a_.channels - channel;
        if (left >= W) return {channel, 0, W};
        if (a_.channels < W) return {0, 0, a_.channels};
        return {a_.channels - W, W - left, W};
    }

    // Equal groups, of a whole number of tiles.
    static int64_t group_of(int64_t weights, int64_t sets, bool prepares) {
        int64_t most = kWeightBytes / (weights * int64_t(sizeof(T)));
        if (prepares && most > kPreparedSets) most = kPreparedSets;
        if (most < kSets) most = kSets;
        const int64_t groups = (sets + most - 1) / most, even = (sets + groups - 1) / groups;
        return (even + kSets - 1) / kSets * kSets;
    }

    static int64_t blocks_of(const DepthwiseConv& a, int64_t others, int64_t prepared_sets) {
        int64_t rows = a.height * others / kManyTasks;
        if (prepared_sets) {  // with the rows beside them in cache, and not fewer than some of these
            const int64_t row = a.width * prepared_sets * W * int64_t(sizeof(T));
            const int64_t fit = kPreparedBytes / row - a.kernel_height, least = 2 * a.kernel_height;
            if (rows > fit) rows = fit;
            if (rows < least) rows = least;
        }
        if (rows < 1) rows = 1;
        return (a.height + rows - 1) / rows;
    }

    template <class From>
    static V some(const From* from, const Lanes& lanes) {
        if (lanes.last == W) return widen<W>(from);
        T all[W] = {};
        for (int64_t lane = 0; lane < lanes.last; lane += 4)
            store(all + lane, widen_some(from + lane, lanes.last - lane));
        return load(all);
    }

    static V parameter(const void* values, const Lanes& lanes) {
        return values ? some(static_cast<const T*>(values) + lanes.channel, lanes) : V{};
    }

    template <class From>
    static From* at(const Grid& grid, int64_t image, int64_t row, int64_t channel) {
        return static_cast<From*>(grid.data) + image * grid.image + row * grid.row + channel;
    }

    void pack_weight(int64_t image, const Lanes& lanes, T* to) const {
        const T* from = static_cast<const T*>(a_.weight) + image * a_.weight_image + lanes.channel;
        const T* const end = to + weights_;
        store(to, parameter(a_.bias, lanes));
        for (to += W; to < end; to += W, from += a_.channels) store(to, some(from, lanes));
    }

    // Rows [top, bottom) of the sets [first, last), side by side for each place.
    void prepare(int64_t image, int64_t first, int64_t last, int64_t top, int64_t bottom, T* to) const {
        V scale[kPreparedSets], shift[kPreparedSets];
        for (int64_t set = first; set < last; ++set) {
            scale[set - first] = a_.scale ? parameter(a_.scale, lanes_of(set)) : V{} + T(1);
            shift[set - first] = parameter(a_.shift, lanes_of(set));
        }
        for (int64_t row = top; row < bottom; ++row) {
            const S* from = at<const S>(a_.x, image, row, 0);
            for (int64_t column = 0; column < a_.width; ++column, from += a_.x.column, to += group_ * W) {
                for (int64_t set = first; set < last; ++set) {
                    const Lanes lanes = lanes_of(set);
                    V x = some(from + lanes.channel, lanes) * scale[set - first] + shift[set - first];
                    if (a_.activation == Activation::kGelu) x = gelu<S, W>(x);
                    store(to + (set - first) * W, x);
                }
            }
        }
    }

    // Rows [top, bottom) of the sets [first, last), from place (0, 0) of the image or from what was prepared
    // of it.
    template <class From>
    VITRAIL_INLINE void convolve_rows(int64_t image, int64_t first, int64_t last, int64_t top, int64_t bottom,
                                      const From* x, int64_t x_row, int64_t x_column, const T* weights,
                                      S* tile) const {
        const int64_t side = a_.kernel_width / 2, above = a_.kernel_height / 2;
        const int64_t tiles = (a_.width + kPlaces - 1) / kPlaces, channel = lanes_of(first).channel;
        const int64_t bytes = (lanes_of(last - 1).channel + W - channel) * int64_t(sizeof(S));
        Source<From> source = {};
        source.row = x_row;
        source.column = x_column;
        for (int64_t row = top; row < bottom; ++row) {
            for (int64_t t = 0, column = 0; t < tiles; ++t) {
                const int places = int((a_.width - column + tiles - t - 1) / (tiles - t));
                source.first = side - column;
                source.last = a_.width + side - column;
                source.first_row = row < above ? above - row : 0;
                source.last_row = row + above < a_.height ? a_.kernel_height : a_.height + above - row;
                if (!prepares_ && row + above + 1 < a_.height) {
                    const From* next = x + (row + above + 1) * x_row + column * x_column + channel;
                    for (int i = 0; i < places; ++i, next += x_column) prefetch(next, bytes);
                }
                if (row + 1 < bottom) {
                    S* next = at<S>(a_.out, image, row + 1, channel) + column * a_.out.column;
                    for (int i = 0; i < places; ++i, next += a_.out.column) prefetch_to_write(next, bytes);
                }
                for (int64_t set = first; set < last;) {
                    const Lanes lanes = lanes_of(set);
                    // what is not a whole vector goes by itself, as it is written in part
                    const int sets = set + kSets <= last && set + kSets <= whole_ ? kSets : 1;
                    source.data = x + (row - above) * x_row + (column - side) * x_column;
                    source.data += prepares_ ? (set - first) * W : lanes.channel;
                    const Weights<T> kernels = {weights + (set - first) * weights_, weights_,
                                                a_.kernel_width};
                    Target<S> target = {at<S>(a_.out, image, row, lanes.channel) + column * a_.out.column,
                                        a_.out.column, W, nullptr, 0};
                    if (a_.residual.data) {
                        target.residual =
                            at<const S>(a_.residual, image, row, lanes.channel) + column * a_.residual.column;
                        target.residual_place = a_.residual.column;
                    }
                    if (set < whole_)
                        convolve_places<From, S>(sets, places, source, kernels, target);
                    else
                        convolve_part(lanes, places, source, kernels, target, tile);
                    set += sets;
                }
                column += places;
            }
        }
    }

    // A set of which only some lanes may be written, or read of the residual.
    template <class From>
    void convolve_part(const Lanes& lanes, int places, const Source<From>& x, const Weights<T>& weights,
                       const Target<S>& to, S* tile) const {
        S* const residual = tile + kPlaces * W;
        for (int n = 0; to.residual && n < places; ++n)
            __builtin_memcpy(residual + n * W, to.residual + n * to.residual_place, lanes.last * sizeof(S));
        convolve_places<From, S>(1, places, x, weights, {tile, W, 0, to.residual ? residual : nullptr, W});
        for (int n = 0; n < places; ++n)
            __builtin_memcpy(to.data + n * to.place + lanes.first, tile + n * W + lanes.first,
                             (lanes.last - lanes.first) * sizeof(S));
    }

    const DepthwiseConv& a_;
    const int64_t sets_, whole_, weights_;
    const bool prepares_;
    const int64_t group_, groups_, blocks_, most_rows_;
};

template <class Action>
auto with_kernel(const DepthwiseConv& a, Action action) {
    return with_storage(a.storage, [&](auto s) { return action(Kernel<decltype(s)>(a)); });
}

DepthwiseConvPlan plan(const DepthwiseConv& a) {
    return with_kernel(a, [](const auto& kernel) { return kernel.plan(); });
}

void convolve(const DepthwiseConv& a, void* scratch, int64_t begin, int64_t end) {
    with_kernel(a, [&](const auto& kernel) { kernel.convolve(scratch, begin, end); });
}

}  // namespace

const DepthwiseConvKernels kDepthwiseConv = {plan, convolve};

}  // namespace vitrail::VITRAIL_ISA
