// vitrail::semantic_attention and its backward on a GPU.
#include "../cuda/attention_host.h"
#include "semantic_attention_host.h"

namespace vitrail {
namespace {

struct OnGpu {
    static void attend(const SemanticAttention& a, const Tensor& q) {
        cuda::run_forward(cuda::Patches<float>(a), a, q);
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> semantic_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& own_k, const Tensor& own_v, const Sizes& window_size,
    const Sizes& patch_size, int64_t num_heads, double scale) {
    const Checks checks("semantic_attention_backward");
    SemanticAttention a =
        semantic_arguments(checks, q, k, v, own_k, own_v, window_size, patch_size, num_heads, scale);
    cuda::Backward backward(checks, grad, out, lse, q, v, a);
    Tensor d_own_k = empty_gradient(own_k, backward.g.k[1]), d_own_v = empty_gradient(own_v, backward.g.v[1]);
    Tensor dk = torch::stable::new_empty(k, sizes_of(k)), dv = torch::stable::new_empty(v, sizes_of(v));
    if (out.numel() == 0) {
        for (Tensor* t : {&dk, &dv}) torch::stable::zero_(*t);
        return {backward.dq, dk, dv, d_own_k, d_own_v};
    }
    const cuda::Patches<float> policy(a);
    const int64_t keys = q.size(0) * policy.key_blocks() * policy.largest_key_block();
    Tensor shared_k = torch::stable::new_empty(k, {keys, k.size(3)}, ScalarType::Float);
    Tensor shared_v = torch::stable::new_empty(v, {keys, v.size(3)}, ScalarType::Float);
    backward.g.shared_k = static_cast<float*>(shared_k.mutable_data_ptr());
    backward.g.shared_v = static_cast<float*>(shared_v.mutable_data_ptr());
    cuda::run_query_gradients(policy, a, backward.g, q);
    cuda::run_key_gradients(policy, a, backward.g, q);
    cuda::run_sum_shared(policy, a.storage, dk, backward.g.shared_k);
    cuda::run_sum_shared(policy, a.storage, dv, backward.g.shared_v);
    return {backward.dq, dk, dv, d_own_k, d_own_v};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, VITRAIL_DEVICE_KEY, m) {
    m.impl("semantic_attention", TORCH_BOX(&vitrail::semantic_attention<vitrail::OnGpu>));
    m.impl("semantic_attention_backward", TORCH_BOX(&vitrail::semantic_attention_backward));
}
