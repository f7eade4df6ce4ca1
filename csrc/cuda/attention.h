// Block attention, forward: a block of queries and one head is a block of threads, each warp has 16 of the
// queries.
//
// Keys come in tiles, gathered row by row from wherever the addressing policy says straight into shared
// memory, the next tile while this one is multiplied. The softmax is online: scores live in registers and
// nowhere else.
#pragma once

#include "policies.h"
#include "tiles.h"

namespace vitrail::cuda {

constexpr int kWarpRows = 16;

// How tokens of up to kWidth channels are cut into tiles.
template <class S, int kWidth>
struct TileShape {
    static constexpr int kTokens = 64;                                     // in a tile
    static constexpr int kStages = kWidth * int(sizeof(S)) > 128 ? 1 : 2;  // tiles that are there at a time
};

// A tile of tokens in shared memory: two rows and two numbers of each. And of each query, be it of the tile
// or of a row that the tile is multiplied with, which of 64 keys it attends to: a bit each, in two words.
template <class S, int kWidth>
struct Tile {
    static constexpr int kTokens = TileShape<S, kWidth>::kTokens;
    static constexpr int kRowBytes = Rows<S, kWidth>::bytes(kTokens);
    static constexpr int kSize = 2 * kRowBytes + 16 * kTokens;

    VITRAIL_DEVICE explicit Tile(unsigned char* memory)
        : first{reinterpret_cast<S*>(memory)},
          second{reinterpret_cast<S*>(memory + kRowBytes)},
          number{reinterpret_cast<float*>(memory + 2 * kRowBytes),
                 reinterpret_cast<float*>(memory + 2 * kRowBytes) + kTokens},
          kept(reinterpret_cast<uint32_t*>(memory + 2 * kRowBytes) + 2 * kTokens) {}

    const Rows<S, kWidth> first, second;
    float* const number[2];
    uint32_t* const kept;
};

// Whether rows of a grid can be copied 16 bytes at a time.
template <class S>
VITRAIL_DEVICE bool in_chunks(const Grid& grid, int channels) {
    constexpr int kChunk = 16 / int(sizeof(S));
    return uintptr_t(grid.data) % 16 == 0 && (grid.image | grid.row | grid.column | channels) % kChunk == 0;
}

template <class S>
VITRAIL_DEVICE S* token(const Grid& grid, Place image, Place row, Place column) {
    if (!grid.data) return nullptr;
    return static_cast<S*>(grid.data) + image * grid.image + row * grid.row + column * grid.column;
}

// The row of a key (which = 0) or its value (1), of a head; null where that is zeros.
template <class S>
VITRAIL_DEVICE const S* key_or_value(const BlockAttention& a, int which, Place image, Place head,
                                     const Key& key) {
    const Grid grid = which ? (key.source ? a.v[1] : a.v[0]) : (key.source ? a.k[1] : a.k[0]);
    const S* const at = token<S>(grid, image, key.row, key.column);
    return at ? at + head * (which ? a.value_dim : a.head_dim) : nullptr;
}

// Where rows are copied to, and what of them.
template <class S, int kWidth>
struct Target {
    Rows<S, kWidth> rows;
    int channels;
    bool in_chunks;
};

// Copies rows into one or two arrays. address(which, row) says where a row of an array begins, null where it
// is zeros; a warp asks for 32 of them at a time, a lane for one. Asynchronous where rows are in chunks.
template <int kArrays, class S, int kWidth, class Address>
VITRAIL_DEVICE void gather(const Target<S, kWidth> (&to)[kArrays], int rows, Address address) {
    constexpr int kGroup = kWarp / kArrays, kChunk = Rows<S, kWidth>::kChunk,
                  kChunks = Rows<S, kWidth>::kChunks;
    const int stride = int(blockDim.x) / kWarp * kGroup;
    for (int first = warp() * kGroup; first < rows; first += stride) {
        const int mine = first + lane() % kGroup;
        const auto address_of_mine = mine < rows ? uintptr_t(address(lane() / kGroup, mine)) : 0;
#pragma unroll
        for (int which = 0; which < kArrays; ++which)
            for (int i = 0; i < kGroup * kChunks / kWarp; ++i) {
                const int place = i * kWarp + lane(), row = place / kChunks, c = place % kChunks * kChunk;
                const auto* const from = reinterpret_cast<const S*>(
                    __shfl_sync(0xffffffffu, address_of_mine, which * kGroup + row));
                if (first + row >= rows) continue;
                S* const at = to[which].rows[first + row] + c;
                if (to[which].in_chunks && from && c < to[which].channels)
                    copy_async(at, from + c);
                else
                    for (int j = 0; j < kChunk; ++j)
                        at[j] = from && c + j < to[which].channels ? from[c + j] : S{};
            }
    }
}

// The keys that a block of queries looks at, in a row: what it visits, one block of keys after the other.
template <class Policy>
struct VisitedKeys {
    const Policy& policy;
    const Place image, region, size;  // size: of a block of keys

