// Products of maps whose columns are the channels of one head, and whose rows are tokens: X^T Y, a sum over
// tokens, and X M^T for a matrix M of that head.
//
// A block of threads has a head and a chunk of the tokens of an image. They are copied a tile at a time into
// shared memory, the next tiles while this one is multiplied.
#pragma once

#include <type_traits>

#include "attention.h"

namespace vitrail::cuda {

// Pairs of maps x and y on one grid of tokens; a launch multiplies all of them.
struct TokenMaps {
    static constexpr int kPairs = 3;

    Grid x[kPairs], y[kPairs];
    Place pairs;
    Place heads, channels;  // channels of a head
    Place tokens, width;    // of an image, and of a row of it
    Place chunk, chunks;    // tokens of a chunk, and how many chunks an image has
};

// What a block of threads has: the tokens [first, last) of a head, in a pair of maps.
struct TokenPart {
    Place head, pair, chunk, image, first, last;

    VITRAIL_DEVICE explicit TokenPart(const TokenMaps& maps) {
        Place i = Place(blockIdx.x);
        head = i % maps.heads;
        i /= maps.heads;
        pair = i % maps.pairs;
        i /= maps.pairs;
        chunk = i % maps.chunks;
        image = i / maps.chunks;
        first = chunk * maps.chunk;
        last = maps.tokens - first < maps.chunk ? maps.tokens : first + maps.chunk;
    }

    // Matrices lie as (image, head, pair), sums as (image, head, pair, chunk), each with its rows and
    // columns.
    VITRAIL_DEVICE int64_t matrix(const TokenMaps& maps) const {
        return (int64_t(image) * maps.heads + head) * maps.pairs + pair;
    }
    VITRAIL_DEVICE int64_t sum(const TokenMaps& maps) const { return matrix(maps) * maps.chunks + chunk; }

    // Where a token of a map is, null past the last.
    template <class S>
    VITRAIL_DEVICE S* at(const TokenMaps& maps, const Grid& grid, Place i) const {
        if (i >= last) return nullptr;
        return token<S>(grid, image, i / maps.width, i % maps.width) + int64_t(head) * maps.channels;
    }
};

// Begins to load the first tiles of so many; load(i) copies tile i to where tile i - kStages was.
template <int kStages, class Load>
VITRAIL_DEVICE void begin_tiles(Place tiles, Load load) {
    for (Place i = 0; i < kStages - 1; ++i) {
        if (i < tiles) load(i);
        commit_copies();
    }
}

// Calls use(i) for one tile after the other; all that share a tile meet before and after.
template <int kStages, class Load, class Meet, class Use>
VITRAIL_DEVICE void each_tile(Place tiles, Load load, Meet meet, Use use) {
    for (Place i = 0; i < tiles; ++i) {
        if (i + kStages - 1 < tiles) load(i + kStages - 1);
        commit_copies();
        wait_for_copies<kStages - 1>();
        meet();
        use(i);
        meet();
    }
}

// --- sums ---

template <class S, int kWidth>
struct SumShape {
    static constexpr int kTokens = 32;                                     // in a tile
    static constexpr int kStages = kWidth * int(sizeof(S)) > 128 ? 2 : 4;  // tiles that are there at a time
    static constexpr int kThreads = kWidth / kWarpRows * kWarp;
    static constexpr int kRowBytes = Rows<S, kWidth>::bytes(kTokens);
    static constexpr int kBytes = 2 * kStages * kRowBytes;
};

// X^T Y of each chunk; a warp has 16 channels of x.
template <class S, int kWidth>
__global__ void __launch_bounds__(SumShape<S, kWidth>::kThreads, 4)
    sum_products(const __grid_constant__ TokenMaps maps, float* to) {
    using Shape = SumShape<S, kWidth>;
    const TokenPart part(maps);
    const int channels = int(maps.channels);
    const Grid x = maps.x[part.pair], y = maps.y[part.pair];
    const bool x_chunks = in_chunks<S>(x, channels), y_chunks = in_chunks<S>(y, channels);
    const auto rows = [](Place tile, int which) {
        auto* const memory = static_cast<unsigned char*>(shared_memory());
        return Rows<S, kWidth>{
            reinterpret_cast<S*>(memory + (tile % Shape::kStages * 2 + which) * Shape::kRowBytes)};
    };
    const auto load = [&](Place tile) {
        const Target<S, kWidth> targets[] = {{rows(tile, 0), channels, x_chunks},
                                             {rows(tile, 1), channels, y_chunks}};
        gather(targets, Shape::kTokens, [&](int which, int i) {
            const Place at = part.first + tile * Shape::kTokens + i;
            return which ? part.at<const S>(maps, y, at) : part.at<const S>(maps, x, at);
        });
    };
    float sums[kWidth / 8][4] = {};
    const Place tiles = (part.last - part.first + Shape::kTokens - 1) / Shape::kTokens;
    begin_tiles<Shape::kStages>(tiles, load);
    each_tile<Shape::kStages>(
        tiles, load, [] { __syncthreads(); },
        [&](Place tile) {
            columns_by_columns<Shape::kTokens>(rows(tile, 0), warp() * kWarpRows, rows(tile, 1), sums);
        });
    to += part.sum(maps) * channels * channels;
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int row = warp() * kWarpRows + lane() / 4 + r / 2 * 8,
                      column = 8 * j + 2 * (lane() % 4) + r % 2;
            if (row < channels && column < channels) to[row * channels + column] = sums[j][r];
        }
}

