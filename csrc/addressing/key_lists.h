// Addressing policy of sparse attention: a query looks at the keys of a list of its own.
#pragma once

#include "../core/vec.h"
#include "../ops/sparse_attention.h"

namespace vitrail::VITRAIL_ISA {

class KeyLists {
  public:
    VITRAIL_INLINE explicit KeyLists(const SparseAttention& a) : a_(a) {}

    // Copies the list of a query without its empty slots; returns its length. A list with a number that names
    // no key counts as empty. What is checked is the copy: nobody can change a number afterwards.
    VITRAIL_INLINE int read(int64_t image, int64_t head, int64_t query, int32_t* to) const {
        const int64_t at = image * a_.keys_image + head * a_.keys_head + query * a_.keys_query;
        if (a_.wide_keys)
            copy(static_cast<const int64_t*>(a_.keys) + at, to);
        else
            copy(static_cast<const int32_t*>(a_.keys) + at, to);
        int32_t low = 0, high = -1;
        for (int64_t i = 0; i < a_.slots; ++i) {
            low = to[i] < low ? to[i] : low;
            high = to[i] > high ? to[i] : high;
        }
        if (low < -1 || high >= a_.tokens) {
            __atomic_store_n(a_.wrong_key, true, __ATOMIC_RELAXED);
            return 0;
        }
        int count = int(a_.slots);
        if (low < 0) {
            count = 0;
            for (int64_t i = 0; i < a_.slots; ++i)
                if (to[i] >= 0) to[count++] = to[i];
        }
        return count;
    }

  private:
    template <class Index>
    VITRAIL_INLINE void copy(const Index* from, int32_t* to) const {
        if (a_.keys_slot == 1)
            for (int64_t i = 0; i < a_.slots; ++i) to[i] = narrowed(from[i]);
        else
            for (int64_t i = 0; i < a_.slots; ++i) to[i] = narrowed(from[i * a_.keys_slot]);
    }

    VITRAIL_INLINE static int32_t narrowed(int64_t number) {
        return number == int32_t(number) ? int32_t(number) : -2;  // no key either way
    }

    const SparseAttention& a_;
};

}  // namespace vitrail::VITRAIL_ISA
