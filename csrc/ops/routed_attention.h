// What the operator (checks, memory, threads) and its compiled backends (one per instruction set) agree on.
// Plain data only: a function here would be compiled with several instruction sets under one name.
#pragma once

#include "../core/tensors.h"
#include "../dispatch/backend.h"

namespace vitrail {

// A grid of tokens cut into regions, row by row; the last ones may reach past the grid.
struct Regions {
    int64_t grid_height, grid_width;
    int64_t height, width, size;  // of a region, in tokens
    int64_t down, across, count;  // of the grid, in regions
};

struct RoutedAttention {
    Storage storage;
    Grid q, k, v, out;
    void* lse;  // float, or double for Storage::kFloat64; contiguous
    int64_t heads, head_dim, value_dim;
    Regions q_regions, k_regions;
    const int32_t* routes;  // contiguous (image, region, topk), checked
    const void* weights;    // as routes, in the type of lse; null without soft routing
    int64_t topk;
    double scale;
};

// Sizes in bytes, and how many tasks one image gives. Nothing is packed ahead where pack_tasks is 0.
struct Plan {
    int64_t packed_image, scratch;
    int64_t pack_tasks, attend_tasks;
};

struct Backend {
    const char* name;
    Plan (*plan)(const RoutedAttention&);
    // Packs keys and values of the images from `image` on: tasks [begin, end) of them all.
    void (*pack)(const RoutedAttention&, int64_t image, void* packed, int64_t begin, int64_t end);
    // Computes outputs from what was packed (null: packs what it needs); `scratch` belongs to the caller's
    // thread.
    void (*attend)(const RoutedAttention&, int64_t image, const void* packed, void* scratch, int64_t begin,
                   int64_t end);
};

VITRAIL_DECLARE_KERNELS(Backend, kRoutedAttention)

}  // namespace vitrail
