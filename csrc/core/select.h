// The largest of a row of numbers, as the places where they stand.
//
// Numbers are compared as integers: those of IEEE 754 keep their order if the magnitude of negative ones is
// inverted, and then any bits, NaN too, have a place in one total order. A threshold is searched for that as
// many numbers exceed as are wanted; a second pass writes their places down. Nothing is sorted.
#pragma once

#include "scalar.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vitrail::VITRAIL_ISA {

template <>
struct BitsOf<int32_t> {
    using type = uint32_t;
};
template <>
struct BitsOf<int64_t> {
    using type = uint64_t;
};

template <class T>
struct OrderOf;
template <>
struct OrderOf<float> {
    using type = int32_t;
};
template <>
struct OrderOf<double> {
    using type = int64_t;
};
// The integers that numbers are compared as.
template <class T>
using Order = typename OrderOf<T>::type;

template <class T>
constexpr Order<T> kLeast = Order<T>(1) << (8 * sizeof(T) - 1);

// Any number; never the least integer, which pads rows.
template <class T>
VITRAIL_INLINE Vec<Order<T>, kLanes<T>> ordered(Vec<T, kLanes<T>> x) {
    using V = Vec<Order<T>, kLanes<T>>;
    const V bits = (V)x;
    return maximum(bits ^ ((bits >> (8 * sizeof(T) - 1)) & ~kLeast<T>), V{} + (kLeast<T> + 1));
}

// Numbers that are not negative: the sign, which only NaN may have, is dropped.
template <class T>
VITRAIL_INLINE Vec<Order<T>, kLanes<T>> ordered_magnitude(Vec<T, kLanes<T>> x) {
    return (Vec<Order<T>, kLanes<T>>)x & ~kLeast<T>;
}

template <class T>
VITRAIL_INLINE T root(T x) {
    if constexpr (sizeof(T) == 4) return __builtin_sqrtf(x);
    return T(__builtin_sqrt(x));
}

// Numbers above the threshold are chosen, and the first `ties` of those that equal it.
template <class T>
struct Cut {
    Order<T> threshold;
    int64_t ties;
};

template <class T>
VITRAIL_INLINE int64_t count_above(const Order<T>* x, int64_t padded, Order<T> threshold) {
    constexpr int W = kLanes<T>;
    using V = Vec<Order<T>, W>;
    V above[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= padded; i += 4 * W)
        for (int j = 0; j < 4; ++j) above[j] -= load<Order<T>, W>(x + i + j * W) > threshold;
    for (; i < padded; i += W) above[0] -= load<Order<T>, W>(x + i) > threshold;
    return reduce<Order<T>>(above[0] + above[1] + (above[2] + above[3]), Add())[0];
}

// Looks for the cut above which a wanted number of a row's numbers stand.
//
// Rows that follow each other resemble each other: where the cut of one lay, and how close its numbers were
// there, says where to look in the next. The result does not depend on it.
template <class T>
class CutSearch {
    static constexpr int W = kLanes<T>;
    using Distance = typename BitsOf<T>::type;
    using I = Vec<Order<T>, W>;

  public:
    // Two thresholds between which the cut will probably lie. Whoever makes the row counts the numbers above
    // each. Cuts of different rows are compared as (cut - origin) / unit.
    VITRAIL_INLINE void aim(T origin, T unit, int64_t wanted) {
        origin_ = origin;
        unit_ = unit;
        const T margin = (T(1.25) * root(T(wanted)) + T(1.5)) / slope_;
        guess_[0] = order(origin + (place_ - margin) * unit);
        guess_[1] = order(origin + (place_ + margin) * unit);
    }
    VITRAIL_INLINE Order<T> guess(int i) const { return guess_[i]; }

    // The row holds `count` numbers, padded to `padded`, whole vectors, with kLeast; `above` of them exceed
    // the guesses.
    VITRAIL_INLINE Cut<T> find(const Order<T>* x, int64_t padded, int64_t count, int64_t wanted,
                               const int64_t (&above)[2]) {
        if (wanted >= count) return {kLeast<T>, 0};
        if (wanted <= 0) return {~kLeast<T>, 0};
        const Cut<T> cut = narrow(x, padded, count, wanted, above);
        learn(cut.threshold, above);
        return cut;
    }

  private:
    VITRAIL_INLINE Cut<T> narrow(const Order<T>* x, int64_t padded, int64_t count, int64_t wanted,
                                 const int64_t (&above)[2]) const {
        // more than the wanted numbers lie above `low`, fewer above `high`
        Order<T> low = kLeast<T>, high = ~kLeast<T>;
        int64_t above_low = count, above_high = 0;
        for (int i = 0; i < 2; ++i) {
            if (above[i] == wanted) return {guess_[i], 0};
            if (above[i] > wanted && guess_[i] > low) {
                low = guess_[i];
                above_low = above[i];
            } else if (above[i] < wanted && guess_[i] < high) {
                high = guess_[i];
                above_high = above[i];
            }
        }
        for (int step = 0;; ++step) {
            const Distance distance = Distance(high) - Distance(low);
            if (distance == 1) return {high, wanted - above_high};
            if (above_low - above_high <= W && padded <= kCollected)
                return among_few(x, padded, low, high, wanted - above_high);
            Order<T> threshold = Order<T>(Distance(low) + distance / 2);
            // a long search halves what is left in every third step, so that it ends whatever the numbers are
            if (step < 8 || step % 3 != 0) {
                const T at = estimate(low, high, above_low - wanted, wanted - above_high);
                if (at - at == 0) {
                    threshold = order(at);
                    if (threshold <= low) threshold = low + 1;
                    if (threshold >= high) threshold = high - 1;
                }
            }
            const int64_t now = count_above<T>(x, padded, threshold);
            if (now == wanted) return {threshold, 0};
            (now > wanted ? low : high) = threshold;
            (now > wanted ? above_low : above_high) = now;
        }
    }

