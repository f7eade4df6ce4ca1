// Between an addressing policy and the drivers of block attention: where tokens are in memory.
#pragma once

#include "../addressing/block_policy.h"
#include "block_arguments.h"
#include "panels.h"

namespace vitrail::VITRAIL_ISA {

// A token is the address of its first channel; null where it is a row of zeros.
VITRAIL_INLINE void* token(const Grid& grid, int64_t element, int64_t image, int64_t row, int64_t column) {
    if (!grid.data) return nullptr;
    const int64_t offset = image * grid.image + row * grid.row + column * grid.column;
    return static_cast<char*>(grid.data) + offset * element;
}

VITRAIL_OUTLINE void find_queries(const Grid& grid, int64_t element, int64_t image, const Query* queries,
                                  int count, void** to) {
    for (int i = 0; i < count; ++i) to[i] = token(grid, element, image, queries[i].row, queries[i].column);
}

VITRAIL_OUTLINE void find_keys(const Grid (&grids)[2], int64_t element, int64_t image, const Key* keys,
                               int64_t count, void** to) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = token(grids[keys[i].source], element, image, keys[i].row, keys[i].column);
}

// The keys of all blocks that a block of queries visits, one after the other; returns how many.
template <class Policy>
VITRAIL_OUTLINE int64_t visited_keys(const Policy& policy, int64_t image, int64_t block, Key* to) {
    int64_t n = 0;
    for_each_visit(policy, image, block, [&](int64_t key_block, auto, int64_t) {
        const int64_t count = policy.keys_in(key_block);
        policy.keys(key_block, 0, count, to + n);
        n += count;
    });
    return n;
}

// What is added to the scores of a query with the keys of a block: copied from the tables of all heads, or
// added to the table of one.
template <class T, class Policy>
VITRAIL_OUTLINE void copy_bias(const Policy& policy, const BlockAttention& a, int64_t head,
                               const Query& query, int64_t block, T* to) {
    const T* const table = static_cast<const T*>(a.bias);
    policy.each_bias(head, query.place, block, [&](int64_t key, int64_t at, int64_t count) {
        int64_t i = 0;
        for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + key + i, load(table + at + i));
        for (; i < count; ++i) to[key + i] = table[at + i];
    });
}

template <class T, class Policy>
VITRAIL_OUTLINE void add_bias(const Policy& policy, const T* from, const Query& query, int64_t block,
                              T* table) {
    policy.each_bias(0, query.place, block, [&](int64_t key, int64_t at, int64_t count) {
        for (int64_t i = 0; i < count; ++i) table[at + i] += from[key + i];
    });
}

// Parts of a block of memory, one after the other, aligned to cache lines. Without memory it only counts.
class Scratch {
  public:
    VITRAIL_INLINE explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

    template <class X>
    VITRAIL_INLINE X* take(int64_t count) {
        X* const part = memory_ ? reinterpret_cast<X*>(memory_ + size_) : nullptr;
        size_ += round_up(count * int64_t(sizeof(X)), 64);
        return part;
    }
    VITRAIL_INLINE int64_t size() const { return size_; }

  private:
    char* const memory_;
    int64_t size_ = 0;
};

}  // namespace vitrail::VITRAIL_ISA
