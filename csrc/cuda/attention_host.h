// What the host sides of the block attention operators on a GPU share: kernels that are compiled once for all
// of them.
#pragma once

#include "../ops/block_host.h"
#include "attention_arguments.h"

namespace vitrail::cuda {

void run_forward(const AnyPolicy& policy, const BlockAttention& a, const Tensor& q);

#if !defined(VITRAIL_STANDALONE)

// How a block of keys is shared out: parts, which have a block of threads each, of some warps.
struct KeyGrid {
    int parts, warps;
};
KeyGrid key_grid(const AnyPolicy& policy);

// Gradients of queries, which also leave `delta` for the others; then those of keys, values and weights.
void run_query_gradients(const AnyPolicy& policy, const BlockAttention& a, const AttentionGradients& g,
                         const Tensor& q);
void run_key_gradients(const AnyPolicy& policy, const BlockAttention& a, const AttentionGradients& g,
                       const Tensor& q);

// After them: those of biases, float, and of the keys that patches share, into `to`.
Tensor run_bias_gradients(const Windows<float>& windows, const BlockAttention& a, const AttentionGradients& g,
                          const Tensor& q);
void run_sum_shared(const Patches<float>& patches, Storage storage, const Tensor& to, const float* shared);

// What a backward begins with, for any policy: what was given, and room for the gradient of the queries.
struct Backward {
    AttentionGradients g = {};
    Tensor dq, delta;

    Backward(const BlockAttention& a, const BlockGradients& given, const Tensor& q)
        : delta(tensors::new_empty(q, {q.size(0), q.size(1), q.size(2), a.heads}, ScalarType::Float)) {
        dq = empty_gradient(q, g.q);
        g.grad = given.out;
        g.delta = grid_of(delta);
    }
};

#endif

}  // namespace vitrail::cuda
