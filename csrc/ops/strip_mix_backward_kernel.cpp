// Gradients of strip_mix's weight and bias for one instruction set.
//
// Lanes are groups of channels, as in the forward pass; strips of all images and patches are what is summed
// over. A task owns the sums for some of the places that give, so that none is shared: the order of a sum
// depends on the shapes alone.
#include "../addressing/group_lanes.h"
#include "../core/planes.h"
#include "strip_mix.h"

namespace vitrail::VITRAIL_ISA {
namespace {

// Places that receive and places that give whose sums are in registers, for each of the three strips.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTo = 2, kFrom = 4;
#else
constexpr int kTo = 1, kFrom = 4;
#endif
constexpr int64_t kPart = 16;  // places that give, of a task
constexpr int64_t kStrips =
    64;  // summed at a time: what is packed of a few places fits the first-level cache

// Packed strips of one place after the other, `place` apart, vector of columns by vector of columns. Those of
// the gradient have a strip of zeros at both ends.
template <class P>
struct Strips {
    const P* data;
    int64_t place;
};

template <class T>
struct Sums {
    T* data;
    int64_t tap, to, from;
};

template <class P, int I, int J>
__attribute__((noinline)) void sum_tile(Strips<P> grad, Strips<P> x, int64_t vectors, int64_t strips,
                                        Sums<Compute<P>> to, bool add) {
    using M = Product<P>;
    constexpr int W = kLanes<Compute<P>>, kRow = W * M::kDepth;
    typename M::V sum[3][I][J] = {};
    const auto for_each = [](auto action) VITRAIL_INLINED {
        unroll<3>([&](auto t) VITRAIL_INLINED {
            unroll<I>([&](auto i)
                          VITRAIL_INLINED { unroll<J>([&](auto j) VITRAIL_INLINED { action(t, i, j); }); });
        });
    };
    if (add)
        for_each([&](auto t, auto i, auto j) VITRAIL_INLINED {
            sum[t][i][j] = load(to.data + t * to.tap + i * to.to + j * to.from);
        });
    for (int64_t v = 0; v < vectors; ++v, grad.data += 2 * kRow)
        for (int64_t strip = 0; strip < strips; ++strip, grad.data += kRow, x.data += kRow) {
            typename M::B a[J];
            unroll<J>([&](auto j) VITRAIL_INLINED { a[j] = M::load_b(x.data + j * x.place); });
            unroll<I>([&](auto i) VITRAIL_INLINED {
                unroll<3>([&](auto t) VITRAIL_INLINED {
                    const typename M::B b = M::load_b(grad.data + i * grad.place + (2 - t) * kRow);
                    unroll<J>([&](auto j) VITRAIL_INLINED { sum[t][i][j] = M::add(b, a[j], sum[t][i][j]); });
                });
            });
        }
    for_each([&](auto t, auto i, auto j)
                 VITRAIL_INLINED { store(to.data + t * to.tap + i * to.to + j * to.from, sum[t][i][j]); });
}

template <class P, class... Arguments>
VITRAIL_INLINE void sum_places(int to, int from, const Arguments&... arguments) {
    with_count<kTo>(to, [&](auto i) VITRAIL_INLINED {
        with_count<kFrom>(from, [&](auto j) VITRAIL_INLINED {
            sum_tile<P, decltype(i)::kValue, decltype(j)::kValue>(arguments...);
        });
    });
}

template <class S>
class Kernel {
    using T = Compute<S>;
    using P = Packed<S>;
    static constexpr int W = kLanes<T>, kDepth = Product<P>::kDepth, kRow = W * kDepth;

  public:
    explicit Kernel(const StripMixGradients& a)
        : a_(a),
          lanes_(a.groups),
          columns_(a.images * a.patches),
          parts_((a.length + kPart - 1) / kPart),
          together_(a.strips < kStrips ? kStrips / a.strips : 1),
          chunk_(together_ * lanes_.of(lanes_.sets() - 1).copies * kDepth) {}

    StripMixGradientsPlan plan() const {
        const int64_t sums = lanes_.sets() * (3 * a_.length + 1) * a_.length * W;
        const int64_t packed = together_ * a_.length * (2 * a_.strips + 2) * kRow;
        return {sums * int64_t(sizeof(T)), packed * int64_t(sizeof(P)), parts_ * lanes_.sets()};
    }

