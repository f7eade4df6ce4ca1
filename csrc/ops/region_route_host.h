// vitrail::region_route on any device: checks and the output. A device says how it chooses.
#pragma once

#include "region_route.h"
#include "regions_host.h"

namespace vitrail {

// What a device is given: grids of the same dtype and batch, the output is not empty.
struct RegionRoute {
    Storage storage;
    Regions q_regions, k_regions;
    int64_t topk;
    int64_t* routes;  // contiguous (image, region of q, place)
};

template <class Device>
Tensor region_route(const Tensor& q, const Tensor& k, int64_t topk, const Sizes& region_size,
                    const Sizes& kv_region_size) {
    constexpr Checks checks("region_route");
    RegionRoute a = {};
    a.storage = checks.computed("q", q);
    checks.grid("q", q, q, 1);
    checks.grid("k", k, q, 1);
    if (k.size(3) != q.size(3))
        checks.fail("k must have the channels of q, ", q.size(3), ", got ", k.size(3));
    a.q_regions = regions_of(checks, "region_size", q, region_size);
    a.k_regions = regions_of(checks, "kv_region_size", k, kv_region_size);
    if (topk < 1 || topk > a.k_regions.count)
        checks.fail("topk must lie between 1 and the number of key regions, ", a.k_regions.count, "; got ",
                    topk);
    a.topk = topk;
    Tensor routes = new_result(q, {q.size(0), a.q_regions.count, topk}, ScalarType::Long);
    if (routes.numel() == 0) return routes;
    a.routes = static_cast<int64_t*>(routes.mutable_data_ptr());
    Device::route(a, q, k);
    return routes;
}

}  // namespace vitrail
