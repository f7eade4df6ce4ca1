// strip_mix for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
//
// Lanes are groups of channels. A task computes a block of strips: it packs them, with the strips beside them
// (zeros past the grid), and walks over the places that receive. Sums of several strips and places stay in
// registers, so that a vector of the grid or of the weight, once loaded, is used several times.
#include "../addressing/group_lanes.h"
#include "../core/planes.h"
#include "strip_mix.h"

namespace vitrail::VITRAIL_ISA {
namespace {

// Strips and places whose sums are in registers; beside them are the strips of one place, and a weight.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStrips = 7, kPlaces = 3;
#else
constexpr int kStrips = 4, kPlaces = 2;
#endif

// Of the weights of a vector of groups that one task after the other uses.
constexpr int64_t kWeightBytes = int64_t(384) << 10;

// Weights of one vector of groups; strides in elements, `from` is that of a row (of pairs).
template <class P>
struct Weights {
    const P* data;
    int64_t tap, to, from;
};

// Sums of R strips and N places: `x` are the R + 2 strips of each place (pair of places).
template <class P, int R, int N>
__attribute__((noinline)) void mix_tile(const P* x, const Weights<P>& w, int64_t depth,
                                        const Compute<P>* bias, Compute<P>* out, int64_t strip,
                                        int64_t place) {
    using M = Product<P>;
    constexpr int W = kLanes<Compute<P>>, kRow = W * M::kDepth;
    const auto for_each = [](auto action) VITRAIL_INLINED {
        unroll<N>([&](auto n) VITRAIL_INLINED { unroll<R>([&](auto r) VITRAIL_INLINED { action(n, r); }); });
    };
    typename M::V sum[N][R];
    for_each([&](auto n, auto r) VITRAIL_INLINED { sum[n][r] = load(bias + n * W); });
    const P* weight[3] = {w.data, w.data + w.tap, w.data + 2 * w.tap};
    const int64_t to = w.to, from = w.from;
    for (int64_t i = 0; i < depth; ++i) {
        typename M::B v[R + 2];
        unroll<R + 2>([&](auto r) VITRAIL_INLINED { v[r] = M::load_b(x + r * kRow); });
        x += (R + 2) * kRow;
        unroll<N>([&](auto n) VITRAIL_INLINED {
            unroll<3>([&](auto tap) VITRAIL_INLINED {
                const typename M::B y = M::load_b(weight[tap] + n * to);
                unroll<R>([&](auto r) VITRAIL_INLINED { sum[n][r] = M::add(y, v[r + tap], sum[n][r]); });
            });
        });
        unroll<3>([&](auto tap) VITRAIL_INLINED { weight[tap] += from; });
    }
    for_each([&](auto n, auto r) VITRAIL_INLINED { store(out + r * strip + n * place, sum[n][r]); });
}

template <class P, class... Arguments>
VITRAIL_INLINE void mix_strips(int strips, int places, const Arguments&... arguments) {
    with_count<kStrips>(strips, [&](auto r) VITRAIL_INLINED {
        with_count<kPlaces>(places, [&](auto n) VITRAIL_INLINED {
            mix_tile<P, decltype(r)::kValue, decltype(n)::kValue>(arguments...);
        });
    });
}

template <class S>
class Kernel {
    using T = Compute<S>;
    using P = Packed<S>;
    static constexpr int W = kLanes<T>, kDepth = Product<P>::kDepth, kRow = W * kDepth;
    static constexpr bool kAsTheyLie = sizeof(P) == sizeof(T) && sizeof(S) == sizeof(T);

  public:
    explicit Kernel(const StripMix& a)
        : a_(a),
          lanes_(a.groups),
          depth_((a.length + kDepth - 1) / kDepth),
          blocks_((a.strips + kStrips - 1) / kStrips),
          columns_(a.images * a.patches * blocks_),
          parts_(parts_of(a.length, depth_)),
          first_packed_(kAsTheyLie ? lanes_.full_sets() : 0) {}

    StripMixPlan plan() const {
        const int64_t bias = lanes_.sets() * a_.length * W * sizeof(T);
        const int64_t weight = (lanes_.sets() - first_packed_) * a_.length * 3 * depth_ * kRow * sizeof(P);
        const int64_t block = (kStrips + 2) * depth_ * kRow * sizeof(P);
        const int64_t tile = (kStrips * kPlaces + 1) * W * sizeof(T);
        int64_t tasks = 0;
        for (int64_t set = 0; set < lanes_.sets(); ++set) tasks += parts_ * lanes_.vectors(set, columns_);
        return {bias + weight, block + tile, lanes_.sets() * a_.length, tasks};
    }

