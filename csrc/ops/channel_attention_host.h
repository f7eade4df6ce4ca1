// vitrail::channel_attention and its backward on any device: checks and outputs. A device says how it
// attends.
#pragma once

#include <cmath>

#include "channel_attention.h"
#include "host.h"

namespace vitrail {

inline ChannelAttention channel_arguments(const Checks& checks, const Tensor& q, const Tensor& k,
                                          const Tensor& v, int64_t num_heads, double scale) {
    ChannelAttention a = {};
    a.storage = checks.computed("q", q);
    checks.heads(num_heads);
    checks.grid("q", q, q, num_heads);
    const auto check_like_q = [&](const char* name, const Tensor& t) {
        checks.grid(name, t, q, num_heads);
        checks.shape(name, t, {q.size(0), q.size(1), q.size(2), q.size(3)});
    };
    check_like_q("k", k);
    check_like_q("v", v);
    a.images = q.size(0);
    a.height = q.size(1);
    a.width = q.size(2);
    a.heads = num_heads;
    a.head_dim = q.size(3) / num_heads;
    a.scale = scale;
    checks.channels(a.head_dim, a.head_dim);
    a.q = grid_of(q);
    a.k = grid_of(k);
    a.v = grid_of(v);
    // A generous bound on all memory, in floating point because it may overflow.
    const double head = double(a.head_dim) + 64.0, tokens = double(a.height) * double(a.width) / 256.0 + 1.0;
    if (64.0 * double(a.images) * double(a.heads) * tokens * head * head > 0x1p62)
        checks.fail("q is too large, got shape ", shape_of(q));
    return a;
}

template <class Device>
std::tuple<Tensor, Tensor> channel_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             int64_t num_heads, double scale) {
    ChannelAttention a = channel_arguments(Checks("channel_attention"), q, k, v, num_heads, scale);
    Tensor out = new_result(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
    Tensor lse = tensors::new_empty(q, {q.size(0), 1, 1, q.size(3)}, compute_type(a.storage));
    a.out = grid_of(out);
    a.lse = lse.mutable_data_ptr();
    if (out.numel() > 0)
        Device::attend(a, q);
    else  // scores of no tokens are zero
        tensors::fill_(lse, std::log(double(a.head_dim)));
    return {out, lse};
}

#if !defined(VITRAIL_STANDALONE)

template <class Device>
std::tuple<Tensor, Tensor, Tensor> channel_attention_backward(const Tensor& grad, const Tensor& out,
                                                              const Tensor& lse, const Tensor& q,
                                                              const Tensor& k, const Tensor& v,
                                                              int64_t num_heads, double scale) {
    const Checks checks("channel_attention_backward");
    ChannelAttention a = channel_arguments(checks, q, k, v, num_heads, scale);
    const std::vector<int64_t> shape = {q.size(0), q.size(1), q.size(2), q.size(3)};
    const auto check_like_q = [&](const char* name, const Tensor& t) {
        checks.grid(name, t);
        checks.placed(name, t, q);
        checks.dtype(name, t, q.scalar_type());
        checks.shape(name, t, shape);
    };
    check_like_q("grad", grad);
    check_like_q("out", out);
    checks.placed("lse", lse, q);
    checks.dtype("lse", lse, compute_type(a.storage));
    checks.shape("lse", lse, {q.size(0), 1, 1, q.size(3)});
    Tensor grad_q = tensors::new_empty(q, shape), grad_k = tensors::new_empty(q, shape),
           grad_v = tensors::new_empty(q, shape);
    if (q.numel() == 0) return {grad_q, grad_k, grad_v};
    const Tensor rows = tensors::contiguous(lse);  // outlives the kernel
    a.lse = const_cast<void*>(rows.const_data_ptr());
    a.grad = grid_of(grad);
    a.grad_q = grid_of(grad_q);
    a.grad_k = grid_of(grad_k);
    a.grad_v = grid_of(grad_v);
    Device::differentiate(a, q);
    return {grad_q, grad_k, grad_v};
}

#endif

}  // namespace vitrail
