// channel_attention for one instruction set. Compiled once per set, with -DVITRAIL_ISA=<namespace>.
//
// Scores are kept transposed, [key channel][query channel], so that a softmax runs down the rows, a vector of
// query channels at a time, and its result is the matrix that values are multiplied with.
#include "../core/token_products.h"
#include "channel_attention.h"

namespace vitrail::VITRAIL_ISA {
namespace {

constexpr int64_t kChunk = 256;  // tokens of a chunk, at least

template <class S>
class Steps {
  protected:
    using T = Compute<S>;
    using P = Packed<S>;
    static constexpr int W = kLanes<T>;
    using V = Vec<T, W>;

    Steps(const ChannelAttention& a, int sums, int matrices)
        : a_(a),
          products_(a.head_dim),
          tokens_(a.height * a.width),
          chunks_(chunks_of(tokens_, a.head_dim)),
          sums_(sums * products_.sums_size()),
          matrices_(matrices * products_.matrix_size()) {}

    ChannelAttentionPlan plan(int64_t weigh_numbers) const {
        const int64_t tokens = products_.scratch_bytes(), weigh = weigh_numbers * int64_t(sizeof(T));
        return {chunks_, sums_ * int64_t(sizeof(T)), matrices_ * int64_t(sizeof(P)),
                tokens < weigh ? weigh : tokens};
    }

    // Image, head and tokens [first, last) of a task. Heads run fastest: their channels are neighbours.
    struct Part {
        int64_t image, head, first, last;
    };

    Part part(int64_t task) const {
        const int64_t chunk = task / a_.heads % chunks_;
        return {task / a_.heads / chunks_, task % a_.heads, chunk * tokens_ / chunks_,
                (chunk + 1) * tokens_ / chunks_};
    }

    TokenRows<S> rows(const Grid& grid, const Part& part) const {
        return {grid, part.image, part.head * a_.head_dim, a_.width};
    }

    T* sums(void* all, int64_t task) const { return static_cast<T*>(all) + task * sums_; }

    const P* matrices(const void* all, const Part& part) const {
        return static_cast<const P*>(all) + (part.image * a_.heads + part.head) * matrices_;
    }

    // Of an image and head, the sums of the first chunk; the others follow `chunk_step()` apart.
    const T* first_sums(const void* all, int64_t task) const {
        return static_cast<const T*>(all) + (task / a_.heads * chunks_ * a_.heads + task % a_.heads) * sums_;
    }
    int64_t chunk_step() const { return a_.heads * sums_; }

    VITRAIL_INLINE V sum_of_chunks(const T* first) const {
        V sum = load(first);
        for (int64_t chunk = 1; chunk < chunks_; ++chunk) sum += load(first + chunk * chunk_step());
        return sum;
    }

    // Scores are scaled so that exponents are of 2.
    T log2_scale() const { return T(a_.scale * 1.44269504088896340736); }

    const ChannelAttention& a_;
    const TokenProducts<S> products_;
    const int64_t tokens_, chunks_;
    const int64_t sums_, matrices_;  // numbers, of a task and of an image and head

  private:
    // Sums must not outweigh the tokens that they are taken of.
    static int64_t chunks_of(int64_t tokens, int64_t channels) {
        const int64_t chunk = 8 * channels < kChunk ? kChunk : 8 * channels;
        return (tokens + chunk - 1) / chunk;
    }
};

template <class S>
class Forward : Steps<S> {
    using Base = Steps<S>;
    using Base::a_, Base::products_, Base::W;
    using typename Base::P, typename Base::Part, typename Base::T, typename Base::V;

  public:
    explicit Forward(const ChannelAttention& a) : Base(a, 1, 1) {}

    ChannelAttentionPlan plan() const { return Base::plan(products_.sums_size()); }

    void sum(void* sums, void* scratch, int64_t begin, int64_t end) const {
        for (int64_t task = begin; task < end; ++task) {
            const Part part = this->part(task);
            products_.sum(this->rows(a_.k, part), this->rows(a_.q, part), part.first, part.last,
                          this->sums(sums, task), scratch);
        }
    }

