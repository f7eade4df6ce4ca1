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

    // A query, its result, the gradient of that, and the log-sum-exp.
    template <class S>
    VITRAIL_OUTLINE void load_query(int row, const S* q, const S* out, const S* grad, T lse) {
        pack_row(q, head_dim_, scale_, q_ + row * row_, row_);
        T* const to = grad_ + row * value_row_;
        pack_row(grad, value_dim_, T(1), to, value_row_);
        T sum = 0;
        V sums = {};
        int64_t c = 0;
        for (; c + W <= value_dim_; c += W) sums += load(to + c) * widen<W>(out + c);
        for (; c < value_dim_; c += 4) {
            const Vec<T, 4> x = load<T, 4>(to + c) * widen_some(out + c, value_dim_ - c);
            for (int i = 0; i < 4; ++i) sum += x[i];
        }
        for (int i = 0; i < W; ++i) sum += sums[i];
        product_[row] = sum;
        lse_[row] = lse * kLog2E;
        for (int64_t i = 0; i < row_; i += W) store(dq_ + row * row_ + i, V{});
    }

    template <class S>
    VITRAIL_OUTLINE void load_keys(int count, const void* const* k, int64_t k_channel, const void* const* v,
                                   int64_t v_channel) {
        const auto at = [&](const void* const* tokens, int i, int64_t channel) {
            return i < count && tokens[i] ? static_cast<const S*>(tokens[i]) + channel : nullptr;
        };
        keys_ = count;
        for (int i = 0; i < count; ++i) pack_row(at(k, i, k_channel), head_dim_, T(1), k_ + i * row_, row_);
        const int padded = int(round_up(count, W));
        for (int i = 0; i < padded; i += 4) {
            const S *k4[4], *v4[4];
            for (int j = 0; j < 4; ++j) {
                k4[j] = at(k, i + j, k_channel);
                v4[j] = at(v, i + j, v_channel);
            }
            pack_four_columns<T>(k4, head_dim_, head_dim_, k_columns_ + i, kGradientKeys);
            pack_four_columns<T>(v4, value_dim_, value_dim_, v_columns_ + i, kGradientKeys);
        }
    }

    // Gradients of `rows` queries and the keys that were loaded. `key_weights` has a number for each key, and
    // the sums of their gradients are added to `weight_grads`; `bias` has a row for each query. Null:
    // without.
    VITRAIL_OUTLINE void run(int rows, const T* key_weights, T* weight_grads, const T* bias,
                             int64_t bias_row);

    // After run: the gradients of the scores of a query, and of a key and its value.
    VITRAIL_INLINE const T* score_grads(int row) const { return scores_ + row * kGradientKeys; }
    VITRAIL_INLINE const T* key_grads(int key) const { return dk_ + key * row_; }
    VITRAIL_INLINE const T* value_grads(int key) const { return dv_ + key * value_row_; }

    template <class S>
    VITRAIL_OUTLINE void store_query(int row, S* to) const {
        const T* const from = dq_ + row * row_;
        int64_t c = 0;
        for (; c + W <= head_dim_; c += W) narrow<W>(to + c, load(from + c) * scale_);
        for (; c < head_dim_; c += 4) narrow_some(to + c, load<T, 4>(from + c) * scale_, head_dim_ - c);
    }

  private:
    static constexpr T kLog2E = T(1.44269504088896340736);

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
            if (keys_ - i < W) {
                Vec<Bit, W> lane;
                for (int j = 0; j < W; ++j) lane[j] = Bit(j);
                weight = lane < Bit(keys_ - i) ? weight : V{};
            }
            if constexpr (kWeighted) {
                const V ds = weight * (grad * w - product_[row]);
                store(weight_grads + i, load(weight_grads + i) + ds * score + weight * grad);
                store(s + i, ds * w);
                store(p + i, weight * w);
            } else {
                store(s + i, weight * (grad - product_[row]));
                store(p + i, weight);
            }
        }
    }

    const int64_t head_dim_, value_dim_, row_, value_row_;
    const T scale_;
    // Rows of queries (scaled), keys, results and their gradients; keys and values also as columns, and
    // scores and weights: [.][kGradientKeys].
    T *const q_, *const dq_, *const grad_, *const k_, *const dk_, *const dv_;
    T *const k_columns_, *const v_columns_, *const scores_, *const weights_;
    int keys_ = 0;
    T product_[kQueryBlock], lse_[kQueryBlock];
};

template <class T>
void GradientBlock<T>::run(int rows, const T* key_weights, T* weight_grads, const T* bias, int64_t bias_row) {
    constexpr int64_t step = kGradientKeys;
    const int64_t vectors = (keys_ + W - 1) / W;
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
#define VITRAIL_GRADIENT_PARTS(S, EXTERN)                                                            \
    EXTERN template void GradientBlock<Compute<S>>::load_query<S>(int, const S*, const S*, const S*, \
                                                                  Compute<S>);                       \
    EXTERN template void GradientBlock<Compute<S>>::load_keys<S>(int, const void* const*, int64_t,   \
                                                                 const void* const*, int64_t);       \
    EXTERN template void GradientBlock<Compute<S>>::store_query<S>(int, S*) const;
#define VITRAIL_ALL_GRADIENTS(EXTERN)                                                                 \
    VITRAIL_GRADIENT_PARTS(float, EXTERN)                                                             \
    VITRAIL_GRADIENT_PARTS(double, EXTERN)                                                            \
    VITRAIL_GRADIENT_PARTS(BFloat16, EXTERN)                                                          \
    VITRAIL_GRADIENT_PARTS(Float16, EXTERN)                                                           \
    EXTERN template void GradientBlock<float>::run(int, const float*, float*, const float*, int64_t); \
    EXTERN template void GradientBlock<double>::run(int, const double*, double*, const double*, int64_t);

VITRAIL_ALL_GRADIENTS(extern)

}  // namespace vitrail::VITRAIL_ISA
