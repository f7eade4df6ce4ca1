// vitrail::sparse_attention and its backward on the CPU: memory and threads. The arithmetic is in the
// kernels.
#include "../dispatch/registration.h"
#include "sparse_attention_host.h"

namespace vitrail {
namespace {

// Widened keys and values that one pass over the images may hold, per thread.
constexpr int64_t kPackedBytesPerThread = int64_t(1) << 20;
// Fewer multiplications than this are not worth waking another thread for.
constexpr double kGrain = 0x1p16;

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
    const int64_t budget = kPackedBytesPerThread * tensors::get_num_threads();
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

struct OnCpu {
    static void attend(const Checks& checks, SparseAttention a, const Tensor& q, const Tensor& keys) {
        bool wrong = false;
        a.wrong_key = &wrong;
        run(a, q.size(0));
        refuse_wrong_key(checks, a, keys, wrong);
    }

#if !defined(VITRAIL_STANDALONE)
    static void gradients(const Checks& checks, SparseAttentionBackward b, const Tensor& q,
                          const Tensor& keys) {
        bool wrong = false;
        b.forward.wrong_key = &wrong;
        const SparseBackwardBackend& kernel = VITRAIL_KERNELS(kSparseAttentionBackward);
        const int64_t scratch_size = kernel.scratch(b);
        parallel(q.size(0) * b.forward.heads, 1, [&](int64_t begin, int64_t end) {
            AlignedBuffer scratch(scratch_size);
            kernel.run(b, scratch.data, begin, end);
        });
        refuse_wrong_key(checks, b.forward, keys, wrong);
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(sparse_attention, &vitrail::sparse_attention<vitrail::OnCpu>)
VITRAIL_REGISTER_BACKWARD(sparse_attention_backward, &vitrail::sparse_attention_backward<vitrail::OnCpu>)
