// Routes of regions: checked on the way to where kernels read them, and turned around.
#pragma once

#include <cassert>

#include "../addressing/routed_regions.h"
#include "launch.h"
#include "tiles.h"

namespace vitrail::cuda {

struct Indices {
    const void* data;
    bool wide;  // int64
    int64_t size[3], stride[3];
    int64_t limit;  // indices are below it
};

__global__ void copy_indices(const __grid_constant__ Indices from, int32_t* to, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int64_t at = i / from.size[2] / from.size[1] * from.stride[0] +
                       i / from.size[2] % from.size[1] * from.stride[1] + i % from.size[2] * from.stride[2];
    const int64_t index =
        from.wide ? static_cast<const int64_t*>(from.data)[at] : static_cast<const int32_t*>(from.data)[at];
    assert(index >= 0 && index < from.limit && "index out of range");
    to[i] = int32_t(index);
}

// The slots that visit a block of keys, in order: a block of threads has an image, a warp one block of keys
// after the other.
__global__ void __launch_bounds__(1024)
    invert_routes(const int32_t* routes, Place slots, Place blocks, int32_t* begins, int32_t* visitors) {
    const int64_t image = blockIdx.x;
    routes += image * slots;
    begins += image * (blocks + 1);
    visitors += image * slots;
    const Place warps = Place(blockDim.x) / kWarp;
    for (Place block = warp(); block < blocks; block += warps) {
        Place count = 0;
        for (Place first = 0; first < slots; first += kWarp) {
            const Place slot = first + lane();
            count += __popc(__ballot_sync(0xffffffffu, slot < slots && routes[slot] == block));
        }
        if (lane() == 0) begins[block + 1] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        begins[0] = 0;
        for (Place block = 0; block < blocks; ++block) begins[block + 1] += begins[block];
    }
    __syncthreads();
    for (Place block = warp(); block < blocks; block += warps) {
        int32_t* to = visitors + begins[block];
        for (Place first = 0; first < slots; first += kWarp) {
            const Place slot = first + lane();
            const bool visits = slot < slots && routes[slot] == block;
            const unsigned all = __ballot_sync(0xffffffffu, visits);
            if (visits) to[__popc(all & ((1u << lane()) - 1u))] = slot;
            to += __popc(all);
        }
    }
}

// A contiguous int32 copy of a tensor of three dimensions.
inline Tensor checked_indices(const Tensor& from, int64_t limit) {
    constexpr int kThreads = 256;
    Tensor to = tensors::new_empty(from, {from.size(0), from.size(1), from.size(2)}, ScalarType::Int);
    const Indices indices = {from.const_data_ptr(),
                             from.scalar_type() == ScalarType::Long,
                             {from.size(0), from.size(1), from.size(2)},
                             {from.stride(0), from.stride(1), from.stride(2)},
                             limit};
    Launcher{from}(copy_indices, (from.numel() + kThreads - 1) / kThreads, kThreads, 0, indices,
                   static_cast<int32_t*>(to.mutable_data_ptr()), from.numel());
    return to;
}

// Which slots visit a block of keys: where its list begins, (image, block + 1), and the lists, (image, slot).
struct Visitors {
    Tensor begins, slots;
};

inline Visitors list_visitors(const int32_t* routes, const RoutedRegions<float>& regions, const Tensor& q) {
    Tensor begins = tensors::new_empty(q, {q.size(0), regions.key_blocks() + 1}, ScalarType::Int);
    Tensor slots = tensors::new_empty(q, {q.size(0), regions.slots()}, ScalarType::Int);
    Launcher{q}(invert_routes, q.size(0), 1024, 0, routes, regions.slots(), regions.key_blocks(),
                static_cast<int32_t*>(begins.mutable_data_ptr()),
                static_cast<int32_t*>(slots.mutable_data_ptr()));
    return {begins, slots};
}

}  // namespace vitrail::cuda
