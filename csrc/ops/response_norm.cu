// vitrail::response_norm on a GPU.
//
// The numbers are read twice and written once: the first kernel sums squares of what the activation gives,
// the last one activates again, which is cheaper than to keep it.
#include "../core/parts.h"
#include "../cuda/channels_last.h"
#include "../cuda/launch.h"
#include "../cuda/tiles.h"
#include "../dispatch/registration.h"
#include "activation_host.h"

namespace vitrail {
namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
// Channels of a block of threads, four for each lane.
constexpr int kChannels = 4 * kWarp;
// Tokens of a block: results do not depend on the number of images.
constexpr int kTokens = 64;
// Loads of a thread that are under way together.
constexpr int kLoads = 4;

struct ResponseNorm {
    Tokens x, out;
    int64_t images;
    Place tokens, channels;
    Place parts, columns;  // blocks of threads for the tokens and the channels of an image
    const float* weight;
    double eps;
    bool activates, aligned;
    float* squares;  // sums of parts, (images, parts, channels)
    float* factors;  // (images, channels)
};

// Which tokens and channels a thread has: every kWarps-th token, and four channels.
struct Share {
    int64_t image;
    Place part, channel, token, end;
    int count;  // of the four channels

    VITRAIL_DEVICE explicit Share(const ResponseNorm& a) {
        unsigned block = blockIdx.x;
        channel = Place(block % unsigned(a.columns)) * kChannels + 4 * lane();
        block /= unsigned(a.columns);
        part = Place(block % unsigned(a.parts));
        image = block / unsigned(a.parts);
        token = part * kTokens + warp();
        end = part + 1 < a.parts ? (part + 1) * kTokens : a.tokens;
        count = channel < a.channels ? a.channels - channel : 0;
    }
};

template <class S>
VITRAIL_DEVICE S* at(const Tokens& t, const Share& s, Place token) {
    return static_cast<S*>(t.data) + s.image * t.image + token * t.token + s.channel;
}

// Calls action(token, numbers) for the tokens of a thread, with four numbers each.
template <class S, class Action>
VITRAIL_DEVICE void for_each(const ResponseNorm& a, const Share& s, Action action) {
    for (Place token = s.token; token < s.end; token += kLoads * kWarps) {
        Four<S> from[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            from[i] = load_four(at<const S>(a.x, s, token + i * kWarps),
                                token + i * kWarps < s.end ? s.count : 0, a.aligned);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if (token + i * kWarps >= s.end) break;
            Four<float> y;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float x = widen(from[i].x[j]);
                y.x[j] = a.activates ? gelu(x) : x;
            }
            action(token + i * kWarps, y);
        }
    }
}

template <class S>
__global__ void __launch_bounds__(kThreads) sum_squares(const __grid_constant__ ResponseNorm a) {
    const Share s(a);
    float sum[4] = {};
    for_each<S>(a, s, [&](Place, const Four<float>& y) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += y.x[i] * y.x[i];
    });
    float* const sums = static_cast<float*>(shared_memory());  // (warps, channels)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[warp() * kChannels + 4 * lane() + i] = sum[i];
    __syncthreads();
    const Place first = s.channel - 4 * lane(), mine = Place(threadIdx.x);
    if (mine >= kChannels || first + mine >= a.channels) return;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += sums[i * kChannels + mine];
    a.squares[(s.image * a.parts + s.part) * a.channels + first + mine] = total;
}

