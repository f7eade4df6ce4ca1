// What semantic_attention and its kernels (one table per instruction set) agree on.
#pragma once

#include "../core/block_arguments.h"
#include "../dispatch/backend.h"

namespace vitrail {

// k[1], v[1]: keys and values of the semantic tokens, on the grid of the queries.
struct SemanticAttention : BlockAttention {
    int64_t grid_height, grid_width;      // of the semantic tokens
    int64_t window_height, window_width;  // divide it
    int64_t image_height, image_width;
    int64_t patch_height, patch_width;  // at most the image
};

VITRAIL_DECLARE_KERNELS(BlockKernels<SemanticAttention>, kSemanticAttention)

}  // namespace vitrail
