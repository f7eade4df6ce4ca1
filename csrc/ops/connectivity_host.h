// Checks of the arguments that say how keys are chosen, for the operators that choose.
#pragma once

#include "connectivity.h"
#include "host.h"

namespace vitrail {

// For the images of `like`, an argument of that name, on its device.
inline Connectivity checked_connectivity(const Checks& checks, const char* name, const Tensor& like,
                                         int64_t rows, const Tensor& basis, const Optional& candidates,
                                         int64_t num_keys, int64_t num_coefficients,
                                         double coefficient_threshold, double basis_threshold,
                                         double score_threshold) {
    Connectivity c = {};
    checks.placed("basis", basis, like, name);
    c.basis_storage = checks.storage("basis", basis);
    if (basis.dim() != 2 || basis.size(0) != rows || rows < 1)
        checks.fail("basis must have one row per logit, shape (", rows, " (at least 1), tokens), got ",
                    shape_of(basis));
    c.basis = basis.const_data_ptr();
    c.basis_row = basis.stride(0);
    c.basis_token = basis.stride(1);
    c.rows = rows;
    c.keys = c.tokens = basis.size(1);
    if (candidates) {
        checks.placed("candidates", *candidates, like, name);
        if (candidates->scalar_type() != ScalarType::Int && candidates->scalar_type() != ScalarType::Long)
            checks.fail("candidates must be int32 or int64, got ", name_of(candidates->scalar_type()));
        if (candidates->dim() != 2 || candidates->size(0) != like.size(0))
            checks.fail("candidates must have shape (B, keys) = (", like.size(0), ", keys), got ",
                        shape_of(*candidates));
        c.candidates = candidates->const_data_ptr();
        c.wide_candidates = candidates->scalar_type() == ScalarType::Long;
        c.candidates_image = candidates->stride(0);
        c.candidates_key = candidates->stride(1);
        c.keys = candidates->size(1);
    }
    if (c.keys > kMaxExtent / 2 || rows > kMaxExtent / 2)
        checks.fail("basis must have at most ", kMaxExtent / 2, " rows and keys, got ", rows, " and ",
                    c.keys);
    // in floating point because it may overflow
    if (8.0 * double(rows) * double(c.keys + 16) > 0x1p62)
        checks.fail("basis and candidates make too large a matrix, ", rows, " x ", c.keys);
    if (num_keys < 0 || num_keys > c.keys)
        checks.fail("num_keys must lie between 0 and the number of keys, ", c.keys, ", got ", num_keys);
    if (num_coefficients < 0) checks.fail("num_coefficients must not be negative, got ", num_coefficients);
    c.num_keys = num_keys;
    c.num_coefficients = num_coefficients;
    c.coefficient_threshold = coefficient_threshold;
    c.basis_threshold = basis_threshold;
    c.score_threshold = score_threshold;
    return c;
}

template <class Index>
void refuse_wrong_candidate(const Checks& checks, const Connectivity& c, const Tensor& candidates) {
    const Index* data = static_cast<const Index*>(candidates.const_data_ptr());
    for (int64_t b = 0; b < candidates.size(0); ++b)
        for (int64_t j = 0; j < candidates.size(1); ++j) {
            const int64_t token = data[b * c.candidates_image + j * c.candidates_key];
            if (token < 0 || token >= c.tokens)
                checks.fail<std::out_of_range>("candidates[", b, ", ", j, "] is ", token,
                                               ", but the basis has ", c.tokens, " tokens: allowed are 0 to ",
                                               c.tokens - 1);
        }
}

inline void refuse_wrong_candidate(const Checks& checks, const Connectivity& c, const Tensor& candidates) {
    if (c.wide_candidates)
        refuse_wrong_candidate<int64_t>(checks, c, candidates);
    else
        refuse_wrong_candidate<int32_t>(checks, c, candidates);
}

// Names the candidate that a kernel found to be wrong.
[[noreturn]] inline void refuse_candidates(const Checks& checks, const Connectivity& c,
                                           const Tensor& candidates) {
    refuse_wrong_candidate(checks, c, candidates);
    checks.fail("candidates changed while they were read");
}

}  // namespace vitrail
