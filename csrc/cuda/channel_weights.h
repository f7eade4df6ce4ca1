// From sums over the tokens what the channels of a head weigh for each other, and gradients of that. A warp
// has a query channel, a lane some of the key channels.
#pragma once

#include "attention.h"

namespace vitrail::cuda {

// Sums are those that `sum_products` leaves of queries and keys and, backward, of gradients and values; the
// matrices are for `multiply_tokens`.
struct ChannelScores {
    const float* sums;
    float* matrices;
    float* lse;  // (image, head, query channel)
    Place chunks, channels;
    int64_t rows;  // query channels of all heads and images
    float scale;
};

class QueryChannel {
  public:
    static constexpr int kWarps = 8;
    static constexpr int kKeys = 2;  // of a lane: heads have up to 64 channels

    VITRAIL_DEVICE explicit QueryChannel(const ChannelScores& s)
        : row(int64_t(blockIdx.x) * kWarps + warp()),
          head(row / s.channels),
          channel(Place(row % s.channels)),
          s_(s) {}

    VITRAIL_DEVICE bool exists() const { return row < s_.rows; }

    // Calls use(i, key) for the key channels of this lane.
    template <class Use>
    VITRAIL_DEVICE void each_key(Use use) const {
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            const Place key = lane() + i * kWarp;
            if (key < s_.channels) use(i, key);
        }
    }

    // With a key channel, of one of `pairs` pairs of maps: the sum of the chunks, in their order.
    VITRAIL_DEVICE float sum(int pairs, int pair, Place key) const {
        const float* from =
            s_.sums + (head * pairs + pair) * s_.chunks * square() + channel * s_.channels + key;
        float sum = 0.0f;
#pragma unroll 4
        for (Place chunk = 0; chunk < s_.chunks; ++chunk) sum += from[chunk * square()];
        return sum;
    }
    // A matrix of the head.
    VITRAIL_DEVICE float* matrix(int matrices, int i) const {
        return s_.matrices + (head * matrices + i) * square();
    }

    const int64_t row, head;  // among all images
    const Place channel;

  private:
    VITRAIL_DEVICE int64_t square() const { return int64_t(s_.channels) * s_.channels; }

    const ChannelScores& s_;
};

// Softmax over the key channels.
__global__ void __launch_bounds__(QueryChannel::kWarps* kWarp)
    soften_scores(const __grid_constant__ ChannelScores s) {
    const QueryChannel query(s);
    if (!query.exists()) return;
    float weights[QueryChannel::kKeys], top = -INFINITY, total = 0.0f;
    query.each_key([&](int i, Place key) {
        weights[i] = query.sum(1, 0, key) * (s.scale * kLog2E);
        top = fmaxf(top, weights[i]);
    });
    top = across_warp(top, [](float x, float y) { return fmaxf(x, y); });
    query.each_key([&](int i, Place) {
        weights[i] = exp2_fast(weights[i] - top);
        total += weights[i];
    });
    total = across_warp(total, [](float x, float y) { return x + y; });
    float* const to = query.matrix(1, 0) + query.channel * s.channels;
    query.each_key([&](int i, Place key) { to[key] = weights[i] / total; });
    if (lane() == 0) s.lse[query.row] = (top + log2f(total)) * kLn2;
}

// With weights p and the gradient g of the result, the gradient of p[i][j] is the sum over tokens of g[i] *
// v[j]; with that, p from the log-sum-exps gives the gradient of the scores. They leave as the matrices that
// keys, gradients and queries are multiplied with for the gradients of queries, values and keys.
__global__ void __launch_bounds__(QueryChannel::kWarps* kWarp)
    differentiate_scores(const __grid_constant__ ChannelScores s) {
    const QueryChannel query(s);
    if (!query.exists()) return;
    const float lse = s.lse[query.row] * kLog2E;
    float weights[QueryChannel::kKeys], gradients[QueryChannel::kKeys], mean = 0.0f;
    query.each_key([&](int i, Place key) {
        const float score = query.sum(2, 0, key) * (s.scale * kLog2E) - lse;
        weights[i] = exp2_fast(score > 0.0f ? 0.0f : score);
        gradients[i] = query.sum(2, 1, key);
        mean += weights[i] * gradients[i];
    });
    mean = across_warp(mean, [](float x, float y) { return x + y; });
    query.each_key([&](int i, Place key) {
        const float of_score = weights[i] * (gradients[i] - mean) * s.scale;
        const Place there = query.channel * s.channels + key, turned = key * s.channels + query.channel;
        query.matrix(3, 0)[there] = of_score;
        query.matrix(3, 1)[turned] = weights[i];
        query.matrix(3, 2)[turned] = of_score;
    });
}

}  // namespace vitrail::cuda
