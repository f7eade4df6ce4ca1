// vitrail::sparse_attention and its backward on the CPU: checks, memory, threads. The arithmetic is in the
// kernels.
#include "sparse_attention.h"

#include "token_host.h"

namespace vitrail {
namespace {

constexpr Checks kChecks("sparse_attention"), kBackwardChecks("sparse_attention_backward");
// Widened keys and values that one pass over the images may hold, per thread.
constexpr int64_t kPackedBytesPerThread = int64_t(1) << 20;
// Fewer multiplications than this are not worth waking another thread for.
constexpr double kGrain = 0x1p16;

SparseAttention checked(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& keys, int64_t num_heads, double scale) {
    SparseAttention a = {};
    set_tokens(checks, q, k, v, num_heads, scale, a);
    checks.placed("keys", keys);
    if (keys.scalar_type() != ScalarType::Int && keys.scalar_type() != ScalarType::Long)
        checks.fail("keys must be int32 or int64, got ", name_of(keys.scalar_type()));
    if (keys.dim() != 4 || keys.size(0) != q.size(0) || keys.size(1) != num_heads ||
        keys.size(2) != q.size(1))
        checks.fail("keys must have shape (B, num_heads, queries, slots) = (", q.size(0), ", ", num_heads,
                    ", ", q.size(1), ", slots), got ", shape_of(keys));
    if (keys.size(3) > kMaxExtent / 2)
        checks.fail("keys must have at most ", kMaxExtent / 2, " slots, got ", keys.size(3));
    a.keys = keys.const_data_ptr();
    a.wide_keys = keys.scalar_type() == ScalarType::Long;
    a.keys_image = keys.stride(0);
    a.keys_head = keys.stride(1);
    a.keys_query = keys.stride(2);
    a.keys_slot = keys.stride(3);
    a.slots = keys.size(3);
    // in floating point because it may overflow: keys, values and their gradients of one image
    const double packed = 16.0 * double(a.tokens) * double(num_heads) * double(a.head_dim + a.value_dim + 32);
    if (packed > 0x1p62) checks.fail("k and v need ", packed, " bytes for one image's keys");
    return a;
}

template <class Index>
void name_wrong_key(const Checks& checks, const SparseAttention& a, const Tensor& keys) {
    const Index* data = static_cast<const Index*>(keys.const_data_ptr());
    for (int64_t b = 0; b < keys.size(0); ++b)
        for (int64_t h = 0; h < keys.size(1); ++h)
            for (int64_t q = 0; q < keys.size(2); ++q)
                for (int64_t j = 0; j < keys.size(3); ++j) {
                    const int64_t key =
                        data[b * a.keys_image + h * a.keys_head + q * a.keys_query + j * a.keys_slot];
                    if (key < -1 || key >= a.tokens)
                        checks.fail<std::out_of_range>(
                            "keys[", b, ", ", h, ", ", q, ", ", j, "] is ", key, ", but there are ", a.tokens,
                            " keys: allowed are 0 to ", a.tokens - 1, ", and -1 for an empty slot");
                }
    checks.fail("keys changed while they were read");
}

void refuse_wrong_key(const Checks& checks, const SparseAttention& a, const Tensor& keys, bool wrong) {
    if (!wrong) return;
    if (a.wide_keys)
        name_wrong_key<int64_t>(checks, a, keys);
    else
        name_wrong_key<int32_t>(checks, a, keys);
}

void run(const SparseAttention& a, int64_t images) {
    const SparseBackend& kernel = VITRAIL_KERNELS(kSparseAttention);
    const SparsePlan plan = kernel.plan(a);
    const int64_t channels = a.head_dim + a.value_dim;
    const double work = double(a.queries) * double(a.slots) * double(channels) * double(a.heads);
    const int64_t budget = kPackedBytesPerThread * torch::stable::get_num_threads();
    const int64_t together = std::clamp<int64_t>(budget / std::max<int64_t>(plan.packed_image, 1), 1, images);
    AlignedBuffer packed(together * plan.packed_image);
    for (int64_t first = 0; first < images; first += together) {
        const int64_t count = std::min(together, images - first);
        parallel(count * plan.pack_tasks, grain(kGrain, 64.0 * double(channels)),
                 [&](int64_t begin, int64_t end) { kernel.pack(a, first, packed.data, begin, end); });
        parallel(count * plan.attend_tasks, grain(kGrain, work / double(plan.attend_tasks)),
                 [&](int64_t begin, int64_t end) {
                     AlignedBuffer scratch(plan.scratch);
                     kernel.attend(a, first, packed.data, scratch.data, begin, end);
                 });
    }
}

std::tuple<Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& keys, int64_t num_heads, double scale) {
    SparseAttention a = checked(kChecks, q, k, v, keys, num_heads, scale);
    Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
    Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), num_heads}, compute_type(a.storage));
    if (out.numel() == 0) return {out, lse};
    bool wrong = false;
    a.out = tokens_of(out);
    a.lse = lse.mutable_data_ptr();
    a.wrong_key = &wrong;
    run(a, q.size(0));
    refuse_wrong_key(kChecks, a, keys, wrong);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(const Tensor& grad, const Tensor& out,
                                                             const Tensor& lse, const Tensor& q,
                                                             const Tensor& k, const Tensor& v,
                                                             const Tensor& keys, int64_t num_heads,
                                                             double scale) {
    const Checks& checks = kBackwardChecks;
    SparseAttentionBackward b = {};
    b.forward = checked(checks, q, k, v, keys, num_heads, scale);
    checks.tokens("grad", grad, q, num_heads);
    checks.shape("grad", grad, {q.size(0), q.size(1), v.size(2)});
    checks.shape("out", out, {q.size(0), q.size(1), v.size(2)});
    checks.placed("lse", lse);
    checks.dtype("lse", lse, compute_type(b.forward.storage));
    checks.shape("lse", lse, {q.size(0), q.size(1), num_heads});
    Tensor grad_q = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
    Tensor grad_k = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
    Tensor grad_v = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
    const Tensor whole_lse = torch::stable::contiguous(lse);
    bool wrong = false;
    b.grad = tokens_of(grad);
    b.grad_q = tokens_of(grad_q);
    b.grad_k = tokens_of(grad_k);
    b.grad_v = tokens_of(grad_v);
    b.forward.lse = const_cast<void*>(whole_lse.const_data_ptr());
    b.forward.wrong_key = &wrong;
    const SparseBackwardBackend& kernel = VITRAIL_KERNELS(kSparseAttentionBackward);
    const int64_t scratch_size = kernel.scratch(b);
    parallel(q.size(0) * num_heads, 1, [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(scratch_size);
        kernel.run(b, scratch.data, begin, end);
    });
    refuse_wrong_key(checks, b.forward, keys, wrong);
    return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("sparse_attention", TORCH_BOX(&vitrail::sparse_attention));
    m.impl("sparse_attention_backward", TORCH_BOX(&vitrail::sparse_attention_backward));
}
