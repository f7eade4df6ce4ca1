// sparse_attention for one instruction set. Compiled once per backend, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/key_lists.h"
#include "../core/head_rows.h"
#include "sparse_attention.h"

namespace vitrail::VITRAIL_ISA {
namespace {

template <class S>
struct Kernel {
    using T = Compute<S>;
    using Block = ListedQueries<T>;

    static HeadRows<S> head_rows(const SparseAttention& a) {
        return {a.k, a.v, a.tokens, a.heads, a.head_dim, a.value_dim};
    }
    static int64_t query_blocks(const SparseAttention& a) {
        const int64_t rows = Block::rows_together(a.slots);
        return (a.queries + rows - 1) / rows;
    }

    static const S* row(const Tokens& x, int64_t image, int64_t token, int64_t channel) {
        return static_cast<const S*>(x.data) + image * x.image + token * x.token + channel;
    }

    static SparsePlan plan(const SparseAttention& a) {
        return {int64_t(sizeof(T)) * head_rows(a).image_size(),
                Block::scratch_size(a.head_dim, a.value_dim, a.slots) +
                    int64_t(sizeof(int32_t)) * Block::rows_together(a.slots) * Block::list_row(a.slots),
                head_rows(a).image_tasks(), a.heads * query_blocks(a)};
    }

    static void pack(const SparseAttention& a, int64_t image, void* packed, int64_t begin, int64_t end) {
        const HeadRows<S> rows = head_rows(a);
        for (int64_t task = begin; task < end; ++task) rows.pack(image, task, static_cast<T*>(packed));
    }

    static void attend(const SparseAttention& a, int64_t image, const void* packed, void* scratch,
                       int64_t begin, int64_t end) {
        const KeyLists lists(a);
        const HeadRows<S> packed_rows = head_rows(a);
        const int64_t together = Block::rows_together(a.slots);
        Block queries(a.head_dim, a.value_dim, a.slots, scratch);
        const Rows<int32_t> list = {
            reinterpret_cast<int32_t*>(static_cast<char*>(scratch) +
                                       Block::scratch_size(a.head_dim, a.value_dim, a.slots)),
            Block::list_row(a.slots)};
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % query_blocks(a) * together, at = task / query_blocks(a);
            const int64_t head = at % a.heads, source = image + at / a.heads;
            const int rows = int(a.queries - first < together ? a.queries - first : together);
            for (int r = 0; r < rows; ++r) {
                queries.load_query(r, row(a.q, source, first + r, head * a.head_dim), T(a.scale));
                queries.set_list(r, list[r], lists.read(source, head, first + r, list[r]));
            }
            queries.attend(rows, packed_rows.keys(static_cast<const T*>(packed), at),
                           packed_rows.values(static_cast<const T*>(packed), at));
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
    return with_storage(a.storage, [&](auto s) { return action(Kernel<decltype(s)>()); });
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
