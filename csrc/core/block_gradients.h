// The driver of the gradients of block attention.
//
// A task is a head of a unit: queries whose keys no other unit has, as the addressing policy says. Within it
// one block of queries follows the other, so that sums have an order of their own, whatever the threads do.
#pragma once

#include "attention_backward.h"
#include "block_addresses.h"

namespace vitrail::VITRAIL_ISA {

template <template <class> class PolicyFor, class S>
class BlockGradientsKernel {
    using T = Compute<S>;
    using Policy = PolicyFor<T>;
    using Arguments = typename Policy::Arguments;

  public:
    static GradientPlan plan(const Arguments& a) {
        const Policy policy(a);
        Scratch scratch(nullptr);
        const Task task(a, {}, policy, scratch);
        GradientPlan plan = {};
        plan.scratch = scratch.size();
        plan.tasks = policy.units() * a.heads;
        plan.work = 2.5 * double(query_blocks(policy)) * double(policy.visits()) / double(policy.units()) *
                    double(policy.largest_key_block()) * kQueryBlock * double(a.head_dim + a.value_dim);
        return plan;
    }

    static void run(const Arguments& a, const BlockGradients& gradients, void* memory, int64_t begin,
                    int64_t end) {
        const Policy policy(a);
        Scratch scratch(memory);
        Task task(a, gradients, policy, scratch);
        const int64_t units = policy.units(), blocks = query_blocks(policy) / units;
        for (int64_t i = begin; i < end;) {
            // heads of one unit share their addresses; no sum has terms of two heads
            const int64_t image = i / a.heads / units, first = i / a.heads % units * blocks;
            const int64_t head = i % a.heads;
            const int64_t heads = end - i < a.heads - head ? end - i : a.heads - head;
            for (int64_t block = first; block < first + blocks; ++block) {
                task.find(image, block);
                for (int64_t j = head; j < head + heads; ++j) task.run(j);
            }
            i += heads;
        }
    }

  private:
    class Task {
      public:
        VITRAIL_INLINE Task(const Arguments& a, const BlockGradients& gradients, const Policy& policy,
                            Scratch& scratch)
            : a_(a),
              gradients_(gradients),
              policy_(policy),
              block_(a.head_dim, a.value_dim, T(a.scale),
                     scratch.take<T>(block_.size(a.head_dim, a.value_dim))),
              most_keys_(policy.visits() * policy.largest_key_block()),
              keys_(scratch.take<Key>(most_keys_)),
              k_(scratch.take<void*>(most_keys_)),
              v_(scratch.take<void*>(most_keys_)),
              dk_(scratch.take<void*>(most_keys_)),
              dv_(scratch.take<void*>(most_keys_)),
              weights_(scratch.take<T>(policy.weighted() ? most_keys_ + kLanes<T> : 0)),
              weight_grads_(scratch.take<T>(policy.weighted() ? most_keys_ + kLanes<T> : 0)),
              bias_row_(policy.biased() ? round_up(policy.largest_key_block(), kLanes<T>) + kLanes<T> : 0),
              bias_(scratch.take<T>(bias_row_ * kQueryBlock)) {}

        VITRAIL_INLINE void find(int64_t image, int64_t block) {
            image_ = image;
            at_ = block;
            rows_ = list_queries(policy_, block, query_);
            if (rows_ == 0) return;
            find_queries(a_.q, sizeof(S), image, query_, rows_, q_);
            find_queries(a_.out, sizeof(S), image, query_, rows_, out_);
            find_queries(a_.lse, sizeof(T), image, query_, rows_, lse_);
            find_queries(gradients_.out, sizeof(S), image, query_, rows_, grad_);
            find_queries(gradients_.q, sizeof(S), image, query_, rows_, dq_);
            count_ = visited_keys(policy_, image, block, keys_);
            find_keys(a_.k, sizeof(S), image, keys_, count_, k_);
            find_keys(a_.v, sizeof(S), image, keys_, count_, v_);
            find_keys(gradients_.k, sizeof(T), image, keys_, count_, dk_);
            find_keys(gradients_.v, sizeof(T), image, keys_, count_, dv_);
        }

