// What the host sides of the operators share whose tokens are a list, with keys of their own for each query.
#pragma once

#include "host.h"

namespace vitrail {

// Checks queries, keys and values, and fills in what is common to the operators.
template <class Arguments>
void set_tokens(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads,
                double scale, Arguments& a) {
    a.storage = checks.computed("q", q);
    checks.heads(num_heads);
    checks.tokens("q", q, q, num_heads);
    checks.tokens("k", k, q, num_heads);
    checks.tokens("v", v, q, num_heads);
    if (k.size(2) != q.size(2))
        checks.fail("k must have the channels of q, ", q.size(2), ", got ", k.size(2));
    if (v.size(1) != k.size(1)) checks.fail("v must have the tokens of k, ", k.size(1), ", got ", v.size(1));
    checks.channels(q.size(2) / num_heads, v.size(2) / num_heads);
    a.q = tokens_of(q);
    a.k = tokens_of(k);
    a.v = tokens_of(v);
    a.queries = q.size(1);
    a.tokens = k.size(1);
    a.heads = num_heads;
    a.head_dim = q.size(2) / num_heads;
    a.value_dim = v.size(2) / num_heads;
    a.scale = scale;
}

}  // namespace vitrail
