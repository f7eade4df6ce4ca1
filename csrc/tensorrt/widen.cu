#include "../cuda/launch.h"
#include "../cuda/tiles.h"
#include "../standalone/widen.h"

namespace vitrail {
namespace cuda {

template <class S>
__global__ void widen_numbers(const S* from, float* to, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) to[i] = widen(from[i]);
}

}  // namespace cuda

namespace standalone {

Tensor widened(const Tensor& t) {
    constexpr int kThreads = 256;
    if (t.scalar_type() == ScalarType::Float) return t;
    const Tensor to = new_empty(t, sizes_of(t), ScalarType::Float);
    const auto run = [&](auto s) {
        using S = decltype(s);
        cuda::Launcher{t}(cuda::widen_numbers<S>, (t.numel() + kThreads - 1) / kThreads, kThreads, 0,
                          static_cast<const S*>(t.const_data_ptr()),
                          static_cast<float*>(to.mutable_data_ptr()), t.numel());
    };
    if (t.scalar_type() == ScalarType::BFloat16)
        run(cuda::BFloat16());
    else
        run(cuda::Float16());
    return to;
}

}  // namespace standalone
}  // namespace vitrail
