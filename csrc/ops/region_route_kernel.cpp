// region_route for one instruction set. Compiled once per backend, with -DVITRAIL_ISA=<namespace>.
#include "../core/scalar.h"
#include "region_route.h"

namespace vitrail::VITRAIL_ISA {
namespace {

VITRAIL_INLINE int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

template <class S>
struct Kernel {
    using T = Compute<S>;
    static constexpr int W = kLanes<T>;

    // Rows are summed first, so that sums are of few numbers of like size.
    static void mean(const Grid& grid, const Regions& r, int64_t image, int64_t region, int64_t channels,
                     T* to) {
        const int64_t top = region / r.across * r.height, left = region % r.across * r.width;
        const int64_t rows = least(r.height, r.grid_height - top),
                      columns = least(r.width, r.grid_width - left);
        const S* const from =
            static_cast<const S*>(grid.data) + image * grid.image + top * grid.row + left * grid.column;
        const T scale = T(1) / T(rows * columns);
        const auto sum_of = [&](auto read) {
            auto sum = decltype(read(from)){};
            for (int64_t y = 0; y < rows; ++y) {
                auto of_row = decltype(read(from)){};
                for (int64_t x = 0; x < columns; ++x) of_row += read(from + y * grid.row + x * grid.column);
                sum += of_row;
            }
            return sum * scale;
        };
        int64_t c = 0;
        for (; c + W <= channels; c += W)
            store(to + c, sum_of([&](const S* at) { return widen<W>(at + c); }));
        for (; c < channels; c += 4) {
            const Vec<T, 4> m = sum_of([&](const S* at) { return widen_some(at + c, channels - c); });
            narrow_some(to + c, m, channels - c);
        }
    }

    static void means(const Grid& grid, const Regions& r, int64_t channels, T* to, int64_t begin,
                      int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            mean(grid, r, i / r.count, i % r.count, channels, to + i * channels);
    }

    static T total(Vec<T, W> v) {
        const Vec<T, W> rows[4] = {v, Vec<T, W>{}, Vec<T, W>{}, Vec<T, W>{}};
        return reduce_rows<T>(rows, Add())[0];
    }

    static void scores(const T* query, const T* keys, int64_t channels, int64_t count, T* to) {
        for (int64_t i = 0; i < count; ++i, keys += channels) {
            Vec<T, W> sum = {};
            int64_t c = 0;
            for (; c + W <= channels; c += W) sum += load(query + c) * load(keys + c);
            T rest = 0;
            for (; c < channels; ++c) rest += query[c] * keys[c];
            to[i] = total(sum) + rest;
        }
    }
};

template <class Action>
void with_kernel(Storage storage, Action action) {
    switch (storage) {
        case Storage::kFloat64:
            return action(Kernel<double>());
        case Storage::kBFloat16:
            return action(Kernel<BFloat16>());
        case Storage::kFloat16:
            return action(Kernel<Float16>());
        default:
            return action(Kernel<float>());
    }
}

void means(Storage storage, const Grid& grid, const Regions& regions, int64_t channels, void* to,
           int64_t begin, int64_t end) {
    with_kernel(storage, [&](auto kernel) {
        kernel.means(grid, regions, channels, static_cast<typename decltype(kernel)::T*>(to), begin, end);
    });
}

void scores(Storage storage, const void* query, const void* keys, int64_t channels, int64_t count, void* to) {
    with_kernel(storage, [&](auto kernel) {
        using T = typename decltype(kernel)::T;
        kernel.scores(static_cast<const T*>(query), static_cast<const T*>(keys), channels, count,
                      static_cast<T*>(to));
    });
}

}  // namespace

const RegionRouteKernels kRegionRoute = {means, scores};

}  // namespace vitrail::VITRAIL_ISA
