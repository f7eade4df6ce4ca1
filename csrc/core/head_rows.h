// Keys and values of single heads as rows in the type of computation, for attention that reads them row by
// row.
#pragma once

#include "listed.h"
#include "tensors.h"

namespace vitrail::VITRAIL_ISA {

// Keys of a head lie together, after them its values; one head follows the other, image by image.
template <class S>
class HeadRows {
    using T = Compute<S>;
    static constexpr int64_t kTogether = 64;  // tokens that one task widens

  public:
    VITRAIL_INLINE HeadRows(const Tokens& k, const Tokens& v, int64_t tokens, int64_t heads, int64_t head_dim,
                            int64_t value_dim)
        : k_(k), v_(v), tokens_(tokens), heads_(heads), head_dim_(head_dim), value_dim_(value_dim) {}

    VITRAIL_INLINE int64_t image_size() const { return heads_ * head_size(); }  // in elements
    VITRAIL_INLINE int64_t image_tasks() const { return heads_ * blocks(); }

    // Task of the images from `image` on, whose rows begin at `packed`.
    VITRAIL_INLINE void pack(int64_t image, int64_t task, T* packed) const {
        const int64_t first = task % blocks() * kTogether, head = task / blocks();
        const Rows<T> keys = {packed + head * head_size(), whole_vectors<T>(head_dim_)};
        const Rows<T> values = {keys[tokens_], whole_vectors<T>(value_dim_)};
        const S* k = row(k_, image + head / heads_, head % heads_ * head_dim_);
        const S* v = row(v_, image + head / heads_, head % heads_ * value_dim_);
        for (int64_t i = first; i < tokens_ && i < first + kTogether; ++i) {
            widen_row(k + i * k_.token, head_dim_, T(1), keys[i]);
            widen_row(v + i * v_.token, value_dim_, T(1), values[i]);
        }
    }

    // Of a head, counted from the first of the first image packed.
    VITRAIL_INLINE Rows<const T> keys(const T* packed, int64_t head) const {
        return {packed + head * head_size(), whole_vectors<T>(head_dim_)};
    }
    VITRAIL_INLINE Rows<const T> values(const T* packed, int64_t head) const {
        return {keys(packed, head)[tokens_], whole_vectors<T>(value_dim_)};
    }

  private:
    VITRAIL_INLINE int64_t blocks() const { return (tokens_ + kTogether - 1) / kTogether; }
    VITRAIL_INLINE int64_t head_size() const {
        return tokens_ * (whole_vectors<T>(head_dim_) + whole_vectors<T>(value_dim_));
    }

    VITRAIL_INLINE static const S* row(const Tokens& x, int64_t image, int64_t channel) {
        return static_cast<const S*>(x.data) + image * x.image + channel;
    }

    const Tokens k_, v_;
    const int64_t tokens_, heads_, head_dim_, value_dim_;
};

}  // namespace vitrail::VITRAIL_ISA
