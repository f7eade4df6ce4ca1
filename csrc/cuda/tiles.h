// Products of tiles in shared memory, for a warp: 16 rows against the rows of a tile, and weights of these
// rows against them.
//
// float goes through TF32 in three products: numbers are split into two that TF32 holds exactly, and only the
// product of the two small parts is left out. What is lost is as small as the rounding of a sum.
#pragma once

#include "simt.h"

namespace vitrail::cuda {

// Rows of kWidth numbers of S in shared memory; the gap between them keeps the rows of a tile in different
// banks.
template <class S, int kWidth>
struct Rows {
    static constexpr int kPitch = kWidth + 16 / int(sizeof(S));
    static constexpr int kChunk = 16 / int(sizeof(S));  // numbers that are copied at once
    static constexpr int kChunks = kWidth / kChunk;

    VITRAIL_DEVICE S* operator[](int row) const { return data + row * kPitch; }
    VITRAIL_DEVICE Rows from(int row) const { return {data + row * kPitch}; }
    static constexpr int bytes(int rows) { return rows * kPitch * int(sizeof(S)); }

    S* data;
};

// N numbers at once, which begin at a multiple of their size.
template <int N, class S>
VITRAIL_DEVICE void copy(const S* from, S* to) {
    struct alignas(N * sizeof(S)) All {
        S numbers[N];
    };
    *reinterpret_cast<All*>(to) = *reinterpret_cast<const All*>(from);
}

VITRAIL_DEVICE int lane() {
    return int(unsigned(threadIdx.x) % kWarp);
}
VITRAIL_DEVICE int warp() {
    return int(unsigned(threadIdx.x) / kWarp);
}

// A number as the sum of two that TF32 holds.
struct Split {
    uint32_t high, low;

    VITRAIL_DEVICE explicit Split(float x) : high(to_tf32(x)) {
        const float rest = x - float_of(high);
        low = to_tf32(rest == rest ? rest : 0.0f);  // of an infinity nothing is left
    }
};

VITRAIL_DEVICE void multiply_split(float (&c)[4], const Split (&a)[4], const Split (&b)[2]) {
    const uint32_t a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    const uint32_t a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
    const uint32_t b_high[2] = {b[0].high, b[1].high}, b_low[2] = {b[0].low, b[1].low};
    multiply<float>(c, a_low, b_high);
    multiply<float>(c, a_high, b_low);
    multiply<float>(c, a_high, b_high);
}

// sums[j] += rows (16 of them) times the rows 8j to 8j + 7 of the tile, for j < N: sums of products of rows.
template <int N, class S, int kWidth>
VITRAIL_DEVICE void rows_by_rows(Rows<S, kWidth> rows, Rows<S, kWidth> tile, float (&sums)[N][4]) {
    if constexpr (sizeof(S) == 2) {
        static_assert(N % 2 == 0 && kWidth % 16 == 0);
        const int i = lane() / 8, row = lane() % 8;
        const S* const a_row = rows[i % 2 * 8 + row] + i / 2 * 8;
        const S* const b_row = tile[i / 2 * 8 + row] + i % 2 * 8;
#pragma unroll
        for (int k = 0; k < kWidth; k += 16) {
            uint32_t a[4];
            load_tiles<false>(a_row + k, a);
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                uint32_t b[4];
                load_tiles<false>(b_row + j * 8 * tile.kPitch + k, b);
                multiply<S>(sums[j], a, {b[0], b[1]});
                multiply<S>(sums[j + 1], a, {b[2], b[3]});
            }
        }
    } else {
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll 2
        for (int k = 0; k < kWidth; k += 8) {
            const Split a[4] = {Split(rows[g][k + t]), Split(rows[g + 8][k + t]), Split(rows[g][k + t + 4]),
                                Split(rows[g + 8][k + t + 4])};
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const S* const b_row = tile[8 * j + g] + k + t;
                const Split b[2] = {Split(b_row[0]), Split(b_row[4])};
                multiply_split(sums[j], a, b);
            }
        }
    }
}

// sums += weights (16 x 8N, as `rows_by_rows` leaves its sums) times the rows of the tile.
template <int N, class S, int kWidth>
VITRAIL_DEVICE void weights_by_rows(const float (&weights)[N][4], Rows<S, kWidth> tile,
                                    float (&sums)[kWidth / 8][4]) {
    if constexpr (sizeof(S) == 2) {
        static_assert(N % 2 == 0 && kWidth % 16 == 0);
        const int i = lane() / 8;
        const S* const b_row = tile[i % 2 * 8 + lane() % 8] + i / 2 * 8;
#pragma unroll
        for (int k = 0; k < N; k += 2) {
            const uint32_t a[4] = {pair_of<S>(weights[k][0], weights[k][1]),
                                   pair_of<S>(weights[k][2], weights[k][3]),
                                   pair_of<S>(weights[k + 1][0], weights[k + 1][1]),
                                   pair_of<S>(weights[k + 1][2], weights[k + 1][3])};
#pragma unroll
            for (int j = 0; j < kWidth / 8; j += 2) {
                uint32_t b[4];
                load_tiles<true>(b_row + k * 8 * tile.kPitch + j * 8, b);
                multiply<S>(sums[j], a, {b[0], b[1]});
                multiply<S>(sums[j + 1], a, {b[2], b[3]});
            }
        }
    } else {
        // The depth may be taken in any order: places t and t + 4 of a step are rows 2t and 2t + 1 of the
        // tile.
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const Split a[4] = {Split(weights[k][0]), Split(weights[k][2]), Split(weights[k][1]),
                                Split(weights[k][3])};
            const S *const first = tile[8 * k + 2 * t] + g, *const second = first + tile.kPitch;
#pragma unroll
            for (int j = 0; j < kWidth / 8; ++j) {
                const Split b[2] = {Split(first[8 * j]), Split(second[8 * j])};
                multiply_split(sums[j], a, b);
            }
        }
    }
}

