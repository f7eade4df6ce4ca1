// vitrail::window_attention and its backward on a GPU.
#include "../cuda/attention_host.h"
#include "../dispatch/registration.h"
#include "window_attention_host.h"

namespace vitrail {
namespace {

struct OnGpu {
    static void attend(const WindowAttention& a, const Tensor& q) {
        cuda::run_forward(cuda::Windows<float>(a), a, q);
    }

#if !defined(VITRAIL_STANDALONE)
    static WindowGradients gradients(const WindowAttention& a, const BlockGradients& given, const Tensor& q,
                                     const Tensor& k, const Tensor& v, const Optional& bias,
                                     const Optional& pad_key, const Optional& pad_value) {
        const cuda::Windows<float> windows(a);
        cuda::Backward backward(a, given, q);
        cuda::AttentionGradients& g = backward.g;
        Tensor dk = empty_gradient(k, g.k[0]), dv = empty_gradient(v, g.v[0]);
        // What stands past the grid is a row for each key of each window, of which those of tokens stay zero.
        const int64_t keys = q.size(0) * windows.key_blocks() * windows.largest_key_block();
        const auto rows = [&](const Optional& t, float*& data) {
            Tensor sums = tensors::new_zeros(q, {t ? keys : 0, t ? t->size(0) : 0}, ScalarType::Float);
            if (t) data = static_cast<float*>(sums.mutable_data_ptr());
            return sums;
        };
        const Tensor pad_keys = rows(pad_key, g.shared_k), pad_values = rows(pad_value, g.shared_v);
        Tensor dbias = tensors::new_empty(q, {0});
        if (q.numel() > 0) {
            cuda::run_query_gradients(windows, a, g, q);
            cuda::run_key_gradients(windows, a, g, q);
        }
        if (bias) dbias = converted(cuda::run_bias_gradients(windows, a, g, q), bias->scalar_type());
        const auto total = [&](const Tensor& sums) {
            return converted(tensors::sum(sums, Sizes{0}), q.scalar_type());
        };
        return {backward.dq, dk, dv, dbias, total(pad_keys), total(pad_values)};
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(window_attention, &vitrail::window_attention<vitrail::OnGpu>)
VITRAIL_REGISTER_BACKWARD(window_attention_backward, &vitrail::window_attention_backward<vitrail::OnGpu>)