    // A task is one place that receives.
    void pack(void* packed, int64_t begin, int64_t end) const {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t set = task / a_.length, place = task % a_.length;
            const Lanes lanes = lanes_.of(set);
            Vec<T, W> bias = {};
            if (a_.bias) bias = spread(static_cast<const S*>(a_.bias) + place * a_.groups + set * W, lanes);
            store(static_cast<T*>(packed) + task * W, bias);
            if (set < first_packed_) continue;
            P* to = packed_weights(packed, set) + place * 3 * depth_ * kRow;
            const S* from = static_cast<const S*>(a_.weight) + place * a_.to + set * W;
            pack_places({from, a_.tap, a_.from}, 3, lanes, to, kRow, 3 * kRow);
        }
    }

    // A task is a part of the places that receive, of a vector of columns. The tasks of one set and part
    // follow each other: they share its weights.
    void mix(const void* packed, void* scratch, int64_t begin, int64_t end) const {
        P* const block = static_cast<P*>(scratch);
        T* const tile = reinterpret_cast<T*>(block + (kStrips + 2) * depth_ * kRow);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t full = parts_ * columns_;
            const int64_t set = task < lanes_.full_sets() * full ? task / full : lanes_.full_sets();
            const Lanes lanes = lanes_.of(set);
            const int64_t vectors = lanes_.vectors(set, columns_);
            const int64_t part = (task - set * full) / vectors, vector = (task - set * full) % vectors;
            Column column[W];
            int strips = 0;
            for (int i = 0; i < lanes.copies; ++i) {
                column[i] = column_of(set, vector * lanes.copies + i);
                if (column[i].strips > strips) strips = column[i].strips;
            }
            for (int i = 0; i < lanes.copies; ++i)
                pack_column({lanes.count, lanes.width, 1}, column[i], strips,
                            block + i * lanes.width * kDepth);
            mix_block(packed, set, part, column, strips, block, tile);
        }
    }

  private:
    struct Column {
        int64_t first;  // strip
        int strips;     // none: a column past the last one
        const S* x;     // of the first place of strip 0
        S* out;
    };

    // So many that the weights of one stay in the second-level cache while grids pass by.
    static int64_t parts_of(int64_t length, int64_t depth) {
        const int64_t place = 3 * depth * kRow * sizeof(P);
        const int64_t places = kWeightBytes / place;
        return places < 1 ? length : (length + places - 1) / places;
    }

    P* packed_weights(void* packed, int64_t set) const {
        P* weights = reinterpret_cast<P*>(static_cast<T*>(packed) + lanes_.sets() * a_.length * W);
        return weights + (set - first_packed_) * a_.length * 3 * depth_ * kRow;
    }

    Weights<P> weights(const void* packed, int64_t set) const {
        if (set < first_packed_) return {static_cast<const P*>(a_.weight) + set * W, a_.tap, a_.to, a_.from};
        return {packed_weights(const_cast<void*>(packed), set), kRow, 3 * depth_ * kRow, 3 * kRow};
    }

    Column column_of(int64_t set, int64_t index) const {
        if (index >= columns_) return {0, 0, nullptr, nullptr};
        const int64_t block = index % blocks_, rest = index / blocks_;
        const int64_t image = rest / a_.patches, channel = rest % a_.patches * a_.groups + set * W;
        const int64_t first = block * a_.strips / blocks_, last = (block + 1) * a_.strips / blocks_;
        return {first, int(last - first), static_cast<const S*>(a_.x.data) + image * a_.x.image + channel,
                static_cast<S*>(a_.out.data) + image * a_.out.image + channel};
    }

    // The strips of a block and those beside it; zeros past the grid, and for a column past the last one.
    VITRAIL_INLINE void pack_column(Lanes lanes, const Column& column, int strips, P* to) const {
        const int64_t first = column.first - 1, end = column.first + strips + 1;
        const int64_t begin = first < 0 ? 0 : first, stop = end < a_.strips ? end : a_.strips;
        const int64_t place = (strips + 2) * kRow;
        if (!column.x) return pack_places(zeros<S>(), end - first, lanes, to, kRow, place);
        const Plane<S> plane = {column.x + begin * a_.x.row, a_.x.row, a_.x.column};
        pack_places(zeros<S>(), begin - first, lanes, to, kRow, place);
        pack_places(plane, stop - begin, lanes, to + (begin - first) * kRow, kRow, place);
        pack_places(zeros<S>(), end - stop, lanes, to + (stop - first) * kRow, kRow, place);
    }

