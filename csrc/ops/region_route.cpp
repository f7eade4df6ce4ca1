// vitrail::region_route on the CPU: checks, memory, threads, and the choice itself.
#include "region_route.h"

#include <numeric>

#include "regions_host.h"

namespace vitrail {
namespace {

// Fewer additions than this are not worth waking another thread for.
constexpr int64_t kGrain = int64_t(1) << 16;

void means_of(const Tensor& grid, Storage storage, const Regions& regions, void* to) {
    const int64_t channels = grid.size(3), count = grid.size(0) * regions.count;
    parallel(count, kGrain / std::max<int64_t>(regions.size * channels, 1), [&](int64_t begin, int64_t end) {
        VITRAIL_KERNELS(kRegionRoute).means(storage, grid_of(grid), regions, channels, to, begin, end);
    });
}

// The largest first, as torch.topk has it: a number that is none is larger than all. Of equals the first.
template <class T>
void choose(const T* scores, int64_t count, int64_t topk, std::vector<int64_t>& order, int64_t* to) {
    const auto before = [&](int64_t a, int64_t b) {
        const T x = scores[a], y = scores[b];
        const bool x_none = x != x, y_none = y != y;
        if (x_none != y_none) return x_none;
        if (x_none || x == y) return a < b;
        return x > y;
    };
    order.resize(size_t(count));
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + topk, order.end(), before);
    std::copy_n(order.begin(), topk, to);
}

template <class T>
void route(Storage storage, const void* q, const void* k, int64_t images, int64_t queries, int64_t keys,
           int64_t channels, int64_t topk, int64_t* to) {
    const int64_t work = std::max<int64_t>(keys * (channels + topk), 1);
    parallel(images * queries, kGrain / work, [&](int64_t begin, int64_t end) {
        std::vector<T> scores(static_cast<size_t>(keys));
        std::vector<int64_t> order;
        for (int64_t i = begin; i < end; ++i) {
            const T* of_image = static_cast<const T*>(k) + i / queries * keys * channels;
            VITRAIL_KERNELS(kRegionRoute)
                .scores(storage, static_cast<const T*>(q) + i * channels, of_image, channels, keys,
                        scores.data());
            choose(scores.data(), keys, topk, order, to + i * topk);
        }
    });
}

Tensor region_route(const Tensor& q, const Tensor& k, int64_t topk, const Sizes& region_size,
                    const Sizes& kv_region_size) {
    constexpr Checks checks("region_route");
    const Storage storage = checks.storage("q", q);
    checks.grid("q", q, q, 1);
    checks.grid("k", k, q, 1);
    if (k.size(3) != q.size(3))
        checks.fail("k must have the channels of q, ", q.size(3), ", got ", k.size(3));
    const Regions of_q = regions_of(checks, "region_size", q, region_size);
    const Regions of_k = regions_of(checks, "kv_region_size", k, kv_region_size);
    if (topk < 1 || topk > of_k.count)
        checks.fail("topk must lie between 1 and the number of key regions, ", of_k.count, "; got ", topk);
    Tensor routes = torch::stable::new_empty(q, {q.size(0), of_q.count, topk}, ScalarType::Long);
    if (routes.numel() == 0) return routes;
    const int64_t size = storage == Storage::kFloat64 ? sizeof(double) : sizeof(float);
    const int64_t of_token = q.size(0) * q.size(3) * size;
    AlignedBuffer q_means(of_q.count * of_token), k_means(of_k.count * of_token);
    means_of(q, storage, of_q, q_means.data);
    means_of(k, storage, of_k, k_means.data);
    const auto run = [&](auto one) {
        route<decltype(one)>(storage, q_means.data, k_means.data, q.size(0), of_q.count, of_k.count,
                             q.size(3), topk, static_cast<int64_t*>(routes.mutable_data_ptr()));
    };
    storage == Storage::kFloat64 ? run(double()) : run(float());
    return routes;
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("region_route", TORCH_BOX(&vitrail::region_route));
}
