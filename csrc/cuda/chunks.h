// Products of many small matrices whose numbers lie interleaved: a chunk of 16 bytes holds one number of each
// of several neighbouring groups.
//
// Nothing is transposed: a thread reads whole chunks, and with them its part of the operands of all these
// groups, of which it has all sums.
#pragma once

#include "tiles.h"

namespace vitrail::cuda {

template <class S>
constexpr int kChunkGroups = 16 / int(sizeof(S));
constexpr int kStep = 8;  // the depth of one product

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

// Of one operand, 8 kHalves rows (or columns) by kStep: this lane's registers for each group. at(half, k) is
// the chunk of its row, g (half = 0) or g + 8 (half = 1), at place k of the depth. The depth may be taken in
// any order: for float, places t and t + 4 are 2t and 2t + 1, so that lanes read from different banks.
template <class S, int kHalves>
struct Operands {
    static constexpr int kRegisters = kHalves * int(sizeof(S)) / 2;

    template <class At>
    VITRAIL_DEVICE explicit Operands(At at) {
        const int t = lane() % 4;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const Chunk first = at(half, 2 * t), second = at(half, 2 * t + 1);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (sizeof(S) == 2) {
                    of[2 * i][half] = __byte_perm(first.words[i], second.words[i], 0x5410);
                    of[2 * i + 1][half] = __byte_perm(first.words[i], second.words[i], 0x7632);
                } else {
                    of[i][half] = first.words[i];
                    of[i][kHalves + half] = second.words[i];
                }
            }
        }
    }

    uint32_t of[kChunkGroups<S>][kRegisters];
};

// sums += a b, group by group.
template <class S>
VITRAIL_DEVICE void multiply_groups(float (&sums)[kChunkGroups<S>][4], const Operands<S, 2>& a,
                                    const Operands<S, 1>& b) {
#pragma unroll
    for (int i = 0; i < kChunkGroups<S>; ++i) {
        if constexpr (sizeof(S) == 2) {
            multiply<S>(sums[i], a.of[i], b.of[i]);
        } else {
            const Split left[4] = {Split(float_of(a.of[i][0])), Split(float_of(a.of[i][1])),
                                   Split(float_of(a.of[i][2])), Split(float_of(a.of[i][3]))};
            const Split right[2] = {Split(float_of(b.of[i][0])), Split(float_of(b.of[i][1]))};
            multiply_split(sums[i], left, right);
        }
    }
}

}  // namespace vitrail::cuda
