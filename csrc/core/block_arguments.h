// What the host side of a block attention operator (checks, memory, threads) and its kernels agree on.
// Plain data only: a function here would be compiled with several instruction sets under one name.
#pragma once

#include "tensors.h"

namespace vitrail {

// Each operator adds what its addressing needs.
struct BlockAttention {
    Storage storage;
    Grid q, out, lse;  // lse: heads side by side, float, or double for Storage::kFloat64
    Grid k[2], v[2];   // where a key may lie: on the grid of keys, or where the addressing says; null: zeros
    const void* bias;  // tables of what is added to scores, one for each head, in the type of lse; or null
    int64_t heads, head_dim, value_dim;
    double scale;
};

// Sizes in bytes, and how many tasks one image gives. Nothing is packed ahead where pack_tasks is 0.
struct BlockPlan {
    int64_t packed_image, scratch;
    int64_t pack_tasks, attend_tasks;
    double work;  // multiplications of one attend task, about
};

// Gradients, and the gradient of the result. Those of keys and values are in the type of lse, added to what
// is there, and null where they are not wanted.
struct BlockGradients {
    Grid out, q, k[2], v[2];
    void* bias;     // of scores: a table for each image and head, `bias_table` numbers apart; or null
    void* weights;  // of visits: (image, head, slot); or null
    int64_t bias_table;
};

struct GradientPlan {
    int64_t scratch, tasks;
    double work;  // multiplications of one task, about
};

template <class Arguments>
struct BlockKernels {
    BlockPlan (*plan)(const Arguments&);
    // Packs keys and values of the images from `image` on: tasks [begin, end) of them all.
    void (*pack)(const Arguments&, int64_t image, void* packed, int64_t begin, int64_t end);
    // Computes outputs from what was packed (null: packs what it needs); `scratch` belongs to the caller's
    // thread.
    void (*attend)(const Arguments&, int64_t image, const void* packed, void* scratch, int64_t begin,
                   int64_t end);
    GradientPlan (*gradient_plan)(const Arguments&);
    // Tasks [begin, end) of all images.
    void (*gradients)(const Arguments&, const BlockGradients&, void* scratch, int64_t begin, int64_t end);
};

}  // namespace vitrail
