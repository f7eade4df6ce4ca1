// vitrail::connectivity_attention on the CPU: checks, memory, threads. The arithmetic is in the kernels.
#include "connectivity_attention.h"

#include "connectivity_host.h"
#include "token_host.h"

namespace vitrail {
namespace {

constexpr Checks kChecks("connectivity_attention");
// Prepared keys, values and basis rows that one pass over the images may hold, per thread.
constexpr int64_t kBytesPerThread = int64_t(1) << 20;
// Fewer multiplications, or numbers copied, than this are not worth waking another thread for.
constexpr double kGrain = 0x1p16;

void run(const ConnectivityAttention& a, int64_t images) {
    const ConnectivityBackend& kernel = VITRAIL_KERNELS(kConnectivityAttention);
    const ConnectivityPlan plan = kernel.plan(a);
    const bool shared = a.choice.candidates == nullptr;
    const int64_t image_bytes = plan.packed_image + (shared ? 0 : plan.basis);
    const int64_t budget = kBytesPerThread * torch::stable::get_num_threads();
    const int64_t together = std::clamp<int64_t>(budget / std::max<int64_t>(image_bytes, 1), 1, images);
    const double slots = double(a.choice.num_keys > 0 ? a.choice.num_keys : a.choice.keys);
    const double work = double(a.queries) * double(a.heads) *
                        (slots * double(a.head_dim + a.value_dim) + 16.0 * double(a.choice.keys));
    AlignedBuffer packed(together * plan.packed_image), basis((shared ? 1 : together) * plan.basis);
    const auto prepare = [&](int64_t first, int64_t count) {
        parallel(count * plan.basis_tasks, grain(kGrain, 64.0 * double(a.choice.rows)),
                 [&](int64_t begin, int64_t end) { kernel.prepare(a, first, basis.data, begin, end); });
    };
    if (shared) prepare(0, 1);
    for (int64_t first = 0; first < images; first += together) {
        const int64_t count = std::min(together, images - first);
        if (!shared) prepare(first, count);
        parallel(count * plan.pack_tasks, grain(kGrain, 64.0 * double(a.head_dim + a.value_dim)),
                 [&](int64_t begin, int64_t end) { kernel.pack(a, first, packed.data, begin, end); });
        parallel(count * plan.attend_tasks, grain(kGrain, work / double(plan.attend_tasks)),
                 [&](int64_t begin, int64_t end) {
                     AlignedBuffer scratch(plan.scratch);
                     kernel.attend(a, first, basis.data, packed.data, scratch.data, begin, end);
                 });
    }
}

Tensor connectivity_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& compressed,
                              const Tensor& offset, const std::optional<Tensor>& projection,
                              const Tensor& basis, const std::optional<Tensor>& candidates, int64_t num_keys,
                              int64_t num_coefficients, double coefficient_threshold, double basis_threshold,
                              double score_threshold, int64_t num_dense, int64_t num_pruned,
                              int64_t num_heads, double scale) {
    ConnectivityAttention a = {};
    set_tokens(kChecks, q, k, v, num_heads, scale, a);
    const ScalarType compute = compute_type(a.storage);
    kChecks.placed("compressed", compressed);
    kChecks.dtype("compressed", compressed, compute);
    if (compressed.dim() != 3)
        kChecks.fail("compressed must have 3 dimensions (B, n, C), got shape ", shape_of(compressed));
    a.compressed_dim = q.size(2) / num_heads;
    std::optional<Tensor> whole_projection;
    if (projection) {
        kChecks.placed("projection", *projection);
        kChecks.dtype("projection", *projection, compute);
        if (projection->dim() != 2 || projection->size(0) < 1 || projection->size(1) != a.compressed_dim)
            kChecks.fail("projection must have shape (c, ", a.compressed_dim, ") with c at least 1, got ",
                         shape_of(*projection));
        a.compressed_dim = projection->size(0);
        whole_projection = torch::stable::contiguous(*projection);
        a.projection = whole_projection->const_data_ptr();
    }
    kChecks.shape("compressed", compressed, {q.size(0), compressed.size(1), num_heads * a.compressed_dim});
    kChecks.contiguous_channels("compressed", compressed);
    kChecks.placed("offset", offset);
    kChecks.dtype("offset", offset, compute);
    kChecks.shape("offset", offset, {q.size(0), compressed.size(1), num_heads});
    a.choice =
        checked_connectivity(kChecks, "q", q, compressed.size(1), basis, candidates, num_keys,
                             num_coefficients, coefficient_threshold, basis_threshold, score_threshold);
    if (a.choice.keys != k.size(1))
        kChecks.fail(candidates ? "candidates" : "basis", " must have the tokens of k, ", k.size(1), ", got ",
                     a.choice.keys);
    if (num_dense < 0 || num_dense > q.size(1))
        kChecks.fail("num_dense must lie between 0 and the number of queries, ", q.size(1), ", got ",
                     num_dense);
    if (num_pruned < 0) kChecks.fail("num_pruned must not be negative, got ", num_pruned);
    a.compressed = tokens_of(compressed);
    a.offset = offset.const_data_ptr();
    a.offset_image = offset.stride(0);
    a.offset_row = offset.stride(1);
    a.offset_head = offset.stride(2);
    a.num_dense = num_dense;
    a.num_pruned = num_pruned;
    // in floating point because it may overflow: what is prepared of one image
    const double packed = 16.0 * double(num_heads) *
                          double(a.head_dim + a.value_dim + a.compressed_dim + 64) *
                          double(a.tokens + a.choice.rows + 64);
    if (packed > 0x1p62) kChecks.fail("k and v need ", packed, " bytes for one image's keys");
    Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
    if (candidates && a.choice.tokens == 0) refuse_wrong_candidate(kChecks, a.choice, *candidates);
    if (out.numel() == 0) return out;
    bool wrong = false;
    a.choice.wrong_candidate = &wrong;
    a.out = tokens_of(out);
    run(a, q.size(0));
    if (wrong) refuse_candidates(kChecks, a.choice, *candidates);
    return out;
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("connectivity_attention", TORCH_BOX(&vitrail::connectivity_attention));
}
