// What window_attention and its kernels (one table per instruction set) agree on.
#pragma once

#include "../core/block_arguments.h"
#include "../dispatch/backend.h"

namespace vitrail {

// k[1], v[1]: the key and the value that stand past the grid. A table of biases is (tokens of a window, the
// same).
struct WindowAttention : BlockAttention {
    int64_t grid_height, grid_width;
    int64_t height, width;  // of a window
    int64_t down, right;    // the shift
};

VITRAIL_DECLARE_KERNELS(BlockKernels<WindowAttention>, kWindowAttention)

}  // namespace vitrail
