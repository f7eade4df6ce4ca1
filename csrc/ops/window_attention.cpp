// vitrail::window_attention on the CPU: checks; the rest is in block_host.h and the kernels.
#include "window_attention.h"

#include "block_host.h"

namespace vitrail {
namespace {

constexpr Checks kChecks("window_attention");

// An optional tensor that all images share, contiguous; null without it.
const void* shared(const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& shape,
                   ScalarType type, std::vector<Tensor>& keep) {
    if (!t) return nullptr;
    kChecks.on_cpu(name, *t);
    kChecks.dtype(name, *t, type);
    kChecks.shape(name, *t, shape);
    keep.push_back(torch::stable::contiguous(*t));
    return keep.back().const_data_ptr();
}

void set_windows(const Tensor& q, const std::vector<int64_t>& window_size, const std::vector<int64_t>& shift,
                 WindowAttention& a) {
    kChecks.extent("window_size", window_size);
    bool within = shift.size() == 2;
    for (size_t i = 0; within && i < 2; ++i) within = 0 <= shift[i] && shift[i] < window_size[i];
    if (!within) {
        std::ostringstream text;
        for (size_t i = 0; i < shift.size(); ++i) text << (i ? ", " : "") << shift[i];
        kChecks.fail("shift must be two numbers from 0 to below window_size (", window_size[0], ", ",
                     window_size[1], "), got (", text.str(), ")");
    }
    a.grid_height = q.size(1);
    a.grid_width = q.size(2);
    a.height = window_size[0];
    a.width = window_size[1];
    a.down = shift[0];
    a.right = shift[1];
}

std::tuple<Tensor, Tensor> window_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const std::optional<Tensor>& bias,
                                            const std::optional<Tensor>& pad_key,
                                            const std::optional<Tensor>& pad_value,
                                            const std::vector<int64_t>& window_size,
                                            const std::vector<int64_t>& shift, int64_t num_heads,
                                            double scale) {
    WindowAttention a = {};
    set_inputs(kChecks, q, k, v, num_heads, scale, a);
    kChecks.same_grid("k", k, "q", q);
    set_windows(q, window_size, shift, a);
    std::vector<Tensor> keep;
    const int64_t tokens = a.height * a.width;
    a.bias = shared("bias", bias, {num_heads, tokens, tokens}, compute_type(a.storage), keep);
    a.k[1].data = const_cast<void*>(shared("pad_key", pad_key, {k.size(3)}, q.scalar_type(), keep));
    a.v[1].data = const_cast<void*>(shared("pad_value", pad_value, {v.size(3)}, q.scalar_type(), keep));
    const int64_t windows = (a.grid_height / a.height + 2) * (a.grid_width / a.width + 2);
    check_packed(kChecks, "window_size", a, windows, tokens);
    auto [out, lse] = new_outputs(q, v, a);
    if (out.numel() > 0) run_forward(VITRAIL_KERNELS(kWindowAttention), a, q.size(0));
    return {out, lse};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("window_attention", TORCH_BOX(&vitrail::window_attention));
}
