// vitrail::semantic_attention and its backward on any device: checks and outputs. A device says how it
// attends, and where gradients come from.
#pragma once

#include "block_host.h"
#include "semantic_attention.h"

namespace vitrail {

inline SemanticAttention semantic_arguments(const Checks& checks, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& own_k, const Tensor& own_v,
                                            const Sizes& window_size, const Sizes& patch_size,
                                            int64_t num_heads, double scale) {
    SemanticAttention a = {};
    set_inputs(checks, q, k, v, num_heads, scale, a);
    checks.grid("own_k", own_k, q, num_heads);
    checks.grid("own_v", own_v, q, num_heads);
    checks.shape("own_k", own_k, {q.size(0), q.size(1), q.size(2), k.size(3)});
    checks.shape("own_v", own_v, {q.size(0), q.size(1), q.size(2), v.size(3)});
    checks.extent("window_size", window_size);
    checks.extent("patch_size", patch_size);
    if (q.size(1) % window_size[0] || q.size(2) % window_size[1])
        checks.fail("window_size (", window_size[0], ", ", window_size[1], ") must divide the grid of q, ",
                    q.size(1), " x ", q.size(2));
    if (patch_size[0] > k.size(1) || patch_size[1] > k.size(2))
        checks.fail("patch_size (", patch_size[0], ", ", patch_size[1], ") must not exceed the grid of k, ",
                    k.size(1), " x ", k.size(2));
    a.grid_height = q.size(1);
    a.grid_width = q.size(2);
    a.window_height = window_size[0];
    a.window_width = window_size[1];
    a.image_height = k.size(1);
    a.image_width = k.size(2);
    a.patch_height = patch_size[0];
    a.patch_width = patch_size[1];
    a.k[1] = grid_of(own_k);
    a.v[1] = grid_of(own_v);
    check_packed(checks, "patch_size", a, (q.size(1) / window_size[0]) * (q.size(2) / window_size[1]),
                 window_size[0] * window_size[1] + patch_size[0] * patch_size[1]);
    return a;
}

template <class Device>
std::tuple<Tensor, Tensor> semantic_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& own_k, const Tensor& own_v,
                                              const Sizes& window_size, const Sizes& patch_size,
                                              int64_t num_heads, double scale) {
    SemanticAttention a = semantic_arguments(Checks("semantic_attention"), q, k, v, own_k, own_v, window_size,
                                             patch_size, num_heads, scale);
    auto [out, lse] = new_outputs(q, v, a);
    if (out.numel() > 0) Device::attend(a, q);
    return {out, lse};
}

#if !defined(VITRAIL_STANDALONE)

// Gradients of q, k, v, own_k, own_v.
using SemanticGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
SemanticGradients semantic_attention_backward(const Tensor& grad, const Tensor& out, const Tensor& lse,
                                              const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Tensor& own_k, const Tensor& own_v,
                                              const Sizes& window_size, const Sizes& patch_size,
                                              int64_t num_heads, double scale) {
    const Checks checks("semantic_attention_backward");
    SemanticAttention a =
        semantic_arguments(checks, q, k, v, own_k, own_v, window_size, patch_size, num_heads, scale);
    BlockGradients g = set_outputs(checks, grad, out, lse, q, v, a);
    return Device::gradients(a, g, q, k, v, own_k, own_v);
}

#endif

}  // namespace vitrail