    // Softmax over the key channels.
    void weigh(const void* sums, void* matrices, void* scratch, int64_t begin, int64_t end) const {
        T* const weights = static_cast<T*>(scratch);
        for (int64_t task = begin; task < end; ++task) {
            T* lse = static_cast<T*>(a_.lse) + task * a_.head_dim;
            for (int64_t i = 0; i < products_.columns; i += W) {
                const V result = soften(this->first_sums(sums, task) + i, weights + i);
                for (int lane = 0; lane < W && i + lane < a_.head_dim; ++lane) lse[i + lane] = result[lane];
            }
            products_.pack_matrix(weights, static_cast<P*>(matrices) + task * this->matrices_);
        }
    }

    void apply(const void* matrices, void* scratch, int64_t begin, int64_t end) const {
        for (int64_t task = begin; task < end; ++task) {
            const Part part = this->part(task);
            products_.apply(this->rows(a_.v, part), this->matrices(matrices, part), this->rows(a_.out, part),
                            part.first, part.last, scratch);
        }
    }

  private:
    // Of a vector of query channels; returns their log-sum-exp.
    VITRAIL_INLINE V soften(const T* sums, T* weights) const {
        const int64_t channels = a_.head_dim, row = products_.columns;
        const T scale = this->log2_scale();
        V top = broadcast(-T(__builtin_inf())), total = {};
        for (int64_t j = 0; j < channels; ++j) {
            const V score = this->sum_of_chunks(sums + j * row) * scale;
            store(weights + j * row, score);
            top = maximum(top, score);
        }
        for (int64_t j = 0; j < channels; ++j) {
            const V p = exp2_negative<W>(load(weights + j * row) - top);
            store(weights + j * row, p);
            total += p;
        }
        const V factor = T(1) / total;
        for (int64_t j = 0; j < channels; ++j) store(weights + j * row, load(weights + j * row) * factor);
        return (top + log2_positive<T, W>(total)) * T(0.69314718055994530942);
    }
};

// With weights p and the gradient g of the result, the gradient of p[i][j] is the sum over tokens of g[i] *
// v[j], and with that p recomputed from the log-sum-exp gives the gradient of the scores.
template <class S>
class Backward : Steps<S> {
    using Base = Steps<S>;
    using Base::a_, Base::products_, Base::W;
    using typename Base::P, typename Base::Part, typename Base::T, typename Base::V;

  public:
    explicit Backward(const ChannelAttention& a)
        : Base(a, 2, 3), square_(round_up(a.head_dim, 4) * products_.columns) {}

    ChannelAttentionPlan plan() const { return Base::plan(3 * square_); }

    void sum(void* sums, void* scratch, int64_t begin, int64_t end) const {
        for (int64_t task = begin; task < end; ++task) {
            const Part part = this->part(task);
            T* const scores = this->sums(sums, task);
            products_.sum(this->rows(a_.k, part), this->rows(a_.q, part), part.first, part.last, scores,
                          scratch);
            products_.sum(this->rows(a_.v, part), this->rows(a_.grad, part), part.first, part.last,
                          scores + products_.sums_size(), scratch);
        }
    }

    void weigh(const void* sums, void* matrices, void* scratch, int64_t begin, int64_t end) const {
        T *const weights = static_cast<T*>(scratch), *const scores = weights + square_,
                 *const turned = scores + square_;
        for (int64_t i = 0; i < 3 * square_; ++i) weights[i] = 0;
        for (int64_t task = begin; task < end; ++task) {
            for (int64_t i = 0; i < products_.columns; i += W)
                differentiate(this->first_sums(sums, task) + i, task * a_.head_dim + i, a_.head_dim - i,
                              weights + i, scores + i);
            P* to = static_cast<P*>(matrices) + task * this->matrices_;
            products_.pack_matrix(scores, to);
            transpose_square(weights, turned);
            products_.pack_matrix(turned, to + products_.matrix_size());
            transpose_square(scores, turned);
            products_.pack_matrix(turned, to + 2 * products_.matrix_size());
        }
    }

