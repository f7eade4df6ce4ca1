// The packed form of a block of keys and values, one head.
//
// Keys come in groups of g <= lanes, each group a panel [units of head_dim][g], so that one vector holds
// G = lanes / g units of g keys: blocks of few keys waste no lanes, and need not be merged first. A last
// group of very few keys, for which even that would be a waste, is spare: its keys are rows of units. After
// the panels come the values, as rows [key][value_dim padded to a vector], two keys to a row where they are
// multiplied in pairs.
#pragma once

#include "panels.h"

namespace vitrail::VITRAIL_ISA {

// Keys per panel: a power of two from four lanes to a whole vector, which `keys` keys fill best.
template <class T>
VITRAIL_INLINE int group_size(int64_t keys) {
    int g = 4;
    while (g < kLanes<T> && g < keys) g *= 2;
    return g;
}

// Sizes in numbers of E, for up to `keys` keys.
template <class E, int G>
struct BlockLayout {
    using T = typename Product<E>::T;
    static constexpr int kDepth = Product<E>::kDepth;
    static constexpr int kGroup = kLanes<T> / G;
    static constexpr int kSpare = G == 1 ? kGroup / 4 : 0;  // a group of up to so many keys is spare

    int64_t head_dim, value_dim, keys, units, panel, spare_row, value_row;

    VITRAIL_INLINE BlockLayout(int64_t head_dim, int64_t value_dim, int64_t keys)
        : head_dim(head_dim),
          value_dim(value_dim),
          keys(keys),
          units(round_up((head_dim + kDepth - 1) / kDepth, G)),
          panel(units * kGroup * kDepth),
          spare_row(round_up(units, kLanes<T>) * kDepth),
          value_row(round_up(value_dim, kLanes<T>)) {}

    VITRAIL_INLINE int64_t groups() const { return (keys + kGroup - 1) / kGroup; }
    VITRAIL_INLINE int64_t values() const { return groups() * panel + kSpare * spare_row; }
    VITRAIL_INLINE int64_t size() const { return values() + round_up(keys, kDepth) * value_row; }
};

// Packs keys [first, first + count) of a block, count <= kGroup, channels from `k_channel` and `v_channel`
// on.
template <class S, int G>
VITRAIL_OUTLINE void pack_group(const BlockLayout<Packed<S>, G>& layout, const void* const* k,
                                int64_t k_channel, const void* const* v, int64_t v_channel, int64_t first,
                                int count, Packed<S>* block) {
    using T = Compute<S>;
    using E = Packed<S>;
    using Layout = BlockLayout<E, G>;
    constexpr int g = Layout::kGroup, depth = Layout::kDepth;
    const auto at = [](const void* token, int64_t channel) {
        return token ? static_cast<const S*>(token) + channel : nullptr;
    };
    E* const panel = block + first / g * layout.panel;
    if (count <= Layout::kSpare) {
        for (int key = 0; key < count; ++key)
            pack_units(at(k[key], k_channel), layout.head_dim, T(1), panel + key * layout.spare_row,
                       layout.spare_row / depth);
    } else {
        for (int key = 0; key < count; key += 4) {
            const S* rows[4];  // lanes without a key may hold anything
            for (int i = 0; i < 4; ++i) rows[i] = at(k[key + i < count ? key + i : key], k_channel);
            pack_four_columns<E>(rows, layout.head_dim, layout.units, reinterpret_cast<T*>(panel) + key, g);
        }
    }
    E* row = block + layout.values() + first * layout.value_row;
    for (int key = 0; key < count; key += depth, row += depth * layout.value_row) {
        if constexpr (depth == 1) {
            pack_row(at(v[key], v_channel), layout.value_dim, T(1), row, layout.value_row);
        } else {
            const S* const pair[2] = {at(v[key], v_channel),
                                      key + 1 < count ? at(v[key + 1], v_channel) : nullptr};
            pack_pair(pair, layout.value_dim, row, layout.value_row);
        }
    }
}

}  // namespace vitrail::VITRAIL_ISA