// A block of threads has an image.
__global__ void __launch_bounds__(kThreads) find_factors(const __grid_constant__ ResponseNorm a) {
    const int64_t image = blockIdx.x;
    const float* const squares = a.squares + image * a.parts * a.channels;
    float* const factors = a.factors + image * a.channels;
    float sum = 0.0f;
    for (Place c = Place(threadIdx.x); c < a.channels; c += kThreads) {
        float total = 0.0f;
        for (Place part = 0; part < a.parts; ++part) total += squares[int64_t(part) * a.channels + c];
        factors[c] = sqrtf(total);
        sum += factors[c];
    }
    sum = across_warp(sum, [](float x, float y) { return x + y; });
    float* const sums = static_cast<float*>(shared_memory());
    if (lane() == 0) sums[warp()] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < kWarps; ++i) total += sums[i];
    const float mean = total / float(a.channels) + float(a.eps);
    for (Place c = Place(threadIdx.x); c < a.channels; c += kThreads)
        factors[c] = 1.0f + a.weight[c] * (factors[c] / mean);
}

template <class S>
__global__ void __launch_bounds__(kThreads) scale(const __grid_constant__ ResponseNorm a) {
    const Share s(a);
    const Four<float> factor =
        load_four(a.factors + s.image * a.channels + s.channel, s.count, a.channels % 4 == 0);
    for_each<S>(a, s, [&](Place token, const Four<float>& y) {
        Four<S> to;
#pragma unroll
        for (int i = 0; i < 4; ++i) narrow(y.x[i] * factor.x[i], to.x[i]);
        S* const out = at<S>(a.out, s, token);
        if (a.channels % 4 == 0 && s.count >= 4) {
            *reinterpret_cast<Four<S>*>(out) = to;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < s.count) out[i] = to.x[i];
        }
    });
}

}  // namespace
}  // namespace cuda

namespace {

Tensor response_norm(const Tensor& x, const Tensor& weight, double eps, const std::string& activation) {
    constexpr Checks checks("response_norm");
    checks.placed("x", x);
    const Storage storage = checks.computed("x", x);
    if (x.dim() != 3 || x.size(1) > kMaxExtent || x.size(2) > kMaxExtent)
        checks.fail("x must have 3 dimensions (B, N, C), N and C at most ", kMaxExtent, ", got shape ",
                    shape_of(x));
    checks.contiguous_channels("x", x);
    checks.placed("weight", weight, x, "x");
    checks.dtype("weight", weight, ScalarType::Float);
    checks.shape("weight", weight, {x.size(2)});
    checks.contiguous_channels("weight", weight);
    Tensor out = tensors::new_empty(x, {x.size(0), x.size(1), x.size(2)});
    cuda::ResponseNorm a = {};
    a.activates = activation_of(checks, activation) == Activation::kGelu;
    if (out.numel() == 0) return out;
    a.x = tokens_of(x);
    a.out = tokens_of(out);
    a.images = x.size(0);
    a.tokens = cuda::Place(x.size(1));
    a.channels = cuda::Place(x.size(2));
    a.parts = cuda::Place((x.size(1) + cuda::kTokens - 1) / cuda::kTokens);
    a.columns = cuda::Place((x.size(2) + cuda::kChannels - 1) / cuda::kChannels);
    a.weight = static_cast<const float*>(weight.const_data_ptr());
    a.eps = eps;
    Tensor squares = tensors::new_empty(x, {a.images, a.parts, a.channels}, ScalarType::Float);
    Tensor factors = tensors::new_empty(x, {a.images, a.channels}, ScalarType::Float);
    a.squares = static_cast<float*>(squares.mutable_data_ptr());
    a.factors = static_cast<float*>(factors.mutable_data_ptr());
    const cuda::Launcher launch(x);
    const int64_t blocks = a.images * a.parts * a.columns;
    cuda::with_numbers(storage, [&](auto s) {
        using S = decltype(s);
        a.aligned = cuda::fours<S>(a.x.data, {a.x.image, a.x.token});
        launch(cuda::sum_squares<S>, blocks, cuda::kThreads,
               cuda::kWarps * cuda::kChannels * int(sizeof(float)), a);
        launch(cuda::find_factors, a.images, cuda::kThreads, cuda::kWarps * int(sizeof(float)), a);
        launch(cuda::scale<S>, blocks, cuda::kThreads, 0, a);
    });
    return out;
}

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(response_norm, &vitrail::response_norm)
