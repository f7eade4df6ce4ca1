// The driver of block attention: queries and keys found through an addressing policy, packed, and attended
// to.
//
// An addressing policy (see addressing/) answers these questions, and nothing else in the library knows the
// answers: how many blocks of queries and of keys an image has, which tokens a block covers, which blocks of
// keys a block of queries visits, and what is added to the scores.
#pragma once

#include "attention.h"
#include "block_arguments.h"

namespace vitrail::VITRAIL_ISA {

// Where a query lies, and its place among the queries of its window where scores are biased by place.
struct Query {
    int64_t row, column, place;
};

// Where a key lies: on the grid of keys (source 0), or in what an operator has besides it (source 1).
struct Key {
    int64_t row, column;
    int source;
};

template <class S>
VITRAIL_INLINE S* token(const Grid& grid, int64_t image, int64_t row, int64_t column) {
    if (!grid.data) return nullptr;
    return static_cast<S*>(grid.data) + image * grid.image + row * grid.row + column * grid.column;
}

// Parts of a block of memory, one after the other, aligned to cache lines. Without memory it only counts.
class Scratch {
  public:
    VITRAIL_INLINE explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

    template <class X>
    VITRAIL_INLINE X* take(int64_t count) {
        X* const part = memory_ ? reinterpret_cast<X*>(memory_ + size_) : nullptr;
        size_ += round_up(count * int64_t(sizeof(X)), 64);
        return part;
    }
    VITRAIL_INLINE int64_t size() const { return size_; }

  private:
    char* const memory_;
    int64_t size_ = 0;
};

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
        const bool ahead = policy.visits() > policy.key_blocks();
        BlockPlan plan = {};
        if (ahead) {
            plan.packed_image = policy.key_blocks() * a.heads * layout.size() * int64_t(sizeof(E));
            plan.pack_tasks = policy.key_blocks() * layout.groups();
        }
        Scratch scratch(nullptr);
        const Task task(a, policy, layout, !ahead, scratch);
        plan.scratch = scratch.size();
        plan.attend_tasks = policy.query_blocks() * a.heads;
        plan.work = double(policy.visits()) / double(policy.query_blocks()) *
                    double(policy.largest_key_block()) * kQueryBlock * double(a.head_dim + a.value_dim);
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
            const S *k[g], *v[g];
            policy.keys(block, first, count, keys);
            for (int i = 0; i < count; ++i) {
                k[i] = token<const S>(a.k[keys[i].source], source, keys[i].row, keys[i].column);
                v[i] = token<const S>(a.v[keys[i].source], source, keys[i].row, keys[i].column);
            }
            for (int64_t head = 0; head < a.heads; ++head)
                pack_group(layout, k, head * a.head_dim, v, head * a.value_dim, first, count,
                           static_cast<E*>(packed) + (at * a.heads + head) * layout.size());
        }
    }

    // A task is a head of a block of queries. Heads run fastest: neighbouring tasks share their addresses.
    static void attend(const Arguments& a, int64_t image, const void* packed, void* memory, int64_t begin,
                       int64_t end) {
        const Policy policy(a);
        const Layout layout(a.head_dim, a.value_dim, policy.largest_key_block());
        Scratch scratch(memory);
        Task task(a, policy, layout, packed == nullptr, scratch);
        int64_t current = -1;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t at = i / a.heads, ahead = at / policy.query_blocks();
            if (at != current) task.locate(image + ahead, at % policy.query_blocks());
            current = at;
            const int64_t blocks = ahead * policy.key_blocks() * a.heads;
            task.run(i % a.heads, packed ? static_cast<const E*>(packed) + blocks * layout.size() : nullptr);
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
              keys_(packs ? policy.most_visits() * layout.keys : 0),
              k_(scratch.take<const S*>(keys_)),
              v_(scratch.take<const S*>(keys_)),
              block_(scratch.take<E>(packs ? layout.size() : 0)) {}

        VITRAIL_INLINE void locate(int64_t image, int64_t block) {
            image_ = image;
            at_ = block;
            rows_ = policy_.queries(block, query_);
            for (int r = 0; r < rows_; ++r) {
                q_[r] = token<const S>(a_.q, image, query_[r].row, query_[r].column);
                out_[r] = token<S>(a_.out, image, query_[r].row, query_[r].column);
                lse_[r] = token<T>(a_.lse, image, query_[r].row, query_[r].column);
            }
            if (keys_ == 0 || rows_ == 0) return;
            int64_t n = 0;
            policy_.for_each_visit(image, block, [&](int64_t key_block, T) {
                const int64_t count = policy_.keys_in(key_block);
                for (int64_t first = 0; first < count; first += kKeyBlock) {
                    Key keys[kKeyBlock];
                    const int some = count - first < kKeyBlock ? int(count - first) : kKeyBlock;
                    policy_.keys(key_block, first, some, keys);
                    for (int i = 0; i < some; ++i, ++n) {
                        k_[n] = token<const S>(a_.k[keys[i].source], image, keys[i].row, keys[i].column);
                        v_[n] = token<const S>(a_.v[keys[i].source], image, keys[i].row, keys[i].column);
                    }
                }
            });
        }

        // `packed`: the blocks of keys of this image, or null.
        VITRAIL_INLINE void run(int64_t head, const E* packed) {
            if (rows_ == 0) return;
            const int64_t k_channel = head * a_.head_dim, v_channel = head * a_.value_dim;
            queries_.begin(rows_, bias_row_ ? bias_ : nullptr, bias_row_);
            for (int r = 0; r < rows_; ++r) queries_.load_query(r, q_[r] + k_channel);
            int64_t n = 0;
            policy_.for_each_visit(image_, at_, [&](int64_t key_block, T weight) {
                const int64_t count = policy_.keys_in(key_block);
                if (bias_row_)
                    for (int r = 0; r < rows_; ++r)
                        policy_.bias(head, query_[r].place, key_block, bias_ + r * bias_row_);
                if (packed) {
                    queries_.visit(packed + (key_block * a_.heads + head) * layout_.size(), count, weight);
                } else {
                    for (int64_t first = 0; first < count; first += g, n += g) {
                        const int some = count - first < g ? int(count - first) : g;
                        pack_group(layout_, k_ + n, k_channel, v_ + n, v_channel, first, some, block_);
                    }
                    n += count - round_up(count, g);
                    queries_.visit(block_, count, weight);
                    queries_.flush();
                }
            });
            queries_.flush();
            queries_.finish();
            for (int r = 0; r < rows_; ++r) {
                queries_.store_output(r, out_[r] + v_channel);
                lse_[r][head] = queries_.log_sum_exp(r);
            }
        }

      private:
        const Arguments& a_;
        const Policy& policy_;
        const Layout& layout_;
        QueryBlock<E, G> queries_;
        const int64_t bias_row_;
        T* const bias_;
        const int64_t keys_;
        const S **const k_, **const v_;
        E* const block_;
        int64_t image_ = 0, at_ = 0;
        int rows_ = 0;
        Query query_[kQueryBlock];
        const S* q_[kQueryBlock];
        S* out_[kQueryBlock];
        T* lse_[kQueryBlock];
    };
};

