// Which of the attention kernels fits.
#pragma once

#include "attention.h"
#include "launch.h"

namespace vitrail::cuda {

// Calls action(S(), width) with the type of the numbers and the channels that tiles have room for.
template <class Action>
auto with_tiles(Storage storage, int64_t channels, Action action) {
    const auto with_width = [&](auto s) {
        if (channels <= 32) return action(s, std::integral_constant<int, 32>());
        return action(s, std::integral_constant<int, 64>());
    };
    if (storage == Storage::kBFloat16) return with_width(BFloat16());
    if (storage == Storage::kFloat16) return with_width(Float16());
    return with_width(float());
}

// Warps for some rows, as far as one block of threads has them.
inline int warps_for(int64_t rows) {
    return int((std::min<int64_t>(rows, kQueryBlock) + kWarpRows - 1) / kWarpRows);
}

}  // namespace vitrail::cuda