    void apply(const void* matrices, void* scratch, int64_t begin, int64_t end) const {
        for (int64_t task = begin; task < end; ++task) {
            const Part part = this->part(task);
            const P* matrix = this->matrices(matrices, part);
            const Grid* const maps[3][2] = {{&a_.k, &a_.grad_q}, {&a_.grad, &a_.grad_v}, {&a_.q, &a_.grad_k}};
            for (const auto& map : maps) {
                products_.apply(this->rows(*map[0], part), matrix, this->rows(*map[1], part), part.first,
                                part.last, scratch);
                matrix += products_.matrix_size();
            }
        }
    }

  private:
    // Weights and gradients of the scores, of a vector of query channels.
    VITRAIL_INLINE void differentiate(const T* sums, int64_t channel, int64_t left, T* weights,
                                      T* scores) const {
        const int64_t channels = a_.head_dim, row = products_.columns;
        const T scale = this->log2_scale();
        V lse = {}, mean = {};
        for (int lane = 0; lane < W && lane < left; ++lane)
            lse[lane] = static_cast<const T*>(a_.lse)[channel + lane] * T(1.44269504088896340736);
        for (int64_t j = 0; j < channels; ++j) {
            const V score = this->sum_of_chunks(sums + j * row) * scale - lse;
            const V p = exp2_negative<W>(score > 0 ? V{} : score);
            const V grad = this->sum_of_chunks(sums + products_.sums_size() + j * row);
            store(weights + j * row, p);
            store(scores + j * row, grad);
            mean += p * grad;
        }
        for (int64_t j = 0; j < channels; ++j)
            store(scores + j * row, load(weights + j * row) * (load(scores + j * row) - mean) * T(a_.scale));
    }

    VITRAIL_INLINE void transpose_square(const T* from, T* to) const {
        const int64_t row = products_.columns;
        for (int64_t i = 0; i < a_.head_dim; i += 4)
            for (int64_t j = 0; j < a_.head_dim; j += 4) {
                Vec<T, 4> x[4];
                for (int n = 0; n < 4; ++n) x[n] = load<T, 4>(from + (j + n) * row + i);
                transpose<T>(x);
                for (int n = 0; n < 4; ++n) store(to + (i + n) * row + j, x[n]);
            }
    }

    const int64_t square_;  // numbers of a matrix whose rows are padded to four, too
};

template <template <class> class Kernel, class Action>
auto with_kernel(const ChannelAttention& a, Action action) {
    return with_storage(a.storage, [&](auto s) { return action(Kernel<decltype(s)>(a)); });
}

template <template <class> class Kernel>
ChannelAttentionPlan plan(const ChannelAttention& a) {
    return with_kernel<Kernel>(a, [](const auto& kernel) { return kernel.plan(); });
}

template <template <class> class Kernel>
void sum(const ChannelAttention& a, void* sums, void* scratch, int64_t begin, int64_t end) {
    with_kernel<Kernel>(a, [&](const auto& kernel) { kernel.sum(sums, scratch, begin, end); });
}

template <template <class> class Kernel>
void weigh(const ChannelAttention& a, const void* sums, void* matrices, void* scratch, int64_t begin,
           int64_t end) {
    with_kernel<Kernel>(a, [&](const auto& kernel) { kernel.weigh(sums, matrices, scratch, begin, end); });
}

template <template <class> class Kernel>
void apply(const ChannelAttention& a, const void* matrices, void* scratch, int64_t begin, int64_t end) {
    with_kernel<Kernel>(a, [&](const auto& kernel) { kernel.apply(matrices, scratch, begin, end); });
}

}  // namespace

const ChannelAttentionSteps kChannelAttention = {plan<Forward>, sum<Forward>, weigh<Forward>, apply<Forward>};
#if !defined(VITRAIL_STANDALONE)
const ChannelAttentionSteps kChannelAttentionBackward = {plan<Backward>, sum<Backward>, weigh<Backward>,
                                                         apply<Backward>};
#endif

}  // namespace vitrail::VITRAIL_ISA
