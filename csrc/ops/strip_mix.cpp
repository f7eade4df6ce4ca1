// vitrail::strip_mix and its backward on the CPU: memory and threads. The arithmetic is in the kernels.
#include "../dispatch/registration.h"
#include "strip_mix_host.h"

namespace vitrail {
namespace {

// Fewer weights packed, or multiplications done, than this are not worth waking another thread for.
constexpr double kPackGrain = 0x1p15, kMixGrain = 0x1p17;

template <class Arguments>
double multiplications(const Arguments& a) {
    return 3.0 * double(a.images * a.strips * a.groups * a.patches) * double(a.length) * double(a.length);
}

struct OnCpu {
    static void mix(const StripMix& a, const Tensor&) {
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

#if !defined(VITRAIL_STANDALONE)
    static void sum_gradients(const StripMixGradients& a, const Tensor&) {
        const StripMixGradientsKernels& kernel = VITRAIL_KERNELS(kStripMixGradients);
        const StripMixGradientsPlan plan = kernel.plan(a);
        AlignedBuffer sums(plan.sums);
        parallel(plan.tasks, grain(kMixGrain, multiplications(a) / double(plan.tasks)),
                 [&](int64_t begin, int64_t end) {
                     AlignedBuffer scratch(plan.scratch);
                     kernel.sum(a, sums.data, scratch.data, begin, end);
                 });
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(strip_mix, &vitrail::strip_mix<vitrail::OnCpu>)
VITRAIL_REGISTER_BACKWARD(strip_mix_backward, &vitrail::strip_mix_backward<vitrail::OnCpu>)
