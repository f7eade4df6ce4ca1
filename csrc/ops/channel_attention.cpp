// vitrail::channel_attention on the CPU: checks, memory, threads. The arithmetic is in the kernels.
#include "channel_attention.h"

#include <cmath>

#include "host.h"

namespace vitrail {
namespace {

constexpr Checks kChecks("channel_attention"), kBackwardChecks("channel_attention_backward");

ChannelAttention arguments(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v,
                           int64_t num_heads, double scale) {
    ChannelAttention a = {};
    a.storage = checks.storage("q", q);
    checks.heads(num_heads);
    checks.grid("q", q, q, num_heads);
    const auto check_like_q = [&](const char* name, const Tensor& t) {
        checks.grid(name, t, q, num_heads);
        checks.shape(name, t, {q.size(0), q.size(1), q.size(2), q.size(3)});
    };
    check_like_q("k", k);
    check_like_q("v", v);
    a.images = q.size(0);
    a.height = q.size(1);
    a.width = q.size(2);
    a.heads = num_heads;
    a.head_dim = q.size(3) / num_heads;
    a.scale = scale;
    a.q = grid_of(q);
    a.k = grid_of(k);
    a.v = grid_of(v);
    // A generous bound on all memory, in floating point because it may overflow.
    const double head = double(a.head_dim) + 64.0, tokens = double(a.height) * double(a.width) / 256.0 + 1.0;
    if (64.0 * double(a.images) * double(a.heads) * tokens * head * head > 0x1p62)
        checks.fail("q is too large, got shape ", shape_of(q));
    return a;
}

void run(const ChannelAttention& a, const ChannelAttentionSteps& steps, double products) {
    // Fewer multiplications than this are not worth waking another thread for.
    constexpr double kGrain = 0x1p18;
    const ChannelAttentionPlan plan = steps.plan(a);
    const int64_t heads = a.images * a.heads, tasks = heads * plan.chunks;
    AlignedBuffer sums(tasks * plan.sums), matrices(heads * plan.matrices);
    const double square = double(a.head_dim) * double(a.head_dim);
    const double work = products * square * double(a.height * a.width) / double(plan.chunks);
    const auto weigh = [&](void* scratch, int64_t begin, int64_t end) {
        steps.weigh(a, sums.data, matrices.data, scratch, begin, end);
    };
    if (plan.chunks == 1)  // a head's steps follow each other while its channels are in cache
        return parallel(heads, grain(kGrain, 2 * work), [&](int64_t begin, int64_t end) {
            AlignedBuffer scratch(plan.scratch);
            for (int64_t head = begin; head < end; ++head) {
                steps.sum(a, sums.data, scratch.data, head, head + 1);
                weigh(scratch.data, head, head + 1);
                steps.apply(a, matrices.data, scratch.data, head, head + 1);
            }
        });
    parallel(tasks, grain(kGrain, work), [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(plan.scratch);
        steps.sum(a, sums.data, scratch.data, begin, end);
    });
    parallel(heads, grain(kGrain, square * double(plan.chunks + 16)), [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(plan.scratch);
        weigh(scratch.data, begin, end);
    });
    parallel(tasks, grain(kGrain, work), [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(plan.scratch);
        steps.apply(a, matrices.data, scratch.data, begin, end);
    });
}

std::tuple<Tensor, Tensor> channel_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             int64_t num_heads, double scale) {
    ChannelAttention a = arguments(kChecks, q, k, v, num_heads, scale);
    Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
    Tensor lse = torch::stable::new_empty(q, {q.size(0), 1, 1, q.size(3)}, compute_type(a.storage));
    a.out = grid_of(out);
    a.lse = lse.mutable_data_ptr();
    if (out.numel() > 0)
        run(a, VITRAIL_KERNELS(kChannelAttention), 1.0);
    else  // scores of no tokens are zero
        torch::stable::fill_(lse, std::log(double(a.head_dim)));
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> channel_attention_backward(const Tensor& grad, const Tensor& out,
                                                              const Tensor& lse, const Tensor& q,
                                                              const Tensor& k, const Tensor& v,
                                                              int64_t num_heads, double scale) {
    const Checks& checks = kBackwardChecks;
    ChannelAttention a = arguments(checks, q, k, v, num_heads, scale);
    const std::vector<int64_t> shape = {q.size(0), q.size(1), q.size(2), q.size(3)};
    const auto check_like_q = [&](const char* name, const Tensor& t) {
        checks.grid(name, t);
        checks.dtype(name, t, q.scalar_type());
        checks.shape(name, t, shape);
    };
    check_like_q("grad", grad);
    check_like_q("out", out);
    checks.placed("lse", lse);
    checks.dtype("lse", lse, compute_type(a.storage));
    checks.shape("lse", lse, {q.size(0), 1, 1, q.size(3)});
    Tensor grad_q = torch::stable::new_empty(q, shape), grad_k = torch::stable::new_empty(q, shape),
           grad_v = torch::stable::new_empty(q, shape);
    if (q.numel() == 0) return {grad_q, grad_k, grad_v};
    const Tensor rows = torch::stable::contiguous(lse);  // outlives the kernel
    a.lse = const_cast<void*>(rows.const_data_ptr());
    a.grad = grid_of(grad);
    a.grad_q = grid_of(grad_q);
    a.grad_k = grid_of(grad_k);
    a.grad_v = grid_of(grad_v);
    run(a, VITRAIL_KERNELS(kChannelAttentionBackward), 2.5);
    return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("channel_attention", TORCH_BOX(&vitrail::channel_attention));
    m.impl("channel_attention_backward", TORCH_BOX(&vitrail::channel_attention_backward));
}
