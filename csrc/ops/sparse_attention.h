// What sparse_attention (checks, memory, threads) and its kernels (one per instruction set) agree on.
#pragma once

#include "../core/tensors.h"
#include "../dispatch/backend.h"

namespace vitrail {

struct SparseAttention {
    Storage storage;
    Tokens q, k, v, out;
    void* lse;  // (image, query, head); float, or double for Storage::kFloat64; contiguous
    int64_t queries, tokens, heads, head_dim, value_dim;
    const void* keys;                                             // int32 or int64, as they came: not checked
    bool wide_keys;                                               // int64
    int64_t keys_image, keys_head, keys_query, keys_slot, slots;  // strides in elements; slots of a list
    double scale;
    bool* wrong_key;  // set where a list holds a number that is neither a key's nor -1
};

// Sizes in bytes, and how many tasks one image gives.
struct SparsePlan {
    int64_t packed_image, scratch;
    int64_t pack_tasks, attend_tasks;
};

struct SparseBackend {
    SparsePlan (*plan)(const SparseAttention&);
    // Widens keys and values of the images from `image` on: tasks [begin, end) of them all.
    void (*pack)(const SparseAttention&, int64_t image, void* packed, int64_t begin, int64_t end);
    // Computes outputs from what was packed; `scratch` belongs to the caller's thread.
    void (*attend)(const SparseAttention&, int64_t image, const void* packed, void* scratch, int64_t begin,
                   int64_t end);
};

VITRAIL_DECLARE_KERNELS(SparseBackend, kSparseAttention)

// The gradients of one call. Keys and values of a head belong to one task.
struct SparseAttentionBackward {
    SparseAttention forward;  // its `out` is not used
    Tokens grad, grad_q, grad_k, grad_v;
};

struct SparseBackwardBackend {
    int64_t (*scratch)(const SparseAttentionBackward&);  // bytes
    // Tasks [begin, end) of images * heads.
    void (*run)(const SparseAttentionBackward&, void* scratch, int64_t begin, int64_t end);
};

VITRAIL_DECLARE_KERNELS(SparseBackwardBackend, kSparseAttentionBackward)

}  // namespace vitrail
