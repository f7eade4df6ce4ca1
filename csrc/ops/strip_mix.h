// What the operator strip_mix (checks, memory, threads) and its kernels (one per instruction set) agree on.
// Plain data only: a function here would be compiled with several instruction sets under one name.
#pragma once

#include "../core/tensors.h"
#include "../dispatch/backend.h"

namespace vitrail {

// Grids are seen as strips: Grid::row leads from strip to strip, Grid::column from place to place.
struct StripMix {
    Storage storage;
    int64_t images, strips, length;  // length: places of a strip
    int64_t groups, patches;         // channels are `patches` times `groups`
    Grid x, out;
    // weight[tap, to, from, group]: strides in elements, groups contiguous
    const void* weight;
    int64_t tap, to, from;
    const void* bias;  // contiguous [to, group]; null for none
};

// Sizes in bytes, and numbers of tasks.
struct StripMixPlan {
    int64_t packed, scratch;
    int64_t pack_tasks, mix_tasks;
};

struct StripMixKernels {
    StripMixPlan (*plan)(const StripMix&);
    // Packs weight and bias: tasks [begin, end) of them all.
    void (*pack)(const StripMix&, void* packed, int64_t begin, int64_t end);
    // Computes outputs; `scratch` belongs to the caller's thread.
    void (*mix)(const StripMix&, const void* packed, void* scratch, int64_t begin, int64_t end);
};

// The gradients of weight and bias; that of x is a mixing with the transposed weight.
struct StripMixGradients {
    Storage storage;
    int64_t images, strips, length;
    int64_t groups, patches;
    Grid grad, x;
    void* weight;  // contiguous (3, length, length, groups)
    void* bias;    // contiguous (length, groups); null for none
};

struct StripMixGradientsPlan {
    int64_t scratch, tasks;
};

struct StripMixGradientsKernels {
    StripMixGradientsPlan (*plan)(const StripMixGradients&);
    void (*sum)(const StripMixGradients&, void* scratch, int64_t begin, int64_t end);
};

VITRAIL_DECLARE_KERNELS(StripMixKernels, kStripMix)
VITRAIL_DECLARE_KERNELS(StripMixGradientsKernels, kStripMixGradients)

}  // namespace vitrail
