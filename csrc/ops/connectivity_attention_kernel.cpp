// connectivity_attention for one instruction set. Compiled once per backend, with -DVITRAIL_ISA=<namespace>.
//
// A task takes some queries of one head from their logits over the choice of their keys to the result: lists
// and scores live in the cache of one processor and are never stored.
#include "../addressing/connectivity.h"
#include "../core/gemm.h"
#include "../core/head_rows.h"
#include "connectivity_attention.h"

namespace vitrail::VITRAIL_ISA {
namespace {

template <class S>
class Kernel {
    using T = Compute<S>;
    using Block = ListedQueries<T>;
    static constexpr int W = kLanes<T>;
    static constexpr int kLogitRows = 32;                    // queries whose logits are computed together
    static constexpr int64_t kListBytes = int64_t(1) << 18;  // of the lists that a task holds
    static constexpr int64_t kMaxChosen = 128;               // queries of a task

  public:
    explicit Kernel(const ConnectivityAttention& a)
        : a_(a),
          basis_(a.choice),
          rows_(a.k, a.v, a.tokens, a.heads, a.head_dim, a.value_dim),
          slots_(a.choice.num_keys > 0 ? a.choice.num_keys : a.choice.keys),
          logit_row_(Chooser<T>::logit_row(a.choice)),
          key_row_(whole_vectors<T>(a.head_dim)),
          projected_row_(whole_vectors<T>(a.compressed_dim)),
          choosing_(a.queries - a.num_dense) {
        int64_t most = kListBytes / (int64_t(sizeof(int32_t)) * Block::list_row(slots_));
        most = most > kMaxChosen ? kMaxChosen : most;
        const int64_t step = Block::rows_together(slots_);
        most = most < step ? step : most / step * step;
        blocks_ = (choosing_ + most - 1) / most;
        together_ = blocks_ > 0 ? (choosing_ + blocks_ - 1) / blocks_ : 0;
        head_tasks_ = blocks_ + (a.num_dense > 0);
    }

    ConnectivityPlan plan() const {
        return {int64_t(sizeof(T)) * basis_.size(),
                int64_t(sizeof(T)) * (rows_.image_size() + a_.heads * compressed_size()),
                scratch_size(),
                basis_.tasks(),
                rows_.image_tasks() + a_.heads,
                a_.heads * head_tasks_};
    }

    void prepare(int64_t image, T* basis, int64_t begin, int64_t end) const {
        for (int64_t task = begin; task < end; ++task)
            basis_.prepare(image + task / basis_.tasks(), task % basis_.tasks(),
                           basis + task / basis_.tasks() * basis_.size());
    }

    // Keys and values, then the compressed keys of each head.
    void pack(int64_t image, T* packed, int64_t begin, int64_t end) const {
        const int64_t tasks = rows_.image_tasks() + a_.heads;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t source = image + task / tasks, own = task % tasks;
            T* const to = packed + task / tasks * packed_size();
            if (own < rows_.image_tasks())
                rows_.pack(source, own, to);
            else
                pack_compressed(source, own - rows_.image_tasks(), to + rows_.image_size());
        }
    }

    void attend(int64_t image, const T* basis, const T* packed, void* scratch, int64_t begin, int64_t end) {
        Scratch s(*this, scratch);
        if (a_.projection) pack_projection(s.projection);
        Chooser<T> chooser(a_.choice, s.chooser);
        Block queries(a_.head_dim, a_.value_dim, slots_, s.block);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t part = task % head_tasks_, at = task / head_tasks_;
            const int64_t head = at % a_.heads, ahead = at / a_.heads;
            const T* const own = packed + ahead * packed_size();
            const T* const mixed = basis + (a_.choice.candidates ? ahead * basis_.size() : 0);
            if (part == blocks_) {
                attend_to_all(image + ahead, head, own, s);
                continue;
            }
            const int64_t first = part * together_;
            const int64_t rows = choosing_ - first < together_ ? choosing_ - first : together_;
            for (int64_t r = 0; r < rows; r += kLogitRows)
                choose(image + ahead, head, first + r, rows - r < kLogitRows ? int(rows - r) : kLogitRows,
                       own, mixed, chooser, s, r);
            const int step = Block::rows_together(slots_);
            for (int64_t r = 0; r < rows; r += step) {
                const int count = rows - r < step ? int(rows - r) : step;
                for (int i = 0; i < count; ++i) queries.set_list(i, s.lists[r + i], s.counts[r + i]);
                attend_block(queries, image + ahead, head, a_.num_dense + first + r, count, own, T(0));
            }
        }
    }

