// vitrail::routed_attention and its backward on a GPU.
#include "../cuda/attention_host.h"
#include "../cuda/indices.h"
#include "routed_attention_host.h"

namespace vitrail {
namespace {

struct OnGpu {
    // Routes are copied by a kernel that checks them: one that names no region stops the program, as an index
    // out of range does in PyTorch's own kernels.
    struct Routing {
        std::vector<Tensor> keep;

        void copy(const Checks&, const Tensor& routes, const Optional& weights, RoutedAttention& a) {
            keep.push_back(cuda::checked_indices(routes, a.k_regions.count));
            a.routes = static_cast<const int32_t*>(keep.back().const_data_ptr());
            if (!weights) return;
            keep.push_back(torch::stable::contiguous(*weights));
            a.weights = keep.back().const_data_ptr();
        }
    };

    static void attend(const RoutedAttention& a, const Tensor& q) {
        cuda::run_forward(cuda::RoutedRegions<float>(a), a, q);
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> routed_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& routes, const Optional& weights, const Sizes& region_size,
    const Sizes& kv_region_size, int64_t num_heads, double scale) {
    const Checks checks("routed_attention_backward");
    OnGpu::Routing routing;
    RoutedAttention a = routed_arguments(checks, q, k, v, routes, weights, region_size, kv_region_size,
                                         num_heads, scale, routing);
    cuda::Backward backward(checks, grad, out, lse, q, v, a);
    Tensor dk = empty_gradient(k, backward.g.k[0]), dv = empty_gradient(v, backward.g.v[0]);
    Tensor dweights = torch::stable::new_empty(q, {0}, ScalarType::Float);
    if (out.numel() == 0 || a.topk == 0) {
        for (Tensor* t : {&backward.dq, &dk, &dv}) torch::stable::zero_(*t);
        if (weights) dweights = torch::stable::new_zeros(*weights, sizes_of(*weights));
        return {backward.dq, dk, dv, dweights};
    }
    const cuda::RoutedRegions<float> policy(a);
    const int64_t images = q.size(0);
    Tensor begins = torch::stable::new_empty(q, {images, policy.key_blocks() + 1}, ScalarType::Int);
    Tensor visitors = torch::stable::new_empty(q, {images, policy.slots()}, ScalarType::Int);
    backward.g.begins = static_cast<const int32_t*>(begins.const_data_ptr());
    backward.g.visitors = static_cast<const int32_t*>(visitors.const_data_ptr());
    cuda::Launcher{q}(cuda::list_visitors, images, 1024, 0, a.routes, policy.slots(), policy.key_blocks(),
                      static_cast<int32_t*>(begins.mutable_data_ptr()),
                      static_cast<int32_t*>(visitors.mutable_data_ptr()));
    if (weights) {
        const cuda::KeyGrid grid = cuda::key_grid(policy);
        const Sizes shape = {images, num_heads * grid.parts * grid.warps, a.q_regions.count, a.topk,
                             a.q_regions.size};
        dweights = torch::stable::new_empty(q, shape, ScalarType::Float);
        backward.g.weights = static_cast<float*>(dweights.mutable_data_ptr());
    }
    cuda::run_query_gradients(policy, a, backward.g, q);
    cuda::run_key_gradients(policy, a, backward.g, q);
    if (weights) dweights = torch::stable::sum(dweights, std::vector<int64_t>{1, 4});
    return {backward.dq, dk, dv, dweights};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, VITRAIL_DEVICE_KEY, m) {
    m.impl("routed_attention", TORCH_BOX(&vitrail::routed_attention<vitrail::OnGpu>));
    m.impl("routed_attention_backward", TORCH_BOX(&vitrail::routed_attention_backward));
}
