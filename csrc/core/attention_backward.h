// Gradients of attention: a block of queries against a stretch of keys, one head.
//
// Weights P are computed again from the log-sum-exp of each query. With D, the sum over channels of a result
// times its gradient, and everything else a dense product:
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - D),  dQ = dS K scale,  dK = dS^T Q scale.
// Where the keys and values of a query are multiplied by weights w (soft routing), S = w s and V = w v, so
// that the gradient of w sums dS s + P (dO v).
#pragma once

#include "panels.h"

namespace vitrail::VITRAIL_ISA {

constexpr int kGradientKeys = 128;

template <class T>
class GradientBlock {
    static constexpr int W = kLanes<T>;
    using V = Vec<T, W>;

  public:
    VITRAIL_INLINE static int64_t size(int64_t head_dim, int64_t value_dim) {
        const int64_t row = round_up(head_dim, W), value_row = round_up(value_dim, W);
        return (2 * kQueryBlock + 2 * kGradientKeys) * row + (kQueryBlock + kGradientKeys) * value_row +
               kGradientKeys * (head_dim + value_dim + 2 * kQueryBlock);
    }

    VITRAIL_INLINE GradientBlock(int64_t head_dim, int64_t value_dim, T scale, T* scratch)
        : head_dim_(head_dim),
          value_dim_(value_dim),
          row_(round_up(head_dim, W)),
          value_row_(round_up(value_dim, W)),
          scale_(scale),
          q_(scratch),
          dq_(q_ + kQueryBlock * row_),
          grad_(dq_ + kQueryBlock * row_),
          k_(grad_ + kQueryBlock * value_row_),
          dk_(k_ + kGradientKeys * row_),
          dv_(dk_ + kGradientKeys * row_),
          k_columns_(dv_ + kGradientKeys * value_row_),
          v_columns_(k_columns_ + kGradientKeys * head_dim),
          scores_(v_columns_ + kGradientKeys * value_dim),
          weights_(scores_ + kGradientKeys * kQueryBlock) {}

    // Queries, their results, the gradients of those, and the log-sum-exps.
    template <class S>
    VITRAIL_OUTLINE void load_queries(int rows, const void* const* q, int64_t q_channel,
                                      const void* const* out, const void* const* grad, int64_t v_channel,
                                      const void* const* lse, int64_t head) {
        rows_ = rows;
        for (int row = 0; row < rows; ++row) {
            T* const to = grad_ + row * value_row_;
            pack_row(static_cast<const S*>(q[row]) + q_channel, head_dim_, scale_, q_ + row * row_, row_);
            pack_row(static_cast<const S*>(grad[row]) + v_channel, value_dim_, T(1), to, value_row_);
            const S* const result = static_cast<const S*>(out[row]) + v_channel;
            V sum = {};
            int64_t c = 0;
            for (; c + W <= value_dim_; c += W) sum += load(to + c) * widen<W>(result + c);
            for (; c < value_dim_; c += 4) {
                const Vec<T, 4> x = load<T, 4>(to + c) * widen_some(result + c, value_dim_ - c);
                for (int i = 0; i < 4; ++i) sum[i] += x[i];
            }
            products_[row] = sum;
            lse_[row] = static_cast<const T*>(lse[row])[head] * kLog2E;
        }
        for (int row = 0; row < rows; row += 4) {
            const V four[4] = {products_[row], products_[row + 1], products_[row + 2], products_[row + 3]};
            const V sums = reduce_rows<T>(four, Add());
            for (int i = 0; i < 4; ++i) product_[row + i] = sums[i];
        }
        for (int64_t i = 0; i < rows * row_; i += W) store(dq_ + i, V{});
    }

