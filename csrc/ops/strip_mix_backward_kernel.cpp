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

template <class P, int I, int J = kFrom, class... Arguments>
VITRAIL_INLINE void sum_from(int from, const Arguments&... arguments) {
    if (from == J)
        sum_tile<P, I, J>(arguments...);
    else if constexpr (J > 1)
        sum_from<P, I, J - 1>(from, arguments...);
}

template <class P, int I = kTo, class... Arguments>
VITRAIL_INLINE void sum_places(int to, int from, const Arguments&... arguments) {
    if (to == I)
        sum_from<P, I>(from, arguments...);
    else if constexpr (I > 1)
        sum_places<P, I - 1>(to, from, arguments...);
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
          together_(a.strips < kStrips ? kStrips / a.strips : 1) {}

    StripMixGradientsPlan plan() const {
        const int64_t sums = (3 * kPart + 1) * a_.length * W + 4;
        const int64_t packed = together_ * (a_.length * (a_.strips + 2) + kPart * a_.strips) * kRow;
        return {sums * int64_t(sizeof(T)) + packed * int64_t(sizeof(P)) + 64, parts_ * lanes_.sets()};
    }

    // Sets run fastest: the last one has less to do.
    void sum(void* scratch, int64_t begin, int64_t end) const {
        P* const grad = static_cast<P*>(scratch);
        P* const x = grad + together_ * a_.length * (a_.strips + 2) * kRow;
        T* const sums = reinterpret_cast<T*>(x + together_ * kPart * a_.strips * kRow);
        T* const bias = sums + 3 * a_.length * kPart * W;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t set = task % lanes_.sets(), part = task / lanes_.sets();
            const int64_t first = part * a_.length / parts_, last = (part + 1) * a_.length / parts_;
            const bool direct = sizeof(S) == sizeof(T) && lanes_.full(set);
            Sums<T> to = {sums, a_.length * kPart * W, kPart * W, W};
            if (direct) {
                T* weight = static_cast<T*>(a_.weight) + first * a_.groups + set * W;
                to = {weight, a_.length * a_.length * a_.groups, a_.length * a_.groups, a_.groups};
            }
            const int64_t vectors = lanes_.vectors(set, (columns_ + kDepth - 1) / kDepth);
            for (int64_t v = 0; v < vectors; v += together_) {
                const int64_t count = vectors - v < together_ ? vectors - v : together_;
                pack(a_.grad, set, v, count, 0, a_.length, 1, grad);
                pack(a_.x, set, v, count, first, last, 0, x);
                sum_part({grad, count * (a_.strips + 2) * kRow}, {x, count * a_.strips * kRow}, last - first,
                         count, to, v > 0);
                if (part == 0 && a_.bias)
                    sum_bias({grad, count * (a_.strips + 2) * kRow}, count, bias, v > 0);
            }
            if (!direct) store_weight(set, first, last, to);
            if (part == 0 && a_.bias)
                for (int64_t i = 0; i < a_.length; ++i)
                    store_sums(lanes_.of(set), bias + i * W,
                               static_cast<S*>(a_.bias) + i * a_.groups + set * W);
        }
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

    VITRAIL_INLINE void store_weight(int64_t set, int64_t first, int64_t last, const Sums<T>& sums) const {
        S* to = static_cast<S*>(a_.weight) + set * W;
        for (int64_t tap = 0; tap < 3; ++tap)
            for (int64_t i = 0; i < a_.length; ++i)
                for (int64_t j = first; j < last; ++j)
                    store_sums(lanes_.of(set),
                               sums.data + tap * sums.tap + i * sums.to + (j - first) * sums.from,
                               to + ((tap * a_.length + i) * a_.length + j) * a_.groups);
    }

    // The columns that a vector holds are summed at the end.
    VITRAIL_INLINE static void store_sums(Lanes lanes, const T* from, S* to) {
        if (lanes.count == W) return narrow<W>(to, load(from));
        for (int lane = 0; lane < lanes.count; lane += 4) {
            Vec<T, 4> sum = {};
            for (int copy = 0; copy < lanes.copies; ++copy)
                sum += load<T, 4>(from + copy * lanes.width + lane);
            narrow_some(to + lane, sum, lanes.count - lane);
        }
    }

    const StripMixGradients& a_;
    const GroupLanes<T> lanes_;
    const int64_t columns_, parts_, together_;
};

template <class Action>
auto with_kernel(const StripMixGradients& a, Action action) {
    switch (a.storage) {
        case Storage::kFloat64:
            return action(Kernel<double>(a));
        case Storage::kBFloat16:
            return action(Kernel<BFloat16>(a));
        case Storage::kFloat16:
            return action(Kernel<Float16>(a));
        default:
            return action(Kernel<float>(a));
    }
}

StripMixGradientsPlan plan(const StripMixGradients& a) {
    return with_kernel(a, [](const auto& kernel) { return kernel.plan(); });
}

void sum(const StripMixGradients& a, void* scratch, int64_t begin, int64_t end) {
    with_kernel(a, [&](const auto& kernel) { kernel.sum(scratch, begin, end); });
}

}  // namespace

const StripMixGradientsKernels kStripMixGradients = {plan, sum};

}  // namespace vitrail::VITRAIL_ISA
