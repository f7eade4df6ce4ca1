// routed_attention for one instruction set. Compiled once per backend, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/routed_regions.h"
#include "../core/attention.h"
#include "routed_attention.h"

namespace vitrail::VITRAIL_ISA {
namespace {

template <class S, int G>
struct Kernel {
    using T = Compute<S>;
    using Layout = BlockLayout<T, G>;

    static Layout layout(const RoutedAttention& a) {
        return Layout(a.head_dim, a.value_dim, RoutedRegions<T>(a).keys_per_block());
    }

    static const S* row(const Grid& grid, int64_t image, Position at, int64_t channel) {
        if (at.row < 0) return nullptr;
        return static_cast<const S*>(grid.data) + image * grid.image + at.row * grid.row +
               at.column * grid.column + channel;
    }

    static Plan plan(const RoutedAttention& a) {
        const RoutedRegions<T> policy(a);
        const int64_t block = layout(a).size();
        // Keys that are visited once on average are packed on the way: they are still in cache when used.
        const int64_t ahead = policy.visits() > policy.key_blocks() ? policy.key_blocks() * a.heads : 0;
        const int64_t scratch = QueryBlock<T, G>::scratch_size(layout(a)) + (ahead > 0 ? 0 : block);
        return {int64_t(sizeof(T)) * ahead * block, int64_t(sizeof(T)) * scratch, ahead,
                policy.query_blocks() * a.heads};
    }

    static void pack_block(const RoutedAttention& a, const RoutedRegions<T>& policy, const Layout& block,
                           int64_t image, int64_t key_block, int64_t head, T* to) {
        constexpr int g = Layout::kGroup;
        for (int64_t first = 0; first < block.keys; first += g) {
            const int count = block.keys - first < g ? int(block.keys - first) : g;
            Position position[g];
            const S *k[g], *v[g];
            policy.keys(key_block, first, count, position);
            for (int i = 0; i < count; ++i) {
                k[i] = row(a.k, image, position[i], head * a.head_dim);
                v[i] = row(a.v, image, position[i], head * a.value_dim);
            }
            pack_group(block, k, v, first, count, to);
        }
    }

    // Asks for the rows of a block of keys and values ahead of pack_block: they are short and far apart,
    // which no hardware foresees.
    static void prefetch_block(const RoutedAttention& a, const RoutedRegions<T>& policy, const Layout& block,
                               int64_t image, int64_t key_block, int64_t head) {
        constexpr int g = Layout::kGroup;
        for (int64_t first = 0; first < block.keys; first += g) {
            const int count = block.keys - first < g ? int(block.keys - first) : g;
            Position position[g];
            policy.keys(key_block, first, count, position);
            for (int i = 0; i < count; ++i) {
                prefetch(row(a.k, image, position[i], head * a.head_dim), a.head_dim * sizeof(S));
                prefetch(row(a.v, image, position[i], head * a.value_dim), a.value_dim * sizeof(S));
            }
        }
    }

    // Asks for what the next task reads and writes.
    static void prefetch_task(const RoutedAttention& a, const RoutedRegions<T>& policy, const Layout& block,
                              int64_t image, bool packs, int64_t task) {
        const int64_t head = task % a.heads, at = task / a.heads;
        const int64_t source = image + at / policy.query_blocks();
        Position position[kQueryBlock];
        const int rows = policy.queries(at % policy.query_blocks(), position);
        for (int r = 0; r < rows; ++r) {
            prefetch(row(a.q, source, position[r], head * a.head_dim), a.head_dim * sizeof(S));
            prefetch(row(a.out, source, position[r], head * a.value_dim), a.value_dim * sizeof(S));
        }
        if (!packs) return;
        policy.for_each_visit(source, at % policy.query_blocks(), [&](int64_t key_block, T) {
            prefetch_block(a, policy, block, source, key_block, head);
        });
    }