// --- products with a matrix ---

// A matrix in shared memory. Each number is the sum of two of S, or of TF32, so that only the maps are
// rounded as they are stored.
template <class S, int kWidth>
class SplitMatrix {
    static constexpr int kRowBytes = Rows<S, kWidth>::bytes(kWidth);

  public:
    static constexpr int kBytes = 2 * kRowBytes + kWidth * int(sizeof(float));

    VITRAIL_DEVICE explicit SplitMatrix(unsigned char* memory)
        : high_{reinterpret_cast<S*>(memory)},
          low_{reinterpret_cast<S*>(memory + kRowBytes)},
          units_(reinterpret_cast<float*>(memory + 2 * kRowBytes)) {}

    // A warp takes one row after the other.
    VITRAIL_DEVICE void load(const float* from, int channels) const {
        constexpr int kEach = kWidth / kWarp;
#pragma unroll 4
        for (int row = warp(); row < kWidth; row += int(blockDim.x) / kWarp) {
            float x[kEach], factor = 1.0f, unit = 1.0f;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int column = lane() + i * kWarp;
                x[i] = row < channels && column < channels ? from[row * channels + column] : 0.0f;
            }
            if constexpr (std::is_same_v<S, Float16>) {
                // A row has a unit of its own, a power of two, in which its largest number is from 2^14 on:
                // float16 has exponents for it and for all that is not small beside it.
                float largest = 0x1p-112f;
#pragma unroll
                for (int i = 0; i < kEach; ++i) largest = fmaxf(largest, fabsf(x[i]));
                largest = across_warp(largest, [](float a, float b) { return fmaxf(a, b); });
                const uint32_t exponent = bits_of(largest) >> 23;
                factor = float_of((268 - exponent) << 23);
                unit = float_of((exponent - 14) << 23);
            }
#pragma unroll
            for (int i = 0; i < kEach; ++i)
                split(x[i] * factor, high_[row][lane() + i * kWarp], low_[row][lane() + i * kWarp]);
            if (lane() == 0) units_[row] = unit;
        }
    }

    // Of rows of a tile, 16m to 16m + 15 for m < M: products[m][j] are those with rows 8j to 8j + 7 of the
    // matrix.
    template <int M>
    VITRAIL_DEVICE void multiply_rows(Rows<S, kWidth> rows, float (&products)[M][kWidth / 8][4]) const {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) products[m][j][r] = 0.0f;
        if constexpr (sizeof(S) == 2)
            multiply_halves(rows, products);
        else
            multiply_floats(rows, products);
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float unit = units_[8 * j + 2 * (lane() % 4) + r];
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    products[m][j][r] *= unit;
                    products[m][j][r + 2] *= unit;
                }
            }
    }

  private:
    VITRAIL_DEVICE static void split(float x, S& high, S& low) {
        if constexpr (sizeof(S) == 2) {
            narrow(x, high);
            const float rest = x - widen(high);
            narrow(rest == rest ? rest : 0.0f, low);
        } else {
            const Split parts(x);
            high = float_of(parts.high);
            low = float_of(parts.low);
        }
    }

    template <int M>
    VITRAIL_DEVICE void multiply_halves(Rows<S, kWidth> rows, float (&sums)[M][kWidth / 8][4]) const {
        const int i = lane() / 8, row = lane() % 8;
        const S* const a_row = rows[i % 2 * 8 + row] + i / 2 * 8;
        const S* const b_rows[2] = {low_[i / 2 * 8 + row] + i % 2 * 8, high_[i / 2 * 8 + row] + i % 2 * 8};
#pragma unroll
        for (int k = 0; k < kWidth; k += 16) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) load_tiles<false>(a_row + m * 16 * rows.kPitch + k, a[m]);
