// Products of many small matrices whose numbers lie interleaved: a chunk of 16 bytes holds one number of each
// of several neighbouring groups.
//
// Nothing is transposed: a thread reads whole chunks, and with them its part of the operands of all these
// groups, of which it has all sums.
#pragma once

#include "tiles.h"

namespace vitrail::cuda {

struct alignas(16) Chunk {
    uint32_t words[4];
};

template <class S>
constexpr int kChunkGroups = 16 / int(sizeof(S));
// The depth of one product.
template <class S>
constexpr int kStep = 32 / int(sizeof(S));

// Begins to copy the first bytes of a chunk, in pieces: as many bytes as all addresses are multiples of.
template <class S>
VITRAIL_DEVICE void copy_chunk(Chunk* to, const S* from, int bytes, int piece) {
    const auto copy = [&](auto size) {
#pragma unroll
        for (int i = 0; i < 16; i += size)
            if (i < bytes)
                copy_async<size>(reinterpret_cast<char*>(to) + i, reinterpret_cast<const char*>(from) + i);
    };
    if (piece == 16) return copy(std::integral_constant<int, 16>());
    if (piece == 8) return copy(std::integral_constant<int, 8>());
    if (piece == 4) return copy(std::integral_constant<int, 4>());
    for (int i = 0; i < bytes / int(sizeof(S)); ++i) reinterpret_cast<S*>(to)[i] = from[i];
}

template <class S>
VITRAIL_DEVICE void store_chunk(const Chunk& from, S* to, int bytes, int piece) {
    struct alignas(8) Half {
        uint32_t words[2];
    };
    if (piece == 16) {
        *reinterpret_cast<Chunk*>(to) = from;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (4 * i >= bytes) return;
        if (piece == 8) {
            if (i % 2 == 0) reinterpret_cast<Half*>(to)[i / 2] = {{from.words[i], from.words[i + 1]}};
        } else if (piece == 4) {
            reinterpret_cast<uint32_t*>(to)[i] = from.words[i];
        } else {
            auto* const halves = reinterpret_cast<uint16_t*>(to) + 2 * i;
            halves[0] = uint16_t(from.words[i]);
            if (4 * i + 2 < bytes) halves[1] = uint16_t(from.words[i] >> 16);
        }
    }
}

// One number of each group.
template <class S>
VITRAIL_DEVICE Chunk chunk_of(const float (&x)[kChunkGroups<S>]) {
    Chunk to;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(S) == 2)
            to.words[i] = pair_of<S>(x[2 * i], x[2 * i + 1]);
        else
            to.words[i] = bits_of(x[i]);
    }
    return to;
}

// An operand for each group: 8 kHalves rows (or columns) by kStep. at(half, k) is the chunk of this lane's
// row, g (half = 0) or g + 8 (half = 1), at place k of the depth. The depth may be taken in any order: for
// float, places t and t + 4 of a step are 2t and 2t + 1, so that lanes read from different banks.
template <class S, int kHalves, class At>
VITRAIL_DEVICE void load_operands(At at, uint32_t (&to)[kChunkGroups<S>][2 * kHalves]) {
    const int t = lane() % 4;
#pragma unroll
    for (int r = 0; r < 2 * kHalves; ++r) {
        const int half = r % kHalves, part = r / kHalves;
        if constexpr (sizeof(S) == 2) {
            const Chunk low = at(half, 8 * part + 2 * t), high = at(half, 8 * part + 2 * t + 1);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                to[2 * i][r] = (low.words[i] & 0xffffu) | high.words[i] << 16;
                to[2 * i + 1][r] = low.words[i] >> 16 | (high.words[i] & 0xffff0000u);
            }
        } else {
            const Chunk chunk = at(half, 2 * t + part);
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i][r] = chunk.words[i];
        }
    }
}

// sums += a b, group by group.
template <class S>
VITRAIL_DEVICE void multiply_groups(float (&sums)[kChunkGroups<S>][4],
                                    const uint32_t (&a)[kChunkGroups<S>][4],
                                    const uint32_t (&b)[kChunkGroups<S>][2]) {
#pragma unroll
    for (int i = 0; i < kChunkGroups<S>; ++i) {
        if constexpr (sizeof(S) == 2) {
            multiply<S>(sums[i], a[i], b[i]);
        } else {
            const Split left[4] = {Split(float_of(a[i][0])), Split(float_of(a[i][1])),
                                   Split(float_of(a[i][2])), Split(float_of(a[i][3]))};
            const Split right[2] = {Split(float_of(b[i][0])), Split(float_of(b[i][1]))};
            multiply_split(sums[i], left, right);
        }
    }
}

}  // namespace vitrail::cuda
