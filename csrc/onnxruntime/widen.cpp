#define VITRAIL_ISA portable
#include "../standalone/widen.h"

#include "../core/scalar.h"
#include "call.h"

namespace vitrail::standalone {

Tensor widened(const Tensor& t) {
    if (t.scalar_type() == ScalarType::Float) return t;
    const Tensor to = new_empty(t, sizes_of(t), ScalarType::Float);
    const auto run = [&](auto s) {
        using S = decltype(s);
        const S* const from = static_cast<const S*>(t.const_data_ptr());
        float* const numbers = static_cast<float*>(to.mutable_data_ptr());
        for (int64_t i = 0; i < t.numel(); i += 4)
            portable::narrow_some(numbers + i, portable::widen_some(from + i, t.numel() - i), t.numel() - i);
    };
    if (t.scalar_type() == ScalarType::BFloat16)
        run(portable::BFloat16());
    else if (t.scalar_type() == ScalarType::Half)
        run(portable::Float16());
    else
        throw std::invalid_argument("weights, biases and the basis must be float32, float16 or bfloat16");
    return to;
}

}  // namespace vitrail::standalone