    VITRAIL_DEVICE Place slot(Place i) const { return policy.slot(region, i / size); }
    VITRAIL_DEVICE Place key_block(Place i) const { return policy.visited(image, slot(i)); }
    VITRAIL_DEVICE Key key(Place i) const { return policy.key(key_block(i), i % size); }
    VITRAIL_DEVICE float weight(Place i) const { return policy.weight(image, slot(i)); }
    VITRAIL_DEVICE Place bias_column(Place i) const { return policy.bias_column(key_block(i), i % size); }
};

// The words of a query: of 64 keys from `first` on those that are there, and that its mask, if any, keeps.
VITRAIL_DEVICE void set_kept(uint32_t* to, const uint32_t* mask, Place first, Place count) {
    for (int i = 0; i < 2; ++i) {
        const Place left = count - first - 32 * i;
        const uint32_t there = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
        to[i] = mask ? mask[first / 32 + i] & there : there;
    }
}

// A block of queries, of one head, and the tiles of keys that it looks at.
template <class S, int kWidth>
class QueryBlock {
    static constexpr int kTokens = TileShape<S, kWidth>::kTokens, kStages = TileShape<S, kWidth>::kStages;

  public:
    // Bytes for `arrays` arrays of `rows` rows each, and the tiles of `keys` keys.
    static int shared_bytes(int arrays, int rows, int64_t keys, bool masked = false) {
        return (masked ? RepeatCounts::bytes(rows) : 0) + arrays * Rows<S, kWidth>::bytes(rows) +
               (keys > kTokens ? kStages : 1) * Tile<S, kWidth>::kSize;
    }

    VITRAIL_DEVICE QueryBlock(const BlockAttention& a, const AnyPolicy& any, Place blocks, int arrays)
        : a_(a),
          any_(any),
          head_(Place(blockIdx.x) % Place(a.heads)),
          block_(Place(blockIdx.x) / Place(a.heads) % blocks),
          image_(Place(blockIdx.x) / Place(a.heads) / blocks),
          rows_(int(blockDim.x) / kWarp * kWarpRows),
          arrays_(arrays),
          k_chunks_(in_chunks<S>(a.k[0], int(a.head_dim)) && in_chunks<S>(a.k[1], int(a.head_dim))),
          v_chunks_(in_chunks<S>(a.v[0], int(a.value_dim)) && in_chunks<S>(a.v[1], int(a.value_dim))),
          region_(any.with([&](const auto& policy) { return block_ / policy.parts(); })),
          key_block_size_(any.with([&](const auto& policy) {
              return policy.keys_in(policy.visited(image_, policy.slot(region_, 0)));
          })),
          count_(any.with([&](const auto& policy) { return policy.visits() * key_block_size_; })) {}

    VITRAIL_DEVICE Rows<S, kWidth> array(int i) const {
        return {reinterpret_cast<S*>(memory() + i * Rows<S, kWidth>::bytes(rows_))};
    }

