// vitrail::region_route on the CPU: memory, threads, and the choice itself.
#include "../dispatch/registration.h"
#include "region_route_host.h"

namespace vitrail {
namespace {

// Fewer additions than this are not worth waking another thread for.
constexpr double kGrain = 0x1p16;

void means_of(const Tensor& grid, Storage storage, const Regions& regions, void* to) {
    const int64_t channels = grid.size(3), count = grid.size(0) * regions.count;
    parallel(count, grain(kGrain, double(regions.size * channels)), [&](int64_t begin, int64_t end) {
        VITRAIL_KERNELS(kRegionRoute).means(storage, grid_of(grid), regions, channels, to, begin, end);
    });
}

template <class T>
struct Choice {
    T score;
    int64_t region;
};

// As torch.topk has it: a number that is none is larger than all.
template <class T>
bool larger(T a, T b) {
    return a > b || (a != a && b == b);
}

// The largest first, of equals the one with the lower number.
template <class T>
void choose(const T* scores, int64_t count, int64_t topk, std::vector<Choice<T>>& best, int64_t* to) {
    constexpr int64_t kFew = 32;  // that are kept in order as numbers come
    best.clear();
    if (topk <= kFew) {
        for (int64_t i = 0; i < count; ++i) {
            if (int64_t(best.size()) == topk) {
                if (!larger(scores[i], best.back().score)) continue;
                best.pop_back();
            }
            size_t at = best.size();
            best.push_back({});
            for (; at > 0 && larger(scores[i], best[at - 1].score); --at) best[at] = best[at - 1];
            best[at] = {scores[i], i};
        }
    } else {
        for (int64_t i = 0; i < count; ++i) best.push_back({scores[i], i});
        std::partial_sort(best.begin(), best.begin() + topk, best.end(), [](const auto& a, const auto& b) {
            return larger(a.score, b.score) || (!larger(b.score, a.score) && a.region < b.region);
        });
    }
    for (int64_t i = 0; i < topk; ++i) to[i] = best[i].region;
}

template <class T>
void route(Storage storage, const T* q, const T* k, int64_t images, int64_t queries, int64_t keys,
           int64_t channels, int64_t topk, int64_t* to) {
    constexpr int64_t kRows = 24;  // query regions that are scored at a time
    const RegionRouteKernels& kernels = VITRAIL_KERNELS(kRegionRoute);
    const int64_t padded = (keys + kRegionPadding - 1) / kRegionPadding * kRegionPadding;
    AlignedBuffer turned(images * padded * channels * int64_t(sizeof(T)));
    parallel(images * padded / 4, grain(kGrain, double(4 * channels)), [&](int64_t begin, int64_t end) {
        kernels.turn(storage, k, keys, channels, turned.data, begin, end);
    });
    const int64_t blocks = (queries + kRows - 1) / kRows;
    parallel(images * blocks, grain(kGrain, double(keys * (channels + topk))),
             [&](int64_t begin, int64_t end) {
                 std::vector<T> scores(static_cast<size_t>(kRows * padded));
                 std::vector<Choice<T>> best;
                 for (int64_t i = begin; i < end; ++i) {
                     const int64_t image = i / blocks, first = i % blocks * kRows,
                                   rows = std::min(kRows, queries - first);
                     const int64_t query = image * queries + first;
                     kernels.scores(storage, q + query * channels, rows,
                                    static_cast<const T*>(turned.data) + image * padded * channels, keys,
                                    channels, scores.data());
                     for (int64_t r = 0; r < rows; ++r)
                         choose(scores.data() + r * padded, keys, topk, best, to + (query + r) * topk);
                 }
             });
}

struct OnCpu {
    static void route(const RegionRoute& a, const Tensor& q, const Tensor& k) {
        const int64_t size = a.storage == Storage::kFloat64 ? sizeof(double) : sizeof(float);
        const int64_t of_token = q.size(0) * q.size(3) * size;
        AlignedBuffer q_means(a.q_regions.count * of_token), k_means(a.k_regions.count * of_token);
        means_of(q, a.storage, a.q_regions, q_means.data);
        means_of(k, a.storage, a.k_regions, k_means.data);
        const auto run = [&](auto one) {
            using T = decltype(one);
            vitrail::route(a.storage, static_cast<const T*>(q_means.data),
                           static_cast<const T*>(k_means.data), q.size(0), a.q_regions.count,
                           a.k_regions.count, q.size(3), a.topk, a.routes);
        };
        a.storage == Storage::kFloat64 ? run(double()) : run(float());
    }
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(region_route, &vitrail::region_route<vitrail::OnCpu>)
