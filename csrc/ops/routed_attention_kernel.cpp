// routed_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/routed_regions.h"
#include "../core/block_kernels.h"

namespace vitrail::VITRAIL_ISA {

const BlockKernels<RoutedAttention> kRoutedAttention = block_kernels<RoutedRegions>();

}  // namespace vitrail::VITRAIL_ISA
