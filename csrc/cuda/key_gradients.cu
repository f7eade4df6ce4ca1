// Backward of block attention: gradients of keys and values, and of the weights of visits.
#include "attention_backward.h"
#include "attention_host.h"
#include "attention_launch.h"

namespace vitrail::cuda {

KeyGrid key_grid(const AnyPolicy& any) {
    return any.with([](const auto& policy) {
        const int64_t largest = policy.largest_key_block();
        return KeyGrid{int((largest + kQueryBlock - 1) / kQueryBlock), warps_for(largest)};
    });
}

void run_key_gradients(const AnyPolicy& any, const BlockAttention& a, const AttentionGradients& g,
                       const Tensor& q) {
    const KeyGrid grid = key_grid(any);
    const int64_t key_blocks = any.with([](const auto& policy) { return int64_t(policy.key_blocks()); });
    with_tiles(a.storage, std::max(a.head_dim, a.value_dim), [&](auto s, auto width) {
        using S = decltype(s);
        Launcher{q}(key_gradients<S, width>, q.size(0) * key_blocks * grid.parts * a.heads,
                    grid.warps * kWarp, KeyBlock<S, width>::shared_bytes(grid.warps * kWarpRows, any.masks()),
                    a, g, any, Place(key_blocks), grid.parts);
    });
}

void run_sum_shared(const Patches<float>& patches, Storage storage, const Tensor& to, const float* shared) {
    constexpr int kThreads = 256;
    with_tiles(storage, 0, [&](auto s, auto) {
        Launcher{to}(sum_shared<decltype(s)>, (to.numel() + kThreads - 1) / kThreads, kThreads, 0, patches,
                     grid_of(to), shared, Place(to.size(1)), Place(to.size(2)), Place(to.size(3)),
                     to.numel());
    });
}

}  // namespace vitrail::cuda
