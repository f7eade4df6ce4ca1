// vitrail::depthwise_conv on a GPU.
//
// A lane has a channel. A block of threads brings its part of the map, and what lies beside it, into shared
// memory as float: there everything that stands in front of the convolution is done once for each number. A
// warp then has a patch of the map, whose sums and taps stay in registers, so that a number, once loaded,
// serves all sums that it belongs to.
#include "../core/parts.h"
#include "../cuda/channels_last.h"
#include "../cuda/launch.h"
#include "../cuda/tiles.h"
#include "../dispatch/registration.h"
#include "depthwise_conv_host.h"

namespace vitrail::cuda {
namespace {

// Of a patch.
constexpr int kRows = 4, kColumns = 8;
// Patches of a tile, which a block of threads has.
constexpr int kPatchesDown = 4, kPatchesAcross = 2;
// Tiles are smaller where there would be fewer of them: two for each multiprocessor of a large GPU.
constexpr int64_t kManyTiles = 264;
// Loads of a thread that are under way together.
constexpr int kLoads = 4;

struct Tiles {
    int patches_down, patches_across;  // of a tile
    Place down, across, channels;      // tiles of an image

    explicit Tiles(const DepthwiseConv& a)
        : patches_down(int(std::min<int64_t>(kPatchesDown, (a.height + kRows - 1) / kRows))),
          patches_across(int(std::min<int64_t>(kPatchesAcross, (a.width + kColumns - 1) / kColumns))) {
        cut(a);
        while (count() * a.images < kManyTiles && patches() > 1) {
            int& longer = patches_across > 1 ? patches_across : patches_down;
            longer /= 2;
            cut(a);
        }
    }

    int patches() const { return patches_down * patches_across; }
    int64_t count() const { return int64_t(down) * across * channels; }

  private:
    void cut(const DepthwiseConv& a) {
        const int rows = patches_down * kRows, columns = patches_across * kColumns;
        down = Place((a.height + rows - 1) / rows);
        across = Place((a.width + columns - 1) / columns);
        channels = Place((a.channels + kWarp - 1) / kWarp);
    }
};

// Where the patch of a warp begins, and its tile.
struct Patch {
    int64_t image;
    Place channel;    // the first of the warp's channels
    Place top, left;  // of the tile
    int row, column;  // within it

    VITRAIL_DEVICE explicit Patch(const Tiles& t) {
        unsigned tile = blockIdx.x;
        channel = Place(tile % unsigned(t.channels)) * kWarp;
        tile /= unsigned(t.channels);
        left = Place(tile % unsigned(t.across)) * t.patches_across * kColumns;
        tile /= unsigned(t.across);
        top = Place(tile % unsigned(t.down)) * t.patches_down * kRows;
        image = tile / unsigned(t.down);
        row = warp() / t.patches_across * kRows;
        column = warp() % t.patches_across * kColumns;
    }
};

VITRAIL_DEVICE const float* of_channel(const void* values, int64_t channel) {
    return static_cast<const float*>(values) + channel;
}

template <class S>
VITRAIL_DEVICE S* at(const Grid& grid, int64_t image, Place row, Place column, Place channel) {
    return static_cast<S*>(grid.data) + image * grid.image + row * grid.row + column * grid.column + channel;
}

VITRAIL_DEVICE bool on_map(const DepthwiseConv& a, Place row, Place column) {
    return unsigned(row) < unsigned(a.height) && unsigned(column) < unsigned(a.width);
}

// What is multiplied to the numbers of a channel, and added, before they are convolved.
struct Affine {
    float scale = 1.0f, shift = 0.0f;

