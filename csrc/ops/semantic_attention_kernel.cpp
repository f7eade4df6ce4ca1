// semantic_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/patches.h"
#include "../core/block_attention.h"
#include "../core/block_gradients.h"

namespace vitrail::VITRAIL_ISA {

const BlockKernels<SemanticAttention> kSemanticAttention = {
    BlockAttentionKernels<Patches>::plan, BlockAttentionKernels<Patches>::pack,
    BlockAttentionKernels<Patches>::attend, BlockGradientsKernels<Patches>::plan,
    BlockGradientsKernels<Patches>::run};

}  // namespace vitrail::VITRAIL_ISA
