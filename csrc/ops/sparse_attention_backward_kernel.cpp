// The gradients of sparse_attention for one instruction set.
//
// A task is one head of one image: keys that many lists name sum up in one place, in the order of the
// queries.
#include "../addressing/key_lists.h"
#include "../core/listed.h"
#include "sparse_attention.h"

namespace vitrail::VITRAIL_ISA {
namespace {

template <class S>
class Kernel {
    using T = Compute<S>;
    static constexpr int W = kLanes<T>;
    static constexpr int kStep = 64;  // see ListedQueries
    using V = Vec<T, W>;

  public:
    static int64_t scratch_size(const SparseAttention& a) {
        const int64_t rows = ListedQueries<T>::rows_together(2 * a.slots);
        const int64_t key = whole_vectors<T>(a.head_dim), value = whole_vectors<T>(a.value_dim);
        return int64_t(sizeof(T)) *
                   (2 * a.tokens * (key + value) + rows * (3 * key + value + 2 * list_row(a))) +
               int64_t(sizeof(int32_t)) * rows * list_row(a);
    }

    Kernel(const SparseAttentionBackward& b, void* scratch)
        : a_(b.forward), b_(b), together_(ListedQueries<T>::rows_together(2 * a_.slots)) {
        const int64_t key = whole_vectors<T>(a_.head_dim), value = whole_vectors<T>(a_.value_dim);
        T* free = static_cast<T*>(scratch);
        const auto take = [&](int64_t rows, int64_t stride) {
            const Rows<T> taken = {free, stride};
            free += rows * stride;
            return taken;
        };
        k_ = take(a_.tokens, key);
        grad_k_ = take(a_.tokens, key);
        v_ = take(a_.tokens, value);
        grad_v_ = take(a_.tokens, value);
        q_ = take(together_, key);
        scaled_q_ = take(together_, key);
        grad_q_ = take(together_, key);
        grad_ = take(together_, value);
        p_ = take(together_, list_row(a_));
        grad_p_ = take(together_, list_row(a_));
        lists_ = {reinterpret_cast<int32_t*>(free), list_row(a_)};
    }

    void run(int64_t image, int64_t head) {
        const int64_t channel = head * a_.head_dim, value_channel = head * a_.value_dim;
        for (int64_t i = 0; i < a_.tokens; ++i) {
            widen_row(row(a_.k, image, i, channel), a_.head_dim, T(1), k_[i]);
            widen_row(row(a_.v, image, i, value_channel), a_.value_dim, T(1), v_[i]);
        }
        clear(grad_k_, a_.tokens);
        clear(grad_v_, a_.tokens);
        for (int64_t first = 0; first < a_.queries; first += together_) {
            const int rows = int(a_.queries - first < together_ ? a_.queries - first : together_);
            load_queries(image, head, first, rows);
            differentiate(rows);
            for (int r = 0; r < rows; ++r)
                narrow_row(grad_q_[r], a_.head_dim, T(1), row(b_.grad_q, image, first + r, channel));
        }
        for (int64_t i = 0; i < a_.tokens; ++i) {
            narrow_row(grad_k_[i], a_.head_dim, T(1), row(b_.grad_k, image, i, channel));
            narrow_row(grad_v_[i], a_.value_dim, T(1), row(b_.grad_v, image, i, value_channel));
        }
    }

  private:
    static int64_t list_row(const SparseAttention& a) { return ListedQueries<T>::list_row(a.slots); }

    static S* row(const Tokens& x, int64_t image, int64_t token, int64_t channel) {
        return static_cast<S*>(x.data) + image * x.image + token * x.token + channel;
    }

    static void clear(Rows<T> rows, int64_t count) {
        for (T* at = rows.data; at < rows[count]; at += W) store(at, V{});
    }

    static Rows<const T> read(Rows<T> rows) { return {rows.data, rows.stride}; }

