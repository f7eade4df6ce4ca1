// What the operator channel_attention (checks, memory, threads) and its kernels (one per instruction set)
// agree on. Plain data only: a function here would be compiled with several instruction sets under one name.
#pragma once

#include "../core/tensors.h"
#include "../dispatch/backend.h"

namespace vitrail {

struct ChannelAttention {
    Storage storage;
    int64_t images, height, width, heads, head_dim;
    Grid q, k, v;
    void* lse;  // float, or double for Storage::kFloat64; contiguous [image, channel]
    double scale;
    Grid out;                           // of the forward pass
    Grid grad, grad_q, grad_k, grad_v;  // of the backward pass
};

// Sizes in bytes. The tokens of an image are cut into chunks by their number alone, so that sums over them do
// not depend on the threads.
struct ChannelAttentionPlan {
    int64_t chunks, sums, matrices, scratch;
};

// Three steps: sums over the tokens, for each image, chunk and head; from these the matrices that tokens are
// multiplied with, for each image and head; the products, for each image, chunk and head.
struct ChannelAttentionSteps {
    ChannelAttentionPlan (*plan)(const ChannelAttention&);
    void (*sum)(const ChannelAttention&, void* sums, void* scratch, int64_t begin, int64_t end);
    void (*weigh)(const ChannelAttention&, const void* sums, void* matrices, void* scratch, int64_t begin,
                  int64_t end);
    void (*apply)(const ChannelAttention&, const void* matrices, void* scratch, int64_t begin, int64_t end);
};

VITRAIL_DECLARE_KERNELS(ChannelAttentionSteps, kChannelAttention)
VITRAIL_DECLARE_KERNELS(ChannelAttentionSteps, kChannelAttentionBackward)

}  // namespace vitrail