    // Where the cut lies if numbers are spread evenly; `over` and `under` are the distances from it in
    // numbers.
    VITRAIL_INLINE T estimate(Order<T> low, Order<T> high, int64_t over, int64_t under) const {
        const T step = T(1.5) / slope_ * unit_;
        if (low == kLeast<T>) return number(high) - T(under) * step;
        if (high == ~kLeast<T>) return number(low) + T(over) * step;
        return number(low) + (T(over) - T(0.5)) / T(over + under) * (number(high) - number(low));
    }

    // The cut in a row of which few numbers lie in (low, high]: the one that `rank - 1` of them exceed.
    VITRAIL_INLINE static Cut<T> among_few(const Order<T>* x, int64_t padded, Order<T> low, Order<T> high,
                                           int64_t rank) {
        Order<T> few[2 * W];
        const int64_t n = collect(x, padded, low, high, few);
        for (int64_t i = n; i < W; ++i) few[i] = kLeast<T>;
        const I values = load<Order<T>, W>(few);
        I greater = {}, equal = {};
        for (int64_t i = 0; i < n; ++i) {
            const I value = broadcast<Order<T>, W>(few[i]);
            greater -= value > values;
            equal -= value == values;
        }
        const Order<T> wanted = Order<T>(rank);
        const I found = (greater < wanted) & (greater + equal >= wanted);
        const Order<T> threshold =
            reduce<Order<T>>(found ? values : broadcast<Order<T>, W>(kLeast<T>), Max())[0];
        const Order<T> above = reduce<Order<T>>(found ? greater : I{}, Max())[0];
        const Order<T> ties = reduce<Order<T>>(found ? equal : I{}, Max())[0];
        if (above + ties == wanted) return {threshold - 1, 0};
        return {threshold, wanted - above};
    }

    // Copies the numbers in (low, high], of which there are at most W.
    VITRAIL_INLINE static int64_t collect(const Order<T>* x, int64_t padded, Order<T> low, Order<T> high,
                                          Order<T>* to) {
        int64_t n = 0, i = 0;
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) {
            const __m512i least = _mm512_set1_epi32(low), most = _mm512_set1_epi32(high);
            for (; i < padded; i += 16) {
                const __m512i numbers = _mm512_loadu_si512(x + i);
                const __mmask16 chosen =
                    _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask(numbers, least), numbers, most);
                _mm512_storeu_si512(to + n, _mm512_maskz_compress_epi32(chosen, numbers));
                n += __builtin_popcount(chosen);
            }
        }
#endif
        for (; i < padded; ++i) {
            to[n] = x[i];
            n += x[i] > low && x[i] <= high;
        }
        return n;
    }

    VITRAIL_INLINE void learn(Order<T> threshold, const int64_t (&above)[2]) {
        const T place = (number(threshold) - origin_) / unit_;
        if (place - place == 0) place_ = place;
        const T between = T(above[0] - above[1]);
        const T slope = between * unit_ / (number(guess_[1]) - number(guess_[0]));
        if (between == 0) {
            slope_ *= T(0.5);  // the guesses were too close together to tell
        } else if (slope > 0 && slope - slope == 0) {
            slope_ = slope;
        }
    }

    VITRAIL_INLINE static T number(Order<T> order) {
        order ^= (order >> (8 * sizeof(T) - 1)) & ~kLeast<T>;
        T x;
        __builtin_memcpy(&x, &order, sizeof(x));
        return x;
    }

    VITRAIL_INLINE static Order<T> order(T x) {
        Order<T> bits;
        __builtin_memcpy(&bits, &x, sizeof(x));
        bits ^= (bits >> (8 * sizeof(T) - 1)) & ~kLeast<T>;
        return bits > kLeast<T> ? bits : kLeast<T> + 1;
    }

#if defined(__AVX512F__)
    static constexpr int64_t kCollected = 1280;
#else
    static constexpr int64_t kCollected = 256;
#endif

    T place_ = 0;  // of the last cut
    T slope_ = 1;  // numbers per unit near it
    T origin_ = 0, unit_ = 1;
    Order<T> guess_[2];
};

// Writes the places of the chosen numbers of a padded row, ascending; returns how many there are. `to` needs
// room for a vector more than that.
template <class T>
VITRAIL_INLINE int64_t write_places(const Order<T>* x, int64_t padded, Cut<T> cut, int32_t* to) {
    int64_t n = 0, i = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        if (cut.ties == 0) {
            const __m512i threshold = _mm512_set1_epi32(cut.threshold);
            __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            for (; i < padded; i += 16) {
                const __mmask16 chosen = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(x + i), threshold);
                // compressing in a register and storing it whole is far quicker than compressing to memory
                _mm512_storeu_si512(to + n, _mm512_maskz_compress_epi32(chosen, place));
                n += __builtin_popcount(chosen);
                place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
            }
        }
    }
#endif
    int64_t ties = cut.ties;
    for (; i < padded; ++i) {
        const bool tied = x[i] == cut.threshold && ties > 0;
        to[n] = int32_t(i);
        n += x[i] > cut.threshold || tied;
        ties -= tied;
    }
    return n;
}

}  // namespace vitrail::VITRAIL_ISA