    // Heads run fastest, so that neighbouring tasks read and write neighbouring channels.
    static void pack(const RoutedAttention& a, int64_t image, void* packed, int64_t begin, int64_t end) {
        const RoutedRegions<T> policy(a);
        const Layout block = layout(a);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t at = task / a.heads, next = (task + 1) / a.heads;
            if (task + 1 < end)
                prefetch_block(a, policy, block, image + next / policy.key_blocks(),
                               next % policy.key_blocks(), (task + 1) % a.heads);
            pack_block(a, policy, block, image + at / policy.key_blocks(), at % policy.key_blocks(),
                       task % a.heads, static_cast<T*>(packed) + task * block.size());
        }
    }

    static void attend(const RoutedAttention& a, int64_t image, const void* packed, void* scratch,
                       int64_t begin, int64_t end) {
        const RoutedRegions<T> policy(a);
        const Layout block = layout(a);
        QueryBlock<T, G> queries(block, policy.weighted(), static_cast<T*>(scratch));
        T* const local = static_cast<T*>(scratch) + queries.scratch_size(block);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t head = task % a.heads, at = task / a.heads;
            const int64_t ahead = at / policy.query_blocks(), source = image + ahead;
            Position position[kQueryBlock];
            const int rows = policy.queries(at % policy.query_blocks(), position);

            if (task + 1 < end) prefetch_task(a, policy, block, image, packed == nullptr, task + 1);

            queries.begin(rows);
            for (int r = 0; r < rows; ++r)
                queries.load_query(r, row(a.q, source, position[r], head * a.head_dim), T(a.scale));
            policy.for_each_visit(source, at % policy.query_blocks(), [&](int64_t key_block, T weight) {
                if (packed) {
                    const int64_t index = (ahead * policy.key_blocks() + key_block) * a.heads + head;
                    queries.visit(static_cast<const T*>(packed) + index * block.size(), weight);
                } else {
                    pack_block(a, policy, block, source, key_block, head, local);
                    queries.visit(local, weight);
                    queries.flush();
                }
            });
            queries.flush();
            for (int r = 0; r < rows; ++r) {
                const S* out = row(a.out, source, position[r], head * a.value_dim);
                queries.store_output(r, const_cast<S*>(out));
                const Regions& grid = a.q_regions;
                const int64_t token =
                    (source * grid.grid_height + position[r].row) * grid.grid_width + position[r].column;
                static_cast<T*>(a.lse)[token * a.heads + head] = queries.log_sum_exp(r);
            }
        }
    }
};

// Calls action(Kernel) with the kernel for the tensors' storage type and the size of a block of keys.
template <class S, class Action>
auto with_kernel_for(const RoutedAttention& a, Action action) {
    using T = Compute<S>;
    const int group = group_size<T>(RoutedRegions<T>(a).keys_per_block());
    if constexpr (kLanes<T> >= 16)
        if (group * 4 == kLanes<T>) return action(Kernel<S, 4>());
    if constexpr (kLanes<T> >= 8)
        if (group * 2 == kLanes<T>) return action(Kernel<S, 2>());
    return action(Kernel<S, 1>());
}

template <class Action>
auto with_kernel(const RoutedAttention& a, Action action) {
    switch (a.storage) {
        case Storage::kFloat64:
            return with_kernel_for<double>(a, action);
        case Storage::kBFloat16:
            return with_kernel_for<BFloat16>(a, action);
        case Storage::kFloat16:
            return with_kernel_for<Float16>(a, action);
        default:
            return with_kernel_for<float>(a, action);
    }
}

Plan plan(const RoutedAttention& a) {
    return with_kernel(a, [&](auto kernel) { return kernel.plan(a); });
}

void pack(const RoutedAttention& a, int64_t image, void* packed, int64_t begin, int64_t end) {
    with_kernel(a, [&](auto kernel) { kernel.pack(a, image, packed, begin, end); });
}

void attend(const RoutedAttention& a, int64_t image, const void* packed, void* scratch, int64_t begin,
            int64_t end) {
    with_kernel(a, [&](auto kernel) { kernel.attend(a, image, packed, scratch, begin, end); });
}

}  // namespace

#define VITRAIL_STRING(x) #x
#define VITRAIL_NAME(x) VITRAIL_STRING(x)
const Backend kRoutedAttention = {VITRAIL_NAME(VITRAIL_ISA), plan, pack, attend};

}  // namespace vitrail::VITRAIL_ISA
