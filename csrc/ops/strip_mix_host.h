// vitrail::strip_mix and its backward on any device: checks and outputs. A device says how it mixes, and how
// it sums the gradients of weight and bias.
#pragma once

#include "host.h"
#include "strip_mix.h"

namespace vitrail {

// The grid as strips: rows of it, or columns.
inline Grid strips_of(const Tensor& t, int64_t axis) {
    Grid grid = grid_of(t);
    if (axis == 1) std::swap(grid.row, grid.column);
    return grid;
}

inline Storage check(const Checks& checks, const Tensor& x, const Tensor& weight, const Optional& bias,
                     int64_t axis) {
    if (axis != 1 && axis != 2) checks.fail("axis must be 1 or 2, got ", axis);
    checks.grid("x", x);
    const Storage storage = checks.computed("x", x);
    checks.placed("weight", weight, x, "x");
    checks.dtype("weight", weight, x.scalar_type());
    const int64_t length = x.size(axis), channels = x.size(3);
    const int64_t groups = weight.dim() == 4 ? weight.size(3) : channels;
    if (groups < 1 || channels % groups != 0)
        checks.fail("the groups of weight must divide the channels of x, ", channels, ", got ", groups);
    checks.shape("weight", weight, {3, length, length, groups});
    checks.contiguous_channels("weight", weight);
    if (bias) {
        checks.placed("bias", *bias, x, "x");
        checks.dtype("bias", *bias, x.scalar_type());
        checks.shape("bias", *bias, {length, groups});
    }
    // Generous bounds on what is packed, in floating point because they may overflow.
    const double vector = 1024.0, places = double(length) + 64.0, strips = double(x.size(3 - axis)) + 64.0;
    if (vector * places * places * (double(groups) / 4.0 + 1.0) > 0x1p62)
        checks.fail("weight is too large, got shape ", shape_of(weight));
    if (vector * places * strips > 0x1p62) checks.fail("x is too large, got shape ", shape_of(x));
#if defined(VITRAIL_CUDA)
    if (double(x.size(0)) * double(x.size(3 - axis)) * double(channels / groups) > double(kMaxExtent))
        checks.fail("x must have at most ", kMaxExtent,
                    " strips on a GPU, those of all images and patches together, got shape ", shape_of(x),
                    " and ", channels / groups, " patches");
#endif
    return storage;
}

inline StripMix mixing(Storage storage, const Tensor& x, const Tensor& weight, int64_t axis,
                       const Tensor& out) {
    StripMix a = {};
    a.storage = storage;
    a.images = x.size(0);
    a.strips = x.size(3 - axis);
    a.length = x.size(axis);
    a.groups = weight.size(3);
    a.patches = x.size(3) / a.groups;
    a.x = strips_of(x, axis);
    a.out = strips_of(out, axis);
    a.weight = weight.const_data_ptr();
    a.tap = weight.stride(0);
    a.to = weight.stride(1);
    a.from = weight.stride(2);
    return a;
}

// The same with the transposed weight: the gradient of x.
inline StripMix transposed(StripMix a, int64_t element_size) {
    a.weight = static_cast<const char*>(a.weight) + 2 * a.tap * element_size;
    a.tap = -a.tap;
    std::swap(a.to, a.from);
    return a;
}

template <class Device>
Tensor strip_mix(const Tensor& x, const Tensor& weight, const Optional& bias, int64_t axis) {
    const Storage storage = check(Checks("strip_mix"), x, weight, bias, axis);
    Tensor out = new_result(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    if (out.numel() == 0) return out;
    StripMix a = mixing(storage, x, weight, axis, out);
    Optional rows;  // outlives the kernel
    if (bias) {
        rows = tensors::contiguous(*bias);
        a.bias = rows->const_data_ptr();
    }
    Device::mix(a, x);
    return out;
}

#if !defined(VITRAIL_STANDALONE)

// Gradients of x, weight and bias (empty without one).
template <class Device>
std::tuple<Tensor, Tensor, Tensor> strip_mix_backward(const Tensor& grad, const Tensor& x,
                                                      const Tensor& weight, const Optional& bias,
                                                      int64_t axis) {
    const Checks checks("strip_mix_backward");
    const Storage storage = check(checks, x, weight, bias, axis);
    checks.grid("grad", grad);
    checks.placed("grad", grad, x, "x");
    checks.dtype("grad", grad, x.scalar_type());
    checks.shape("grad", grad, {x.size(0), x.size(1), x.size(2), x.size(3)});
    const int64_t length = x.size(axis), groups = weight.size(3);
    Tensor grad_x = tensors::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    Tensor grad_weight = tensors::new_empty(x, {3, length, length, groups});
    Tensor grad_bias = bias ? tensors::new_empty(x, {length, groups}) : tensors::new_empty(x, {0});
    if (x.numel() == 0) {
        tensors::zero_(grad_weight);
        tensors::zero_(grad_bias);
        return {grad_x, grad_weight, grad_bias};
    }
    const StripMix a = transposed(mixing(storage, grad, weight, axis, grad_x), weight.element_size());
    Device::mix(a, x);
    StripMixGradients g = {};
    g.storage = a.storage;
    g.images = a.images;
    g.strips = a.strips;
    g.length = a.length;
    g.groups = a.groups;
    g.patches = a.patches;
    g.grad = a.x;
    g.x = strips_of(x, axis);
    g.weight = grad_weight.mutable_data_ptr();
    if (bias) g.bias = grad_bias.mutable_data_ptr();
    Device::sum_gradients(g, x);
    return {grad_x, grad_weight, grad_bias};
}

#endif

}  // namespace vitrail
