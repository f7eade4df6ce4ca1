// Mixing along strips and across adjacent ones, and the gradients of its weight and bias: for each group of
// channels a product of matrices, whose rows are the strips of all patches of all images, one after the
// other.
//
// A block of threads has a chunk of groups. Both operands come as they lie in memory, the next tile while
// this one is multiplied. A strip is loaded once for the three that look at it; one past the grid is a row of
// zeros.
#pragma once

#include "../core/portable.h"
#include "../ops/strip_mix.h"
#include "chunks.h"

namespace vitrail::cuda {

// Chunks of a tile's row of 16 places: the odd one keeps rows in different banks.
constexpr int kPlaces = 16, kPitch = kPlaces + 1;
constexpr int kMixThreads = 256;
// Strips whose addresses are found at a time, and those of a tile, where strips are what is summed over.
constexpr int kSegment = 128, kSumStrips = 32;

// The bytes that addresses are multiples of.
struct MixPieces {
    int x, weight, out;
};
struct GradientPieces {
    int grad, x;
};

// Where a strip begins, one of all patches of all images.
template <class Arguments>
VITRAIL_DEVICE int64_t strip_offset(const Arguments& a, const Grid& grid, Place strip) {
    const Place strips = Place(a.strips), patches = Place(a.patches), sequence = strip / strips;
    return sequence / patches * grid.image + strip % strips * grid.row + sequence % patches * a.groups;
}

// How the outputs are shared out: a block has some strips, and 16 places for each of `across` warps beside
// one another.
struct MixTile {
    int across;

