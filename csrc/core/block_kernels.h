// The table of kernels of an attention operator by blocks, made of its addressing policy. Libraries without
// torch have no gradients.
#pragma once

#include "block_attention.h"
#if !defined(VITRAIL_STANDALONE)
#include "block_gradients.h"
#endif

namespace vitrail::VITRAIL_ISA {

template <template <class> class PolicyFor>
constexpr BlockKernels<typename PolicyFor<float>::Arguments> block_kernels() {
    using Attention = BlockAttentionKernels<PolicyFor>;
#if defined(VITRAIL_STANDALONE)
    return {Attention::plan, Attention::pack, Attention::attend, nullptr, nullptr};
#else
    using Gradients = BlockGradientsKernels<PolicyFor>;
    return {Attention::plan, Attention::pack, Attention::attend, Gradients::plan, Gradients::run};
#endif
}

}  // namespace vitrail::VITRAIL_ISA
