// vitrail::depthwise_conv on the CPU: checks, memory, threads.
#include "depthwise_conv.h"

#include "activation_host.h"

namespace vitrail {
namespace {

constexpr Checks kChecks("depthwise_conv");
// Fewer multiplications than this are not worth waking another thread for.
constexpr double kGrain = 1 << 18;
constexpr int64_t kMaxKernel = 1023;

// A parameter of the channels; null where there is none.
const void* of_channels(const char* name, const std::optional<Tensor>& values, ScalarType type,
                        int64_t channels) {
    if (!values) return nullptr;
    kChecks.placed(name, *values);
    kChecks.dtype(name, *values, type);
    kChecks.shape(name, *values, {channels});
    kChecks.contiguous_channels(name, *values);
    return values->const_data_ptr();
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& shift, const std::string& activation) {
    kChecks.grid("x", x);
    DepthwiseConv a = {};
    a.storage = kChecks.storage("x", x);
    const ScalarType wide = compute_type(a.storage);
    a.images = x.size(0);
    a.height = x.size(1);
    a.width = x.size(2);
    a.channels = x.size(3);
    if (a.channels < 1 || a.channels > kMaxExtent)
        kChecks.fail("x must have from 1 to ", kMaxExtent, " channels, got shape ", shape_of(x));
    kChecks.placed("weight", weight);
    kChecks.dtype("weight", weight, wide);
    const int64_t dims = weight.dim();
    if (dims != 3 && dims != 4)
        kChecks.fail("weight must have shape (height, width, C), or (B, height, width, C), got ",
                     shape_of(weight));
    a.kernel_height = weight.size(dims - 3);
    a.kernel_width = weight.size(dims - 2);
    for (int64_t size : {a.kernel_height, a.kernel_width})
        if (size < 1 || size > kMaxKernel || size % 2 == 0)
            kChecks.fail("the kernel must be odd, up to ", kMaxKernel, " high and wide, got ",
                         a.kernel_height, " x ", a.kernel_width);
    if (dims == 4)
        kChecks.shape("weight", weight, {a.images, a.kernel_height, a.kernel_width, a.channels});
    else
        kChecks.shape("weight", weight, {a.kernel_height, a.kernel_width, a.channels});
    if (!weight.is_contiguous()) kChecks.fail("weight must be contiguous");
    a.weight = weight.const_data_ptr();
    a.weight_image = dims == 4 ? weight.stride(0) : 0;
    a.bias = of_channels("bias", bias, wide, a.channels);
    a.scale = of_channels("scale", scale, wide, a.channels);
    a.shift = of_channels("shift", shift, wide, a.channels);
    a.activation = activation_of(kChecks, activation);
    if (residual) {
        kChecks.grid("residual", *residual);
        kChecks.dtype("residual", *residual, x.scalar_type());
        kChecks.shape("residual", *residual, {a.images, a.height, a.width, a.channels});
        a.residual = grid_of(*residual);
    }
    Tensor out = torch::stable::new_empty(x, {a.images, a.height, a.width, a.channels});
    if (out.numel() == 0) return out;
    a.x = grid_of(x);
    a.out = grid_of(out);
    const DepthwiseConvKernels& kernels = VITRAIL_KERNELS(kDepthwiseConv);
    const DepthwiseConvPlan plan = kernels.plan(a);
    const double work = double(out.numel()) * double(a.kernel_height * a.kernel_width) / double(plan.tasks);
    parallel(plan.tasks, grain(kGrain, work), [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(plan.scratch);
        kernels.convolve(a, scratch.data, begin, end);
    });
    return out;
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("depthwise_conv", TORCH_BOX(&vitrail::depthwise_conv));
}
