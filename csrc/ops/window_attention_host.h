// vitrail::window_attention on any device: checks and outputs. A device says how it attends.
#pragma once

#include "block_host.h"
#include "window_attention.h"

namespace vitrail {

// An optional tensor that all images share, contiguous; null without it.
inline const void* shared(const Checks& checks, const char* name, const Optional& t, const Sizes& shape,
                          ScalarType type, std::vector<Tensor>& keep) {
    if (!t) return nullptr;
    checks.placed(name, *t);
    checks.dtype(name, *t, type);
    checks.shape(name, *t, shape);
    keep.push_back(torch::stable::contiguous(*t));
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
    a.bias = shared(checks, "bias", bias, {num_heads, tokens, tokens}, compute_type(a.storage), keep);
    a.k[1].data = const_cast<void*>(shared(checks, "pad_key", pad_key, {k.size(3)}, q.scalar_type(), keep));
    a.v[1].data =
        const_cast<void*>(shared(checks, "pad_value", pad_value, {v.size(3)}, q.scalar_type(), keep));
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

}  // namespace vitrail
