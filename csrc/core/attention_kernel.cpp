// The attention core for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "attention_parts.h"

namespace vitrail::VITRAIL_ISA {

VITRAIL_ATTENTION_PARTS()

}  // namespace vitrail::VITRAIL_ISA
