// window_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/windows.h"

namespace vitrail::VITRAIL_ISA {

const BlockKernels<WindowAttention> kWindowAttention = BlockAttentionKernels<Windows>::kTable;

}  // namespace vitrail::VITRAIL_ISA
