// vitrail::depthwise_conv on the CPU: threads.
#include "depthwise_conv_host.h"

namespace vitrail {
namespace {

// Fewer multiplications than this are not worth waking another thread for.
constexpr double kGrain = 1 << 18;

struct OnCpu {
    static void convolve(const DepthwiseConv& a, const Tensor& out) {
        const DepthwiseConvKernels& kernels = VITRAIL_KERNELS(kDepthwiseConv);
        const DepthwiseConvPlan plan = kernels.plan(a);
        const double work =
            double(out.numel()) * double(a.kernel_height * a.kernel_width) / double(plan.tasks);
        parallel(plan.tasks, grain(kGrain, work), [&](int64_t begin, int64_t end) {
            AlignedBuffer scratch(plan.scratch);
            kernels.convolve(a, scratch.data, begin, end);
        });
    }
};

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("depthwise_conv", TORCH_BOX(&vitrail::depthwise_conv<vitrail::OnCpu>));
}
