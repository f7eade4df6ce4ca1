// vitrail::semantic_attention and its backward on the CPU.
#include "../dispatch/registration.h"
#include "semantic_attention_host.h"

namespace vitrail {
namespace {

struct OnCpu {
    static void attend(const SemanticAttention& a, const Tensor& q) {
        run_forward(VITRAIL_KERNELS(kSemanticAttention), a, q.size(0));
    }

#if !defined(VITRAIL_STANDALONE)
    static SemanticGradients gradients(const SemanticAttention& a, BlockGradients& g, const Tensor& q,
                                       const Tensor& k, const Tensor& v, const Tensor& own_k,
                                       const Tensor& own_v) {
        const ScalarType type = q.scalar_type(), wide = compute_type(a.storage);
        Tensor dq = empty_gradient(q, g.q);
        Tensor dk = zero_gradient(k, wide, g.k[0]), dv = zero_gradient(v, wide, g.v[0]);
        Tensor d_own_k = zero_gradient(own_k, wide, g.k[1]), d_own_v = zero_gradient(own_v, wide, g.v[1]);
        if (q.numel() > 0) run_gradients(VITRAIL_KERNELS(kSemanticAttention), a, g, q.size(0));
        return {dq, converted(dk, type), converted(dv, type), converted(d_own_k, type),
                converted(d_own_v, type)};
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(semantic_attention, &vitrail::semantic_attention<vitrail::OnCpu>)
VITRAIL_REGISTER_BACKWARD(semantic_attention_backward, &vitrail::semantic_attention_backward<vitrail::OnCpu>)