// sums[j] += columns (16 of them, from `first` on) of x, transposed, times columns 8j to 8j + 7 of y: sums of
// products over kDepth rows of both.
template <int kDepth, class S, int kWidth>
VITRAIL_DEVICE void columns_by_columns(Rows<S, kWidth> x, int first, Rows<S, kWidth> y,
                                       float (&sums)[kWidth / 8][4]) {
    if constexpr (sizeof(S) == 2) {
        static_assert(kDepth % 16 == 0 && kWidth % 16 == 0);
        const int i = lane() / 8, row = lane() % 8;
        const S* const a_row = x[i / 2 * 8 + row] + first + i % 2 * 8;
        const S* const b_row = y[i % 2 * 8 + row] + i / 2 * 8;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            uint32_t a[4];
            load_tiles<true>(a_row + k * x.kPitch, a);
#pragma unroll
            for (int j = 0; j < kWidth / 8; j += 2) {
                uint32_t b[4];
                load_tiles<true>(b_row + k * y.kPitch + j * 8, b);
                multiply<S>(sums[j], a, {b[0], b[1]});
                multiply<S>(sums[j + 1], a, {b[2], b[3]});
            }
        }
    } else {
        // As in `weights_by_rows`, places t and t + 4 of a step are rows 2t and 2t + 1.
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll 2
        for (int k = 0; k < kDepth; k += 8) {
            const S *const x_0 = x[k + 2 * t] + first + g, *const x_1 = x_0 + x.kPitch;
            const S *const y_0 = y[k + 2 * t] + g, *const y_1 = y_0 + y.kPitch;
            const Split a[4] = {Split(x_0[0]), Split(x_0[8]), Split(x_1[0]), Split(x_1[8])};
#pragma unroll
            for (int j = 0; j < kWidth / 8; ++j) {
                const Split b[2] = {Split(y_0[8 * j]), Split(y_1[8 * j])};
                multiply_split(sums[j], a, b);
            }
        }
    }
}

// Of all lanes of a warp.
template <class Op>
VITRAIL_DEVICE float across_warp(float x, Op op) {
#pragma unroll
    for (int bits = 1; bits < kWarp; bits *= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, bits));
    return x;
}

// Of the four lanes that share a row of an accumulator.
template <class Op>
VITRAIL_DEVICE float across_row(float x, Op op) {
    x = op(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return op(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// What lanes hold of a row of an accumulator, row g (half = 0) or g + 8 (half = 1), to memory.
template <int N>
VITRAIL_DEVICE void store_row(const float (&sums)[N][4], int half, int channels, float* to) {
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int c = 8 * j + 2 * (lane() % 4) + r;
            if (c < channels) to[c] = sums[j][2 * half + r];
        }
}

struct alignas(16) Chunk {
    uint32_t words[4];
};

// A warp's 16 rows of an accumulator, rows g and g + 8 times `factors`, to memory: through rows in shared
// memory that only this warp uses, so that memory is written in chunks. address(row) says where a row goes,
// null for nowhere.
template <int N, class S, int kWidth, class Address>
VITRAIL_DEVICE void store_rows(const float (&sums)[N][4], const float (&factors)[2], Rows<S, kWidth> rows,
                               int channels, bool in_chunks, Address address) {
    static_assert(8 * N == kWidth);
    constexpr int kChunk = Rows<S, kWidth>::kChunk, kChunks = Rows<S, kWidth>::kChunks;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            narrow(sums[j][r] * factors[r / 2], rows[lane() / 4 + r / 2 * 8][8 * j + lane() % 4 * 2 + r % 2]);
    const auto address_of_mine = lane() < 16 ? uintptr_t(address(lane())) : 0;
    __syncwarp();
    for (int i = lane(); i < 16 * kChunks; i += kWarp) {
        const int row = i / kChunks, c = i % kChunks * kChunk;
        S* const to = reinterpret_cast<S*>(__shfl_sync(0xffffffffu, address_of_mine, row));
        if (!to || c >= channels) continue;
        if (in_chunks)
            *reinterpret_cast<Chunk*>(to + c) = *reinterpret_cast<const Chunk*>(rows[row] + c);
        else
            for (int j = 0; j < kChunk && c + j < channels; ++j) to[c + j] = rows[row][c + j];
    }
}

}  // namespace vitrail::cuda
