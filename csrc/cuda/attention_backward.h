// Block attention, backward. Attention is computed again from the log-sum-exps, never stored.
//
// A block of queries gives the gradients of its queries; a part of a block of keys, against all queries that
// look at it, those of its keys and values. So every sum has one owner and one order. Keys that several
// blocks of keys share leave their gradients apart, in float, and another kernel adds them up.
#pragma once

#include "attention.h"
#include "attention_arguments.h"

namespace vitrail::cuda {

// Of one query and one key: the attention, from the score and the log-sum-exp in units of log2, and the
// gradient of the score. `product` is that of the value and the gradient of the result, `weight` that of the
// visit.
struct ScoreGradient {
    float attention, of_score;

    VITRAIL_DEVICE ScoreGradient(float score, float product, float weight, float lse, float delta)
        : attention(exp2_fast(score - lse)), of_score(attention * (product * weight - delta)) {}
};

// In units of log2. Of a query that attends to nothing it is such that no key has a share.
VITRAIL_DEVICE float lse_of(float stored) {
    return stored == -INFINITY ? INFINITY : stored * kLog2E;
}

template <class S, int kWidth>
__global__ void __launch_bounds__(128)
    query_gradients(const __grid_constant__ BlockAttention a, const __grid_constant__ AttentionGradients g,
                    const __grid_constant__ AnyPolicy any, Place blocks) {
    constexpr int kTiles = TileShape<S, kWidth>::kTokens / 8, kOutputs = kWidth / 8;
    const QueryBlock<S, kWidth> block(a, any, blocks, 2);
    const int row = warp() * kWarpRows + lane() / 4;  // and row + 8
    block.load_rows(a.q, a.head_dim, 0);
    block.load_rows(g.grad, a.value_dim, 1);
    block.load_keys(0);
    const float* const biases[2] = {block.biases(row), block.biases(row + 8)};
    float lse[2] = {}, delta[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const S* const out = block.template row<const S>(a.out, a.value_dim, row + 8 * i);
        const S* const grad = block.template row<const S>(g.grad, a.value_dim, row + 8 * i);
        if (out)
            for (int c = lane() % 4; c < int(a.value_dim); c += 4) delta[i] += widen(out[c]) * widen(grad[c]);
        delta[i] = across_row(delta[i], [](float x, float y) { return x + y; });
        if (!out) continue;
        lse[i] = lse_of(*block.template row<const float>(a.lse, 1, row + 8 * i));
        if (lane() % 4 == 0) *block.template row<float>(g.delta, 1, row + 8 * i) = delta[i];
    }

    const float scale = float(a.scale) * kLog2E;
    float sums[kOutputs][4] = {};
    block.each_tile([&](const Tile<S, kWidth>& tile) {
        float scores[kTiles][4] = {}, products[kTiles][4] = {};
        rows_by_rows(block.array(0).from(warp() * kWarpRows), tile.first, scores);
        rows_by_rows(block.array(1).from(warp() * kWarpRows), tile.second, products);
        finish_scores(scores, scale, row, tile, biases);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float weight = tile.number[0][8 * j + 2 * (lane() % 4) + r % 2];
                const ScoreGradient s(scores[j][r], products[j][r], weight, lse[r / 2], delta[r / 2]);
                scores[j][r] = s.of_score * weight * float(a.scale);
            }
        weights_by_rows(scores, tile.first, sums);
    });

    block.store_rows(sums, {1.0f, 1.0f}, 0, g.q, a.head_dim);
}

// The row of a query (which = 0) or of the gradient of its result (1), of a head.
template <class S>
VITRAIL_DEVICE const S* query_or_gradient(const BlockAttention& a, const AttentionGradients& g, int which,
                                          Place image, Place head, Place row, Place column) {
    return token<S>(which ? g.grad : a.q, image, row, column) + head * (which ? a.value_dim : a.head_dim);
}

// The queries that look at a block of keys, in a row: region by region, as its list of visitors has them.
template <class Policy>
struct VisitingQueries {
    const Policy& policy;
    const int32_t* visitors;   // null: the block is the slot
    Place block, size, count;  // size: of a region of queries

    VITRAIL_DEVICE Place slot(Place visit) const { return visitors ? visitors[visit] : block; }
    VITRAIL_DEVICE bool find(Place i, Query& to) const {
        return i < count && find_in_region(policy, policy.visitor(slot(i / size)), i % size, to);
    }
    VITRAIL_DEVICE float weight(Place image, Place i) const { return policy.weight(image, slot(i / size)); }
};

