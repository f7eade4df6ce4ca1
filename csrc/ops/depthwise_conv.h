// What the operator depthwise_conv (checks, memory, threads) and its kernels (one per instruction set) agree
// on.
#pragma once

#include "../core/tensors.h"
#include "../dispatch/backend.h"

namespace vitrail {

// out = residual + bias + convolution(activation(x * scale + shift)), with zeros past the grid; an odd kernel
// for each channel. Parameters are of the type of sums.
struct DepthwiseConv {
    Storage storage;
    int64_t images, height, width, channels;
    int64_t kernel_height, kernel_width;
    Grid x, out;
    Grid residual;                     // data null: none
    const void* weight;                // (kernel_height, kernel_width, channels), `weight_image` apart
    int64_t weight_image;              // 0: one for all images
    const void *bias, *scale, *shift;  // (channels), or null
    Activation activation;
};

struct DepthwiseConvPlan {
    int64_t tasks, scratch;  // bytes
};

struct DepthwiseConvKernels {
    DepthwiseConvPlan (*plan)(const DepthwiseConv&);
    void (*convolve)(const DepthwiseConv&, void* scratch, int64_t begin, int64_t end);
};

VITRAIL_DECLARE_KERNELS(DepthwiseConvKernels, kDepthwiseConv)

}  // namespace vitrail
