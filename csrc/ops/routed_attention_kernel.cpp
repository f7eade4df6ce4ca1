// routed_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/routed_regions.h"
#include "../core/block_attention.h"
#include "../core/block_gradients.h"

namespace vitrail::VITRAIL_ISA {

const BlockKernels<RoutedAttention> kRoutedAttention = {
    BlockAttentionKernels<RoutedRegions>::plan, BlockAttentionKernels<RoutedRegions>::pack,
    BlockAttentionKernels<RoutedRegions>::attend, BlockGradientsKernels<RoutedRegions>::plan,
    BlockGradientsKernels<RoutedRegions>::run};

}  // namespace vitrail::VITRAIL_ISA
