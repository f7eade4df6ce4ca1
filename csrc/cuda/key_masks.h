// Addressing policy of sparse attention on a GPU: a block of queries looks at all keys, and a bit says
// whether a query has a key in its list.
//
// Tiles are multiplied whole: a row of a tile in shared memory serves 64 queries, one that is gathered for a
// list serves one. Bits take less memory than the lists that they are made from where these name more than
// one in 64 of the keys (int32: one in 32).
#pragma once

#include "../addressing/block_policy.h"
#include "../ops/sparse_attention.h"
#include "tiles.h"

namespace vitrail::cuda {

class KeyMasks : public OneVisit<float>, public Unbiased {
  public:
    KeyMasks(const SparseAttention& a, uint32_t* bits, int32_t* repeats)
        : bits_(bits),
          repeats_(repeats),
          keys_(a.keys),
          wide_(a.wide_keys),
          strides_{a.keys_image, a.keys_head, a.keys_query, a.keys_slot},
          slots_(Place(a.slots)),
          queries_(Place(a.queries)),
          tokens_(Place(a.tokens)),
          heads_(Place(a.heads)),
          parts_((queries_ + kQueryBlock - 1) / kQueryBlock) {}

    VITRAIL_INLINE Place query_regions() const { return 1; }
    VITRAIL_INLINE Place parts() const { return parts_; }
    VITRAIL_INLINE Place key_blocks() const { return 1; }
    VITRAIL_INLINE Place largest_key_block() const { return tokens_; }
    VITRAIL_INLINE Place largest_query_region() const { return queries_; }
    VITRAIL_INLINE Place slots() const { return 1; }
    VITRAIL_INLINE Rectangle query_region(Place) const { return {0, 0, 1, queries_}; }
    VITRAIL_INLINE bool query_at(Place, Place y, Place x, Query& to) const {
        to = {y, x, x};
        return true;
    }
    VITRAIL_INLINE Place keys_in(Place) const { return tokens_; }
    VITRAIL_INLINE Key key(Place, Place i) const { return {0, i, 0}; }

    // Words of 32 bits for a query, two for each tile of 64 keys, and some even where there is no key.
    VITRAIL_INLINE static int64_t words(int64_t tokens) { return tokens / 64 * 2 + 2; }
    VITRAIL_INLINE uint32_t* bits(int64_t image, Place head, Place query) const {
        return bits_ + ((image * heads_ + head) * queries_ + query) * words(tokens_);
    }

    // Whether a list of the head names a key more than once.
    VITRAIL_INLINE int32_t& repeats(int64_t image, Place head) const {
        return repeats_[image * heads_ + head];
    }

    VITRAIL_INLINE Place heads() const { return heads_; }
    VITRAIL_INLINE Place queries() const { return queries_; }
    VITRAIL_INLINE Place tokens() const { return tokens_; }
    VITRAIL_INLINE Place list_slots() const { return slots_; }
    VITRAIL_INLINE int64_t listed(int64_t image, Place head, Place query, Place slot) const {
        const int64_t at =
            image * strides_[0] + head * strides_[1] + query * strides_[2] + slot * strides_[3];
        return wide_ ? static_cast<const int64_t*>(keys_)[at] : static_cast<const int32_t*>(keys_)[at];
    }

  private:
    uint32_t* bits_;
    int32_t* repeats_;
    const void* keys_;
    bool wide_;  // int64
    int64_t strides_[4];
    Place slots_, queries_, tokens_, heads_, parts_;
};

// How often the lists of some queries name each of 64 keys. A key that is named n times is attended to n
// times: its tile is taken in n rounds, each with those keys that are left.
class RepeatCounts {
    static constexpr int kKeys = 64;

  public:
    static constexpr int bytes(int queries) { return (queries * kKeys + 1) * int(sizeof(uint32_t)); }

    VITRAIL_DEVICE RepeatCounts(void* memory, int queries)
        : highest_(static_cast<uint32_t*>(memory)), counts_(highest_ + 1), queries_(queries) {}

    // find(i) is the number of a query, or -1; `first` the first of the keys. Returns the number of rounds.
    template <class Find>
    VITRAIL_DEVICE int fill(const KeyMasks& masks, Place image, Place head, Place first, Find find) const {
        for (int i = int(threadIdx.x); i <= queries_ * kKeys; i += int(blockDim.x)) highest_[i] = 0;
        __syncthreads();
        for (int i = warp(); i < queries_; i += int(blockDim.x) / kWarp) {
            const Place query = find(i);
            if (query < 0) continue;
            for (Place slot = lane(); slot < masks.list_slots(); slot += kWarp) {
                const int64_t key = masks.listed(image, head, query, slot) - first;
                if (key >= 0 && key < kKeys)
                    atomicMax(highest_, atomicAdd(counts_ + i * kKeys + int(key), 1u) + 1u);
            }
        }
        __syncthreads();
        return int(*highest_);
    }

    // Keeps what is left in a round.
    VITRAIL_DEVICE void keep(int round, uint32_t* kept) const {
        for (int i = int(threadIdx.x); i < 2 * queries_; i += int(blockDim.x)) {
            uint32_t bits = 0;
            for (int key = 0; key < 32; ++key)
                bits |= uint32_t(counts_[i * 32 + key] > uint32_t(round)) << key;
            kept[i] = bits;
        }
        __syncthreads();
    }

  private:
    uint32_t *const highest_, *const counts_;
    const int queries_;
};

}  // namespace vitrail::cuda