#pragma unroll
            for (int j = 0; j < kWidth / 8; j += 2)
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    uint32_t b[4];
                    load_tiles<false>(b_rows[part] + j * 8 * rows.kPitch + k, b);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        multiply<S>(sums[m][j], a[m], {b[0], b[1]});
                        multiply<S>(sums[m][j + 1], a[m], {b[2], b[3]});
                    }
                }
        }
    }

    template <int M>
    VITRAIL_DEVICE void multiply_floats(Rows<S, kWidth> rows, float (&sums)[M][kWidth / 8][4]) const {
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll 2
        for (int k = 0; k < kWidth; k += 8) {
            uint32_t a[M][2][4];  // low parts, and high ones
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const Split x(rows[16 * m + g + r % 2 * 8][k + t + r / 2 * 4]);
                    a[m][0][r] = x.low;
                    a[m][1][r] = x.high;
                }
#pragma unroll
            for (int j = 0; j < kWidth / 8; ++j) {
                const S *const low = low_[8 * j + g] + k + t, *const high = high_[8 * j + g] + k + t;
                const uint32_t b_low[2] = {bits_of(low[0]), bits_of(low[4])},
                               b_high[2] = {bits_of(high[0]), bits_of(high[4])};
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply<float>(sums[m][j], a[m][0], b_high);
                    multiply<float>(sums[m][j], a[m][1], b_low);
                    multiply<float>(sums[m][j], a[m][1], b_high);
                }
            }
        }
    }

    const Rows<S, kWidth> high_, low_;
    float* const units_;
};

// A warp's products as they are stored, to rows in shared memory.
template <int M, class S, int kWidth>
VITRAIL_DEVICE void narrow_rows(const float (&products)[M][kWidth / 8][4], Rows<S, kWidth> to) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                alignas(2 * sizeof(S)) S both[2];
                narrow(products[m][j][2 * half], both[0]);
                narrow(products[m][j][2 * half + 1], both[1]);
                copy<2>(both, to[16 * m + lane() / 4 + 8 * half] + 8 * j + 2 * (lane() % 4));
            }
}

