// region_route for one instruction set. Compiled once per backend, with -DVITRAIL_ISA=<namespace>.
#include "../core/panels.h"
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
    static_assert(kRegionPadding % W == 0);

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

    static void turn(const T* means, int64_t count, int64_t channels, T* to, int64_t begin, int64_t end) {
        const int64_t padded = round_up(count, kRegionPadding);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t image = i / (padded / 4), region = i % (padded / 4) * 4;
            const T* rows[4] = {};
            for (int n = 0; n < 4 && region + n < count; ++n)
                rows[n] = means + (image * count + region + n) * channels;
            pack_four_columns<T>(rows, channels, channels, to + image * channels * padded + region, padded);
        }
    }

    static void scores(const T* means, int64_t rows, const T* turned, int64_t count, int64_t channels,
                       T* to) {
        const int64_t padded = round_up(count, kRegionPadding);
        multiply<T>(rows, padded / W, {means, channels, 1, turned, padded, channels}, to, padded, false);
    }
};

template <class Action>
void with_kernel(Storage storage, Action action) {
    return with_storage(storage, [&](auto s) { return action(Kernel<decltype(s)>()); });
}

void means(Storage storage, const Grid& grid, const Regions& regions, int64_t channels, void* to,
           int64_t begin, int64_t end) {
    with_kernel(storage, [&](auto kernel) {
        kernel.means(grid, regions, channels, static_cast<typename decltype(kernel)::T*>(to), begin, end);
    });
}

void turn(Storage storage, const void* means, int64_t count, int64_t channels, void* to, int64_t begin,
          int64_t end) {
    with_kernel(storage, [&](auto kernel) {
        using T = typename decltype(kernel)::T;
        kernel.turn(static_cast<const T*>(means), count, channels, static_cast<T*>(to), begin, end);
    });
}

void scores(Storage storage, const void* means, int64_t rows, const void* turned, int64_t count,
            int64_t channels, void* to) {
    with_kernel(storage, [&](auto kernel) {
        using T = typename decltype(kernel)::T;
        kernel.scores(static_cast<const T*>(means), rows, static_cast<const T*>(turned), count, channels,
                      static_cast<T*>(to));
    });
}

}  // namespace

const RegionRouteKernels kRegionRoute = {means, turn, scores};

}  // namespace vitrail::VITRAIL_ISA
