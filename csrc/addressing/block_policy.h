// What every addressing policy of block attention shares.
//
// A policy answers these questions, and nothing else in the library knows the answers: how many regions of
// queries and blocks of keys an image has, which tokens they cover, which blocks of keys a region visits,
// what is added to the scores, and which queries share keys. A CPU asks for tokens in rows, one after the
// other; a thread of a GPU for the one that it is about to load.
#pragma once

#include "../core/parts.h"
#include "rectangle.h"

namespace vitrail::VITRAIL_ISA {

// Where a query lies, and its place in its window where scores are biased by place.
struct Query {
    Place row, column, place;
};

// Where a key lies: on the grid of keys (source 0), or in what an operator has besides it (source 1).
struct Key {
    Place row, column;
    int source;
};

// A slot is a visit of a region of queries: from whom, to which block of keys, and how much it counts. Here a
// region visits one block of keys, its own.
template <class T>
struct OneVisit {
    VITRAIL_INLINE Place visits() const { return 1; }  // of one region of queries
    VITRAIL_INLINE bool weighted() const { return false; }
    VITRAIL_INLINE Place slot(Place region, Place) const { return region; }
    VITRAIL_INLINE Place visitor(Place slot) const { return slot; }
    VITRAIL_INLINE Place visited(int64_t, Place slot) const { return slot; }
    VITRAIL_INLINE T weight(int64_t, Place) const { return T(1); }
};

// Nothing is added to scores.
struct Unbiased {
    VITRAIL_INLINE bool biased() const { return false; }
    template <class Visit>
    VITRAIL_INLINE void each_bias(Place, Place, Place, Visit) const {}
    VITRAIL_INLINE int64_t bias_row(Place, Place) const { return 0; }
    VITRAIL_INLINE Place bias_column(Place, Place) const { return 0; }
};

// A region of queries is cut into blocks, `parts()` of them.
template <class Policy>
VITRAIL_INLINE Place query_blocks(const Policy& policy) {
    return policy.query_regions() * policy.parts();
}

// Calls visit(block of keys, weight, slot) for each block of keys that the queries of a block look at.
template <class Policy, class Visit>
VITRAIL_INLINE void for_each_visit(const Policy& policy, int64_t image, Place block, Visit visit) {
    const Place region = block / policy.parts();
    for (Place i = 0; i < policy.visits(); ++i) {
        const Place slot = policy.slot(region, i);
        visit(policy.visited(image, slot), policy.weight(image, slot), slot);
    }
}

// Writes the queries of a block; returns how many.
template <class Policy>
VITRAIL_OUTLINE int list_queries(const Policy& policy, Place block, Query* to) {
    const Place region = block / policy.parts(), part = block % policy.parts();
    const Rectangle rectangle = policy.query_region(region);
    const Place first = part_begin(rectangle.size(), policy.parts(), part);
    const Place end = part_begin(rectangle.size(), policy.parts(), part + 1);
    int n = 0;
    rectangle.each(first, end - first,
                   [&](Place, Place y, Place x) { n += policy.query_at(region, y, x, to[n]); });
    return n;
}

// The i-th token of a region, or of a block: whether it is a query, and where.
template <class Policy>
VITRAIL_INLINE bool find_in_region(const Policy& policy, Place region, Place i, Query& to) {
    return policy.query_region(region).at(
        i, [&](Place y, Place x) { return policy.query_at(region, y, x, to); });
}
template <class Policy>
VITRAIL_INLINE bool find_query(const Policy& policy, Place block, Place i, Query& to) {
    const Place region = block / policy.parts(), part = block % policy.parts();
    const Place size = policy.query_region(region).size();
    const Place at = part_begin(size, policy.parts(), part) + i;
    return at < part_begin(size, policy.parts(), part + 1) && find_in_region(policy, region, at, to);
}

}  // namespace vitrail::VITRAIL_ISA