// A part of a block of keys, of one head, and the tiles of queries that look at it.
template <class S, int kWidth>
class KeyBlock {
    static constexpr int kTokens = TileShape<S, kWidth>::kTokens;

  public:
    static constexpr int kRows = 64;

    // Rows of keys and values, a tile, and four numbers of each of its queries.
    static int shared_bytes(int rows, bool masked) {
        return (masked ? RepeatCounts::bytes(kTokens) : 0) + 2 * Rows<S, kWidth>::bytes(rows) +
               Tile<S, kWidth>::kSize + 16 * kTokens;
    }

    VITRAIL_DEVICE KeyBlock(const BlockAttention& a, const AttentionGradients& g, const AnyPolicy& any,
                            Place blocks, Place parts)
        : a_(a),
          g_(g),
          any_(any),
          blocks_(blocks),
          head_(Place(blockIdx.x) % Place(a.heads)),
          part_(Place(blockIdx.x) / Place(a.heads) % parts),
          block_(Place(blockIdx.x) / Place(a.heads) / parts % blocks),
          image_(Place(blockIdx.x) / Place(a.heads) / parts / blocks),
          parts_(parts),
          rows_(int(blockDim.x) / kWarp * kWarpRows),
          count_(any.with([&](const auto& policy) { return policy.keys_in(block_); })),
          slots_(any.with([](const auto& policy) { return policy.slots(); })),
          begin_(g.visitors ? visits()[0] : 0),
          visits_(g.visitors ? visits()[1] - begin_ : 1),
          region_size_(visits_ > 0 ? any.with([&](const auto& policy) {
              return policy.query_region(policy.visitor(visitors() ? *visitors() : block_)).size();
          })
                                   : 0),
          queries_(visits_ * region_size_) {}

    VITRAIL_DEVICE Place queries() const { return queries_; }
    VITRAIL_DEVICE Rows<S, kWidth> array(int i) const {
        return {reinterpret_cast<S*>(memory() + i * Rows<S, kWidth>::bytes(rows_))};
    }
    // Of query i of the tile: the log-sum-exp, delta, the weight of its visit, its row in the table of
    // biases.
    VITRAIL_DEVICE float lse(int i) const { return tile().number[0][i]; }
    VITRAIL_DEVICE float delta(int i) const { return tile().number[1][i]; }
    VITRAIL_DEVICE float weight(int i) const { return numbers()[i]; }
    VITRAIL_DEVICE int64_t bias_row(int i) const { return bias_rows()[i]; }
    // Whether it attends to the key of a row, if that is there.
    VITRAIL_DEVICE bool attends(int i, int row) const {
        return tile().kept[2 * i + row / 32] >> row % 32 & 1u;
    }
    // Of the key of a row.
    VITRAIL_DEVICE bool has_key(int row) const { return first() + row < count_; }
    VITRAIL_DEVICE int bias_column(int row) const {
        return any_.with([&](const auto& policy) {
            return a_.bias && has_key(row) ? int(policy.bias_column(block_, first() + row)) : 0;
        });
    }

    VITRAIL_DEVICE void load_rows() const {
        if (queries_ == 0) return;
        const int k = int(a_.head_dim), v = int(a_.value_dim);
        const Target<S, kWidth> target[] = {
            {array(0), k, in_chunks<S>(a_.k[0], k) && in_chunks<S>(a_.k[1], k)},
            {array(1), v, in_chunks<S>(a_.v[0], v) && in_chunks<S>(a_.v[1], v)}};
        gather(target, rows_, [&](int which, int i) -> const S* {
            Key key;
            return find_key(i, key) ? key_or_value<S>(a_, which, image_, head_, key) : nullptr;
        });
    }

    // Calls use(first, tile) for one tile of queries after the other.
    template <class Use>
    VITRAIL_DEVICE void each_tile(Use use) const {
        for (Place first = 0; first < queries_; first += kTokens) {
            load_queries(first);
            commit_copies();
            wait_for_copies<0>();
            __syncthreads();
            for (int round = 0, rounds = 1; round < rounds; ++round) {
                if (round > 0) counts().keep(round, tile().kept);
                use(first, tile());
                __syncthreads();
                if (round == 0 && repeats())
                    rounds = counts().fill(*any_.masks(), image_, head_, this->first(), [&](int i) {
                        return first + i < queries_ ? first + i : Place(-1);
                    });
            }
        }
    }

