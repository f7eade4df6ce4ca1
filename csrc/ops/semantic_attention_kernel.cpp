// semantic_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/patches.h"
#include "../core/block_kernels.h"

namespace vitrail::VITRAIL_ISA {

const BlockKernels<SemanticAttention> kSemanticAttention = block_kernels<Patches>();

}  // namespace vitrail::VITRAIL_ISA
