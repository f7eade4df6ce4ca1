// vitrail::window_attention and its backward on the CPU.
#include "../dispatch/registration.h"
#include "window_attention_host.h"

namespace vitrail {
namespace {

struct OnCpu {
    static void attend(const WindowAttention& a, const Tensor& q) {
        run_forward(VITRAIL_KERNELS(kWindowAttention), a, q.size(0));
    }

#if !defined(VITRAIL_STANDALONE)
    static WindowGradients gradients(const WindowAttention& a, BlockGradients& g, const Tensor& q,
                                     const Tensor& k, const Tensor& v, const Optional& bias,
                                     const Optional& pad_key, const Optional& pad_value) {
        const ScalarType type = q.scalar_type(), wide = compute_type(a.storage);
        const int64_t images = q.size(0), tokens = a.height * a.width;
        Tensor dq = empty_gradient(q, g.q), dk = zero_gradient(k, wide, g.k[0]),
               dv = zero_gradient(v, wide, g.v[0]);
        // a sum of its own for each image
        const auto partial = [&](const Optional& t, int64_t size) {
            return tensors::new_zeros(q, {1, t ? images : 0, size}, wide);
        };
        Tensor dbias = partial(bias, a.heads * tokens * tokens);
        Tensor dpad_key = partial(pad_key, k.size(3)), dpad_value = partial(pad_value, v.size(3));
        if (bias) g.bias = dbias.mutable_data_ptr();
        g.bias_table = tokens * tokens;
        if (pad_key) g.k[1] = {dpad_key.mutable_data_ptr(), k.size(3), 0, 0};
        if (pad_value) g.v[1] = {dpad_value.mutable_data_ptr(), v.size(3), 0, 0};
        if (q.numel() > 0) run_gradients(VITRAIL_KERNELS(kWindowAttention), a, g, images);
        const auto total = [&](const Optional& t, const Tensor& sums) {
            return t ? converted(summed(sums, sizes_of(*t)), t->scalar_type()) : tensors::new_empty(q, {0});
        };
        return {dq,
                converted(dk, type),
                converted(dv, type),
                total(bias, dbias),
                total(pad_key, dpad_key),
                total(pad_value, dpad_value)};
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(window_attention, &vitrail::window_attention<vitrail::OnCpu>)
VITRAIL_REGISTER_BACKWARD(window_attention_backward, &vitrail::window_attention_backward<vitrail::OnCpu>)
