// window_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/windows.h"
#include "../core/block_attention.h"
#include "../core/block_gradients.h"

namespace vitrail::VITRAIL_ISA {

const BlockKernels<WindowAttention> kWindowAttention = {
    BlockAttentionKernels<Windows>::plan, BlockAttentionKernels<Windows>::pack,
    BlockAttentionKernels<Windows>::attend, BlockGradientsKernels<Windows>::plan,
    BlockGradientsKernels<Windows>::run};

}  // namespace vitrail::VITRAIL_ISA