    // Where the query of a row of the block is; null past the last. `channels` of a head.
    template <class X>
    VITRAIL_DEVICE X* row(const Grid& grid, int64_t channels, int i) const {
        Query at;
        if (!find(i, at)) return nullptr;
        return token<X>(grid, image_, at.row, at.column) + head_ * channels;
    }
    VITRAIL_DEVICE void load_rows(const Grid& grid, int64_t channels, int to) const {
        const Target<S, kWidth> target[] = {{array(to), int(channels), in_chunks<S>(grid, int(channels))}};
        gather(target, rows_, [&](int, int i) { return row<const S>(grid, channels, i); });
    }
    // A warp's results, by way of an array that nothing is read from any more.
    template <int N>
    VITRAIL_DEVICE void store_rows(const float (&sums)[N][4], const float (&factors)[2], int by,
                                   const Grid& grid, int64_t channels) const {
        const int first = warp() * kWarpRows;
        cuda::store_rows(sums, factors, array(by).from(first), int(channels),
                         in_chunks<S>(grid, int(channels)),
                         [&](int i) { return row<S>(grid, channels, first + i); });
    }
    // Its row in the table of biases, or null.
    VITRAIL_DEVICE const float* biases(int i) const {
        Query at;
        if (!a_.bias || !find(i, at)) return nullptr;
        return static_cast<const float*>(a_.bias) +
               any_.with([&](const auto& policy) { return policy.bias_row(head_, at.place); });
    }
    // Begins to load the tile that holds key `first`: keys, values, and the numbers of each key: its weight,
    // and the bits of its column in the table of biases.
    VITRAIL_DEVICE void load_keys(Place first) const {
        const Tile<S, kWidth> to = tile(first);
        const Target<S, kWidth> target[] = {{to.first, int(a_.head_dim), k_chunks_},
                                            {to.second, int(a_.value_dim), v_chunks_}};
        gather(target, kTokens, [&](int which, int i) -> const S* {
            if (first + i >= count_) return nullptr;
            const Key key = with_keys([&](const auto& keys) { return keys.key(first + i); });
            return key_or_value<S>(a_, which, image_, head_, key);
        });
        for (int i = int(threadIdx.x); i < kTokens; i += int(blockDim.x)) {
            const bool some = first + i < count_;
            to.number[0][i] =
                some ? with_keys([&](const auto& keys) { return keys.weight(first + i); }) : 0.0f;
            to.number[1][i] = float_of(
                some && a_.bias ? with_keys([&](const auto& keys) { return keys.bias_column(first + i); })
                                : 0);
        }
        for (int i = int(threadIdx.x); i < rows_; i += int(blockDim.x)) {
            const Place query = any_.masks() ? place(i) : Place(-1);
            set_kept(to.kept + 2 * i, query < 0 ? nullptr : any_.masks()->bits(image_, head_, query), first,
                     count_);
        }
        commit_copies();
    }

