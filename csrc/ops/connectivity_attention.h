// What connectivity_attention (checks, memory, threads) and its kernels (one per instruction set) agree on.
#pragma once

#include "../dispatch/backend.h"
#include "connectivity.h"

namespace vitrail {

struct ConnectivityAttention {
    Connectivity choice;
    Storage storage;
    Tokens q, k, v, out;
    // In the type of computation. With a projection, queries go through it before they meet the compressed
    // keys.
    Tokens compressed;                              // (image, basis row)
    int64_t compressed_dim;                         // of a head
    const void* projection;                         // (compressed channel, channel), contiguous; null: none
    const void* offset;                             // (image, basis row, head)
    int64_t offset_image, offset_row, offset_head;  // strides in elements
    int64_t queries, tokens, heads, head_dim, value_dim;
    int64_t num_dense;   // queries, the first, that look at all keys ...
    int64_t num_pruned;  // ... and at so many keys of zeros with values of zeros
    double scale;
};

// Sizes in bytes, and how many tasks one image gives. Where all tokens are keys, the basis of one image
// serves all.
struct ConnectivityPlan {
    int64_t basis, packed_image, scratch;
    int64_t basis_tasks, pack_tasks, attend_tasks;
};

struct ConnectivityBackend {
    ConnectivityPlan (*plan)(const ConnectivityAttention&);
    // Each does tasks [begin, end) of the images from `image` on, whose results begin at `basis` and
    // `packed`.
    void (*prepare)(const ConnectivityAttention&, int64_t image, void* basis, int64_t begin, int64_t end);
    void (*pack)(const ConnectivityAttention&, int64_t image, void* packed, int64_t begin, int64_t end);
    void (*attend)(const ConnectivityAttention&, int64_t image, const void* basis, const void* packed,
                   void* scratch, int64_t begin, int64_t end);
};

VITRAIL_DECLARE_KERNELS(ConnectivityBackend, kConnectivityAttention)

}  // namespace vitrail
