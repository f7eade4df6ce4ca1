// The attention core for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "attention.h"

namespace vitrail::VITRAIL_ISA {

VITRAIL_ALL_GROUPINGS(VITRAIL_STORAGE_PARTS)
VITRAIL_ALL_BLOCKS(VITRAIL_BLOCK_PARTS)

}  // namespace vitrail::VITRAIL_ISA
