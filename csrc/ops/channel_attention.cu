// vitrail::channel_attention and its backward on a GPU.
#include "../cuda/attention_launch.h"
#include "../cuda/channel_weights.h"
#include "../cuda/token_products.h"
#include "../dispatch/registration.h"
#include "channel_attention_host.h"

namespace vitrail {
namespace {

// Chunks follow from the size of an image alone, so that its results do not depend on the batch. What is
// summed of them must not outweigh the tokens, nor take long to add up.
constexpr int64_t kLeast = 256, kMostChunks = 64, kMultiple = 128;

int64_t tokens_of_chunk(int64_t tokens, int64_t channels) {
    const int64_t size = std::max({kLeast, 8 * channels, (tokens + kMostChunks - 1) / kMostChunks});
    return (size + kMultiple - 1) / kMultiple * kMultiple;
}

// Of this image or a smaller one, so that memory for an image is enough for those that are smaller.
int64_t most_chunks(int64_t tokens, int64_t channels) {
    const int64_t least = std::max(kLeast, 8 * channels);
    return std::min(kMostChunks, (tokens + least - 1) / least);
}

// The three steps, each of which is a launch.
class Steps {
  public:
    Steps(const ChannelAttention& a, const Tensor& q)
        : a_(a),
          q_(q),
          tokens_(a.height * a.width),
          chunk_(tokens_of_chunk(tokens_, a.head_dim)),
          chunks_((tokens_ + chunk_ - 1) / chunk_),
          room_(most_chunks(tokens_, a.head_dim)) {}

    using Pairs = std::initializer_list<std::pair<Grid, Grid>>;

    // Sums over tokens of x[i] * y[j], for each pair (x, y).
    Tensor sum(const Pairs& pairs) const {
        const cuda::TokenMaps maps = maps_of(pairs);
        Tensor sums = squares(maps.pairs * room_);
        cuda::with_tiles(a_.storage, a_.head_dim, [&](auto s, auto width) {
            using Shape = cuda::SumShape<decltype(s), width>;
            cuda::Launcher{q_}(cuda::sum_products<decltype(s), width>, blocks(maps), Shape::kThreads,
                               Shape::kBytes, maps, static_cast<float*>(sums.mutable_data_ptr()));
        });
        return sums;
    }

    // So many matrices for each head.
    Tensor weigh(void (*kernel)(cuda::ChannelScores), const Tensor& sums, int64_t count) const {
        constexpr int kWarps = cuda::QueryChannel::kWarps;
        Tensor matrices = squares(count);
        const cuda::ChannelScores scores = {static_cast<const float*>(sums.const_data_ptr()),
                                            static_cast<float*>(matrices.mutable_data_ptr()),
                                            static_cast<float*>(a_.lse),
                                            cuda::Place(chunks_),
                                            cuda::Place(a_.head_dim),
                                            a_.images * a_.heads * a_.head_dim,
                                            float(a_.scale)};
        cuda::Launcher{q_}(kernel, (scores.rows + kWarps - 1) / kWarps, kWarps * cuda::kWarp, 0, scores);
        return matrices;
    }

    // y = x times the transpose of its matrix, for each pair (x, y).
    void multiply(const Tensor& matrices, const Pairs& pairs) const {
        const cuda::TokenMaps maps = maps_of(pairs);
        cuda::with_tiles(a_.storage, a_.head_dim, [&](auto s, auto width) {
            using Shape = cuda::ProductShape<decltype(s), width>;
            cuda::Launcher{q_}(cuda::multiply_tokens<decltype(s), width>, blocks(maps), Shape::kThreads,
                               Shape::kBytes, maps, static_cast<const float*>(matrices.const_data_ptr()));
        });
    }

  private:
    // Of each image and head, some squares of numbers.
    Tensor squares(int64_t count) const {
        return tensors::new_empty(q_, {a_.images * a_.heads, count, a_.head_dim, a_.head_dim},
                                  ScalarType::Float);
    }

    cuda::TokenMaps maps_of(const Pairs& pairs) const {
        cuda::TokenMaps maps = {};
        for (const auto& [x, y] : pairs) {
            maps.x[maps.pairs] = x;
            maps.y[maps.pairs++] = y;
        }
        maps.heads = cuda::Place(a_.heads);
        maps.channels = cuda::Place(a_.head_dim);
        maps.tokens = cuda::Place(tokens_);
        maps.width = cuda::Place(a_.width);
        maps.chunk = cuda::Place(chunk_);
        maps.chunks = cuda::Place(chunks_);
        return maps;
    }

    int64_t blocks(const cuda::TokenMaps& maps) const { return a_.images * chunks_ * maps.pairs * a_.heads; }

    const ChannelAttention& a_;
    const Tensor& q_;
    const int64_t tokens_, chunk_, chunks_, room_;
};

struct OnGpu {
    static void attend(const ChannelAttention& a, const Tensor& q) {
        const Steps steps(a, q);
        const Tensor sums = steps.sum({{a.q, a.k}});
        const Tensor weights = steps.weigh(cuda::soften_scores, sums, 1);
        steps.multiply(weights, {{a.v, a.out}});
    }

#if !defined(VITRAIL_STANDALONE)
    static void differentiate(const ChannelAttention& a, const Tensor& q) {
        const Steps steps(a, q);
        const Tensor sums = steps.sum({{a.q, a.k}, {a.grad, a.v}});
        const Tensor matrices = steps.weigh(cuda::differentiate_scores, sums, 3);
        steps.multiply(matrices, {{a.k, a.grad_q}, {a.grad, a.grad_v}, {a.q, a.grad_k}});
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(channel_attention, &vitrail::channel_attention<vitrail::OnGpu>)
VITRAIL_REGISTER_BACKWARD(channel_attention_backward, &vitrail::channel_attention_backward<vitrail::OnGpu>)