    VITRAIL_INLINE int places() const { return across * kPlaces; }
    VITRAIL_INLINE int strips() const { return kMixThreads / kWarp / across * 16; }
    // In chunks: addresses, and a stage of strips and weights.
    VITRAIL_INLINE int table() const { return strips() / 2 + 1; }
    VITRAIL_INLINE int stage() const { return (strips() + 2 + 3 * places()) * kPitch; }
    VITRAIL_INLINE int shared_bytes(int64_t length) const {
        return 16 * (kPitch + table() + (length > kPlaces ? 2 : 1) * stage());
    }
};

template <class S>
__global__ void __launch_bounds__(kMixThreads, 2)
    mix_strips(const __grid_constant__ StripMix a, const __grid_constant__ MixPieces pieces, MixTile tile) {
    constexpr int kGroups = kChunkGroups<S>, kTiles = kPlaces / 8;
    const Place length = Place(a.length), strips = Place(a.strips),
                all = strips * Place(a.images * a.patches);
    const Place chunks = (Place(a.groups) + kGroups - 1) / kGroups;
    const Place tiles = (length + tile.places() - 1) / tile.places();
    const Place group = Place(blockIdx.x) % chunks * kGroups;
    const Place first_place = Place(blockIdx.x) / chunks % tiles * tile.places();
    const Place first_strip = Place(blockIdx.x) / chunks / tiles * tile.strips();
    const int groups = min(kGroups, int(a.groups) - group), bytes = groups * int(sizeof(S));

    Chunk* const zeros = static_cast<Chunk*>(shared_memory());
    auto* const offsets = reinterpret_cast<int64_t*>(zeros + kPitch);
    Chunk* const stages = zeros + kPitch + tile.table();
    for (int i = int(threadIdx.x); i < kPitch; i += kMixThreads) zeros[i] = {};
    for (int i = int(threadIdx.x); i < tile.strips() + 2; i += kMixThreads) {
        const Place strip = first_strip - 1 + i;
        offsets[i] = strip >= 0 && strip < all ? strip_offset(a, a.x, strip) + group : -1;
    }
    __syncthreads();

    // A row of 16 threads copies rows of chunks, of the strips and then of the weights.
    const int row_of_mine = int(threadIdx.x) / kPlaces, rows_at_once = kMixThreads / kPlaces;
    const auto load = [&](Place from) {
        Chunk* to = stages + from / kPlaces % 2 * tile.stage() + int(threadIdx.x) % kPlaces;
        from += Place(threadIdx.x) % kPlaces;
        const S* const x = static_cast<const S*>(a.x.data) + from * a.x.column;
        for (int i = row_of_mine; i < tile.strips() + 2; i += rows_at_once) {
            if (from >= length)
                to[i * kPitch] = {};
            else if (offsets[i] >= 0)
                copy_chunk(to + i * kPitch, x + offsets[i], bytes, pieces.x);
        }
        to += (tile.strips() + 2) * kPitch;
        const S* weight = static_cast<const S*>(a.weight) + first_place * a.to + from * a.from + group;
        for (int tap = 0; tap < 3; ++tap, weight += a.tap, to += tile.places() * kPitch)
            for (int i = row_of_mine; i < tile.places() && first_place + i < length; i += rows_at_once) {
                if (from >= length)
                    to[i * kPitch] = {};
                else
                    copy_chunk(to + i * kPitch, weight + i * a.to, bytes, pieces.weight);
            }
    };

    const int g = lane() / 4, t = lane() % 4;
    const int row = warp() / tile.across * 16 + g, column = warp() % tile.across * kPlaces;  // and row + 8
    const Place place = first_place + column;
    const bool idle = first_strip + row - g >= all || place >= length;
    // A bit for each tap and each of the two rows.
    int outside = 0;
    for (int half = 0; half < 2; ++half) {
        const Place strip = (first_strip + row + 8 * half) % strips;
        outside |= (strip == 0 ? 1 << half : 0) | (strip == strips - 1 ? 16 << half : 0);
    }
    float sums[kTiles][kGroups][4] = {};
    for (Place from = -kPlaces; from < length; from += kPlaces) {
        if (from + kPlaces < length) load(from + kPlaces);
        commit_copies();
        if (from < 0) continue;
        wait_for_copies<1>();
        __syncthreads();
        const int x = kPitch + tile.table() + from / kPlaces % 2 * tile.stage();
        const int weight = x + (tile.strips() + 2 + column + g) * kPitch;
#pragma unroll 1
        for (int tap = 0; tap < 3 && !idle; ++tap) {
            int strip[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                strip[half] = outside >> (2 * tap + half) & 1 ? 0 : x + (row + 8 * half + tap) * kPitch;
#pragma unroll 1
            for (int k = 0; k < kPlaces && from + k < length; k += kStep) {
                const Operands<S, 2> left([&](int half, int i) { return zeros[strip[half] + k + i]; });
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
                    if (place + 8 * j >= length) break;
                    const Operands<S, 1> right([&](int, int i) {
                        return zeros[weight + (tap * tile.places() + 8 * j) * kPitch + k + i];
                    });
                    multiply_groups<S>(sums[j], left, right);
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Place strip = first_strip + row + 8 * half;
        if (strip >= all) continue;
        S* const out = static_cast<S*>(a.out.data) + strip_offset(a, a.out, strip) + group;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const Place to = place + 8 * j + 2 * t + r;
                if (to >= length) continue;
                float x[kGroups];
#pragma unroll
                for (int i = 0; i < kGroups; ++i) {
                    x[i] = sums[j][i][2 * half + r];
                    if (a.bias && i < groups)
                        x[i] += widen(static_cast<const S*>(a.bias)[to * a.groups + group + i]);
                }
                store_chunk(chunk_of<S>(x), out + to * a.out.column, bytes, pieces.out);
            }
    }
}

// --- gradients of weight and bias ---

// Sums of parts of the strips: (part, receiving and giving places of the three taps and then the bias,
// group), groups up to a whole number of chunks.
struct PartialSums {
    float* data;
    Place segments;  // of a part
    int64_t groups, size;
};

// A block has 16 receiving and 16 giving places for each of side x side warps, for each tap.
struct GradientTile {
    int side;

    VITRAIL_INLINE int threads() const { return 3 * side * side * kWarp; }
    VITRAIL_INLINE int places() const { return side * kPlaces; }
    VITRAIL_INLINE int pitch() const { return places() + 1; }
    // In chunks: addresses of both grids and the taps of each strip, and a stage of both grids.
    static constexpr int kTable = (2 * (kSegment + 2) + kSegment / 2) / 2;
    VITRAIL_INLINE int stage() const { return (2 * kSumStrips + 2) * pitch(); }
    VITRAIL_INLINE int shared_bytes(int64_t strips) const {
        return 16 * (1 + kTable + (strips > kSumStrips ? 2 : 1) * stage());
    }
};

template <class S>
__global__ void __launch_bounds__(384)
    sum_strips(const __grid_constant__ StripMixGradients a, const __grid_constant__ GradientPieces pieces,
               GradientTile tile, const __grid_constant__ PartialSums parts) {
    constexpr int kGroups = kChunkGroups<S>, kTiles = kPlaces / 8;
    const Place length = Place(a.length), strips = Place(a.strips),
                all = strips * Place(a.images * a.patches);
    const Place chunks = Place(parts.groups) / kGroups, tiles = (length + tile.places() - 1) / tile.places();
    const Place group = Place(blockIdx.x) % chunks * kGroups;
    const Place first_from = Place(blockIdx.x) / chunks % tiles * tile.places();
    const Place first_to = Place(blockIdx.x) / chunks / tiles % tiles * tile.places();
    const Place part = Place(blockIdx.x) / chunks / tiles / tiles;
    const int bytes = min(kGroups, int(a.groups) - group) * int(sizeof(S));

    Chunk* const zero = static_cast<Chunk*>(shared_memory());
    auto* const x_offsets = reinterpret_cast<int64_t*>(zero + 1);
    int64_t* const grad_offsets = x_offsets + kSegment + 2;
    auto* const taps = reinterpret_cast<int*>(grad_offsets + kSegment + 2);  // bits: which strips are there
    Chunk* const stages = zero + 1 + GradientTile::kTable;
    if (threadIdx.x == 0) zero[0] = {};

    const int g = lane() / 4, t = lane() % 4;
    const int tap = warp() / (tile.side * tile.side);
    const int to = warp() / tile.side % tile.side * kPlaces, from = warp() % tile.side * kPlaces;
    const bool idle = first_to + to >= length || first_from + from >= length;
    // Of the bias, a thread has a word of a chunk of one place.
    const int word = int(threadIdx.x) % 4, place = int(threadIdx.x) / 4;
    const bool biased = a.bias && first_from == 0 && place < tile.places() && first_to + place < length;
    float sums[kTiles][kGroups][4] = {}, bias[2] = {};
    for (Place segment = part * parts.segments; segment < (part + 1) * parts.segments; ++segment) {
        const Place first = segment * kSegment;
        if (first >= all) break;
        const int count = min(kSegment, all - first);
        __syncthreads();
        for (int i = int(threadIdx.x); i < kSegment + 2; i += int(blockDim.x)) {
            const Place strip = first - 1 + i;
            const bool some = strip >= 0 && strip < all;
            x_offsets[i] = some ? strip_offset(a, a.x, strip) + group : -1;
            grad_offsets[i] = some ? strip_offset(a, a.grad, strip) + group : -1;
            if (i == 0 || i > kSegment) continue;
            const Place at = strip % strips;
            taps[i - 1] = i > count ? 0 : (at > 0 ? 1 : 0) | 2 | (at + 1 < strips ? 4 : 0);
        }
        __syncthreads();

        const auto load = [&](int first_row) {
            Chunk* const stage = stages + first_row / kSumStrips % 2 * tile.stage();
            const int column = int(threadIdx.x) % kPlaces, rows_at_once = int(blockDim.x) / kPlaces;
            const auto load_rows = [&](const Grid& grid, const int64_t* offsets, int rows, Place first_place,
                                       int piece, Chunk* to) {
                for (int i = int(threadIdx.x) / kPlaces; i < rows; i += rows_at_once)
                    for (int j = column; j < tile.places() && first_place + j < length; j += kPlaces) {
                        if (offsets[i] >= 0)
                            copy_chunk(to + i * tile.pitch() + j,
                                       static_cast<const S*>(grid.data) + offsets[i] +
                                           (first_place + j) * grid.column,
                                       bytes, piece);
                        else
                            to[i * tile.pitch() + j] = {};
                    }
            };
            load_rows(a.grad, grad_offsets + 1 + first_row, kSumStrips, first_to, pieces.grad, stage);
            load_rows(a.x, x_offsets + first_row, kSumStrips + 2, first_from, pieces.x,
                      stage + kSumStrips * tile.pitch());
        };
        for (int first_row = -kSumStrips; first_row < count; first_row += kSumStrips) {
            if (first_row + kSumStrips < count) load(first_row + kSumStrips);
            commit_copies();
            if (first_row < 0) continue;
            wait_for_copies<1>();
            __syncthreads();
            const int grad = 1 + GradientTile::kTable + first_row / kSumStrips % 2 * tile.stage();
            const int left_row = grad + to + g,
                      right_row = grad + (kSumStrips + tap) * tile.pitch() + from + g;
            const int rows = min(kSumStrips, count - first_row);
#pragma unroll 1
            for (int k = 0; k < rows && !idle; k += kStep) {
                const Operands<S, 2> left(
                    [&](int half, int i) { return zero[left_row + (k + i) * tile.pitch() + 8 * half]; });
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
                    if (first_from + from + 8 * j >= length) break;
                    const Operands<S, 1> right([&](int, int i) {
                        const bool some = taps[first_row + k + i] >> tap & 1;
                        return zero[some ? right_row + (k + i) * tile.pitch() + 8 * j : 0];
                    });
                    multiply_groups<S>(sums[j], left, right);
                }
            }
            for (int k = 0; k < rows && biased; ++k) {
                const uint32_t bits = zero[grad + k * tile.pitch() + place].words[word];
                if constexpr (sizeof(S) == 2) {
                    bias[0] += widen(S{uint16_t(bits)});
                    bias[1] += widen(S{uint16_t(bits >> 16)});
                } else {
                    bias[0] += float_of(bits);
                }
            }
            __syncthreads();
        }
    }

    float* const sum = parts.data + part * parts.size + group;
    if (biased) {
        constexpr int kNumbers = 4 / int(sizeof(S));
        for (int i = 0; i < kNumbers; ++i)
            sum[(3 * a.length * a.length + first_to + place) * parts.groups + kNumbers * word + i] = bias[i];
    }
    if (idle) return;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Place receives = first_to + to + g + r / 2 * 8,
                        gives = first_from + from + 8 * j + 2 * t + r % 2;
            if (receives >= length || gives >= length) continue;
            auto* const at = reinterpret_cast<Chunk*>(sum + ((tap * a.length + receives) * a.length + gives) *
                                                                parts.groups);
#pragma unroll
            for (int i = 0; i < kGroups; i += 4)
                at[i / 4] = {{bits_of(sums[j][i][r]), bits_of(sums[j][i + 1][r]), bits_of(sums[j][i + 2][r]),
                              bits_of(sums[j][i + 3][r])}};
        }
}

// Adds up the parts, in their order.
template <class S>
__global__ void add_parts(const __grid_constant__ StripMixGradients a,
                          const __grid_constant__ PartialSums parts, Place count) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, weights = 3 * a.length * a.length;
    const int64_t entry = i / parts.groups, group = i % parts.groups;
    if (entry >= weights + (a.bias ? a.length : 0) || group >= a.groups) return;
    float sum = 0;
    for (Place part = 0; part < count; ++part) sum += parts.data[part * parts.size + i];
    narrow(sum, entry < weights ? static_cast<S*>(a.weight)[entry * a.groups + group]
                                : static_cast<S*>(a.bias)[(entry - weights) * a.groups + group]);
}

}  // namespace vitrail::cuda