// Calls action(Kernel) with the kernel for the tensors' storage type and the size of a block of keys.
template <template <class> class PolicyFor, class S, class Arguments, class Action>
VITRAIL_INLINE auto with_kernel_for(const Arguments& a, Action action) {
    using T = Compute<S>;
    const int group = group_size<T>(PolicyFor<T>(a).largest_key_block());
    if constexpr (kLanes<T> >= 16)
        if (group * 4 == kLanes<T>) return action(BlockAttentionKernel<PolicyFor, S, 4>());
    if constexpr (kLanes<T> >= 8)
        if (group * 2 == kLanes<T>) return action(BlockAttentionKernel<PolicyFor, S, 2>());
    return action(BlockAttentionKernel<PolicyFor, S, 1>());
}

template <template <class> class PolicyFor, class Arguments, class Action>
VITRAIL_INLINE auto with_kernel(const Arguments& a, Action action) {
    switch (a.storage) {
        case Storage::kFloat64:
            return with_kernel_for<PolicyFor, double>(a, action);
        case Storage::kBFloat16:
            return with_kernel_for<PolicyFor, BFloat16>(a, action);
        case Storage::kFloat16:
            return with_kernel_for<PolicyFor, Float16>(a, action);
        default:
            return with_kernel_for<PolicyFor, float>(a, action);
    }
}

template <template <class> class PolicyFor>
class BlockAttentionKernels {
    using Arguments = typename PolicyFor<float>::Arguments;

    static BlockPlan plan(const Arguments& a) {
        return with_kernel<PolicyFor>(a, [&](auto kernel) { return kernel.plan(a); });
    }
    static void pack(const Arguments& a, int64_t image, void* packed, int64_t begin, int64_t end) {
        with_kernel<PolicyFor>(a, [&](auto kernel) { kernel.pack(a, image, packed, begin, end); });
    }
    static void attend(const Arguments& a, int64_t image, const void* packed, void* scratch, int64_t begin,
                       int64_t end) {
        with_kernel<PolicyFor>(a, [&](auto kernel) { kernel.attend(a, image, packed, scratch, begin, end); });
    }

  public:
    static constexpr BlockKernels<Arguments> kTable = {plan, pack, attend};
};

}  // namespace vitrail::VITRAIL_ISA
