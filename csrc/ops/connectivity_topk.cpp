// vitrail::connectivity_topk on the CPU: checks, memory, threads. The arithmetic is in the kernels.
#include "connectivity_topk.h"

#include "connectivity_host.h"

namespace vitrail {
namespace {

constexpr Checks kChecks("connectivity_topk");
// Basis rows of the candidates of several images that may be held together, per thread.
constexpr int64_t kRowsBytesPerThread = int64_t(1) << 20;
// Fewer numbers than this are not worth waking another thread for.
constexpr double kGrain = 0x1p15;

void run(const ConnectivityTopk& a, int64_t images) {
    const TopkBackend& kernel = VITRAIL_KERNELS(kConnectivityTopk);
    const TopkPlan plan = kernel.plan(a);
    const bool shared = a.choice.candidates == nullptr;
    const int64_t budget = kRowsBytesPerThread * torch::stable::get_num_threads();
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

Tensor connectivity_topk(const Tensor& logits, const Tensor& basis, const std::optional<Tensor>& candidates,
                         int64_t num_keys, int64_t num_coefficients, double coefficient_threshold,
                         double basis_threshold, double score_threshold) {
    ConnectivityTopk a = {};
    a.storage = kChecks.storage("logits", logits);
    if (logits.dim() != 4)
        kChecks.fail("logits must have 4 dimensions (B, heads, queries, n), got shape ", shape_of(logits));
    a.choice =
        checked_connectivity(kChecks, logits.size(0), logits.size(3), basis, candidates, num_keys,
                             num_coefficients, coefficient_threshold, basis_threshold, score_threshold);
    a.logits = logits.const_data_ptr();
    a.image = logits.stride(0);
    a.head = logits.stride(1);
    a.query = logits.stride(2);
    a.row = logits.stride(3);
    a.heads = logits.size(1);
    a.queries = logits.size(2);
    a.slots = num_keys > 0 ? num_keys : a.choice.keys;
    Tensor out = torch::stable::new_empty(logits, {logits.size(0), a.heads, a.queries, a.slots},
                                          std::make_optional(ScalarType::Long));
    if (candidates && a.choice.tokens == 0) refuse_wrong_candidate(kChecks, a.choice, *candidates);
    if (out.numel() == 0) return out;
    bool wrong = false;
    a.choice.wrong_candidate = &wrong;
    a.out = static_cast<int64_t*>(out.mutable_data_ptr());
    run(a, logits.size(0));
    if (wrong) refuse_candidates(kChecks, a.choice, *candidates);
    return out;
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("connectivity_topk", TORCH_BOX(&vitrail::connectivity_topk));
}
