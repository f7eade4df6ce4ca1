// vitrail::channel_attention and its backward on the CPU: memory and threads. The arithmetic is in the
// kernels.
#include "../dispatch/registration.h"
#include "channel_attention_host.h"

namespace vitrail {
namespace {

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

struct OnCpu {
    static void attend(const ChannelAttention& a, const Tensor&) {
        run(a, VITRAIL_KERNELS(kChannelAttention), 1.0);
    }
#if !defined(VITRAIL_STANDALONE)
    static void differentiate(const ChannelAttention& a, const Tensor&) {
        run(a, VITRAIL_KERNELS(kChannelAttentionBackward), 2.5);
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(channel_attention, &vitrail::channel_attention<vitrail::OnCpu>)
VITRAIL_REGISTER_BACKWARD(channel_attention_backward, &vitrail::channel_attention_backward<vitrail::OnCpu>)
