// vitrail::window_attention and its backward on the CPU: checks; the rest is in block_host.h and the kernels.
#include "window_attention.h"

#include "block_host.h"

namespace vitrail {
namespace {

using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// An optional tensor that all images share, contiguous; null without it.
const void* shared(const Checks& checks, const char* name, const Optional& t, const Sizes& shape,
                   ScalarType type, std::vector<Tensor>& keep) {
    if (!t) return nullptr;
    checks.on_cpu(name, *t);
    checks.dtype(name, *t, type);
    checks.shape(name, *t, shape);
    keep.push_back(torch::stable::contiguous(*t));
    return keep.back().const_data_ptr();
}

void set_windows(const Checks& checks, const Tensor& q, const Sizes& window_size, const Sizes& shift,
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

WindowAttention arguments(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Optional& bias, const Optional& pad_key, const Optional& pad_value,
                          const Sizes& window_size, const Sizes& shift, int64_t num_heads, double scale,
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

std::tuple<Tensor, Tensor> window_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Optional& bias, const Optional& pad_key,
                                            const Optional& pad_value, const Sizes& window_size,
                                            const Sizes& shift, int64_t num_heads, double scale) {
    std::vector<Tensor> keep;
    WindowAttention a = arguments(Checks("window_attention"), q, k, v, bias, pad_key, pad_value, window_size,
                                  shift, num_heads, scale, keep);
    auto [out, lse] = new_outputs(q, v, a);
    if (out.numel() > 0) run_forward(VITRAIL_KERNELS(kWindowAttention), a, q.size(0));
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Optional& bias, const Optional& pad_key, const Optional& pad_value,
    const Sizes& window_size, const Sizes& shift, int64_t num_heads, double scale) {
    const Checks checks("window_attention_backward");
    std::vector<Tensor> keep;
    WindowAttention a =
        arguments(checks, q, k, v, bias, pad_key, pad_value, window_size, shift, num_heads, scale, keep);
    BlockGradients g = {};
    set_outputs(checks, grad, out, lse, q, v, a, g);
    const ScalarType type = q.scalar_type(), wide = compute_type(a.storage);
    const int64_t images = q.size(0), tokens = a.height * a.width;
    Tensor dq = empty_gradient(q, g.q), dk = zero_gradient(k, wide, g.k[0]),
           dv = zero_gradient(v, wide, g.v[0]);
    // a sum of its own for each image
    const auto partial = [&](const Optional& t, int64_t size) {
        return torch::stable::new_zeros(q, {1, t ? images : 0, size}, wide);
    };
    Tensor dbias = partial(bias, num_heads * tokens * tokens);
    Tensor dpad_key = partial(pad_key, k.size(3)), dpad_value = partial(pad_value, v.size(3));
    if (bias) g.bias = dbias.mutable_data_ptr();
    g.bias_table = tokens * tokens;
    if (pad_key) g.k[1] = {dpad_key.mutable_data_ptr(), k.size(3), 0, 0};
    if (pad_value) g.v[1] = {dpad_value.mutable_data_ptr(), v.size(3), 0, 0};
    if (out.numel() > 0) run_gradients(VITRAIL_KERNELS(kWindowAttention), a, g, images);
    const auto total = [&](const Optional& t, const Tensor& sums) {
        return t ? converted(summed(sums, sizes_of(*t)), t->scalar_type()) : torch::stable::new_empty(q, {0});
    };
    return {dq,
            converted(dk, type),
            converted(dv, type),
            total(bias, dbias),
            total(pad_key, dpad_key),
            total(pad_value, dpad_value)};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("window_attention", TORCH_BOX(&vitrail::window_attention));
    m.impl("window_attention_backward", TORCH_BOX(&vitrail::window_attention_backward));
}