    template <class S>
    VITRAIL_OUTLINE void load_keys(int count, const void* const* k, int64_t k_channel, const void* const* v,
                                   int64_t v_channel) {
        keys_ = count;
        for (int i = 0; i < count; ++i)
            pack_row(channels<S>(k[i], k_channel), head_dim_, T(1), k_ + i * row_, row_);
        for (int i = 0; i < count; i += 4) {
            const S *k4[4], *v4[4];  // lanes without a key may hold anything
            for (int j = 0; j < 4; ++j) {
                k4[j] = channels<S>(k[i + j < count ? i + j : i], k_channel);
                v4[j] = channels<S>(v[i + j < count ? i + j : i], v_channel);
            }
            pack_four_columns<T>(k4, head_dim_, head_dim_, k_columns_ + i, kGradientKeys);
            pack_four_columns<T>(v4, value_dim_, value_dim_, v_columns_ + i, kGradientKeys);
        }
    }

    // Gradients of the queries and the keys that were loaded. `key_weights` has a number for each key, and
    // the sums of their gradients are added to `weight_grads`; `bias` has a row for each query. Null:
    // without.
    VITRAIL_OUTLINE void run(const T* key_weights, T* weight_grads, const T* bias, int64_t bias_row);

    // After run: the gradients of the scores of a query.
    VITRAIL_INLINE const T* score_grads(int row) const { return scores_ + row * kGradientKeys; }

    template <class S>
    VITRAIL_OUTLINE void store_queries(void* const* tokens, int64_t channel) const {
        for (int row = 0; row < rows_; ++row) {
            S* const to = static_cast<S*>(tokens[row]) + channel;
            const T* const from = dq_ + row * row_;
            int64_t c = 0;
            for (; c + W <= head_dim_; c += W) narrow<W>(to + c, load(from + c) * scale_);
            for (; c < head_dim_; c += 4) narrow_some(to + c, load<T, 4>(from + c) * scale_, head_dim_ - c);
        }
    }

    // Adds the gradients of keys and values to tokens; null: not wanted.
    VITRAIL_OUTLINE void add_keys(void* const* dk, int64_t k_channel, void* const* dv,
                                  int64_t v_channel) const {
        for (int key = 0; key < keys_; ++key) {
            if (dk[key]) add(dk_ + key * row_, head_dim_, static_cast<T*>(dk[key]) + k_channel);
            if (dv[key]) add(dv_ + key * value_row_, value_dim_, static_cast<T*>(dv[key]) + v_channel);
        }
    }

  private:
    static constexpr T kLog2E = T(1.44269504088896340736);

    template <class S>
    VITRAIL_INLINE static const S* channels(const void* token, int64_t channel) {
        return token ? static_cast<const S*>(token) + channel : nullptr;
    }

    VITRAIL_INLINE static void add(const T* from, int64_t channels, T* to) {
        int64_t c = 0;
        for (; c + W <= channels; c += W) store(to + c, load(to + c) + load(from + c));
        for (; c < channels; ++c) to[c] += from[c];
    }

    // Turns scores and dP into dS and P, all of one row.
    template <bool kWeighted, bool kBiased>
    VITRAIL_INLINE void soften(int row, const T* key_weights, T* weight_grads, const T* bias) {
        using Bit = typename BitsOf<T>::type;
        T* const s = scores_ + row * kGradientKeys;
        T* const p = weights_ + row * kGradientKeys;
        for (int i = 0; i < keys_; i += W) {
            const V score = load(s + i), grad = load(p + i);
            V x = score;
            V w = {};
            if constexpr (kWeighted) {
                w = load(key_weights + i);
                x = score * w;
            }
            if constexpr (kBiased) x += load(bias + i);
            V weight = exp2_negative<W>(x * kLog2E - lse_[row]);
            V ds = weight * ((kWeighted ? grad * w : grad) - product_[row]);
            V dw = ds * score + weight * grad;
            if (keys_ - i < W) {
                Vec<Bit, W> lane;
                for (int j = 0; j < W; ++j) lane[j] = Bit(j);
                const auto exists = lane < Bit(keys_ - i);
                weight = exists ? weight : V{};
                ds = exists ? ds : V{};
                dw = exists ? dw : V{};
            }
            if constexpr (kWeighted) {
                store(weight_grads + i, load(weight_grads + i) + dw);
                ds *= w;
                weight *= w;
            }
            store(s + i, ds);
            store(p + i, weight);
        }
    }

