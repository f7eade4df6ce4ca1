// What connectivity_topk (checks, memory, threads) and its kernels (one per instruction set) agree on.
#pragma once

#include "../dispatch/backend.h"
#include "connectivity.h"

namespace vitrail {

struct ConnectivityTopk {
    Connectivity choice;
    Storage storage;
    const void* logits;               // (image, head, query, row)
    int64_t image, head, query, row;  // strides in elements
    int64_t heads, queries, slots;
    int64_t* out;  // contiguous (image, head, query, slot)
};

// Sizes in bytes, and how many tasks one image gives. Where all tokens are keys, the rows of one image serve
// all.
struct TopkPlan {
    int64_t rows, scratch;
    int64_t prepare_tasks, choose_tasks;
};

struct TopkBackend {
    TopkPlan (*plan)(const ConnectivityTopk&);
    // Prepares the basis rows of the images from `image` on: tasks [begin, end) of them all.
    void (*prepare)(const ConnectivityTopk&, int64_t image, void* rows, int64_t begin, int64_t end);
    void (*choose)(const ConnectivityTopk&, int64_t image, const void* rows, void* scratch, int64_t begin,
                   int64_t end);
};

VITRAIL_DECLARE_KERNELS(TopkBackend, kConnectivityTopk)

}  // namespace vitrail