    // A warp's gradients of keys or values: into their tensors, by way of an array that nothing is read from
    // any more, or, as float, among those that blocks share.
    template <int N>
    VITRAIL_DEVICE void store_rows(const float (&sums)[N][4], int by, const Grid (&grids)[2], float* shared,
                                   int64_t channels) const {
        const int first_row = warp() * kWarpRows;
        const bool chunks = (!grids[0].data || in_chunks<S>(grids[0], int(channels))) &&
                            (!grids[1].data || in_chunks<S>(grids[1], int(channels)));
        cuda::store_rows(
            sums, {1.0f, 1.0f}, array(by).from(first_row), int(channels), chunks, [&](int i) -> S* {
                Key key;
                if (!find_key(first_row + i, key) || !grids[key.source].data) return nullptr;
                return token<S>(grids[key.source], image_, key.row, key.column) + head_ * channels;
            });
        if (!shared) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + lane() / 4 + 8 * half;
            Key key;
            if (!find_key(row, key) || grids[key.source].data) continue;
            const int64_t at = (int64_t(image_) * blocks_ + block_) * largest() + first() + row;
            store_row(sums, half, int(channels), shared + (at * a_.heads + head_) * channels);
        }
    }

    // Sums of a warp: its lanes have those of queries first + 2t and first + 2t + 1, of some of its keys.
    VITRAIL_DEVICE void store_weights(Place first, const float (&sums)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = sums[r];
            for (int mask = 4; mask < kWarp; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            const Place query = first + 2 * (lane() % 4) + r;
            if (lane() >= 4 || query >= queries_) continue;
            const int64_t warps = int64_t(blockDim.x) / kWarp, at = part_ * warps + warp();
            const int64_t table = (int64_t(image_) * a_.heads + head_) * parts_ * warps + at;
            const Place visit = query / region_size_;
            const int64_t slot = table * slots_ + (visitors() ? visitors()[visit] : block_);
            g_.weights[slot * region_size_ + query % region_size_] = sum;
        }
    }

  private:
    VITRAIL_DEVICE static unsigned char* memory() { return static_cast<unsigned char*>(shared_memory()); }
    VITRAIL_DEVICE Tile<S, kWidth> tile() const {
        return Tile<S, kWidth>(memory() + 2 * Rows<S, kWidth>::bytes(rows_));
    }
    VITRAIL_DEVICE int64_t* bias_rows() const {
        return reinterpret_cast<int64_t*>(memory() + 2 * Rows<S, kWidth>::bytes(rows_) +
                                          Tile<S, kWidth>::kSize);
    }
    VITRAIL_DEVICE float* numbers() const { return reinterpret_cast<float*>(bias_rows() + kTokens); }
    VITRAIL_DEVICE bool repeats() const { return any_.masks() && any_.masks()->repeats(image_, head_); }
    VITRAIL_DEVICE RepeatCounts counts() const { return {numbers() + kTokens, kTokens}; }

    VITRAIL_DEVICE Place first() const { return part_ * kRows; }
    VITRAIL_DEVICE Place largest() const {
        return any_.with([](const auto& policy) { return policy.largest_key_block(); });
    }
    // Where the lists of the visitors of its block begin and end; the list; null where the block is the slot.
    VITRAIL_DEVICE const int32_t* visits() const {
        return g_.begins + int64_t(image_) * (blocks_ + 1) + block_;
    }
    VITRAIL_DEVICE const int32_t* visitors() const {
        return g_.visitors ? g_.visitors + int64_t(image_) * slots_ + begin_ : nullptr;
    }
    // Calls action with the queries that look at the block.
    template <class Action>
    VITRAIL_DEVICE auto with_queries(Action action) const {
        return any_.with([&](const auto& policy) {
            return action(VisitingQueries<std::decay_t<decltype(policy)>>{policy, visitors(), block_,
                                                                          region_size_, queries_});
        });
    }
    VITRAIL_DEVICE bool find_query(Place i, Query& to) const {
        return with_queries([&](const auto& queries) { return queries.find(i, to); });
    }
    VITRAIL_DEVICE bool find_key(int row, Key& to) const {
        if (row >= kRows || !has_key(row)) return false;
        to = any_.with([&](const auto& policy) { return policy.key(block_, first() + row); });
        return true;
    }

    VITRAIL_DEVICE void load_queries(Place first) const {
        const Tile<S, kWidth> to = tile();
        const int k = int(a_.head_dim), v = int(a_.value_dim);
        const Target<S, kWidth> target[] = {{to.first, k, in_chunks<S>(a_.q, k)},
                                            {to.second, v, in_chunks<S>(g_.grad, v)}};
        gather(target, kTokens, [&](int which, int i) -> const S* {
            Query at;
            if (!find_query(first + i, at)) return nullptr;
            return query_or_gradient<S>(a_, g_, which, image_, head_, at.row, at.column);
        });
        for (int i = int(threadIdx.x); i < kTokens; i += int(blockDim.x)) {
            Query at;
            const bool some = find_query(first + i, at);
            // a query that is not there attends to nothing
            to.number[0][i] =
                some ? lse_of(token<float>(a_.lse, image_, at.row, at.column)[head_]) : INFINITY;
            to.number[1][i] = some ? token<float>(g_.delta, image_, at.row, at.column)[head_] : 0.0f;
            numbers()[i] =
                some ? with_queries([&](const auto& queries) { return queries.weight(image_, first + i); })
                     : 0.0f;
            bias_rows()[i] =
                some && a_.bias
                    ? any_.with([&](const auto& policy) { return policy.bias_row(head_, at.place); })
                    : 0;
            set_kept(to.kept + 2 * i,
                     some && any_.masks() ? any_.masks()->bits(image_, head_, at.place) : nullptr,
                     this->first(), count_);
        }
    }

    const BlockAttention& a_;
    const AttentionGradients& g_;
    const AnyPolicy& any_;
    const Place blocks_, head_, part_, block_, image_, parts_;
    const int rows_;
    const Place count_, slots_, begin_, visits_, region_size_, queries_;
};

