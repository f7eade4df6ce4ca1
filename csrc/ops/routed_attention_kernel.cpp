// routed_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/routed_regions.h"

namespace vitrail::VITRAIL_ISA {

const BlockKernels<RoutedAttention> kRoutedAttention = BlockAttentionKernels<RoutedRegions>::kTable;

}  // namespace vitrail::VITRAIL_ISA
