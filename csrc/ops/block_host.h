// What the host sides of the block attention operators share: checks, outputs, memory and threads.
#pragma once

#include "../core/block_arguments.h"
#include "host.h"

namespace vitrail {

// Checks queries, keys and values, and fills in what is common to the operators but the outputs.
inline void set_inputs(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads,
                       double scale, BlockAttention& a) {
    a.storage = checks.computed("q", q);
    checks.heads(heads);
    checks.grid("q", q, q, heads);
    checks.grid("k", k, q, heads);
    checks.grid("v", v, q, heads);
    if (k.size(3) != q.size(3))
        checks.fail("k must have the channels of q, ", q.size(3), ", got ", k.size(3));
    checks.same_grid("v", v, "k", k);
    a.heads = heads;
    a.head_dim = q.size(3) / heads;
    a.value_dim = v.size(3) / heads;
    a.scale = scale;
    checks.channels(a.head_dim, a.value_dim);
    a.q = grid_of(q);
    a.k[0] = grid_of(k);
    a.v[0] = grid_of(v);
}

// A bound on the packed form of one image, generous and in floating point because it may overflow.
inline void check_packed(const Checks& checks, const char* name, const BlockAttention& a, int64_t key_blocks,
                         int64_t keys) {
    const double packed = 8.0 * double(key_blocks) * double(a.heads) * double(keys + 16) *
                          double(a.head_dim + a.value_dim + 64);
    if (packed > 0x1p60)
        checks.fail(name, " and the channels of k and v need ", packed, " bytes for one image's keys");
}

// Empty outputs: the result, like q with the channels of v, and the log-sum-exp of each query and head.
inline std::tuple<Tensor, Tensor> new_outputs(const Tensor& q, const Tensor& v, BlockAttention& a) {
    Tensor out = new_result(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
    Tensor lse = tensors::new_empty(q, {q.size(0), q.size(1), q.size(2), a.heads}, compute_type(a.storage));
    a.out = grid_of(out);
    a.lse = grid_of(lse);
    return {out, lse};
}

#if !defined(VITRAIL_CUDA)

template <class Arguments>
void run_forward(const BlockKernels<Arguments>& kernels, const Arguments& a, int64_t images) {
    // Packed keys and values that one pass over the images may hold, per thread: about what stays in cache.
    constexpr int64_t kPackedBytesPerThread = int64_t(1) << 20;
    // Less work than this, in bytes or multiplications, is not worth waking another thread for.
    constexpr double kPackGrain = 0x1p17, kAttendGrain = 0x1p20;
    const BlockPlan plan = kernels.plan(a);
    const auto attend = [&](int64_t first, int64_t count, const void* packed) {
        parallel(count * plan.attend_tasks, grain(kAttendGrain, plan.work), [&](int64_t begin, int64_t end) {
            AlignedBuffer scratch(plan.scratch);
            kernels.attend(a, first, packed, scratch.data, begin, end);
        });
    };
    if (plan.pack_tasks == 0) return attend(0, images, nullptr);
    const int64_t budget = kPackedBytesPerThread * tensors::get_num_threads();
    const int64_t together = std::clamp<int64_t>(budget / plan.packed_image, 1, images);
    AlignedBuffer packed(together * plan.packed_image);
    const double pack_work = double(plan.packed_image) / double(plan.pack_tasks);
    for (int64_t first = 0; first < images; first += together) {
        const int64_t count = std::min(together, images - first);
        parallel(count * plan.pack_tasks, grain(kPackGrain, pack_work),
                 [&](int64_t begin, int64_t end) { kernels.pack(a, first, packed.data, begin, end); });
        attend(first, count, packed.data);
    }
}

#endif

#if !defined(VITRAIL_STANDALONE)

// --- gradients ---

// Checks what the forward operator returned, and the gradient of its result, with which gradients begin.
inline BlockGradients set_outputs(const Checks& checks, const Tensor& grad, const Tensor& out,
                                  const Tensor& lse, const Tensor& q, const Tensor& v, BlockAttention& a) {
    const std::vector<int64_t> shape = {q.size(0), q.size(1), q.size(2), v.size(3)};
    const auto check = [&](const char* name, const Tensor& t, ScalarType type) {
        checks.placed(name, t, q);
        checks.dtype(name, t, type);
        checks.contiguous_channels(name, t);
    };
    checks.shape("grad", grad, shape);
    check("grad", grad, q.scalar_type());
    checks.shape("out", out, shape);
    check("out", out, q.scalar_type());
    checks.shape("lse", lse, {q.size(0), q.size(1), q.size(2), a.heads});
    check("lse", lse, compute_type(a.storage));
    a.out = grid_of(out);
    a.lse = grid_of(lse);
    BlockGradients g = {};
    g.out = grid_of(grad);
    return g;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
    return sizes;
}

// The gradient of a grid, to be written in its type, or added to in another.
inline Tensor empty_gradient(const Tensor& t, Grid& grid) {
    Tensor gradient = tensors::new_empty(t, sizes_of(t));
    grid = grid_of(gradient);
    return gradient;
}

inline Tensor zero_gradient(const Tensor& t, ScalarType type, Grid& grid) {
    Tensor gradient = tensors::new_zeros(t, sizes_of(t), type);
    grid = grid_of(gradient);
    return gradient;
}

inline Tensor converted(const Tensor& t, ScalarType type) {
    return t.scalar_type() == type ? t : tensors::to(t, type);
}

#if !defined(VITRAIL_CUDA)

// The sums of `from`, (groups, tables, numbers), over the tables of each group, always in their order.
inline Tensor summed(const Tensor& from, const std::vector<int64_t>& shape) {
    Tensor to = tensors::new_zeros(from, shape);
    const int64_t groups = from.size(0), tables = from.size(1), size = from.size(2);
    const auto sum = [&](auto number) {
        using T = decltype(number);
        const T* const data = static_cast<const T*>(from.const_data_ptr());
        T* const sums = static_cast<T*>(to.mutable_data_ptr());
        for (int64_t group = 0; group < groups; ++group)
            parallel(size, int64_t(1) << 14, [&](int64_t begin, int64_t end) {
                for (int64_t table = group * tables; table < (group + 1) * tables; ++table)
                    for (int64_t i = begin; i < end; ++i) sums[group * size + i] += data[table * size + i];
            });
    };
    if (from.scalar_type() == ScalarType::Double)
        sum(double());
    else
        sum(float());
    return to;
}

template <class Arguments>
void run_gradients(const BlockKernels<Arguments>& kernels, const Arguments& a, const BlockGradients& g,
                   int64_t images) {
    constexpr double kGrain = 0x1p20;  // multiplications
    const GradientPlan plan = kernels.gradient_plan(a);
    parallel(images * plan.tasks, grain(kGrain, plan.work), [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(plan.scratch);
        kernels.gradients(a, g, scratch.data, begin, end);
    });
}

#endif
#endif

}  // namespace vitrail
