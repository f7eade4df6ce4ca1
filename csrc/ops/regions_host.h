// Grids cut into regions, for the host sides of the operators that have them.
#pragma once

#include "host.h"
#include "routed_attention.h"

namespace vitrail {

inline Regions regions_of(const Checks& checks, const char* name, const Tensor& grid, const Sizes& size) {
    checks.extent(name, size);
    Regions r = {};
    r.grid_height = grid.size(1);
    r.grid_width = grid.size(2);
    r.height = size[0];
    r.width = size[1];
    r.size = r.height * r.width;
    r.down = (r.grid_height + r.height - 1) / r.height;
    r.across = (r.grid_width + r.width - 1) / r.width;
    r.count = r.down * r.across;
    return r;
}

}  // namespace vitrail