    VITRAIL_DEVICE void read(const DepthwiseConv& a, Place channel) {
        if (a.scale && channel < a.channels) scale = *of_channel(a.scale, channel);
        if (a.shift && channel < a.channels) shift = *of_channel(a.shift, channel);
    }
    VITRAIL_DEVICE float operator()(float x) const { return x * scale + shift; }
};

// The sums of a patch, with the bias and the residual, to memory.
template <class S, int M>
VITRAIL_DEVICE void finish(const DepthwiseConv& a, const Patch& p, Place channel, float (&sum)[M][kColumns]) {
    const Place row = p.top + p.row, column = p.left + p.column;
    const Place rows = Place(a.height) - row, columns = Place(a.width) - column;
    const auto for_each = [&](const Grid& grid, auto action) {
        auto* of_row = at<S>(grid, p.image, row, column, channel);
#pragma unroll
        for (int m = 0; m < M; ++m, of_row += grid.row) {
            auto* of_place = of_row;
#pragma unroll
            for (int n = 0; n < kColumns; ++n, of_place += grid.column)
                if (m < rows && n < columns) action(sum[m][n], *of_place);
        }
    };
    const float bias = a.bias ? *of_channel(a.bias, channel) : 0.0f;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < kColumns; ++n) sum[m][n] += bias;
    // all loads before the first store, which might be to the same memory as far as the compiler knows
    if (a.residual.data) for_each(a.residual, [](float& to, const S& from) { to += widen(from); });
    for_each(a.out, [](float from, S& to) { narrow(from, to); });
}

// The tile's part of the map, and the K / 2 rows and columns around it, (row, column, channel).
template <class S, int K>
VITRAIL_DEVICE void fill_tile(const DepthwiseConv& a, const Tiles& t, const Patch& p, bool aligned,
                              float* tile) {
    constexpr int kFours = kWarp / 4;
    const int width = t.patches_across * kColumns + K - 1, size = (t.patches_down * kRows + K - 1) * width;
    const int step = int(blockDim.x) / kFours, four = int(threadIdx.x) % kFours;
    const Place channel = p.channel + 4 * four;
    Affine affine[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) affine[i].read(a, channel + i);
    Four<float>* const to = reinterpret_cast<Four<float>*>(tile) + four;
    const S* const from = at<const S>(a.x, p.image, 0, 0, channel);
    int place = int(threadIdx.x) / kFours;
    int row = place / width, column = place % width;
    const int rows = step / width, columns = step % width;
    while (place < size) {
        Four<S> read[kLoads];
        bool inside[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const Place y = p.top + row - K / 2, x = p.left + column - K / 2;
            inside[i] = place + i * step < size && on_map(a, y, x);
            read[i] = load_four(from + y * a.x.row + x * a.x.column,
                                inside[i] ? Place(a.channels) - channel : 0, aligned);
            row += rows;
            column += columns;
            if (column >= width) {
                column -= width;
                ++row;
            }
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i, place += step) {
            if (place >= size) break;
            Four<float> wide = {};
            if (inside[i])
#pragma unroll
                for (int j = 0; j < 4; ++j) wide.x[j] = affine[j](widen(read[i].x[j]));
            to[place * kFours] = wide;
        }
    }
    if (a.activation != Activation::kGelu) return;
    // of what this thread has written; zeros past the map stay zeros
    for (place = int(threadIdx.x) / kFours; place < size; place += step)
#pragma unroll
        for (int j = 0; j < 4; ++j) to[place * kFours].x[j] = gelu(to[place * kFours].x[j]);
}

// Square kernels with K x K taps.
template <class S, int K>
__global__ void __launch_bounds__(kPatchesDown * kPatchesAcross * kWarp)
    convolve(const __grid_constant__ DepthwiseConv a, const __grid_constant__ Tiles t, bool aligned) {
    float* const tile = static_cast<float*>(shared_memory());
    const Patch p(t);
    const Place channel = p.channel + lane();
    float tap[K * K];
#pragma unroll
    for (int k = 0; k < K * K; ++k)
        tap[k] = channel < a.channels
                     ? *of_channel(a.weight, p.image * a.weight_image + int64_t(k) * a.channels + channel)
                     : 0.0f;
    fill_tile<S, K>(a, t, p, aligned, tile);
    __syncthreads();
    if (channel >= a.channels || p.top + p.row >= a.height || p.left + p.column >= a.width) return;

    const int width = t.patches_across * kColumns + K - 1;
    const float* from = tile + (p.row * width + p.column) * kWarp + lane();
    float sum[kRows][kColumns] = {};
#pragma unroll
    for (int row = 0; row < kRows + K - 1; ++row, from += width * kWarp)
#pragma unroll
        for (int column = 0; column < kColumns + K - 1; ++column) {
            const float x = from[column * kWarp];
#pragma unroll
            for (int m = 0; m < kRows; ++m)
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    const int down = row - m, right = column - n;
                    if (down >= 0 && down < K && right >= 0 && right < K)
                        sum[m][n] += x * tap[down * K + right];
                }
        }
    finish<S>(a, p, channel, sum);
}

