// The driver of block attention: queries and keys found through an addressing policy, packed, and attended
// to.
#pragma once

#include "attention_parts.h"
#include "block_addresses.h"

namespace vitrail::VITRAIL_ISA {

template <template <class> class PolicyFor, class S, int G>
class BlockAttentionKernel {
    using T = Compute<S>;
    using E = Packed<S>;
    using Policy = PolicyFor<T>;
    using Arguments = typename Policy::Arguments;
    using Layout = BlockLayout<E, G>;
    static constexpr int g = Layout::kGroup;

  public:
    static BlockPlan plan(const Arguments& a) {
        const Policy policy(a);
        const Layout layout(a.head_dim, a.value_dim, policy.largest_key_block());
        // Keys that are visited once on average are packed on the way: they are still in cache when used.
        const bool ahead = query_blocks(policy) * policy.visits() > policy.key_blocks();
        BlockPlan plan = {};
        if (ahead) {
            plan.packed_image = policy.key_blocks() * a.heads * layout.size() * int64_t(sizeof(E));
            plan.pack_tasks = policy.key_blocks() * layout.groups();
        }
        Scratch scratch(nullptr);
        const Task task(a, policy, layout, !ahead, scratch);
        plan.scratch = scratch.size();
        plan.attend_tasks = query_blocks(policy) * a.heads;
        plan.work = double(policy.visits()) * double(policy.largest_key_block()) * kQueryBlock *
                    double(a.head_dim + a.value_dim);
        return plan;
    }

    // A task is a group of keys, of all heads.
    static void pack(const Arguments& a, int64_t image, void* packed, int64_t begin, int64_t end) {
        const Policy policy(a);
        const Layout layout(a.head_dim, a.value_dim, policy.largest_key_block());
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % layout.groups() * g, at = task / layout.groups();
            const int64_t source = image + at / policy.key_blocks(), block = at % policy.key_blocks();
            const int64_t left = policy.keys_in(block) - first;
            if (left <= 0) continue;
            const int count = left < g ? int(left) : g;
            Key keys[g];
            void *k[g], *v[g];
            policy.keys(block, first, count, keys);
            find_keys(a.k, sizeof(S), source, keys, count, k);
            find_keys(a.v, sizeof(S), source, keys, count, v);
            E* const to = static_cast<E*>(packed) + at * a.heads * layout.size();
            for (int64_t head = 0; head < a.heads; ++head)
                pack_group<S, G>(layout, k, head * a.head_dim, v, head * a.value_dim, first, count,
                                 to + head * layout.size());
        }
    }

