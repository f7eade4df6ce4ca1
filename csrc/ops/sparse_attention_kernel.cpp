// sparse_attention for one instruction set. Compiled once per backend, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/key_lists.h"
#include "../core/listed.h"
#include "sparse_attention.h"

namespace vitrail::VITRAIL_ISA {
namespace {

constexpr int64_t kPackRows = 64;  // keys, and their values, that one task widens

template <class S>
struct Kernel {
    using T = Compute<S>;
    using Block = ListedQueries<T>;

    static int64_t key_row(const SparseAttention& a) { return whole_vectors<T>(a.head_dim); }
    static int64_t value_row(const SparseAttention& a) { return whole_vectors<T>(a.value_dim); }
    static int64_t head_size(const SparseAttention& a) { return a.tokens * (key_row(a) + value_row(a)); }
    static int64_t pack_blocks(const SparseAttention& a) { return (a.tokens + kPackRows - 1) / kPackRows; }
    static int64_t query_blocks(const SparseAttention& a) {
        const int64_t rows = Block::rows_together(a.slots);
        return (a.queries + rows - 1) / rows;
    }

    static const S* row(const Tokens& x, int64_t image, int64_t token, int64_t channel) {
        return static_cast<const S*>(x.data) + image * x.image + token * x.token + channel;
    }

    static SparsePlan plan(const SparseAttention& a) {
        return {int64_t(sizeof(T)) * a.heads * head_size(a),
                Block::scratch_size(a.head_dim, a.value_dim, a.slots), a.heads * pack_blocks(a),
                a.heads * query_blocks(a)};
    }

    // Keys of a head lie together, after them its values.
    static void pack(const SparseAttention& a, int64_t image, void* packed, int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % pack_blocks(a) * kPackRows, at = task / pack_blocks(a);
            const int64_t head = at % a.heads, source = image + at / a.heads;
            const Rows<T> keys = {static_cast<T*>(packed) + at * head_size(a), key_row(a)};
            const Rows<T> values = {keys[a.tokens], value_row(a)};
            for (int64_t i = first; i < a.tokens && i < first + kPackRows; ++i) {
                widen_row(row(a.k, source, i, head * a.head_dim), a.head_dim, T(1), keys[i]);
                widen_row(row(a.v, source, i, head * a.value_dim), a.value_dim, T(1), values[i]);
            }
        }
    }

    static void attend(const SparseAttention& a, int64_t image, const void* packed, void* scratch,
                       int64_t begin, int64_t end) {
        const KeyLists lists(a);
        const int64_t together = Block::rows_together(a.slots);
        Block queries(a.head_dim, a.value_dim, a.slots, scratch);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % query_blocks(a) * together, at = task / query_blocks(a);
            const int64_t head = at % a.heads, source = image + at / a.heads;
            const int rows = int(a.queries - first < together ? a.queries - first : together);
            const Rows<const T> keys = {static_cast<const T*>(packed) + at * head_size(a), key_row(a)};
            const Rows<const T> values = {keys[a.tokens], value_row(a)};
            for (int r = 0; r < rows; ++r) {
                queries.load_query(r, row(a.q, source, first + r, head * a.head_dim), T(a.scale));
                queries.set_count(r, lists.read(source, head, first + r, queries.list(r)));
            }
            queries.attend(rows, keys, values);
            for (int r = 0; r < rows; ++r) {
                queries.store_output(r, const_cast<S*>(row(a.out, source, first + r, head * a.value_dim)));
                static_cast<T*>(a.lse)[(source * a.queries + first + r) * a.heads + head] =
                    queries.log_sum_exp(r);
            }
        }
    }
};

template <class Action>
auto with_kernel(const SparseAttention& a, Action action) {
    switch (a.storage) {
        case Storage::kFloat64:
            return action(Kernel<double>());
        case Storage::kBFloat16:
            return action(Kernel<BFloat16>());
        case Storage::kFloat16:
            return action(Kernel<Float16>());
        default:
            return action(Kernel<float>());
    }
}

SparsePlan plan(const SparseAttention& a) {
    return with_kernel(a, [&](auto kernel) { return kernel.plan(a); });
}

void pack(const SparseAttention& a, int64_t image, void* packed, int64_t begin, int64_t end) {
    with_kernel(a, [&](auto kernel) { kernel.pack(a, image, packed, begin, end); });
}

void attend(const SparseAttention& a, int64_t image, const void* packed, void* scratch, int64_t begin,
            int64_t end) {
    with_kernel(a, [&](auto kernel) { kernel.attend(a, image, packed, scratch, begin, end); });
}

}  // namespace

const SparseBackend kSparseAttention = {plan, pack, attend};

}  // namespace vitrail::VITRAIL_ISA
