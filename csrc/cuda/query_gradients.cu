// Backward of block attention: gradients of queries, and of biases.
#include "attention_backward.h"
#include "attention_host.h"
#include "attention_launch.h"

namespace vitrail::cuda {

void run_query_gradients(const AnyPolicy& any, const BlockAttention& a, const AttentionGradients& g,
                         const Tensor& q) {
    any.with([&](const auto& policy) {
        const int64_t keys = int64_t(policy.visits()) * policy.largest_key_block();
        const int warps = warps_for(policy.largest_query_region());
        with_tiles(a.storage, std::max(a.head_dim, a.value_dim), [&](auto s, auto width) {
            using S = decltype(s);
            Launcher{q}(query_gradients<S, width>, q.size(0) * query_blocks(policy) * a.heads, warps * kWarp,
                        QueryBlock<S, width>::shared_bytes(2, warps * kWarpRows, keys, any.masks()), a, g,
                        any, query_blocks(policy));
        });
    });
}

Tensor run_bias_gradients(const Windows<float>& windows, const BlockAttention& a, const AttentionGradients& g,
                          const Tensor& q) {
    constexpr int64_t kBlocks = 1024;  // enough to fill a GPU
    const int64_t places = windows.largest_key_block(), all = q.size(0) * windows.key_blocks();
    return with_tiles(a.storage, std::max(a.head_dim, a.value_dim), [&](auto s, auto width) {
        using S = decltype(s);
        constexpr int kTokens = TileShape<S, width>::kTokens;
        const int warps = warps_for(places), rows = warps * kWarpRows;
        const int64_t parts = (places + kTokens - 1) / kTokens * ((places + rows - 1) / rows) * a.heads;
        const int64_t slices = std::clamp<int64_t>(kBlocks / parts, 1, std::max<int64_t>(all, 1));
        Tensor tables = tensors::new_empty(q, {slices, a.heads, places, places}, ScalarType::Float);
        Launcher{q}(bias_gradients<S, width>, slices * parts, warps * kWarp,
                    QueryBlock<S, width>::shared_bytes(2, rows, 1), a, g, windows,
                    static_cast<float*>(tables.mutable_data_ptr()), Place(q.size(0)), Place(slices));
        return tensors::sum(tables, std::vector<int64_t>{0});
    });
}

}  // namespace vitrail::cuda
