// vitrail::sparse_attention and its backward on a GPU.
#include <cassert>

#include "../cuda/attention_host.h"
#include "../cuda/launch.h"
#include "../cuda/tiles.h"
#include "../dispatch/registration.h"
#include "sparse_attention_host.h"

namespace vitrail {
namespace cuda {

// The bits of a query's keys: a warp has a query, and makes some of its words at a time in shared memory.
__global__ void mask_keys(const __grid_constant__ KeyMasks masks, int64_t queries, int most_words) {
    const int64_t i = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp();
    if (i >= queries) return;
    const Place query = Place(i % masks.queries()), head = Place(i / masks.queries() % masks.heads());
    const int64_t image = i / masks.queries() / masks.heads();
    const Place words = Place(KeyMasks::words(masks.tokens()));
    uint32_t* const mine = static_cast<uint32_t*>(shared_memory()) + warp() * most_words;
    bool again = false;
    for (Place first = 0; first < words; first += most_words) {
        const Place count = words - first < most_words ? words - first : most_words;
        for (Place word = lane(); word < count; word += kWarp) mine[word] = 0;
        __syncwarp();
        for (Place slot = lane(); slot < masks.list_slots(); slot += kWarp) {
            const int64_t key = masks.listed(image, head, query, slot), word = key / 32 - first;
            assert(key >= -1 && key < masks.tokens() && "a number that names no key");
            if (key < 0 || key >= masks.tokens() || word < 0 || word >= count) continue;
            const uint32_t bit = 1u << key % 32;
            again |= (atomicOr(mine + word, bit) & bit) != 0;
        }
        __syncwarp();
        uint32_t* const to = masks.bits(image, head, query) + first;
        for (Place word = lane(); word < count; word += kWarp) to[word] = mine[word];
        __syncwarp();
    }
    if (again) masks.repeats(image, head) = 1;  // whoever writes, writes the same
}

namespace {

// Masks of a call, and the memory that they are in.
struct Masked {
    Tensor bits, repeats;
    KeyMasks policy;

    Masked(const SparseAttention& a, const Tensor& q)
        : bits(tensors::new_empty(q, {q.size(0) * a.heads, a.queries, KeyMasks::words(a.tokens)},
                                  ScalarType::Int)),
          repeats(tensors::new_zeros(q, {q.size(0), a.heads}, ScalarType::Int)),
          policy(a, static_cast<uint32_t*>(bits.mutable_data_ptr()),
                 static_cast<int32_t*>(repeats.mutable_data_ptr())) {
        constexpr int kWarps = 4, kMostWords = 1024;
        const int64_t queries = q.size(0) * a.heads * a.queries;
        const int words = int(std::min<int64_t>(KeyMasks::words(a.tokens), kMostWords));
        Launcher{q}(mask_keys, (queries + kWarps - 1) / kWarps, kWarps * kWarp,
                    kWarps * words * int(sizeof(uint32_t)), policy, queries, words);
    }
};

// Tokens as a grid of one row.
Grid row_of(const Tokens& tokens) {
    return {tokens.data, tokens.image, 0, tokens.token};
}

BlockAttention block_attention(const SparseAttention& a) {
    BlockAttention block = {};
    block.storage = a.storage;
    block.q = row_of(a.q);
    block.k[0] = row_of(a.k);
    block.v[0] = row_of(a.v);
    block.out = row_of(a.out);
    block.lse = {a.lse, a.queries * a.heads, 0, a.heads};
    block.heads = a.heads;
    block.head_dim = a.head_dim;
    block.value_dim = a.value_dim;
    block.scale = a.scale;
    return block;
}

}  // namespace
}  // namespace cuda

namespace {

struct OnGpu {
    static void attend(const Checks&, const SparseAttention& a, const Tensor& q, const Tensor&) {
        cuda::run_forward(cuda::Masked(a, q).policy, cuda::block_attention(a), q);
    }

#if !defined(VITRAIL_STANDALONE)
    static void gradients(const Checks&, const SparseAttentionBackward& b, const Tensor& q, const Tensor&) {
        const SparseAttention& a = b.forward;
        const cuda::Masked masked(a, q);
        const BlockAttention block = cuda::block_attention(a);
        Tensor delta = tensors::new_empty(q, {q.size(0), a.queries, a.heads}, ScalarType::Float);
        cuda::AttentionGradients g = {};
        g.grad = cuda::row_of(b.grad);
        g.q = cuda::row_of(b.grad_q);
        g.k[0] = cuda::row_of(b.grad_k);
        g.v[0] = cuda::row_of(b.grad_v);
        g.delta = {delta.mutable_data_ptr(), a.queries * a.heads, 0, a.heads};
        cuda::run_query_gradients(masked.policy, block, g, q);
        cuda::run_key_gradients(masked.policy, block, g, q);
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(sparse_attention, &vitrail::sparse_attention<vitrail::OnGpu>)
VITRAIL_REGISTER_BACKWARD(sparse_attention_backward, &vitrail::sparse_attention_backward<vitrail::OnGpu>)
