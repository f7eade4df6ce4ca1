// connectivity_topk for one instruction set. Compiled once per backend, with -DVITRAIL_ISA=<namespace>.
#include "../addressing/connectivity.h"
#include "connectivity_topk.h"

namespace vitrail::VITRAIL_ISA {
namespace {

constexpr int64_t kTogether = 32;  // queries that one task chooses for

template <class S>
struct Kernel {
    using T = Compute<S>;

    static int64_t blocks(const ConnectivityTopk& a) { return (a.queries + kTogether - 1) / kTogether; }

    static int64_t list_row(const ConnectivityTopk& a) { return a.slots + 16; }

    static TopkPlan plan(const ConnectivityTopk& a) {
        const BasisRows<T> basis(a.choice);
        return {int64_t(sizeof(T)) * basis.size(),
                Chooser<T>::scratch_size(a.choice) + int64_t(sizeof(T)) * Chooser<T>::logit_row(a.choice) +
                    int64_t(sizeof(int32_t)) * list_row(a),
                basis.tasks(), a.heads * blocks(a)};
    }

    static void prepare(const ConnectivityTopk& a, int64_t image, void* rows, int64_t begin, int64_t end) {
        const BasisRows<T> basis(a.choice);
        for (int64_t task = begin; task < end; ++task)
            basis.prepare(image + task / basis.tasks(), task % basis.tasks(),
                          static_cast<T*>(rows) + task / basis.tasks() * basis.size());
    }

    static void choose(const ConnectivityTopk& a, int64_t image, const void* rows, void* scratch,
                       int64_t begin, int64_t end) {
        const BasisRows<T> basis(a.choice);
        T* const logits = static_cast<T*>(scratch);
        void* const rest = logits + Chooser<T>::logit_row(a.choice);
        Chooser<T> chooser(a.choice, rest);
        int32_t* const list =
            reinterpret_cast<int32_t*>(static_cast<char*>(rest) + Chooser<T>::scratch_size(a.choice));
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % blocks(a) * kTogether, at = task / blocks(a);
            const int64_t head = at % a.heads, ahead = at / a.heads;
            const T* const own =
                static_cast<const T*>(rows) + (a.choice.candidates ? ahead * basis.size() : 0);
            for (int64_t query = first; query < a.queries && query < first + kTogether; ++query) {
                load_logits(a, image + ahead, head, query, logits);
                const int count = chooser.choose(logits, own, list);
                write(a, list, count,
                      a.out + (((image + ahead) * a.heads + head) * a.queries + query) * a.slots);
            }
        }
    }

    static void load_logits(const ConnectivityTopk& a, int64_t image, int64_t head, int64_t query, T* to) {
        const S* from = static_cast<const S*>(a.logits) + image * a.image + head * a.head + query * a.query;
        if (a.row == 1) {
            int64_t i = 0;
            for (; i + 4 <= a.choice.rows; i += 4) store(to + i, widen<4>(from + i));
            for (; i < a.choice.rows; ++i) to[i] = widen_some(from + i, 1)[0];
        } else {
            for (int64_t i = 0; i < a.choice.rows; ++i) to[i] = widen_some(from + i * a.row, 1)[0];
        }
    }

    // By number all slots are filled; by threshold a key has the slot of its number.
    static void write(const ConnectivityTopk& a, const int32_t* list, int count, int64_t* to) {
        if (a.choice.num_keys > 0) {
            for (int i = 0; i < count; ++i) to[i] = list[i];
            return;
        }
        for (int64_t i = 0; i < a.slots; ++i) to[i] = -1;
        for (int i = 0; i < count; ++i) to[list[i]] = list[i];
    }
};

template <class Action>
auto with_kernel(const ConnectivityTopk& a, Action action) {
    return with_storage(a.storage, [&](auto s) { return action(Kernel<decltype(s)>()); });
}

TopkPlan plan(const ConnectivityTopk& a) {
    return with_kernel(a, [&](auto kernel) { return kernel.plan(a); });
}

void prepare(const ConnectivityTopk& a, int64_t image, void* rows, int64_t begin, int64_t end) {
    with_kernel(a, [&](auto kernel) { kernel.prepare(a, image, rows, begin, end); });
}

void choose(const ConnectivityTopk& a, int64_t image, const void* rows, void* scratch, int64_t begin,
            int64_t end) {
    with_kernel(a, [&](auto kernel) { kernel.choose(a, image, rows, scratch, begin, end); });
}

}  // namespace

const TopkBackend kConnectivityTopk = {plan, prepare, choose};

}  // namespace vitrail::VITRAIL_ISA
