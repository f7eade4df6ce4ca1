// The forward kernels of block attention, for all policies, types and widths.
#include "attention_host.h"
#include "attention_launch.h"

namespace vitrail::cuda {

void run_forward(const AnyPolicy& any, const BlockAttention& a, const Tensor& q) {
    any.with([&](const auto& policy) {
        const int warps = warps_for(policy.largest_query_region());
        const int64_t keys = int64_t(policy.visits()) * policy.largest_key_block();
        if (keys > kMaxExtent)
            throw std::runtime_error("a query may look at " + std::to_string(kMaxExtent) +
                                     " keys on a GPU, and these would look at " + std::to_string(keys));
        with_tiles(a.storage, std::max(a.head_dim, a.value_dim), [&](auto s, auto width) {
            using S = decltype(s);
            Launcher{q}(attend<S, width>, q.size(0) * query_blocks(policy) * a.heads, warps * kWarp,
                        QueryBlock<S, width>::shared_bytes(1, warps * kWarpRows, keys, any.masks()), a, any,
                        query_blocks(policy));
        });
    });
}

}  // namespace vitrail::cuda
