// vitrail::routed_attention on the CPU: checks, memory, threads. The arithmetic is in the backends.
#include "routed_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../dispatch/capability.h"

namespace vitrail {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Packed keys and values that one pass over the images may hold, per thread: about what stays in cache.
constexpr int64_t kPackedBytesPerThread = int64_t(1) << 20;
// Fewer elements packed, or multiplications done, than this are not worth waking another thread for.
constexpr int64_t kPackGrain = int64_t(1) << 15, kAttendGrain = int64_t(1) << 18;
constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max();

template <class Error = std::runtime_error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    message << "routed_attention: ";
    (message << ... << parts);
    throw Error(message.str());
}

std::string shape_of(const Tensor& t) {
    std::ostringstream text;
    text << "(";
    for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
    text << ")";
    return text.str();
}

const char* name_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        default:
            return "another type";
    }
}

Storage storage_of(const Tensor& q) {
    switch (q.scalar_type()) {
        case ScalarType::Float:
            return Storage::kFloat32;
        case ScalarType::Double:
            return Storage::kFloat64;
        case ScalarType::BFloat16:
            return Storage::kBFloat16;
        case ScalarType::Half:
            return Storage::kFloat16;
        default:
            fail("q must be float32, float64, bfloat16 or float16, got ", name_of(q.scalar_type()));
    }
}

void check_grid(const char* name, const Tensor& t, const Tensor& q, int64_t heads) {
    if (!t.is_cpu()) fail(name, " must be on the CPU");
    if (t.dim() != 4) fail(name, " must have 4 dimensions (B, H, W, C), got shape ", shape_of(t));
    if (t.scalar_type() != q.scalar_type())
        fail(name, " must have the dtype of q, ", name_of(q.scalar_type()), ", got ",
             name_of(t.scalar_type()));
    if (t.size(0) != q.size(0))
        fail(name, " must have the batch size of q, ", q.size(0), ", got ", t.size(0));
    if (t.size(3) == 0 || t.size(3) % heads != 0)
        fail(name, " must have a positive multiple of num_heads = ", heads, " channels, got ", t.size(3));
    if (t.stride(3) != 1 && t.size(3) > 1)
        fail("the last dimension of ", name, " must be contiguous (stride 1), got stride ", t.stride(3));
    if (t.size(1) > kMaxExtent || t.size(2) > kMaxExtent)
        fail(name, " must be at most ", kMaxExtent, " tokens high and wide, got shape ", shape_of(t));
}

Regions regions_of(const char* name, const Tensor& grid, const std::vector<int64_t>& size) {
    if (size.size() != 2 || std::min(size[0], size[1]) < 1 || std::max(size[0], size[1]) > kMaxExtent ||
        size[0] > kMaxExtent / size[1]) {
        std::ostringstream text;
        for (size_t i = 0; i < size.size(); ++i) text << (i ? ", " : "") << size[i];
        fail(name, " must be two positive numbers whose product is at most ", kMaxExtent, ", got (",
             text.str(), ")");
    }
    Regions r = {};
    r.grid_height = grid.size(1);
    r.grid_width = grid.size(2);
    r.height = size[0];
    r.width = size[1];
    r.size = r.height * r.width;
    r.down = (r.grid_height + r.height - 1) / r.height;
    r.across = (r.grid_width + r.width - 1) / r.width;
    r.count = r.down * r.across;
    return r;
}

