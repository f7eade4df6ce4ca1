// Activation functions on vectors.
#pragma once

#include "scalar.h"

namespace vitrail::VITRAIL_ISA {

// GELU, x Phi(x), with Phi(x) = 1/2 + x P(x^2): P is a polynomial in u = 2 (x / limit)^2 - 1, fitted for the
// least error of GELU up to |x| = limit, beyond which Phi is taken as 0 or 1.
template <class S>
struct GeluFit {  // the error is 5e-7
    static constexpr float kLimit = 5.5f;
    static constexpr float kTerms[] = {-9.11749580e-4f, 2.59226527e-3f, -2.51820579e-3f, 2.47533714e-3f,
                                       -6.29272144e-3f, 1.14252817e-2f, -1.53732527e-2f, 2.00295451e-2f,
                                       -2.59418978e-2f, 3.21135938e-2f, -3.88046943e-2f, 4.77356051e-2f,
                                       -6.41719783e-2f, 1.28551945e-1f};
};
template <>
struct GeluFit<BFloat16> {  // 3e-5, a hundredth of what the result is rounded by
    static constexpr float kLimit = 4.5f;
    static constexpr float kTerms[] = {3.3536949e-3f,   -9.32853832e-3f, 1.22085164e-2f,
                                       -1.67440441e-2f, 2.76294063e-2f,  -4.05557677e-2f,
                                       5.48185676e-2f,  -7.71719601e-2f, 1.56902113e-1f};
};

// `S` is the type that the result is stored in.
template <class S, int N>
VITRAIL_INLINE Vec<float, N> gelu(Vec<float, N> x) {
    using Fit = GeluFit<S>;
    constexpr float limit = Fit::kLimit;
    const Vec<float, N> high = broadcast<float, N>(limit);
    x = maximum(broadcast<float, N>(-limit), x);  // further left GELU is zero
    const Vec<float, N> bounded = x < high ? x : high;
    const Vec<float, N> u = bounded * bounded * (2.0f / (limit * limit)) - 1.0f;
    Vec<float, N> p = broadcast<float, N>(Fit::kTerms[0]);
    for (int i = 1; i < int(sizeof(Fit::kTerms) / sizeof(float)); ++i) p = p * u + Fit::kTerms[i];
    return x * (bounded * p + 0.5f);
}

template <class S, int N>
VITRAIL_INLINE Vec<double, N> gelu(Vec<double, N> x) {
    for (int i = 0; i < N; ++i) x[i] *= 0.5 * (1.0 + __builtin_erf(x[i] * 0.70710678118654752440));
    return x;
}

}  // namespace vitrail::VITRAIL_ISA
