// vitrail::depthwise_conv on any device: checks and the output. A device says how it convolves.
#pragma once

#include "activation_host.h"
#include "depthwise_conv.h"

namespace vitrail {

constexpr int64_t kMaxKernel = 1023;

// A parameter of the channels; null where there is none.
inline const void* of_channels(const Checks& checks, const char* name, const Optional& values,
                               const Tensor& x, ScalarType type) {
    if (!values) return nullptr;
    checks.placed(name, *values, x, "x");
    checks.dtype(name, *values, type);
    checks.shape(name, *values, {x.size(3)});
    checks.contiguous_channels(name, *values);
    return values->const_data_ptr();
}

template <class Device>
Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& residual,
                      const Optional& scale, const Optional& shift, const std::string& activation) {
    const Checks checks("depthwise_conv");
    checks.grid("x", x);
    DepthwiseConv a = {};
    a.storage = checks.computed("x", x);
    const ScalarType wide = compute_type(a.storage);
    a.images = x.size(0);
    a.height = x.size(1);
    a.width = x.size(2);
    a.channels = x.size(3);
    if (a.channels < 1 || a.channels > kMaxExtent)
        checks.fail("x must have from 1 to ", kMaxExtent, " channels, got shape ", shape_of(x));
    checks.placed("weight", weight, x, "x");
    checks.dtype("weight", weight, wide);
    const int64_t dims = weight.dim();
    if (dims != 3 && dims != 4)
        checks.fail("weight must have shape (height, width, C), or (B, height, width, C), got ",
                    shape_of(weight));
    a.kernel_height = weight.size(dims - 3);
    a.kernel_width = weight.size(dims - 2);
    for (int64_t size : {a.kernel_height, a.kernel_width})
        if (size < 1 || size > kMaxKernel || size % 2 == 0)
            checks.fail("the kernel must be odd, up to ", kMaxKernel, " high and wide, got ", a.kernel_height,
                        " x ", a.kernel_width);
    if (dims == 4)
        checks.shape("weight", weight, {a.images, a.kernel_height, a.kernel_width, a.channels});
    else
        checks.shape("weight", weight, {a.kernel_height, a.kernel_width, a.channels});
    if (!weight.is_contiguous()) checks.fail("weight must be contiguous");
    a.weight = weight.const_data_ptr();
    a.weight_image = dims == 4 ? weight.stride(0) : 0;
    a.bias = of_channels(checks, "bias", bias, x, wide);
    a.scale = of_channels(checks, "scale", scale, x, wide);
    a.shift = of_channels(checks, "shift", shift, x, wide);
    a.activation = activation_of(checks, activation);
    if (residual) {
        checks.grid("residual", *residual);
        checks.placed("residual", *residual, x, "x");
        checks.dtype("residual", *residual, x.scalar_type());
        checks.shape("residual", *residual, {a.images, a.height, a.width, a.channels});
        a.residual = grid_of(*residual);
    }
    Tensor out = tensors::new_empty(x, {a.images, a.height, a.width, a.channels});
    if (out.numel() == 0) return out;
    a.x = grid_of(x);
    a.out = grid_of(out);
    Device::convolve(a, out);
    return out;
}

}  // namespace vitrail
