// vitrail::sparse_attention and its backward on any device: checks and outputs. A device says how it attends,
// and where gradients come from.
#pragma once

#include "sparse_attention.h"
#include "token_host.h"

namespace vitrail {

inline SparseAttention sparse_arguments(const Checks& checks, const Tensor& q, const Tensor& k,
                                        const Tensor& v, const Tensor& keys, int64_t num_heads,
                                        double scale) {
    SparseAttention a = {};
    set_tokens(checks, q, k, v, num_heads, scale, a);
    checks.placed("keys", keys);
    if (keys.scalar_type() != ScalarType::Int && keys.scalar_type() != ScalarType::Long)
        checks.fail("keys must be int32 or int64, got ", name_of(keys.scalar_type()));
    if (keys.dim() != 4 || keys.size(0) != q.size(0) || keys.size(1) != num_heads ||
        keys.size(2) != q.size(1))
        checks.fail("keys must have shape (B, num_heads, queries, slots) = (", q.size(0), ", ", num_heads,
                    ", ", q.size(1), ", slots), got ", shape_of(keys));
    if (keys.size(3) > kMaxExtent / 2)
        checks.fail("keys must have at most ", kMaxExtent / 2, " slots, got ", keys.size(3));
    a.keys = keys.const_data_ptr();
    a.wide_keys = keys.scalar_type() == ScalarType::Long;
    a.keys_image = keys.stride(0);
    a.keys_head = keys.stride(1);
    a.keys_query = keys.stride(2);
    a.keys_slot = keys.stride(3);
    a.slots = keys.size(3);
    // in floating point because it may overflow: keys, values and their gradients of one image
    const double packed = 16.0 * double(a.tokens) * double(num_heads) * double(a.head_dim + a.value_dim + 32);
    if (packed > 0x1p62) checks.fail("k and v need ", packed, " bytes for one image's keys");
    return a;
}

template <class Device>
std::tuple<Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& keys, int64_t num_heads, double scale) {
    const Checks checks("sparse_attention");
    SparseAttention a = sparse_arguments(checks, q, k, v, keys, num_heads, scale);
    Tensor out = new_result(q, {q.size(0), q.size(1), v.size(2)});
    Tensor lse = tensors::new_empty(q, {q.size(0), q.size(1), num_heads}, compute_type(a.storage));
    a.out = tokens_of(out);
    a.lse = lse.mutable_data_ptr();
    if (out.numel() > 0) Device::attend(checks, a, q, keys);
    return {out, lse};
}

#if !defined(VITRAIL_STANDALONE)

template <class Device>
std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(const Tensor& grad, const Tensor& out,
                                                             const Tensor& lse, const Tensor& q,
                                                             const Tensor& k, const Tensor& v,
                                                             const Tensor& keys, int64_t num_heads,
                                                             double scale) {
    const Checks checks("sparse_attention_backward");
    SparseAttentionBackward b = {};
    b.forward = sparse_arguments(checks, q, k, v, keys, num_heads, scale);
    checks.tokens("grad", grad, q, num_heads);
    checks.shape("grad", grad, {q.size(0), q.size(1), v.size(2)});
    checks.tokens("out", out, q, num_heads);
    checks.shape("out", out, {q.size(0), q.size(1), v.size(2)});
    checks.placed("lse", lse, q);
    checks.dtype("lse", lse, compute_type(b.forward.storage));
    checks.shape("lse", lse, {q.size(0), q.size(1), num_heads});
    Tensor grad_q = tensors::new_empty(q, {q.size(0), q.size(1), q.size(2)});
    Tensor grad_k = tensors::new_empty(k, {k.size(0), k.size(1), k.size(2)});
    Tensor grad_v = tensors::new_empty(v, {v.size(0), v.size(1), v.size(2)});
    const Tensor whole_lse = tensors::contiguous(lse);
    b.grad = tokens_of(grad);
    b.grad_q = tokens_of(grad_q);
    b.grad_k = tokens_of(grad_k);
    b.grad_v = tokens_of(grad_v);
    b.forward.out = tokens_of(out);
    b.forward.lse = const_cast<void*>(whole_lse.const_data_ptr());
    if (q.size(0) > 0) Device::gradients(checks, b, q, keys);
    return {grad_q, grad_k, grad_v};
}

#endif

}  // namespace vitrail
