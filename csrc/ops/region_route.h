// What region_route and its kernels (one table per instruction set) agree on.
#pragma once

#include "routed_attention.h"

namespace vitrail {

struct RegionRouteKernels {
    // Means of the regions [begin, end) of all images, each `channels` numbers of the type of sums.
    void (*means)(Storage, const Grid&, const Regions&, int64_t channels, void* to, int64_t begin,
                  int64_t end);
    // Products of one region's mean with `count` others, which lie one after the other.
    void (*scores)(Storage, const void* query, const void* keys, int64_t channels, int64_t count, void* to);
};

VITRAIL_DECLARE_KERNELS(RegionRouteKernels, kRegionRoute)

}  // namespace vitrail
