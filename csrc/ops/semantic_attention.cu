// vitrail::semantic_attention and its backward on a GPU.
#include "../cuda/attention_host.h"
#include "../dispatch/registration.h"
#include "semantic_attention_host.h"

namespace vitrail {
namespace {

struct OnGpu {
    static void attend(const SemanticAttention& a, const Tensor& q) {
        cuda::run_forward(cuda::Patches<float>(a), a, q);
    }

#if !defined(VITRAIL_STANDALONE)
    static SemanticGradients gradients(const SemanticAttention& a, const BlockGradients& given,
                                       const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& own_k,
                                       const Tensor& own_v) {
        const cuda::Patches<float> patches(a);
        cuda::Backward backward(a, given, q);
        cuda::AttentionGradients& g = backward.g;
        Tensor d_own_k = empty_gradient(own_k, g.k[1]), d_own_v = empty_gradient(own_v, g.v[1]);
        Tensor dk = tensors::new_empty(k, sizes_of(k)), dv = tensors::new_empty(v, sizes_of(v));
        // Of the image, a row for each key of each patch.
        const int64_t keys = q.size(0) * patches.key_blocks() * patches.largest_key_block();
        Tensor of_k = tensors::new_empty(k, {keys, k.size(3)}, ScalarType::Float);
        Tensor of_v = tensors::new_empty(v, {keys, v.size(3)}, ScalarType::Float);
        g.shared_k = static_cast<float*>(of_k.mutable_data_ptr());
        g.shared_v = static_cast<float*>(of_v.mutable_data_ptr());
        if (q.numel() > 0) {
            cuda::run_query_gradients(patches, a, g, q);
            cuda::run_key_gradients(patches, a, g, q);
        }
        cuda::run_sum_shared(patches, a.storage, dk, g.shared_k);
        cuda::run_sum_shared(patches, a.storage, dv, g.shared_v);
        return {backward.dq, dk, dv, d_own_k, d_own_v};
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(semantic_attention, &vitrail::semantic_attention<vitrail::OnGpu>)
VITRAIL_REGISTER_BACKWARD(semantic_attention_backward, &vitrail::semantic_attention_backward<vitrail::OnGpu>)
