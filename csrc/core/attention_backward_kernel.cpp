// Gradients of attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
#include "attention_backward.h"

namespace vitrail::VITRAIL_ISA {

VITRAIL_GRADIENTS()

}  // namespace vitrail::VITRAIL_ISA