    // Sets run fastest: the last one has less to do.
    void sum(void* sums, void* scratch, int64_t begin, int64_t end) const {
        const int64_t sets = lanes_.sets();
        for (int64_t column = 0; column < columns_; column += chunk_)
            for (int64_t set = 0; set < sets; ++set) {
                const int64_t first = begin > set ? (begin - set + sets - 1) / sets : 0;
                const int64_t last = end > set ? (end - set + sets - 1) / sets : 0;
                if (first < last) sum_chunk(set, first, last, column, sums, scratch);
            }
        for (int64_t task = begin; task < end; ++task) store_part(task % sets, task / sets, sums);
    }

  private:
    // Packs places [first, last) of `count` vectors of columns, with `border` strips of zeros at both ends.
    VITRAIL_INLINE void pack(const Grid& grid, int64_t set, int64_t vector, int64_t count, int64_t first,
                             int64_t last, int64_t border, P* to) const {
        Lanes lanes = lanes_.of(set);
        const int64_t copies = lanes.copies, strips = a_.strips + 2 * border, place = count * strips * kRow;
        lanes.copies = 1;
        for (int64_t i = 0; i < count * copies; ++i) {
            Plane<S> planes[kDepth], none[kDepth];
            for (int d = 0; d < kDepth; ++d) {
                planes[d] = column_of(grid, set, first, (vector * copies + i) * kDepth + d);
                none[d] = zeros<S>();
            }
            P* at = to + i / copies * strips * kRow + i % copies * lanes.width * kDepth;
            pack_plane(none, border, last - first, lanes, at, kRow, place);
            at += border * kRow;
            pack_plane(planes, a_.strips, last - first, lanes, at, kRow, place);
            pack_plane(none, border, last - first, lanes, at + a_.strips * kRow, kRow, place);
        }
    }

    // Strips and places, from place `first` on, of a patch of an image; zeros past the last one.
    VITRAIL_INLINE Plane<S> column_of(const Grid& grid, int64_t set, int64_t first, int64_t index) const {
        if (index >= columns_) return zeros<S>();
        const int64_t image = index / a_.patches, channel = index % a_.patches * a_.groups + set * W;
        return {static_cast<const S*>(grid.data) + image * grid.image + first * grid.column + channel,
                grid.row, grid.column};
    }

    // Parts [first, last) of a set: adds a chunk of columns to their sums.
    VITRAIL_INLINE void sum_chunk(int64_t set, int64_t first, int64_t last, int64_t column, void* sums,
                                  void* scratch) const {
        P* const grad = static_cast<P*>(scratch);
        P* const x = grad + together_ * a_.length * (a_.strips + 2) * kRow;
        const int64_t width = lanes_.of(set).copies * kDepth, begin = place_of(first), end = place_of(last);
        const int64_t left = columns_ - column < chunk_ ? columns_ - column : chunk_;
        const int64_t vectors = (left + width - 1) / width;
        for (int64_t v = 0; v < vectors; v += together_) {
            const int64_t count = vectors - v < together_ ? vectors - v : together_;
            const bool add = column + v > 0;
            pack(a_.grad, set, column / width + v, count, 0, a_.length, 1, grad);
            pack(a_.x, set, column / width + v, count, begin, end, 0, x);
            const Strips<P> of_grad = {grad, count * (a_.strips + 2) * kRow};
            Strips<P> of_x = {x, count * a_.strips * kRow};
            for (int64_t part = first; part < last; ++part) {
                const int64_t places = place_of(part + 1) - place_of(part);
                sum_part(of_grad, of_x, places, count, sums_of(set, part, sums), add);
                of_x.data += places * of_x.place;
            }
            if (first == 0 && a_.bias) sum_bias(of_grad, count, bias_of(set, sums), add);
        }
    }

    int64_t place_of(int64_t part) const { return part * a_.length / parts_; }

    // Where the sums of a part are kept: in the result, if it has their type and lanes are not summed.
    Sums<T> sums_of(int64_t set, int64_t part, void* sums) const {
        const int64_t place = place_of(part), size = a_.length * a_.length;
        if (direct(set))
            return {static_cast<T*>(a_.weight) + place * a_.groups + set * W, size * a_.groups,
                    a_.length * a_.groups, a_.groups};
        return {static_cast<T*>(sums) + (3 * set * size + place) * W, size * W, a_.length * W, W};
    }
    bool direct(int64_t set) const { return sizeof(S) == sizeof(T) && lanes_.full(set); }

    T* bias_of(int64_t set, void* sums) const {
        return static_cast<T*>(sums) + (3 * lanes_.sets() * a_.length + set) * a_.length * W;
    }