// Up to 32 rows in shared memory to memory, `step` numbers apart, by one warp.
template <class S, int kWidth>
VITRAIL_DEVICE void store_rows(Rows<S, kWidth> rows, int count, int channels, bool in_chunks, S* to,
                               int64_t step) {
    constexpr int kChunk = Rows<S, kWidth>::kChunk, kChunks = Rows<S, kWidth>::kChunks;
#pragma unroll 2
    for (int i = 0; i < kChunks; ++i) {
        const int place = i * kWarp + lane(), row = place / kChunks, c = place % kChunks * kChunk;
        if (row >= count) continue;
        const S* const from = rows[row] + c;
        S* const at = to + row * step + c;
        if (in_chunks && c < channels)
            copy<kChunk>(from, at);
        else
            for (int j = 0; j < kChunk; ++j)
                if (c + j < channels) at[j] = from[j];
    }
}

template <class S, int kWidth>
struct ProductShape {
    static constexpr int kBytesOfToken = kWidth * int(sizeof(S));
    static constexpr int kStages = kBytesOfToken < 128 ? 3 : kBytesOfToken < 256 ? 2 : 1;
    static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
    static constexpr int kTiles = 2;  // of 16 tokens, of a warp
    static constexpr int kWarpTokens = kTiles * kWarpRows, kTokens = kWarps * kWarpTokens;
    static constexpr int kRowBytes = Rows<S, kWidth>::bytes(kTokens);
    static constexpr int kBytes = SplitMatrix<S, kWidth>::kBytes + kStages * kRowBytes;
    static constexpr int kBlocks = kWidth > 32 ? 3 : 5;  // which registers should leave room for
};

// Y = X M^T for a matrix of each image, head and pair. Y is contiguous.
template <class S, int kWidth>
__global__ void __launch_bounds__(ProductShape<S, kWidth>::kThreads, ProductShape<S, kWidth>::kBlocks)
    multiply_tokens(const __grid_constant__ TokenMaps maps, const float* matrices) {
    using Shape = ProductShape<S, kWidth>;
    const TokenPart part(maps);
    const int channels = int(maps.channels);
    const Grid x = maps.x[part.pair], y = maps.y[part.pair];
    const bool x_chunks = in_chunks<S>(x, channels), y_chunks = in_chunks<S>(y, channels);
    auto* const memory = static_cast<unsigned char*>(shared_memory());
    const SplitMatrix<S, kWidth> matrix(memory);
    const auto rows = [&](Place tile) {
        return Rows<S, kWidth>{reinterpret_cast<S*>(memory + SplitMatrix<S, kWidth>::kBytes +
                                                    tile % Shape::kStages * Shape::kRowBytes)};
    };
    // A warp copies 32 rows at a time, those which it then multiplies: it need not wait for the others.
    static_assert(Shape::kWarpTokens == kWarp);
    const auto load = [&](Place tile) {
        const Target<S, kWidth> targets[] = {{rows(tile), channels, x_chunks}};
        gather(targets, Shape::kTokens,
               [&](int, int i) { return part.at<const S>(maps, x, part.first + tile * Shape::kTokens + i); });
    };
    const Place tiles = (part.last - part.first + Shape::kTokens - 1) / Shape::kTokens;
    begin_tiles<Shape::kStages>(tiles, load);
    matrix.load(matrices + part.matrix(maps) * channels * channels, channels);
    __syncthreads();
    each_tile<Shape::kStages>(
        tiles, load, [] { __syncwarp(); },
        [&](Place tile) {
            const Place first = part.first + tile * Shape::kTokens + warp() * Shape::kWarpTokens;
            if (first >= part.last) return;
            const Rows<S, kWidth> mine = rows(tile).from(warp() * Shape::kWarpTokens);
            float products[Shape::kTiles][kWidth / 8][4];
            matrix.multiply_rows(mine, products);
            __syncwarp();
            narrow_rows(products, mine);
            __syncwarp();
            const int count = part.last - first < kWarp ? int(part.last - first) : kWarp;
            store_rows(mine, count, channels, y_chunks, part.at<S>(maps, y, first), y.column);
        });
}

}  // namespace vitrail::cuda
