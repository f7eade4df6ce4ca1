// vitrail::routed_attention on the CPU: checks, memory, threads. The arithmetic is in the backends.
#include "routed_attention.h"

#include "block_host.h"

namespace vitrail {
namespace {

constexpr Checks kChecks("routed_attention");

Regions regions_of(const char* name, const Tensor& grid, const std::vector<int64_t>& size) {
    kChecks.extent(name, size);
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
            kChecks.fail<std::out_of_range>("routes[", b, ", ", r, ", ", j, "] is ", int64_t(route),
                                            ", but there are ", regions, " key regions: allowed are 0 to ",
                                            regions - 1);
        return int32_t(route);
    });
}

std::tuple<Tensor, Tensor> routed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& routes, const std::optional<Tensor>& weights,
                                            const std::vector<int64_t>& region_size,
                                            const std::vector<int64_t>& kv_region_size, int64_t num_heads,
                                            double scale) {
    RoutedAttention a = {};
    set_inputs(kChecks, q, k, v, num_heads, scale, a);
    const ScalarType compute = compute_type(a.storage);
    a.q_regions = regions_of("region_size", q, region_size);
    // A region that is larger than the grid holds the same queries as one of the grid's size.
    a.q_regions.height = std::min(a.q_regions.height, std::max<int64_t>(q.size(1), 1));
    a.q_regions.width = std::min(a.q_regions.width, std::max<int64_t>(q.size(2), 1));
    a.q_regions.size = a.q_regions.height * a.q_regions.width;
    a.k_regions = regions_of("kv_region_size", k, kv_region_size);
    if (a.k_regions.count > kMaxExtent)
        kChecks.fail("kv_region_size cuts k into ", a.k_regions.count, " regions; at most ", kMaxExtent,
                     " are allowed");
    kChecks.on_cpu("routes", routes);
    if (routes.scalar_type() != ScalarType::Int && routes.scalar_type() != ScalarType::Long)
        kChecks.fail("routes must be int32 or int64, got ", name_of(routes.scalar_type()));
    if (routes.dim() != 3 || routes.size(0) != q.size(0) || routes.size(1) != a.q_regions.count)
        kChecks.fail("routes must have shape (B, regions of q, topk) = (", q.size(0), ", ", a.q_regions.count,
                     ", topk), got ", shape_of(routes));
    if (weights) {
        kChecks.on_cpu("weights", *weights);
        if (weights->scalar_type() != compute)
            kChecks.fail("weights must be ", name_of(compute), " for q of ", name_of(q.scalar_type()),
                         ", got ", name_of(weights->scalar_type()));
        if (shape_of(*weights) != shape_of(routes))
            kChecks.fail("weights must have the shape of routes, ", shape_of(routes), ", got ",
                         shape_of(*weights));
    }
    a.topk = routes.size(2);
    check_packed(kChecks, "kv_region_size", a, a.k_regions.count, a.k_regions.size);

    auto [out, lse] = new_outputs(q, v, a);
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
    a.routes = route_list.data();
    run_forward(VITRAIL_KERNELS(kRoutedAttention), a, q.size(0));
    return {out, lse};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("routed_attention", TORCH_BOX(&vitrail::routed_attention));
}
