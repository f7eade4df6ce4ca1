// vitrail::semantic_attention and its backward on the CPU.
#include "semantic_attention_host.h"

namespace vitrail {
namespace {

struct OnCpu {
    static void attend(const SemanticAttention& a, const Tensor& q) {
        run_forward(VITRAIL_KERNELS(kSemanticAttention), a, q.size(0));
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> semantic_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& own_k, const Tensor& own_v, const Sizes& window_size,
    const Sizes& patch_size, int64_t num_heads, double scale) {
    const Checks checks("semantic_attention_backward");
    SemanticAttention a =
        semantic_arguments(checks, q, k, v, own_k, own_v, window_size, patch_size, num_heads, scale);
    BlockGradients g = {};
    set_outputs(checks, grad, out, lse, q, v, a, g);
    const ScalarType type = q.scalar_type(), wide = compute_type(a.storage);
    Tensor dq = empty_gradient(q, g.q);
    Tensor dk = zero_gradient(k, wide, g.k[0]), dv = zero_gradient(v, wide, g.v[0]);
    Tensor d_own_k = zero_gradient(own_k, wide, g.k[1]), d_own_v = zero_gradient(own_v, wide, g.v[1]);
    if (out.numel() > 0) run_gradients(VITRAIL_KERNELS(kSemanticAttention), a, g, q.size(0));
    return {dq, converted(dk, type), converted(dv, type), converted(d_own_k, type), converted(d_own_v, type)};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("semantic_attention", TORCH_BOX(&vitrail::semantic_attention<vitrail::OnCpu>));
    m.impl("semantic_attention_backward", TORCH_BOX(&vitrail::semantic_attention_backward));
}