Grid grid_of(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// Copies a (B, R, topk) tensor of any strides into a contiguous array.
template <class To, class From, class Convert>
std::vector<To> copy_slots(const Tensor& t, Convert convert) {
    const From* data = static_cast<const From*>(t.const_data_ptr());
    std::vector<To> to;
    to.reserve(t.numel());
    for (int64_t b = 0; b < t.size(0); ++b)
        for (int64_t r = 0; r < t.size(1); ++r)
            for (int64_t j = 0; j < t.size(2); ++j)
                to.push_back(convert(data[b * t.stride(0) + r * t.stride(1) + j * t.stride(2)], b, r, j));
    return to;
}

// The checked copy is what the kernel uses: nobody can change an index after it was checked.
template <class Index>
std::vector<int32_t> checked_routes(const Tensor& routes, int64_t regions) {
    return copy_slots<int32_t, Index>(routes, [&](Index route, int64_t b, int64_t r, int64_t j) {
        if (route < 0 || route >= regions)
            fail<std::out_of_range>("routes[", b, ", ", r, ", ", j, "] is ", int64_t(route),
                                    ", but there are ", regions, " key regions: allowed are 0 to ",
                                    regions - 1);
        return int32_t(route);
    });
}

const Backend& backend() {
#if defined(__x86_64__)
    switch (capability()) {
        case Capability::kAvx512:
            return avx512::kRoutedAttention;
        case Capability::kAvx2:
            return avx2::kRoutedAttention;
        default:
            break;
    }
#endif
    return portable::kRoutedAttention;
}

struct AlignedBuffer {
    explicit AlignedBuffer(int64_t bytes) : data(::operator new(size_t(bytes), kAlignment)) {}
    ~AlignedBuffer() { ::operator delete(data, kAlignment); }
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;

    static constexpr std::align_val_t kAlignment{64};
    void* const data;
};

void run(const RoutedAttention& a, int64_t images) {
    const Backend& kernel = backend();
    const Plan plan = kernel.plan(a);
    const int64_t channels = a.head_dim + a.value_dim;
    const int64_t rows = std::min<int64_t>(a.q_regions.size, 64);
    const int64_t keys = a.k_regions.size;
    const int64_t pack_grain = std::max<int64_t>(1, kPackGrain / (keys * channels));
    const double work = double(rows) * double(keys) * double(a.topk) * double(channels);
    const int64_t attend_grain = std::max<int64_t>(1, int64_t(kAttendGrain / work));
    const auto attend = [&](int64_t first, int64_t count, const void* packed) {
        torch::stable::parallel_for(0, count * plan.attend_tasks, attend_grain,
                                    [&](int64_t begin, int64_t end) {
                                        AlignedBuffer scratch(plan.scratch);
                                        kernel.attend(a, first, packed, scratch.data, begin, end);
                                    });
    };
    if (plan.pack_tasks == 0) return attend(0, images, nullptr);
    const int64_t budget = kPackedBytesPerThread * torch::stable::get_num_threads();
    const int64_t together = std::clamp<int64_t>(budget / plan.packed_image, 1, images);
    AlignedBuffer packed(together * plan.packed_image);
    for (int64_t first = 0; first < images; first += together) {
        const int64_t count = std::min(together, images - first);
        torch::stable::parallel_for(0, count * plan.pack_tasks, pack_grain, [&](int64_t begin, int64_t end) {
            kernel.pack(a, first, packed.data, begin, end);
        });
        attend(first, count, packed.data);
    }
}

std::tuple<Tensor, Tensor> routed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& routes, const std::optional<Tensor>& weights,
                                            const std::vector<int64_t>& region_size,
                                            const std::vector<int64_t>& kv_region_size, int64_t num_heads,
                                            double scale) {
    RoutedAttention a = {};
    a.storage = storage_of(q);
    const ScalarType compute = a.storage == Storage::kFloat64 ? ScalarType::Double : ScalarType::Float;
    if (num_heads < 1) fail("num_heads must be at least 1, got ", num_heads);
    check_grid("q", q, q, num_heads);
    check_grid("k", k, q, num_heads);
    check_grid("v", v, q, num_heads);
    if (k.size(3) != q.size(3)) fail("k must have the channels of q, ", q.size(3), ", got ", k.size(3));
    if (v.size(1) != k.size(1) || v.size(2) != k.size(2))
        fail("v must lie on the grid of k, ", k.size(1), " x ", k.size(2), ", got ", v.size(1), " x ",
             v.size(2));
    a.q_regions = regions_of("region_size", q, region_size);
    // A region that is larger than the grid holds the same queries as one of the grid's size.
    a.q_regions.height = std::min(a.q_regions.height, std::max<int64_t>(q.size(1), 1));
    a.q_regions.width = std::min(a.q_regions.width, std::max<int64_t>(q.size(2), 1));
    a.q_regions.size = a.q_regions.height * a.q_regions.width;
    a.k_regions = regions_of("kv_region_size", k, kv_region_size);
    if (a.k_regions.count > kMaxExtent)
        fail("kv_region_size cuts k into ", a.k_regions.count, " regions; at most ", kMaxExtent,
             " are allowed");
    if (!routes.is_cpu()) fail("routes must be on the CPU");
    if (routes.scalar_type() != ScalarType::Int && routes.scalar_type() != ScalarType::Long)
        fail("routes must be int32 or int64, got ", name_of(routes.scalar_type()));
    if (routes.dim() != 3 || routes.size(0) != q.size(0) || routes.size(1) != a.q_regions.count)
        fail("routes must have shape (B, regions of q, topk) = (", q.size(0), ", ", a.q_regions.count,
             ", topk), got ", shape_of(routes));
    if (weights) {
        if (!weights->is_cpu()) fail("weights must be on the CPU");
        if (weights->scalar_type() != compute)
            fail("weights must be ", name_of(compute), " for q of ", name_of(q.scalar_type()), ", got ",
                 name_of(weights->scalar_type()));
        if (shape_of(*weights) != shape_of(routes))
            fail("weights must have the shape of routes, ", shape_of(routes), ", got ", shape_of(*weights));
    }
    a.heads = num_heads;
    a.head_dim = q.size(3) / num_heads;
    a.value_dim = v.size(3) / num_heads;
    a.topk = routes.size(2);
    a.scale = scale;
    // A generous bound on the packed form of one image, in floating point because it may overflow.
    const double packed = 8.0 * double(a.k_regions.count) * double(num_heads) *
                          double(a.k_regions.size + 16) * double(a.head_dim + a.value_dim + 32);
    if (packed > 0x1p62)
        fail("kv_region_size and the channels of k and v need ", packed, " bytes for one image's keys");

    Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
    Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), num_heads}, compute);
    const std::vector<int32_t> route_list = routes.scalar_type() == ScalarType::Int
                                                ? checked_routes<int32_t>(routes, a.k_regions.count)
                                                : checked_routes<int64_t>(routes, a.k_regions.count);
    if (out.numel() == 0) return {out, lse};
    if (a.topk == 0) {  // a softmax over nothing
        torch::stable::fill_(out, 0.0);
        torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
        return {out, lse};
    }
    std::vector<float> weights32;
    std::vector<double> weights64;
    const auto same = [](auto weight, int64_t, int64_t, int64_t) { return weight; };
    if (weights && compute == ScalarType::Float)
        a.weights = (weights32 = copy_slots<float, float>(*weights, same)).data();
    if (weights && compute == ScalarType::Double)
        a.weights = (weights64 = copy_slots<double, double>(*weights, same)).data();
    a.q = grid_of(q);
    a.k = grid_of(k);
    a.v = grid_of(v);
    a.out = grid_of(out);
    a.lse = lse.mutable_data_ptr();
    a.routes = route_list.data();
    run(a, q.size(0));
    return {out, lse};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("routed_attention", TORCH_BOX(&vitrail::routed_attention));
}