// Kernels of any other size, straight from the map: a patch is a part of a row.
template <class S>
__global__ void __launch_bounds__(kPatchesDown * kPatchesAcross * kWarp)
    convolve_any(const __grid_constant__ DepthwiseConv a, const __grid_constant__ Tiles t) {
    const Patch p(t);
    const Place channel = p.channel + lane();
    if (channel >= a.channels || p.left + p.column >= a.width) return;
    Affine affine;
    affine.read(a, channel);
    const bool activates = a.activation == Activation::kGelu;
    const Place above = Place(a.kernel_height / 2), before = Place(a.kernel_width / 2);
    const float* const weight = of_channel(a.weight, p.image * a.weight_image + channel);
    for (Patch part = p; part.row < p.row + kRows && part.top + part.row < a.height; ++part.row) {
        float sum[1][kColumns] = {};
        for (Place down = 0; down < a.kernel_height; ++down) {
            const Place row = part.top + part.row + down - above;
            Place column = p.left + p.column - before;
            const auto next = [&] {
                float x = 0.0f;
                if (on_map(a, row, column)) {
                    x = affine(widen(*at<const S>(a.x, p.image, row, column, channel)));
                    if (activates) x = gelu(x);
                }
                ++column;
                return x;
            };
            float x[kColumns];
#pragma unroll
            for (int n = 1; n < kColumns; ++n) x[n] = next();
            for (Place right = 0; right < a.kernel_width; ++right) {
#pragma unroll
                for (int n = 1; n < kColumns; ++n) x[n - 1] = x[n];
                x[kColumns - 1] = next();
                const float tap = weight[(down * a.kernel_width + right) * a.channels];
#pragma unroll
                for (int n = 0; n < kColumns; ++n) sum[0][n] += x[n] * tap;
            }
        }
        finish<S>(a, part, channel, sum);
    }
}

template <class S, int K>
void run(const DepthwiseConv& a, const Tiles& t, const Tensor& out) {
    const int rows = t.patches_down * kRows + K - 1, columns = t.patches_across * kColumns + K - 1;
    Launcher{out}(convolve<S, K>, a.images * t.count(), t.patches() * kWarp,
                  rows * columns * kWarp * int(sizeof(float)), a, t,
                  fours<S>(a.x.data, {a.x.image, a.x.row, a.x.column}));
}

}  // namespace
}  // namespace vitrail::cuda

namespace vitrail {
namespace {

struct OnGpu {
    static void convolve(const DepthwiseConv& a, const Tensor& out) {
        const cuda::Tiles t(a);
        cuda::with_numbers(a.storage, [&](auto s) {
            using S = decltype(s);
            const int64_t k = a.kernel_height == a.kernel_width ? a.kernel_height : 0;
            if (k == 3)
                cuda::run<S, 3>(a, t, out);
            else if (k == 5)
                cuda::run<S, 5>(a, t, out);
            else if (k == 7)
                cuda::run<S, 7>(a, t, out);
            else
                cuda::Launcher{out}(cuda::convolve_any<S>, a.images * t.count(), t.patches() * cuda::kWarp, 0,
                                    a, t);
        });
    }
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(depthwise_conv, &vitrail::depthwise_conv<vitrail::OnGpu>)
