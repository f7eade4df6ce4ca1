// What routed_attention and its kernels (one table per instruction set) agree on.
#pragma once

#include "../core/block_arguments.h"
#include "../dispatch/backend.h"

namespace vitrail {

// A grid of tokens cut into regions, row by row; the last ones may reach past the grid.
struct Regions {
    int64_t grid_height, grid_width;
    int64_t height, width, size;  // of a region, in tokens
    int64_t down, across, count;  // of the grid, in regions
};

struct RoutedAttention : BlockAttention {
    Regions q_regions, k_regions;
    const int32_t* routes;  // contiguous (image, region, topk), checked
    const void* weights;    // as routes, in the type of lse; null without soft routing
    int64_t topk;
};

VITRAIL_DECLARE_KERNELS(BlockKernels<RoutedAttention>, kRoutedAttention)

}  // namespace vitrail