    // A task is a head of a block of queries. Heads run fastest: neighbouring tasks share their addresses.
    static void attend(const Arguments& a, int64_t image, const void* packed, void* memory, int64_t begin,
                       int64_t end) {
        const Policy policy(a);
        const Layout layout(a.head_dim, a.value_dim, policy.largest_key_block());
        Scratch scratch(memory);
        Task task(a, policy, layout, packed == nullptr, scratch);
        const int64_t blocks = query_blocks(policy);
        int64_t current = -1;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t at = i / a.heads, ahead = at / blocks;
            if (at != current) task.find(image + ahead, at % blocks);
            current = at;
            const int64_t keys = ahead * policy.key_blocks() * a.heads;
            task.run(i % a.heads, packed ? static_cast<const E*>(packed) + keys * layout.size() : nullptr);
        }
    }

  private:
    // A block of queries: where its tokens are, and one head of them after the other.
    class Task {
      public:
        VITRAIL_INLINE Task(const Arguments& a, const Policy& policy, const Layout& layout, bool packs,
                            Scratch& scratch)
            : a_(a),
              policy_(policy),
              layout_(layout),
              queries_(layout, T(a.scale), policy.weighted(), scratch.take<E>(queries_.queries_size(layout)),
                       scratch.take<T>(queries_.output_size(layout))),
              bias_row_(policy.biased() ? round_up(layout.groups() * g, kLanes<T>) : 0),
              bias_(scratch.take<T>(bias_row_ * kQueryBlock)),
              most_keys_(packs ? policy.visits() * layout.keys : 0),
              keys_(scratch.take<Key>(most_keys_)),
              k_(scratch.take<void*>(most_keys_)),
              v_(scratch.take<void*>(most_keys_)),
              block_(scratch.take<E>(packs ? layout.size() : 0)) {}

        VITRAIL_INLINE void find(int64_t image, int64_t block) {
            image_ = image;
            at_ = block;
            rows_ = list_queries(policy_, block, query_);
            find_queries(a_.q, sizeof(S), image, query_, rows_, q_);
            find_queries(a_.out, sizeof(S), image, query_, rows_, out_);
            find_queries(a_.lse, sizeof(T), image, query_, rows_, lse_);
            if (most_keys_ == 0 || rows_ == 0) return;
            const int64_t count = visited_keys(policy_, image, block, keys_);
            find_keys(a_.k, sizeof(S), image, keys_, count, k_);
            find_keys(a_.v, sizeof(S), image, keys_, count, v_);
        }

        // `packed`: the blocks of keys of this image, or null.
        VITRAIL_OUTLINE void run(int64_t head, const E* packed) {
            if (rows_ == 0) return;
            const int64_t k_channel = head * a_.head_dim, v_channel = head * a_.value_dim;
            queries_.begin(rows_, bias_row_ ? bias_ : nullptr, bias_row_);
            queries_.template load_queries<S>(q_, k_channel);
            int64_t n = 0;
            for_each_visit(policy_, image_, at_, [&](int64_t key_block, T weight, int64_t) {
                const int64_t count = policy_.keys_in(key_block);
                if (bias_row_)
                    for (int r = 0; r < rows_; ++r)
                        copy_bias(policy_, a_, head, query_[r], key_block, bias_ + r * bias_row_);
                if (packed) {
                    queries_.visit(packed + (key_block * a_.heads + head) * layout_.size(), count, weight);
                } else {
                    for (int64_t first = 0; first < count; first += g) {
                        const int some = count - first < g ? int(count - first) : g;
                        pack_group<S, G>(layout_, k_ + n + first, k_channel, v_ + n + first, v_channel, first,
                                         some, block_);
                    }
                    n += count;
                    queries_.visit(block_, count, weight);
                    queries_.flush();
                }
            });
            queries_.flush();
            queries_.finish();
            queries_.template store_results<S>(out_, v_channel, lse_, head);
        }

      private:
        const Arguments& a_;
        const Policy& policy_;
        const Layout& layout_;
        QueryBlock<E, G> queries_;
        const int64_t bias_row_;
        T* const bias_;
        const int64_t most_keys_;
        Key* const keys_;
        void **const k_, **const v_;
        E* const block_;
        int64_t image_ = 0, at_ = 0;
        int rows_ = 0;
        Query query_[kQueryBlock];
        void *q_[kQueryBlock], *out_[kQueryBlock], *lse_[kQueryBlock];
    };
};

// Calls action(Kernel) with the kernel for a storage type and the size of a block of keys.
template <template <class> class PolicyFor, class S, class Action>
VITRAIL_INLINE auto with_grouping(const typename PolicyFor<Compute<S>>::Arguments& a, Action action) {
    using T = Compute<S>;
    const int group = group_size<T>(PolicyFor<T>(a).largest_key_block());
    if constexpr (kLanes<T> >= 16)
        if (group * 4 == kLanes<T>) return action(BlockAttentionKernel<PolicyFor, S, 4>());
    if constexpr (kLanes<T> >= 8)
        if (group * 2 == kLanes<T>) return action(BlockAttentionKernel<PolicyFor, S, 2>());
    return action(BlockAttentionKernel<PolicyFor, S, 1>());
}

template <template <class> class PolicyFor>
class BlockAttentionKernels {
    using Arguments = typename PolicyFor<float>::Arguments;

    template <class Action>
    VITRAIL_INLINE static auto with_kernel(const Arguments& a, Action action) {
        return with_storage(a.storage,
                            [&](auto s) { return with_grouping<PolicyFor, decltype(s)>(a, action); });
    }

  public:
    static BlockPlan plan(const Arguments& a) {
        return with_kernel(a, [&](auto kernel) { return kernel.plan(a); });
    }
    static void pack(const Arguments& a, int64_t image, void* packed, int64_t begin, int64_t end) {
        with_kernel(a, [&](auto kernel) { kernel.pack(a, image, packed, begin, end); });
    }
    static void attend(const Arguments& a, int64_t image, const void* packed, void* scratch, int64_t begin,
                       int64_t end) {
        with_kernel(a, [&](auto kernel) { kernel.attend(a, image, packed, scratch, begin, end); });
    }
};

}  // namespace vitrail::VITRAIL_ISA
