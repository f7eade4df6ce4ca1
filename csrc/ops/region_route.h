// What region_route and its kernels (one table per instruction set) agree on.
#pragma once

#include "routed_attention.h"

namespace vitrail {

// Rows of scores are padded to a multiple of this, which whole vectors of any type and instruction set
// divide.
constexpr int64_t kRegionPadding = 16;

struct RegionRouteKernels {
    // Means of the regions [begin, end) of all images, each `channels` numbers of the type of sums.
    void (*means)(Storage, const Grid&, const Regions&, int64_t channels, void* to, int64_t begin,
                  int64_t end);
    // Turns the means of `count` regions to [channel][region, padded with zeros]: groups [begin, end) of four
    // regions of all images.
    void (*turn)(Storage, const void* means, int64_t count, int64_t channels, void* to, int64_t begin,
                 int64_t end);
    // Products of the means of `rows` regions with the turned means of `count` others; rows of them are
    // padded.
    void (*scores)(Storage, const void* means, int64_t rows, const void* turned, int64_t count,
                   int64_t channels, void* to);
};

VITRAIL_DECLARE_KERNELS(RegionRouteKernels, kRegionRoute)

}  // namespace vitrail
