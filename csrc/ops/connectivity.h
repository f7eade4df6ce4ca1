// How keys are chosen from a mixture of basis rows; plain data that hosts and kernels agree on.
#pragma once

#include "../core/tensors.h"

namespace vitrail {

struct Connectivity {
    Storage basis_storage;
    const void* basis;  // (row, token)
    int64_t basis_row, basis_token, rows, tokens;
    const void* candidates;  // (image, key): the tokens that are keys; null: all. As they came: not checked
    bool wide_candidates;    // int64, else int32
    int64_t candidates_image, candidates_key, keys;
    int64_t num_keys, num_coefficients;  // 0: by threshold
    double coefficient_threshold, basis_threshold, score_threshold;
    bool* wrong_candidate;  // set where a candidate names no token
};

}  // namespace vitrail