  private:
    struct Scratch {
        Scratch(const Kernel& k, void* memory) {
            T* free = static_cast<T*>(memory);
            q = {free, k.key_row_};
            projected = {q[kLogitRows], k.projected_row_};
            projection = projected[kLogitRows];
            logits = {projection + k.a_.head_dim * k.projected_row_, k.logit_row_};
            lists = {reinterpret_cast<int32_t*>(logits[kLogitRows]), k.list_row()};
            counts = lists[k.list_rows()];
            chooser = counts + whole_vectors<float>(k.together_);
            block = static_cast<char*>(chooser) + Chooser<T>::scratch_size(k.a_.choice);
        }

        Rows<T> q, projected, logits;
        T* projection;  // (channel, compressed channel)
        Rows<int32_t> lists;
        int32_t* counts;
        void *chooser, *block;
    };

    // A dense query's list names all keys; it is held where the lists of choosing queries are otherwise.
    int64_t list_row() const { return Block::list_row(slots_); }
    int64_t list_rows() const {
        const int64_t rows = (Block::list_row(a_.tokens) + list_row() - 1) / list_row();
        return a_.num_dense > 0 && rows > together_ ? rows : together_;
    }

    int64_t scratch_size() const {
        const int64_t choosing = Block::scratch_size(a_.head_dim, a_.value_dim, slots_);
        const int64_t dense =
            a_.num_dense > 0 ? Block::scratch_size(a_.head_dim, a_.value_dim, a_.tokens) : 0;
        return int64_t(sizeof(T)) *
                   (kLogitRows * (key_row_ + projected_row_ + logit_row_) + a_.head_dim * projected_row_) +
               int64_t(sizeof(int32_t)) * (list_rows() * list_row() + whole_vectors<float>(together_)) +
               Chooser<T>::scratch_size(a_.choice) + (dense > choosing ? dense : choosing);
    }

    // A matrix (channel, basis row) and a row of offsets.
    int64_t compressed_size() const { return (a_.compressed_dim + 1) * logit_row_; }
    int64_t packed_size() const { return rows_.image_size() + a_.heads * compressed_size(); }

    template <class X = S>
    static X* row(const Tokens& x, int64_t image, int64_t token, int64_t channel) {
        return static_cast<X*>(x.data) + image * x.image + token * x.token + channel;
    }

    void pack_compressed(int64_t image, int64_t head, T* packed) const {
        T* const to = packed + head * compressed_size();
        for (int64_t i = 0; i < compressed_size(); ++i) to[i] = 0;
        for (int64_t r = 0; r < a_.choice.rows; ++r) {
            const T* from = row<T>(a_.compressed, image, r, head * a_.compressed_dim);
            for (int64_t c = 0; c < a_.compressed_dim; ++c) to[c * logit_row_ + r] = from[c];
            to[a_.compressed_dim * logit_row_ + r] = static_cast<const T*>(
                a_.offset)[image * a_.offset_image + r * a_.offset_row + head * a_.offset_head];
        }
    }

    void pack_projection(T* to) const {
        for (int64_t i = 0; i < a_.head_dim * projected_row_; ++i) to[i] = 0;
        for (int64_t c = 0; c < a_.compressed_dim; ++c)
            for (int64_t i = 0; i < a_.head_dim; ++i)
                to[i * projected_row_ + c] = static_cast<const T*>(a_.projection)[c * a_.head_dim + i];
    }

