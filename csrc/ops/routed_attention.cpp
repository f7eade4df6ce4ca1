// vitrail::routed_attention and its backward on the CPU: checks; the rest is in block_host.h and the kernels.
#include "routed_attention.h"

#include "block_host.h"
#include "regions_host.h"

namespace vitrail {
namespace {

using Optional = std::optional<Tensor>;

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

template <class Index>
std::vector<int32_t> checked_routes(const Checks& checks, const Tensor& routes, int64_t regions) {
    return copy_slots<int32_t, Index>(routes, [&](Index route, int64_t b, int64_t r, int64_t j) {
        if (route < 0 || route >= regions)
            checks.fail<std::out_of_range>("routes[", b, ", ", r, ", ", j, "] is ", int64_t(route),
                                           ", but there are ", regions, " key regions: allowed are 0 to ",
                                           regions - 1);
        return int32_t(route);
    });
}

// What the kernels use are copies: nobody can change an index after it was checked.
struct Routing {
    std::vector<int32_t> routes;
    std::vector<float> weights32;
    std::vector<double> weights64;

    void copy(const Checks& checks, const Tensor& chosen, const Optional& weights, RoutedAttention& a) {
        routes = chosen.scalar_type() == ScalarType::Int
                     ? checked_routes<int32_t>(checks, chosen, a.k_regions.count)
                     : checked_routes<int64_t>(checks, chosen, a.k_regions.count);
        a.routes = routes.data();
        if (!weights) return;
        const auto same = [](auto weight, int64_t, int64_t, int64_t) { return weight; };
        if (a.storage == Storage::kFloat64)
            a.weights = (weights64 = copy_slots<double, double>(*weights, same)).data();
        else
            a.weights = (weights32 = copy_slots<float, float>(*weights, same)).data();
    }
};

RoutedAttention arguments(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& routes, const Optional& weights, const Sizes& region_size,
                          const Sizes& kv_region_size, int64_t num_heads, double scale, Routing& routing) {
    RoutedAttention a = {};
    set_inputs(checks, q, k, v, num_heads, scale, a);
    a.q_regions = regions_of(checks, "region_size", q, region_size);
    // A region that is larger than the grid holds the same queries as one of the grid's size.
    a.q_regions.height = std::min(a.q_regions.height, std::max<int64_t>(q.size(1), 1));
    a.q_regions.width = std::min(a.q_regions.width, std::max<int64_t>(q.size(2), 1));
    a.q_regions.size = a.q_regions.height * a.q_regions.width;
    a.k_regions = regions_of(checks, "kv_region_size", k, kv_region_size);
    if (a.k_regions.count > kMaxExtent)
        checks.fail("kv_region_size cuts k into ", a.k_regions.count, " regions; at most ", kMaxExtent,
                    " are allowed");
    checks.on_cpu("routes", routes);
    if (routes.scalar_type() != ScalarType::Int && routes.scalar_type() != ScalarType::Long)
        checks.fail("routes must be int32 or int64, got ", name_of(routes.scalar_type()));
    if (routes.dim() != 3 || routes.size(0) != q.size(0) || routes.size(1) != a.q_regions.count)
        checks.fail("routes must have shape (B, regions of q, topk) = (", q.size(0), ", ", a.q_regions.count,
                    ", topk), got ", shape_of(routes));
    if (weights) {
        const ScalarType compute = compute_type(a.storage);
        checks.on_cpu("weights", *weights);
        if (weights->scalar_type() != compute)
            checks.fail("weights must be ", name_of(compute), " for q of ", name_of(q.scalar_type()),
                        ", got ", name_of(weights->scalar_type()));
        if (shape_of(*weights) != shape_of(routes))
            checks.fail("weights must have the shape of routes, ", shape_of(routes), ", got ",
                        shape_of(*weights));
    }
    a.topk = routes.size(2);
    check_packed(checks, "kv_region_size", a, a.k_regions.count, a.k_regions.size);
    routing.copy(checks, routes, weights, a);
    return a;
}

std::tuple<Tensor, Tensor> routed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& routes, const Optional& weights,
                                            const Sizes& region_size, const Sizes& kv_region_size,
                                            int64_t num_heads, double scale) {
    Routing routing;
    RoutedAttention a = arguments(Checks("routed_attention"), q, k, v, routes, weights, region_size,
                                  kv_region_size, num_heads, scale, routing);
    auto [out, lse] = new_outputs(q, v, a);
    if (out.numel() == 0) return {out, lse};
    if (a.topk == 0) {  // a softmax over nothing
        torch::stable::fill_(out, 0.0);
        torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
        return {out, lse};
    }
    run_forward(VITRAIL_KERNELS(kRoutedAttention), a, q.size(0));
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> routed_attention_backward(
    const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& routes, const Optional& weights, const Sizes& region_size,
    const Sizes& kv_region_size, int64_t num_heads, double scale) {
    const Checks checks("routed_attention_backward");
    Routing routing;
    RoutedAttention a =
        arguments(checks, q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale, routing);
    BlockGradients g = {};
    set_outputs(checks, grad, out, lse, q, v, a, g);
    const ScalarType type = q.scalar_type(), wide = compute_type(a.storage);
    Tensor dq = empty_gradient(q, g.q), dk = zero_gradient(k, wide, g.k[0]),
           dv = zero_gradient(v, wide, g.v[0]);
    Tensor dweights = torch::stable::new_empty(q, {0});
    // a sum of its own for each head
    Tensor by_head =
        torch::stable::new_zeros(q, {q.size(0), weights ? num_heads : 0, a.q_regions.count * a.topk}, wide);
    if (weights) g.weights = by_head.mutable_data_ptr();
    if (out.numel() > 0) run_gradients(VITRAIL_KERNELS(kRoutedAttention), a, g, q.size(0));
    if (weights) dweights = summed(by_head, sizes_of(*weights));
    return {dq, converted(dk, type), converted(dv, type), dweights};
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("routed_attention", TORCH_BOX(&vitrail::routed_attention));
    m.impl("routed_attention_backward", TORCH_BOX(&vitrail::routed_attention_backward));
}
