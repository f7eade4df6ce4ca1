// Between an addressing policy and the drivers of block attention: tokens, and where they are in memory.
//
// An addressing policy (see addressing/) answers these questions, and nothing else in the library knows the
// answers: how many blocks of queries and of keys an image has, which tokens a block covers, which blocks of
// keys a block of queries visits, what is added to the scores, and which queries share keys.
#pragma once

#include "block_arguments.h"
#include "panels.h"

namespace vitrail::VITRAIL_ISA {

// Where a query lies, and its place in its window where scores are biased by place.
struct Query {
    int64_t row, column, place;
};

// Where a key lies: on the grid of keys (source 0), or in what an operator has besides it (source 1).
struct Key {
    int64_t row, column;
    int source;
};

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
    policy.for_each_visit(image, block, [&](int64_t key_block, auto, int64_t) {
        const int64_t count = policy.keys_in(key_block);
        policy.keys(key_block, 0, count, to + n);
        n += count;
    });
    return n;
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
