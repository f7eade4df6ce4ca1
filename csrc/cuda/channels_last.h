// Four neighbouring channels of maps and rows, and what is done to numbers on their way.
#pragma once

#include "../core/tensors.h"
#include "simt.h"

namespace vitrail::cuda {

constexpr float kRootHalf = 0.70710678f;

VITRAIL_DEVICE float gelu(float x) {
    return 0.5f * x * (1.0f + erff(kRootHalf * x));
}

// Numbers that are loaded at once.
template <class S>
struct alignas(4 * sizeof(S)) Four {
    S x[4];
};

// Of `count` channels, as far as there are four; zeros past them. `aligned`: all four may be loaded at once.
template <class S>
VITRAIL_DEVICE Four<S> load_four(const S* from, int count, bool aligned) {
    if (aligned && count >= 4) {
#if defined(VITRAIL_EMULATE)
        if (reinterpret_cast<uintptr_t>(from) % sizeof(Four<S>)) std::abort();
#endif
        return *reinterpret_cast<const Four<S>*>(from);
    }
    Four<S> to = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < count) to.x[i] = from[i];
    return to;
}

// Whether all fours of some memory with these strides are where they can be loaded at once.
template <class S>
bool fours(const void* data, std::initializer_list<int64_t> strides) {
    bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(Four<S>) == 0;
    for (int64_t stride : strides) aligned = aligned && stride % 4 == 0;
    return aligned;
}

// Calls action(S()) for the type of the numbers.
template <class Action>
void with_numbers(Storage storage, Action action) {
    if (storage == Storage::kBFloat16) return action(BFloat16());
    if (storage == Storage::kFloat16) return action(Float16());
    action(float());
}

}  // namespace vitrail::cuda