        VITRAIL_OUTLINE void run(int64_t head) {
            if (rows_ == 0) return;
            const int64_t k_channel = head * a_.head_dim, v_channel = head * a_.value_dim;
            block_.template load_queries<S>(rows_, q_, k_channel, out_, grad_, v_channel, lse_, head);
            begin(head);
            const int64_t parts = (count_ + kGradientKeys - 1) / kGradientKeys;
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t first = part_begin(count_, parts, part);
                const int count = int(part_begin(count_, parts, part + 1) - first);
                block_.template load_keys<S>(count, k_ + first, k_channel, v_ + first, v_channel);
                block_.run(policy_.weighted() ? weights_ + first : nullptr, weight_grads_ + first,
                           bias_row_ ? bias_ + first : nullptr, bias_row_);
                block_.add_keys(dk_ + first, k_channel, dv_ + first, v_channel);
                if (bias_row_)  // what was added to these scores is no longer needed
                    for (int r = 0; r < rows_; ++r)
                        __builtin_memcpy(bias_ + r * bias_row_ + first, block_.score_grads(r),
                                         count * sizeof(T));
            }
            end(head);
            block_.template store_queries<S>(dq_, k_channel);
        }

      private:
        // The weights of the keys, and what is added to their scores.
        VITRAIL_INLINE void begin(int64_t head) {
            int64_t n = 0;
            for_each_visit(policy_, image_, at_, [&](int64_t key_block, T weight, int64_t) {
                if (policy_.weighted())
                    for (int64_t i = 0; i < policy_.keys_in(key_block); ++i, ++n) {
                        weights_[n] = weight;
                        weight_grads_[n] = 0;
                    }
                if (bias_row_)
                    for (int r = 0; r < rows_; ++r)
                        copy_bias(policy_, a_, head, query_[r], key_block, bias_ + r * bias_row_);
            });
            if (policy_.weighted())
                for (int i = 0; i < kLanes<T>; ++i) weights_[n + i] = weight_grads_[n + i] = 0;
        }

        // Adds up their gradients.
        VITRAIL_INLINE void end(int64_t head) {
            const int64_t table = image_ * a_.heads + head;
            int64_t n = 0;
            for_each_visit(policy_, image_, at_, [&](int64_t key_block, T, int64_t slot) {
                if (gradients_.weights) {
                    T sum = 0;
                    for (int64_t i = 0; i < policy_.keys_in(key_block); ++i) sum += weight_grads_[n++];
                    static_cast<T*>(gradients_.weights)[table * policy_.slots() + slot] += sum;
                }
                if (gradients_.bias)
                    for (int r = 0; r < rows_; ++r)
                        add_bias(policy_, bias_ + r * bias_row_, query_[r], key_block,
                                 static_cast<T*>(gradients_.bias) + table * gradients_.bias_table);
            });
        }

        const Arguments& a_;
        const BlockGradients& gradients_;
        const Policy& policy_;
        GradientBlock<T> block_;
        const int64_t most_keys_;
        Key* const keys_;
        void **const k_, **const v_, **const dk_, **const dv_;
        T *const weights_, *const weight_grads_;
        const int64_t bias_row_;
        T* const bias_;
        int64_t image_ = -1, at_ = -1, count_ = 0;
        int rows_ = 0;
        Query query_[kQueryBlock];
        void *q_[kQueryBlock], *out_[kQueryBlock], *lse_[kQueryBlock], *grad_[kQueryBlock], *dq_[kQueryBlock];
    };
};

template <template <class> class PolicyFor>
class BlockGradientsKernels {
    using Arguments = typename PolicyFor<float>::Arguments;

  public:
    static GradientPlan plan(const Arguments& a) {
        return with_storage(a.storage,
                            [&](auto s) { return BlockGradientsKernel<PolicyFor, decltype(s)>::plan(a); });
    }
    static void run(const Arguments& a, const BlockGradients& gradients, void* scratch, int64_t begin,
                    int64_t end) {
        with_storage(a.storage, [&](auto s) {
            BlockGradientsKernel<PolicyFor, decltype(s)>::run(a, gradients, scratch, begin, end);
        });
    }
};

}  // namespace vitrail::VITRAIL_ISA
