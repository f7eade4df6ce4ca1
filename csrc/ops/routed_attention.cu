// vitrail::routed_attention and its backward on a GPU.
#include "../cuda/attention_host.h"
#include "../cuda/routes.h"
#include "../dispatch/registration.h"
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
            keep.push_back(tensors::contiguous(*weights));
            a.weights = keep.back().const_data_ptr();
        }
    };

    static void attend(const RoutedAttention& a, const Tensor& q) {
        cuda::run_forward(cuda::RoutedRegions<float>(a), a, q);
    }

#if !defined(VITRAIL_STANDALONE)
    static RoutedGradients gradients(const RoutedAttention& a, const BlockGradients& given, const Tensor& q,
                                     const Tensor& k, const Tensor& v, const Optional& weights) {
        const cuda::RoutedRegions<float> regions(a);
        cuda::Backward backward(a, given, q);
        cuda::AttentionGradients& g = backward.g;
        Tensor dk = empty_gradient(k, g.k[0]), dv = empty_gradient(v, g.v[0]);
        Tensor dweights = tensors::new_empty(q, {0}, ScalarType::Float);
        if (weights) {
            const cuda::KeyGrid grid = cuda::key_grid(regions);
            const Sizes shape = {q.size(0), a.heads * grid.parts * grid.warps, a.q_regions.count, a.topk,
                                 a.q_regions.size};
            dweights = tensors::new_empty(q, shape, ScalarType::Float);
            g.weights = static_cast<float*>(dweights.mutable_data_ptr());
        }
        if (q.numel() > 0 && a.topk > 0) {
            const cuda::Visitors visitors = cuda::list_visitors(a.routes, regions, q);
            g.begins = static_cast<const int32_t*>(visitors.begins.const_data_ptr());
            g.visitors = static_cast<const int32_t*>(visitors.slots.const_data_ptr());
            cuda::run_query_gradients(regions, a, g, q);
            cuda::run_key_gradients(regions, a, g, q);
        } else {  // queries that look at nothing
            for (Tensor* t : {&backward.dq, &dk, &dv, &dweights}) tensors::zero_(*t);
        }
        if (weights) dweights = tensors::sum(dweights, Sizes{1, 4});
        return {backward.dq, dk, dv, dweights};
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(routed_attention, &vitrail::routed_attention<vitrail::OnGpu>)
VITRAIL_REGISTER_BACKWARD(routed_attention_backward, &vitrail::routed_attention_backward<vitrail::OnGpu>)
