// Activation functions on vectors.
#pragma once

#include "scalar.h"

namespace vitrail::VITRAIL_ISA {

// GELU, x Phi(x), with Phi(x) = 1/2 + x P(x^2): a polynomial in u = 2 (x / limit)^2 - 1, fitted for the least
// error of GELU up to |x| = limit, beyond which Phi is taken as 0 or 1. The error is 5e-7 for float (13
// terms).
template <int N>
VITRAIL_INLINE Vec<float, N> gelu(Vec<float, N> x) {
    constexpr float limit = 5.5f;
    const Vec<float, N> high = broadcast<float, N>(limit);
    x = maximum(broadcast<float, N>(-limit), x);  // further left GELU is zero
    const Vec<float, N> bounded = x < high ? x : high;
    const Vec<float, N> u = bounded * bounded * (2.0f / (limit * limit)) - 1.0f;
    Vec<float, N> p = u * -9.11749580e-4f + 2.59226527e-3f;
    p = p * u - 2.51820579e-3f;
    p = p * u + 2.47533714e-3f;
    p = p * u - 6.29272144e-3f;
    p = p * u + 1.14252817e-2f;
    p = p * u - 1.53732527e-2f;
    p = p * u + 2.00295451e-2f;
    p = p * u - 2.59418978e-2f;
    p = p * u + 3.21135938e-2f;
    p = p * u - 3.88046943e-2f;
    p = p * u + 4.77356051e-2f;
    p = p * u - 6.41719783e-2f;
    p = p * u + 1.28551945e-1f;
    return x * (bounded * p + 0.5f);
}

template <int N>
VITRAIL_INLINE Vec<double, N> gelu(Vec<double, N> x) {
    for (int i = 0; i < N; ++i) x[i] *= 0.5 * (1.0 + __builtin_erf(x[i] * 0.70710678118654752440));
    return x;
}

}  // namespace vitrail::VITRAIL_ISA