    void load_queries(int64_t image, int64_t head, int64_t first, int rows) {
        constexpr T log2e = T(1.44269504088896340736);
        const KeyLists lists(a_);
        for (int r = 0; r < rows; ++r) {
            const S* q = row(a_.q, image, first + r, head * a_.head_dim);
            widen_row(q, a_.head_dim, T(1), q_[r]);
            widen_row(q, a_.head_dim, T(a_.scale) * log2e, scaled_q_[r]);
            widen_row(row(b_.grad, image, first + r, head * a_.value_dim), a_.value_dim, T(1), grad_[r]);
            count_[r] = lists.read(image, head, first + r, lists_[r]);
            for (int i = count_[r]; i % 4 != 0; ++i) lists_[r][i] = 0;
            lse_[r] =
                static_cast<const T*>(a_.lse)[(image * a_.queries + first + r) * a_.heads + head] * log2e;
        }
        clear(grad_q_, rows);
    }

    // Adds the gradients of a block of queries.
    void differentiate(int rows) {
        int most = 0;
        for (int r = 0; r < rows; ++r) most = count_[r] > most ? count_[r] : most;
        in_steps(rows, most, [&](int r, int step, int n) {
            multiply_listed(scaled_q_[r], read(k_), lists_[r] + step, n, p_[r] + step);
            multiply_listed(grad_[r], read(v_), lists_[r] + step, n, grad_p_[r] + step);
        });
        for (int r = 0; r < rows; ++r) through_softmax(r);
        in_steps(rows, most, [&](int r, int step, int n) {
            const int32_t* list = lists_[r] + step;
            add_to_listed(p_[r] + step, grad_[r], grad_v_, list, n);
            add_to_listed(grad_p_[r] + step, q_[r], grad_k_, list, n);
            sum_listed(grad_p_[r] + step, read(k_), list, n, grad_q_[r]);
        });
    }

    template <class Action>
    void in_steps(int rows, int most, Action action) const {
        for (int step = 0; step < most; step += kStep)
            for (int r = 0; r < rows; ++r)
                if (count_[r] > step) action(r, step, count_[r] - step < kStep ? count_[r] - step : kStep);
    }

    // Scores become weights, the gradients of weights those of the unscaled scores.
    void through_softmax(int r) {
        T *const p = p_[r], *const grad = grad_p_[r];
        const int count = count_[r], padded = int(whole_vectors<T>(count));
        for (int i = count; i < padded; ++i) {
            p[i] = -T(__builtin_inf());
            grad[i] = 0;
        }
        const V lse = broadcast(lse_[r]);
        V mean = {};
        for (int i = 0; i < padded; i += W) {
            const V weight = exp2_negative<W>(load(p + i) - lse);
            mean += weight * load(grad + i);
            store(p + i, weight);
        }
        mean = reduce<T>(mean, Add());
        for (int i = 0; i < padded; i += W)
            store(grad + i, load(p + i) * (load(grad + i) - mean) * T(a_.scale));
    }

    const SparseAttention& a_;
    const SparseAttentionBackward& b_;
    const int64_t together_;
    Rows<T> k_, v_, grad_k_, grad_v_, q_, scaled_q_, grad_q_, grad_, p_, grad_p_;
    Rows<int32_t> lists_;
    int count_[ListedQueries<T>::kMaxRows];
    T lse_[ListedQueries<T>::kMaxRows];
};

int64_t scratch(const SparseAttentionBackward& b) {
    return with_storage(b.forward.storage,
                        [&](auto type) { return Kernel<decltype(type)>::scratch_size(b.forward); });
}

void run(const SparseAttentionBackward& b, void* scratch, int64_t begin, int64_t end) {
    with_storage(b.forward.storage, [&](auto type) {
        Kernel<decltype(type)> kernel(b, scratch);
        for (int64_t task = begin; task < end; ++task)
            kernel.run(task / b.forward.heads, task % b.forward.heads);
    });
}

}  // namespace

const SparseBackwardBackend kSparseAttentionBackward = {scratch, run};

}  // namespace vitrail::VITRAIL_ISA
