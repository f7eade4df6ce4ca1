// window_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/windows.h"
#include "../core/block_kernels.h"

namespace vitrail::VITRAIL_ISA {

const BlockKernels<WindowAttention> kWindowAttention = block_kernels<Windows>();

}  // namespace vitrail::VITRAIL_ISA
