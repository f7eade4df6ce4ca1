// vitrail::strip_mix on the CPU: checks, memory, threads. The arithmetic is in the kernels.
#include "strip_mix.h"

#include "host.h"

namespace vitrail {
namespace {

constexpr Checks kChecks("strip_mix"), kBackwardChecks("strip_mix_backward");
// Fewer weights packed, or multiplications done, than this are not worth waking another thread for.
constexpr double kPackGrain = 0x1p15, kMixGrain = 0x1p17;

// The grid as strips: rows of it, or columns.
Grid strips_of(const Tensor& t, int64_t axis) {
    Grid grid = grid_of(t);
    if (axis == 1) std::swap(grid.row, grid.column);
    return grid;
}

Storage check(const Checks& checks, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              int64_t axis) {
    if (axis != 1 && axis != 2) checks.fail("axis must be 1 or 2, got ", axis);
    checks.grid("x", x);
    const Storage storage = checks.storage("x", x);
    checks.placed("weight", weight);
    checks.dtype("weight", weight, x.scalar_type());
    const int64_t length = x.size(axis), channels = x.size(3);
    const int64_t groups = weight.dim() == 4 ? weight.size(3) : channels;
    if (groups < 1 || channels % groups != 0)
        checks.fail("the groups of weight must divide the channels of x, ", channels, ", got ", groups);
    checks.shape("weight", weight, {3, length, length, groups});
    checks.contiguous_channels("weight", weight);
    if (bias) {
        checks.placed("bias", *bias);
        checks.dtype("bias", *bias, x.scalar_type());
        checks.shape("bias", *bias, {length, groups});
    }
    // Generous bounds on what is packed, in floating point because they may overflow.
    const double vector = 1024.0, places = double(length) + 64.0, strips = double(x.size(3 - axis)) + 64.0;
    if (vector * places * places * (double(groups) / 4.0 + 1.0) > 0x1p62)
        checks.fail("weight is too large, got shape ", shape_of(weight));
    if (vector * places * strips > 0x1p62) checks.fail("x is too large, got shape ", shape_of(x));
    return storage;
}

StripMix mixing(Storage storage, const Tensor& x, const Tensor& weight, int64_t axis, const Tensor& out) {
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
StripMix transposed(StripMix a, int64_t element_size) {
    a.weight = static_cast<const char*>(a.weight) + 2 * a.tap * element_size;
    a.tap = -a.tap;
    std::swap(a.to, a.from);
    return a;
}

double multiplications(const StripMix& a) {
    return 3.0 * double(a.images * a.strips * a.groups * a.patches) * double(a.length) * double(a.length);
}

void run(const StripMix& a) {
    const StripMixKernels& kernel = VITRAIL_KERNELS(kStripMix);
    const StripMixPlan plan = kernel.plan(a);
    AlignedBuffer packed(plan.packed);
    parallel(plan.pack_tasks, grain(kPackGrain, 48.0 * double(a.length)),
             [&](int64_t begin, int64_t end) { kernel.pack(a, packed.data, begin, end); });
    parallel(plan.mix_tasks, grain(kMixGrain, multiplications(a) / double(plan.mix_tasks)),
             [&](int64_t begin, int64_t end) {
                 AlignedBuffer scratch(plan.scratch);
                 kernel.mix(a, packed.data, scratch.data, begin, end);
             });
}

Tensor strip_mix(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t axis) {
    const Storage storage = check(kChecks, x, weight, bias, axis);
    Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    if (out.numel() == 0) return out;
    StripMix a = mixing(storage, x, weight, axis, out);
    std::optional<Tensor> rows;  // outlives the kernel
    if (bias) {
        rows = torch::stable::contiguous(*bias);
        a.bias = rows->const_data_ptr();
    }
    run(a);
    return out;
}

void run(const StripMixGradients& a, double work) {
    const StripMixGradientsKernels& kernel = VITRAIL_KERNELS(kStripMixGradients);
    const StripMixGradientsPlan plan = kernel.plan(a);
    AlignedBuffer sums(plan.sums);
    parallel(plan.tasks, grain(kMixGrain, work / double(plan.tasks)), [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(plan.scratch);
        kernel.sum(a, sums.data, scratch.data, begin, end);
    });
}

// Gradients of x, weight and bias (empty without one).
std::tuple<Tensor, Tensor, Tensor> strip_mix_backward(const Tensor& grad, const Tensor& x,
                                                      const Tensor& weight, const std::optional<Tensor>& bias,
                                                      int64_t axis) {
    const Checks& checks = kBackwardChecks;
    const Storage storage = check(checks, x, weight, bias, axis);
    checks.grid("grad", grad);
    checks.dtype("grad", grad, x.scalar_type());
    checks.shape("grad", grad, {x.size(0), x.size(1), x.size(2), x.size(3)});
    const int64_t length = x.size(axis), groups = weight.size(3);
    Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    Tensor grad_weight = torch::stable::new_empty(x, {3, length, length, groups});
    Tensor grad_bias =
        bias ? torch::stable::new_empty(x, {length, groups}) : torch::stable::new_empty(x, {0});
    if (x.numel() == 0) {
        torch::stable::zero_(grad_weight);
        torch::stable::zero_(grad_bias);
        return {grad_x, grad_weight, grad_bias};
    }
    const StripMix a = transposed(mixing(storage, grad, weight, axis, grad_x), weight.element_size());
    run(a);
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
    run(g, multiplications(a));
    return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("strip_mix", TORCH_BOX(&vitrail::strip_mix));
    m.impl("strip_mix_backward", TORCH_BOX(&vitrail::strip_mix_backward));
}