    // Calls use(tile) for one tile after the other, whose loading `load_keys(0)` has begun.
    template <class Use>
    VITRAIL_DEVICE void each_tile(Use use) const {
        for (Place first = 0; first < count_; first += kTokens) {
            const Place next = first + kTokens;
            if (kStages > 1 && next < count_) {
                load_keys(next);
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            __syncthreads();
            for (int round = 0, rounds = 1; round < rounds; ++round) {
                if (round > 0) counts().keep(round, tile(first).kept);
                use(tile(first));
                __syncthreads();
                if (round == 0 && repeats())
                    rounds =
                        counts().fill(*any_.masks(), image_, head_, first, [&](int i) { return place(i); });
            }
            if (kStages == 1 && next < count_) load_keys(next);
        }
        if (count_ == 0) {  // rows that are on their way must not arrive after what is written there
            wait_for_copies<0>();
            __syncthreads();
        }
    }

  private:
    VITRAIL_DEVICE static unsigned char* memory() { return static_cast<unsigned char*>(shared_memory()); }
    VITRAIL_DEVICE Tile<S, kWidth> tile(Place first) const {
        return Tile<S, kWidth>(memory() + tiles() + first / kTokens % kStages * Tile<S, kWidth>::kSize);
    }
    VITRAIL_DEVICE int tiles() const { return arrays_ * Rows<S, kWidth>::bytes(rows_); }  // where they begin
    VITRAIL_DEVICE bool repeats() const { return any_.masks() && any_.masks()->repeats(image_, head_); }
    VITRAIL_DEVICE RepeatCounts counts() const {
        return {memory() + tiles() + (count_ > kTokens ? kStages : 1) * Tile<S, kWidth>::kSize, rows_};
    }
    // Calls action with the keys of the block.
    template <class Action>
    VITRAIL_DEVICE auto with_keys(Action action) const {
        return any_.with([&](const auto& policy) {
            return action(
                VisitedKeys<std::decay_t<decltype(policy)>>{policy, image_, region_, key_block_size_});
        });
    }
    // Of the query of a row; -1 past the last.
    VITRAIL_DEVICE Place place(int i) const {
        Query at;
        return find(i, at) ? at.place : Place(-1);
    }
    VITRAIL_DEVICE bool find(int i, Query& to) const {
        return any_.with([&](const auto& policy) { return find_query(policy, block_, i, to); });
    }

    const BlockAttention& a_;
    const AnyPolicy& any_;
    const Place head_, block_, image_;
    const int rows_, arrays_;
    const bool k_chunks_, v_chunks_;
    const Place region_, key_block_size_, count_;
};

// Scores of a warp's rows with the keys of a tile, as powers of two: scaled, weighed, biased, and without
// those keys that a row does not attend to.
template <int N, class S, int kWidth>
VITRAIL_DEVICE void finish_scores(float (&scores)[N][4], float scale, int row, const Tile<S, kWidth>& tile,
                                  const float* const (&biases)[2]) {
    const int first = 2 * (lane() % 4);
    uint32_t kept[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i / 2][i % 2] = tile.kept[2 * (row + i / 2 * 8) + i % 2] >> first;
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int key = 8 * j + first + r % 2;
            float x = scores[j][r] * scale * tile.number[0][key];
            if (biases[r / 2]) x += biases[r / 2][bits_of(tile.number[1][key])] * kLog2E;
            scores[j][r] = kept[r / 2][j / 4] >> (j % 4 * 8 + r % 2) & 1u ? x : -INFINITY;
        }
}

template <class S, int kWidth>
__global__ void __launch_bounds__(128, 3)
    attend(const __grid_constant__ BlockAttention a, const __grid_constant__ AnyPolicy any, Place blocks) {
    constexpr int kTiles = TileShape<S, kWidth>::kTokens / 8, kOutputs = kWidth / 8;
    const QueryBlock<S, kWidth> block(a, any, blocks, 1);
    const int row = warp() * kWarpRows + lane() / 4;  // and row + 8
    block.load_rows(a.q, a.head_dim, 0);
    block.load_keys(0);
    const float* const biases[2] = {block.biases(row), block.biases(row + 8)};
    const float scale = float(a.scale) * kLog2E;
    float highest[2] = {-3.4e38f, -3.4e38f}, total[2] = {}, out[kOutputs][4] = {};
    block.each_tile([&](const Tile<S, kWidth>& tile) {
        float scores[kTiles][4] = {};
        rows_by_rows(block.array(0).from(warp() * kWarpRows), tile.first, scores);
        finish_scores(scores, scale, row, tile, biases);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float top = highest[i];
#pragma unroll
            for (int j = 0; j < kTiles; ++j) top = fmaxf(top, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
            top = across_row(top, [](float x, float y) { return fmaxf(x, y); });
            const float rescale = exp2_fast(highest[i] - top);
            highest[i] = top;
            total[i] *= rescale;
#pragma unroll
            for (int j = 0; j < kOutputs; ++j) {
                out[j][2 * i] *= rescale;
                out[j][2 * i + 1] *= rescale;
            }
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float x = exp2_fast(scores[j][r] - highest[r / 2]);
                total[r / 2] += x;
                scores[j][r] = x * tile.number[0][8 * j + 2 * (lane() % 4) + r % 2];
            }
        weights_by_rows(scores, tile.second, out);
    });

    float factors[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        total[i] = across_row(total[i], [](float x, float y) { return x + y; });
        factors[i] = any.masks() && total[i] == 0.0f ? 0.0f : 1.0f / total[i];  // a list may be empty
        float* const lse = block.template row<float>(a.lse, 1, row + 8 * i);
        if (lse && lane() % 4 == 0) *lse = (highest[i] + log2f(total[i])) * kLn2;
    }
    block.store_rows(out, factors, 0, a.out, a.value_dim);
}

}  // namespace vitrail::cuda