    // Writes the lists of choosing queries [first, first + rows) to those of the task from `to` on.
    void choose(int64_t image, int64_t head, int64_t first, int rows, const T* packed, const T* basis,
                Chooser<T>& chooser, const Scratch& s, int64_t to) const {
        const T* const compressed = packed + rows_.image_size() + head * compressed_size();
        const T* const offset = compressed + a_.compressed_dim * logit_row_;
        for (int r = 0; r < rows; ++r) {
            widen_row(row(a_.q, image, a_.num_dense + first + r, head * a_.head_dim), a_.head_dim, T(1),
                      s.q[r]);
            for (int64_t i = 0; i < logit_row_; i += W) store(s.logits[r] + i, load(offset + i));
        }
        Rows<T> asking = s.q;
        if (a_.projection) {
            asking = s.projected;
            multiply(rows, projected_row_ / W,
                     Factors<T>{s.q.data, key_row_, 1, s.projection, projected_row_, a_.head_dim},
                     asking.data, projected_row_, false);
        }
        multiply(rows, logit_row_ / W,
                 Factors<T>{asking.data, asking.stride, 1, compressed, logit_row_, a_.compressed_dim},
                 s.logits.data, logit_row_, true);
        for (int r = 0; r < rows; ++r) s.counts[to + r] = chooser.choose(s.logits[r], basis, s.lists[to + r]);
    }

    void attend_block(Block& queries, int64_t image, int64_t head, int64_t first, int rows, const T* packed,
                      T zero_keys) const {
        for (int r = 0; r < rows; ++r)
            queries.load_query(r, row(a_.q, image, first + r, head * a_.head_dim), T(a_.scale));
        queries.attend(rows, rows_.keys(packed, head), rows_.values(packed, head), zero_keys);
        for (int r = 0; r < rows; ++r)
            queries.store_output(r, row(a_.out, image, first + r, head * a_.value_dim));
    }

    void attend_to_all(int64_t image, int64_t head, const T* packed, const Scratch& s) const {
        Block queries(a_.head_dim, a_.value_dim, a_.tokens, s.block);
        int32_t* const all = s.lists.data;
        for (int64_t i = 0; i < a_.tokens; ++i) all[i] = int32_t(i);
        const int step = Block::rows_together(a_.tokens);
        for (int64_t first = 0; first < a_.num_dense; first += step) {
            const int count = a_.num_dense - first < step ? int(a_.num_dense - first) : step;
            for (int r = 0; r < count; ++r) queries.set_list(r, all, int(a_.tokens));
            attend_block(queries, image, head, first, count, packed, T(a_.num_pruned));
        }
    }

    const ConnectivityAttention& a_;
    const BasisRows<T> basis_;
    const HeadRows<S> rows_;
    const int64_t slots_, logit_row_, key_row_, projected_row_;
    const int64_t choosing_;  // queries
    int64_t blocks_, together_, head_tasks_;
};

template <class Action>
auto with_kernel(const ConnectivityAttention& a, Action action) {
    return with_storage(a.storage,
                        [&](auto s) { return action(Kernel<decltype(s)>(a), Compute<decltype(s)>()); });
}

ConnectivityPlan plan(const ConnectivityAttention& a) {
    return with_kernel(a, [](auto kernel, auto) { return kernel.plan(); });
}

void prepare(const ConnectivityAttention& a, int64_t image, void* basis, int64_t begin, int64_t end) {
    with_kernel(
        a, [&](auto kernel, auto t) { kernel.prepare(image, static_cast<decltype(t)*>(basis), begin, end); });
}

void pack(const ConnectivityAttention& a, int64_t image, void* packed, int64_t begin, int64_t end) {
    with_kernel(
        a, [&](auto kernel, auto t) { kernel.pack(image, static_cast<decltype(t)*>(packed), begin, end); });
}

void attend(const ConnectivityAttention& a, int64_t image, const void* basis, const void* packed,
            void* scratch, int64_t begin, int64_t end) {
    with_kernel(a, [&](auto kernel, auto t) {
        kernel.attend(image, static_cast<const decltype(t)*>(basis), static_cast<const decltype(t)*>(packed),
                      scratch, begin, end);
    });
}

}  // namespace

const ConnectivityBackend kConnectivityAttention = {plan, prepare, pack, attend};

}  // namespace vitrail::VITRAIL_ISA
