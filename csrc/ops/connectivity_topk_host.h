// vitrail::connectivity_topk on any device: checks and the output. A device says what it looks at before
// anything runs (`admit`), and how it chooses (`choose`).
#pragma once

#include "connectivity_host.h"
#include "connectivity_topk.h"

namespace vitrail {

template <class Device>
Tensor connectivity_topk(const Tensor& logits, const Tensor& basis, const Optional& candidates,
                         int64_t num_keys, int64_t num_coefficients, double coefficient_threshold,
                         double basis_threshold, double score_threshold) {
    constexpr Checks checks("connectivity_topk");
    ConnectivityTopk a = {};
    a.storage = checks.computed("logits", logits);
    if (logits.dim() != 4)
        checks.fail("logits must have 4 dimensions (B, heads, queries, n), got shape ", shape_of(logits));
    a.choice =
        checked_connectivity(checks, "logits", logits, logits.size(3), basis, candidates, num_keys,
                             num_coefficients, coefficient_threshold, basis_threshold, score_threshold);
    a.logits = logits.const_data_ptr();
    a.image = logits.stride(0);
    a.head = logits.stride(1);
    a.query = logits.stride(2);
    a.row = logits.stride(3);
    a.heads = logits.size(1);
    a.queries = logits.size(2);
    a.slots = num_keys > 0 ? num_keys : a.choice.keys;
    Tensor out = new_result(logits, {logits.size(0), a.heads, a.queries, a.slots}, ScalarType::Long);
    Device::admit(checks, a, logits, candidates);
    if (out.numel() == 0) return out;
    a.out = static_cast<int64_t*>(out.mutable_data_ptr());
    Device::choose(checks, a, logits, candidates);
    return out;
}

}  // namespace vitrail