template <class S, int kWidth>
__global__ void __launch_bounds__(128)
    key_gradients(const __grid_constant__ BlockAttention a, const __grid_constant__ AttentionGradients g,
                  const __grid_constant__ AnyPolicy any, Place blocks, Place parts) {
    constexpr int kTiles = TileShape<S, kWidth>::kTokens / 8, kOutputs = kWidth / 8;
    const KeyBlock<S, kWidth> block(a, g, any, blocks, parts);
    const int row = warp() * kWarpRows + lane() / 4;  // and row + 8
    block.load_rows();
    const int columns[2] = {block.bias_column(row), block.bias_column(row + 8)};
    const float scale = float(a.scale) * kLog2E;
    float k_sums[kOutputs][4] = {}, v_sums[kOutputs][4] = {};
    block.each_tile([&](Place first, const Tile<S, kWidth>& tile) {
        float scores[kTiles][4] = {}, products[kTiles][4] = {};
        rows_by_rows(block.array(0).from(warp() * kWarpRows), tile.first, scores);
        rows_by_rows(block.array(1).from(warp() * kWarpRows), tile.second, products);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            float of_weight[2] = {};
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int query = 8 * j + 2 * (lane() % 4) + r % 2;
                const bool some = block.attends(query, row + r / 2 * 8);
                const float weight = block.weight(query), raw = scores[j][r];
                float score = raw * scale * weight;
                if (a.bias)
                    score +=
                        static_cast<const float*>(a.bias)[block.bias_row(query) + columns[r / 2]] * kLog2E;
                const ScoreGradient s(some ? score : -INFINITY, products[j][r], weight, block.lse(query),
                                      block.delta(query));
                // through the score and through the value
                of_weight[r % 2] += s.of_score * raw * float(a.scale) + s.attention * products[j][r];
                scores[j][r] = s.attention * weight;
                products[j][r] = s.of_score * weight * float(a.scale);
            }
            if (g.weights) block.store_weights(first + 8 * j, of_weight);
        }
        weights_by_rows(scores, tile.second, v_sums);
        weights_by_rows(products, tile.first, k_sums);
    });

    block.store_rows(k_sums, 0, g.k, g.shared_k, a.head_dim);
    block.store_rows(v_sums, 1, g.v, g.shared_v, a.value_dim);
}

