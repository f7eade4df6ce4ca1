// Inputs in float32.
#pragma once

#include "tensor.h"

namespace vitrail::standalone {

// A copy in float32, in the memory of the call; the tensor itself if it is float32.
Tensor widened(const Tensor& t);

}  // namespace vitrail::standalone