    const int64_t head_dim_, value_dim_, row_, value_row_;
    const T scale_;
    // Rows of queries (scaled), keys, results and their gradients; keys and values also as columns, and
    // scores and weights: [.][kGradientKeys].
    T *const q_, *const dq_, *const grad_, *const k_, *const dk_, *const dv_;
    T *const k_columns_, *const v_columns_, *const scores_, *const weights_;
    int rows_ = 0, keys_ = 0;
    alignas(64) V products_[kQueryBlock] = {};
    T product_[kQueryBlock], lse_[kQueryBlock];
};

template <class T>
void GradientBlock<T>::run(const T* key_weights, T* weight_grads, const T* bias, int64_t bias_row) {
    constexpr int64_t step = kGradientKeys;
    const int64_t vectors = (keys_ + W - 1) / W;
    const int rows = rows_;
    multiply<T>(rows, vectors, {q_, row_, 1, k_columns_, step, head_dim_}, scores_, step, false);
    multiply<T>(rows, vectors, {grad_, value_row_, 1, v_columns_, step, value_dim_}, weights_, step, false);
    for (int r = 0; r < rows; ++r)
        if (key_weights)
            soften<true, false>(r, key_weights, weight_grads, nullptr);
        else if (bias)
            soften<false, true>(r, nullptr, nullptr, bias + r * bias_row);
        else
            soften<false, false>(r, nullptr, nullptr, nullptr);
    multiply<T>(keys_, value_row_ / W, {weights_, 1, step, grad_, value_row_, rows}, dv_, value_row_, false);
    multiply<T>(keys_, row_ / W, {scores_, 1, step, q_, row_, rows}, dk_, row_, false);
    multiply<T>(rows, row_ / W, {scores_, step, 1, k_, row_, keys_}, dq_, row_, true);
}

// What is not inline is compiled once, in attention_backward_kernel.cpp, for all operators.
#define VITRAIL_STORAGE_GRADIENTS(S, ...)                                                               \
    __VA_ARGS__ template void GradientBlock<Compute<S>>::load_queries<S>(                               \
        int, const void* const*, int64_t, const void* const*, const void* const*, int64_t,              \
        const void* const*, int64_t);                                                                   \
    __VA_ARGS__ template void GradientBlock<Compute<S>>::load_keys<S>(int, const void* const*, int64_t, \
                                                                      const void* const*, int64_t);     \
    __VA_ARGS__ template void GradientBlock<Compute<S>>::store_queries<S>(void* const*, int64_t) const;
#define VITRAIL_BLOCK_GRADIENTS(T, ...)                                               \
    __VA_ARGS__ template void GradientBlock<T>::run(const T*, T*, const T*, int64_t); \
    __VA_ARGS__ template void GradientBlock<T>::add_keys(void* const*, int64_t, void* const*, int64_t) const;
#define VITRAIL_GRADIENTS(...)                       \
    VITRAIL_STORAGE_GRADIENTS(float, __VA_ARGS__)    \
    VITRAIL_STORAGE_GRADIENTS(double, __VA_ARGS__)   \
    VITRAIL_STORAGE_GRADIENTS(BFloat16, __VA_ARGS__) \
    VITRAIL_STORAGE_GRADIENTS(Float16, __VA_ARGS__)  \
    VITRAIL_BLOCK_GRADIENTS(float, __VA_ARGS__)      \
    VITRAIL_BLOCK_GRADIENTS(double, __VA_ARGS__)

VITRAIL_GRADIENTS(extern)

}  // namespace vitrail::VITRAIL_ISA
