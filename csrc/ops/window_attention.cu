// vitrail::window_attention and its backward on a GPU.
#include "../cuda/attention_host.h"
#include "window_attention_host.h"

namespace vitrail {
namespace {

struct OnGpu {
    static void attend(const WindowAttention& a, const Tensor& q) {
        cuda::run_forward(cuda::Windows<float>(a), a, q);
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Optional& bias, const Optional& pad_key, const Optional& pad_value,
    const Sizes& window_size, const Sizes& shift, int64_t num_heads, double scale) {
    const Checks checks("window_attention_backward");
    std::vector<Tensor> keep;
    WindowAttention a = window_arguments(checks, q, k, v, bias, pad_key, pad_value, window_size, shift,
                                         num_heads, scale, keep);
    cuda::Backward backward(checks, grad, out, lse, q, v, a);
    Tensor dk = empty_gradient(k, backward.g.k[0]), dv = empty_gradient(v, backward.g.v[0]);
    const auto zeros = [&](const Optional& t) {
        return t ? torch::stable::new_zeros(*t, sizes_of(*t)) : torch::stable::new_empty(q, {0});
    };
    if (out.numel() == 0) return {backward.dq, dk, dv, zeros(bias), zeros(pad_key), zeros(pad_value)};
    const cuda::Windows<float> windows(a);
    // what stands past the grid: rows for all keys of all windows, of which those of tokens stay zero
    const auto rows = [&](const Optional& t, float*& data) {
        if (!t) return Tensor();
        const int64_t keys = q.size(0) * windows.key_blocks() * windows.largest_key_block();
        Tensor sums = torch::stable::new_zeros(*t, {keys, t->size(0)}, ScalarType::Float);
        data = static_cast<float*>(sums.mutable_data_ptr());
        return sums;
    };
    const Tensor pad_keys = rows(pad_key, backward.g.shared_k),
                 pad_values = rows(pad_value, backward.g.shared_v);
    cuda::run_query_gradients(windows, a, backward.g, q);
    cuda::run_key_gradients(windows, a, backward.g, q);
    const auto summed = [&](const Optional& t, const Tensor& sums) {
        return t ? converted(torch::stable::sum(sums, std::vector<int64_t>{0}), t->scalar_type()) : zeros(t);
    };
    return {backward.dq,
            dk,
            dv,
            bias ? converted(cuda::run_bias_gradients(windows, a, backward.g, q), bias->scalar_type())
                 : zeros(bias),
            summed(pad_key, pad_keys),
            summed(pad_value, pad_values)};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, VITRAIL_DEVICE_KEY, m) {
    m.impl("window_attention", TORCH_BOX(&vitrail::window_attention<vitrail::OnGpu>));
    m.impl("window_attention_backward", TORCH_BOX(&vitrail::window_attention_backward));
}