    // Columns of the plane are the places of a strip; they are packed in pairs where they are multiplied so.
    VITRAIL_INLINE void pack_places(Plane<S> plane, int64_t rows, Lanes lanes, P* to, int64_t to_row,
                                    int64_t to_column) const {
        Plane<S> planes[kDepth];
        for (int i = 0; i < kDepth; ++i)
            planes[i] = {plane.data + i * plane.column, plane.row, kDepth * plane.column};
        const int64_t whole = a_.length / kDepth;
        pack_plane(planes, rows, whole, lanes, to, to_row, to_column);
        if (whole == depth_) return;
        planes[0].data += whole * planes[0].column;
        for (int i = 1; i < kDepth; ++i) planes[i] = zeros<S>();
        pack_plane(planes, rows, 1, lanes, to + whole * to_column, to_row, to_column);
    }

    VITRAIL_INLINE void mix_block(const void* packed, int64_t set, int64_t part, const Column* column,
                                  int strips, const P* block, T* tile) const {
        const Lanes lanes = lanes_.of(set);
        int64_t place = part * a_.length / parts_;
        const int64_t end = (part + 1) * a_.length / parts_;
        const T* bias = static_cast<const T*>(packed) + (set * a_.length + place) * W;
        Weights<P> w = weights(packed, set);
        w.data += place * w.to;
        const bool in_place = sizeof(S) == sizeof(T) && lanes_.full(set);
        const int64_t tiles = (end - place + kPlaces - 1) / kPlaces;
        for (int64_t t = 0; t < tiles; ++t) {
            const int places = int((end - place + tiles - t - 1) / (tiles - t));
            if (in_place) {
                S* out = column->out + column->first * a_.out.row + place * a_.out.column;
                mix_strips<P>(strips, places, block, w, depth_, bias, reinterpret_cast<T*>(out), a_.out.row,
                              a_.out.column);
            } else {
                mix_strips<P>(strips, places, block, w, depth_, bias, tile, int64_t(kPlaces * W), int64_t(W));
                for (int i = 0; i < lanes.copies; ++i)
                    store_tile(lanes, column[i], place, places, tile + i * lanes.width);
            }
            place += places;
            bias += places * W;
            w.data += places * w.to;
        }
    }

    VITRAIL_INLINE void store_tile(Lanes lanes, const Column& column, int64_t place, int places,
                                   const T* from) const {
        for (int r = 0; r < column.strips; ++r, from += kPlaces * W) {
            S* to = column.out + (column.first + r) * a_.out.row + place * a_.out.column;
            for (int n = 0; n < places; ++n, to += a_.out.column) {
                if (lanes.count == W)
                    narrow<W>(to, load(from + n * W));
                else
                    for (int lane = 0; lane < lanes.count; lane += 4)
                        narrow_some(to + lane, load<T, 4>(from + n * W + lane), lanes.count - lane);
            }
        }
    }

    const StripMix& a_;
    const GroupLanes<T> lanes_;
    const int64_t depth_, blocks_, columns_, parts_;
    const int64_t first_packed_;  // of the sets; those before are read where they lie
};

template <class Action>
auto with_kernel(const StripMix& a, Action action) {
    return with_storage(a.storage, [&](auto s) { return action(Kernel<decltype(s)>(a)); });
}

StripMixPlan plan(const StripMix& a) {
    return with_kernel(a, [](const auto& kernel) { return kernel.plan(); });
}

void pack(const StripMix& a, void* packed, int64_t begin, int64_t end) {
    with_kernel(a, [&](const auto& kernel) { kernel.pack(packed, begin, end); });
}

void mix(const StripMix& a, const void* packed, void* scratch, int64_t begin, int64_t end) {
    with_kernel(a, [&](const auto& kernel) { kernel.mix(packed, scratch, begin, end); });
}

}  // namespace

const StripMixKernels kStripMix = {plan, pack, mix};

}  // namespace vitrail::VITRAIL_ISA