    VITRAIL_INLINE void sum_part(Strips<P> grad, Strips<P> x, int64_t places, int64_t vectors, Sums<T> sums,
                                 bool add) const {
        const int64_t tiles = (places + kFrom - 1) / kFrom;
        int64_t from = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int width = int((places - from + tiles - tile - 1) / (tiles - tile));
            Sums<T> to = sums;
            to.data += from * to.from;
            for (int64_t i = 0; i < a_.length; i += kTo, to.data += kTo * to.to) {
                const int height = a_.length - i < kTo ? int(a_.length - i) : kTo;
                sum_places<P>(height, width, Strips<P>{grad.data + i * grad.place, grad.place},
                              Strips<P>{x.data + from * x.place, x.place}, vectors, a_.strips, to, add);
            }
            from += width;
        }
    }

    // Four places at a time, so that additions need not wait for each other; past the last one it is
    // repeated.
    VITRAIL_INLINE void sum_bias(Strips<P> grad, int64_t vectors, T* bias, bool add) const {
        using M = Product<P>;
        P ones[kRow];
        for (P& x : ones) set_one(x);
        const typename M::B one = M::load_b(ones);
        const int64_t strips = vectors * (a_.strips + 2), last = a_.length - 1;
        for (int64_t i = 0; i < a_.length; i += 4) {
            const P* from[4];
            Vec<T, W> sum[4] = {};
            unroll<4>([&](auto n) VITRAIL_INLINED {
                const int64_t place = i + n < last ? i + n : last;
                from[n] = grad.data + place * grad.place;
                if (add) sum[n] = load(bias + place * W);
            });
            for (int64_t strip = 0; strip < strips; ++strip)
                unroll<4>([&](auto n) VITRAIL_INLINED {
                    sum[n] = M::add(one, M::load_b(from[n] + strip * kRow), sum[n]);
                });
            for (int n = 0; n < 4 && i + n < a_.length; ++n) store(bias + (i + n) * W, sum[n]);
        }
    }

    static void set_one(T& x) { x = 1; }
    static void set_one(BFloat16& x) { x.bits = 0x3f80; }

    void store_part(int64_t set, int64_t part, void* sums) const {
        const Lanes lanes = lanes_.of(set);
        const Sums<T> from = sums_of(set, part, sums);
        const int64_t first = place_of(part), last = place_of(part + 1), n = a_.length;
        S* const to = static_cast<S*>(a_.weight) + set * W;
        if (!direct(set))
            for (int64_t tap = 0; tap < 3; ++tap)
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t j = first; j < last; ++j)
                        store_sums(lanes, from.data + tap * from.tap + i * from.to + (j - first) * from.from,
                                   to + ((tap * n + i) * n + j) * a_.groups);
        if (part == 0 && a_.bias)
            for (int64_t i = 0; i < n; ++i)
                store_sums(lanes, bias_of(set, sums) + i * W,
                           static_cast<S*>(a_.bias) + i * a_.groups + set * W);
    }

    // The columns that a vector holds are summed at the end.
    VITRAIL_INLINE static void store_sums(Lanes lanes, const T* from, S* to) {
        if (lanes.count == W) return narrow<W>(to, load(from));
        for (int lane = 0; lane < lanes.count; lane += 4) {
            Vec<T, 4> sum = {};
            for (int copy = 0; copy < lanes.copies; ++copy)
                sum += widen_some(from + copy * lanes.width + lane, lanes.count - lane);
            narrow_some(to + lane, sum, lanes.count - lane);
        }
    }

    const StripMixGradients& a_;
    const GroupLanes<T> lanes_;
    const int64_t columns_, parts_, together_;  // together_: vectors of columns that are summed at a time
    const int64_t chunk_;                       // columns that all sets visit before they go on
};

template <class Action>
auto with_kernel(const StripMixGradients& a, Action action) {
    return with_storage(a.storage, [&](auto s) { return action(Kernel<decltype(s)>(a)); });
}

StripMixGradientsPlan plan(const StripMixGradients& a) {
    return with_kernel(a, [](const auto& kernel) { return kernel.plan(); });
}

void sum(const StripMixGradients& a, void* sums, void* scratch, int64_t begin, int64_t end) {
    with_kernel(a, [&](const auto& kernel) { kernel.sum(sums, scratch, begin, end); });
}

}  // namespace

const StripMixGradientsKernels kStripMixGradients = {plan, sum};

}  // namespace vitrail::VITRAIL_ISA
