// vitrail::window_attention and its backward on any device: checks and outputs. A device says how it attends,
// and where gradients come from.
#pragma once

#include "block_host.h"
#include "window_attention.h"

namespace vitrail {

// An optional tensor that all images share, contiguous; null without it.
inline const void* shared(const Checks& checks, const char* name, const Optional& t, const Tensor& q,
                          const Sizes& shape, ScalarType type, std::vector<Tensor>& keep) {
    if (!t) return nullptr;
    checks.placed(name, *t, q);
    checks.dtype(name, *t, type);
    checks.shape(name, *t, shape);
    keep.push_back(tensors::contiguous(*t));
    return keep.back().const_data_ptr();
}

inline void set_windows(const Checks& checks, const Tensor& q, const Sizes& window_size, const Sizes& shift,
                        WindowAttention& a) {
    checks.extent("window_size", window_size);
    bool within = shift.size() == 2;
    for (size_t i = 0; within && i < 2; ++i) within = 0 <= shift[i] && shift[i] < window_size[i];
    if (!within) {
        std::ostringstream text;
        for (size_t i = 0; i < shift.size(); ++i) text << (i ? ", " : "") << shift[i];
        checks.fail("shift must be two numbers from 0 to below window_size (", window_size[0], ", ",
                    window_size[1], "), got (", text.str(), ")");
    }
    a.grid_height = q.size(1);
    a.grid_width = q.size(2);
    a.height = window_size[0];
    a.width = window_size[1];
    a.down = shift[0];
    a.right = shift[1];
}

inline WindowAttention window_arguments(const Checks& checks, const Tensor& q, const Tensor& k,
                                        const Tensor& v, const Optional& bias, const Optional& pad_key,
                                        const Optional& pad_value, const Sizes& window_size,
                                        const Sizes& shift, int64_t num_heads, double scale,
                                        std::vector<Tensor>& keep) {
    WindowAttention a = {};
    set_inputs(checks, q, k, v, num_heads, scale, a);
    checks.same_grid("k", k, "q", q);
    set_windows(checks, q, window_size, shift, a);
    const int64_t tokens = a.height * a.width;
    a.bias = shared(checks, "bias", bias, q, {num_heads, tokens, tokens}, compute_type(a.storage), keep);
    a.k[1].data =
        const_cast<void*>(shared(checks, "pad_key", pad_key, q, {k.size(3)}, q.scalar_type(), keep));
    a.v[1].data =
        const_cast<void*>(shared(checks, "pad_value", pad_value, q, {v.size(3)}, q.scalar_type(), keep));
    const int64_t windows = (a.grid_height / a.height + 2) * (a.grid_width / a.width + 2);
    check_packed(checks, "window_size", a, windows, tokens);
    return a;
}

template <class Device>
std::tuple<Tensor, Tensor> window_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Optional& bias, const Optional& pad_key,
                                            const Optional& pad_value, const Sizes& window_size,
                                            const Sizes& shift, int64_t num_heads, double scale) {
    std::vector<Tensor> keep;
    WindowAttention a = window_arguments(Checks("window_attention"), q, k, v, bias, pad_key, pad_value,
                                         window_size, shift, num_heads, scale, keep);
    auto [out, lse] = new_outputs(q, v, a);
    if (out.numel() > 0) Device::attend(a, q);
    return {out, lse};
}

#if !defined(VITRAIL_STANDALONE)

// Gradients of q, k, v, bias, pad_key, pad_value; empty for what is not there.
using WindowGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
WindowGradients window_attention_backward(const Tensor& grad, const Tensor& out, const Tensor& lse,
                                          const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Optional& bias, const Optional& pad_key,
                                          const Optional& pad_value, const Sizes& window_size,
                                          const Sizes& shift, int64_t num_heads, double scale) {
    const Checks checks("window_attention_backward");
    std::vector<Tensor> keep;
    WindowAttention a = window_arguments(checks, q, k, v, bias, pad_key, pad_value, window_size, shift,
                                         num_heads, scale, keep);
    BlockGradients g = set_outputs(checks, grad, out, lse, q, v, a);
    return Device::gradients(a, g, q, k, v, bias, pad_key, pad_value);
}

#endif

}  // namespace vitrail
