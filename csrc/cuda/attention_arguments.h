// What the host side of block attention on a GPU and its kernels agree on.
#pragma once

#include "../core/block_arguments.h"
#include "policies.h"

namespace vitrail::cuda {

// Gradients, and what they are made of.
struct AttentionGradients {
    Grid grad;           // of the result
    Grid q, k[2], v[2];  // in the type of their tensors; null where `shared` has them
    Grid delta;          // of each query: the product of the result and its gradient; as the log-sum-exps lie
    // Of keys and values of a source that blocks share: (image, block, key of the block, channel); or null.
    float *shared_k, *shared_v;
    // Of weights: (image, head, warp of a block of keys, slot, query of the slot's region); or null.
    float* weights;
    // Which slots visit a block of keys, in order: where its list begins, (image, block + 1), and the lists,
    // (image, slot). Null where slots and blocks are the same.
    const int32_t *begins, *visitors;
};

}  // namespace vitrail::cuda