// Gradients of biases: a part of the table of one head, over some windows of some images, in their order.
template <class S, int kWidth>
__global__ void __launch_bounds__(128)
    bias_gradients(const __grid_constant__ BlockAttention a, const __grid_constant__ AttentionGradients g,
                   const __grid_constant__ Windows<float> windows, float* tables, Place images,
                   Place slices) {
    constexpr int kTokens = TileShape<S, kWidth>::kTokens, kTiles = kTokens / 8;
    const int rows = int(blockDim.x) / kWarp * kWarpRows, places = windows.largest_key_block();
    const Place column_parts = (places + kTokens - 1) / kTokens, row_parts = (places + rows - 1) / rows;
    const Place head = Place(blockIdx.x) % Place(a.heads), at = Place(blockIdx.x) / Place(a.heads);
    const Place column_0 = at % column_parts * kTokens, row_0 = at / column_parts % row_parts * rows;
    const Place slice = at / column_parts / row_parts;
    unsigned char* const memory = static_cast<unsigned char*>(shared_memory());
    const Rows<S, kWidth> queries{reinterpret_cast<S*>(memory)};
    const Rows<S, kWidth> grads{reinterpret_cast<S*>(memory + queries.bytes(rows))};
    const Tile<S, kWidth> tile(memory + 2 * queries.bytes(rows));
    const int k = int(a.head_dim), v = int(a.value_dim), row = warp() * kWarpRows + lane() / 4;
    const Target<S, kWidth> row_target[] = {{queries, k, in_chunks<S>(a.q, k)},
                                            {grads, v, in_chunks<S>(g.grad, v)}};
    const Target<S, kWidth> tile_target[] = {
        {tile.first, k, in_chunks<S>(a.k[0], k) && in_chunks<S>(a.k[1], k)},
        {tile.second, v, in_chunks<S>(a.v[0], v) && in_chunks<S>(a.v[1], v)}};
    float sums[kTiles][4] = {};
    const int64_t all = int64_t(images) * windows.key_blocks();
    for (int64_t i = all * slice / slices; i < all * (slice + 1) / slices; ++i) {
        const Place image = Place(i / windows.key_blocks()), window = Place(i % windows.key_blocks());
        gather(row_target, rows, [&](int which, int i) -> const S* {
            Key at;
            if (!windows.at_place(window, row_0 + i, at) || at.source != 0) return nullptr;
            return query_or_gradient<S>(a, g, which, image, head, at.row, at.column);
        });
        gather(tile_target, kTokens, [&](int which, int i) -> const S* {
            Key at;
            return windows.at_place(window, column_0 + i, at) ? key_or_value<S>(a, which, image, head, at)
                                                              : nullptr;
        });
        for (int place = int(threadIdx.x); place < kTokens; place += int(blockDim.x)) {
            Key at;
            tile.number[0][place] = windows.at_place(window, column_0 + place, at) ? 0.0f : -INFINITY;
        }
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        float scores[kTiles][4] = {}, products[kTiles][4] = {};
        rows_by_rows(queries.from(warp() * kWarpRows), tile.first, scores);
        rows_by_rows(grads.from(warp() * kWarpRows), tile.second, products);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Place place = row_0 + row + 8 * half;
            Key there;
            if (!windows.at_place(window, place, there) || there.source != 0) continue;
            const float lse = token<float>(a.lse, image, there.row, there.column)[head] * kLog2E;
            const float delta = token<float>(g.delta, image, there.row, there.column)[head];
            const float* const biases =
                static_cast<const float*>(a.bias) + windows.bias_row(head, place) + column_0;
#pragma unroll
            for (int j = 0; j < kTiles; ++j)
#pragma unroll
                for (int r = 2 * half; r < 2 * half + 2; ++r) {
                    const int column = 8 * j + 2 * (lane() % 4) + r % 2;
                    const float bias = column_0 + column < places ? biases[column] * kLog2E : 0.0f;
                    const float score =
                        scores[j][r] * float(a.scale) * kLog2E + bias + tile.number[0][column];
                    sums[j][r] += ScoreGradient(score, products[j][r], 1.0f, lse, delta).of_score;
                }
        }
        __syncthreads();
    }
    float* const table = tables + (int64_t(slice) * a.heads + head) * places * places;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Place place = row_0 + row + r / 2 * 8, column = column_0 + 8 * j + 2 * (lane() % 4) + r % 2;
            if (place < places && column < places) table[int64_t(place) * places + column] = sums[j][r];
        }
}

// Adds up the gradients of keys that patches share; a thread has a channel of a token.
template <class S>
__global__ void sum_shared(const __grid_constant__ Patches<float> patches, const __grid_constant__ Grid to,
                           const float* shared, Place height, Place width, Place channels, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Place c = Place(i % channels), x = Place(i / channels % width),
                y = Place(i / channels / width % height);
    const int64_t image = i / channels / width / height;
    float sum = 0.0f;
    patches.each_block_with(y, x, [&](Place block, Place key) {
        sum +=
            shared[((image * patches.key_blocks() + block) * patches.largest_key_block() + key) * channels +
                   c];
    });
    narrow(sum, token<S>(to, Place(image), y, x)[c]);
}

}  // namespace vitrail::cuda
