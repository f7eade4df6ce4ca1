// vitrail::connectivity_topk on the CPU: memory, threads. The arithmetic is in the kernels.
#include "../dispatch/registration.h"
#include "connectivity_topk_host.h"

namespace vitrail {
namespace {

// Basis rows of the candidates of several images that may be held together, per thread.
constexpr int64_t kRowsBytesPerThread = int64_t(1) << 20;
// Fewer numbers than this are not worth waking another thread for.
constexpr double kGrain = 0x1p15;

void run(const ConnectivityTopk& a, int64_t images) {
    const TopkBackend& kernel = VITRAIL_KERNELS(kConnectivityTopk);
    const TopkPlan plan = kernel.plan(a);
    const bool shared = a.choice.candidates == nullptr;
    const int64_t budget = kRowsBytesPerThread * tensors::get_num_threads();
    const int64_t together =
        shared ? images : std::clamp<int64_t>(budget / std::max<int64_t>(plan.rows, 1), 1, images);
    const double prepared = double(a.choice.rows) * double(a.choice.keys) / double(plan.prepare_tasks);
    const double chosen = double(a.queries) * double(a.heads) * double(a.choice.keys) * 16.0;
    AlignedBuffer rows((shared ? 1 : together) * plan.rows);
    for (int64_t first = 0; first < images; first += together) {
        const int64_t count = std::min(together, images - first);
        parallel((shared ? 1 : count) * plan.prepare_tasks, grain(kGrain, prepared),
                 [&](int64_t begin, int64_t end) { kernel.prepare(a, first, rows.data, begin, end); });
        parallel(count * plan.choose_tasks, grain(kGrain, chosen / double(plan.choose_tasks)),
                 [&](int64_t begin, int64_t end) {
                     AlignedBuffer scratch(plan.scratch);
                     kernel.choose(a, first, rows.data, scratch.data, begin, end);
                 });
    }
}

struct OnCpu {
    static void admit(const Checks& checks, const ConnectivityTopk& a, const Tensor&,
                      const Optional& candidates) {
        if (candidates && a.choice.tokens == 0) refuse_wrong_candidate(checks, a.choice, *candidates);
    }

    static void choose(const Checks& checks, ConnectivityTopk& a, const Tensor& logits,
                       const Optional& candidates) {
        bool wrong = false;
        a.choice.wrong_candidate = &wrong;
        run(a, logits.size(0));
        if (wrong) refuse_candidates(checks, a.choice, *candidates);
    }
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(connectivity_topk, &vitrail::connectivity_topk<vitrail::OnCpu>)
