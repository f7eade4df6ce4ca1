// vitrail::routed_attention and its backward on any device: checks and outputs.
//
// A device says how it gets routes that cannot change (`Routing`), how it attends (`attend`), and where
// gradients come from (`gradients`).
#pragma once

#include "block_host.h"
#include "regions_host.h"
#include "routed_attention.h"

namespace vitrail {

template <class Routing>
RoutedAttention routed_arguments(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& routes, const Optional& weights, const Sizes& region_size,
                                 const Sizes& kv_region_size, int64_t num_heads, double scale,
                                 Routing& routing) {
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
    checks.placed("routes", routes, q);
    if (routes.scalar_type() != ScalarType::Int && routes.scalar_type() != ScalarType::Long)
        checks.fail("routes must be int32 or int64, got ", name_of(routes.scalar_type()));
    if (routes.dim() != 3 || routes.size(0) != q.size(0) || routes.size(1) != a.q_regions.count)
        checks.fail("routes must have shape (B, regions of q, topk) = (", q.size(0), ", ", a.q_regions.count,
                    ", topk), got ", shape_of(routes));
    if (weights) {
        const ScalarType compute = compute_type(a.storage);
        checks.placed("weights", *weights, q);
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

template <class Device>
std::tuple<Tensor, Tensor> routed_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& routes, const Optional& weights,
                                            const Sizes& region_size, const Sizes& kv_region_size,
                                            int64_t num_heads, double scale) {
    typename Device::Routing routing;
    RoutedAttention a = routed_arguments(Checks("routed_attention"), q, k, v, routes, weights, region_size,
                                         kv_region_size, num_heads, scale, routing);
    auto [out, lse] = new_outputs(q, v, a);
    if (out.numel() == 0) return {out, lse};
    if (a.topk == 0) {  // a softmax over nothing
        tensors::fill_(out, 0.0);
        tensors::fill_(lse, -std::numeric_limits<double>::infinity());
        return {out, lse};
    }
    Device::attend(a, q);
    return {out, lse};
}

#if !defined(VITRAIL_STANDALONE)

// Gradients of q, k, v, weights; empty where there are no weights.
using RoutedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Device>
RoutedGradients routed_attention_backward(const Tensor& grad, const Tensor& out, const Tensor& lse,
                                          const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& routes, const Optional& weights,
                                          const Sizes& region_size, const Sizes& kv_region_size,
                                          int64_t num_heads, double scale) {
    const Checks checks("routed_attention_backward");
    typename Device::Routing routing;
    RoutedAttention a = routed_arguments(checks, q, k, v, routes, weights, region_size, kv_region_size,
                                         num_heads, scale, routing);
    BlockGradients g = set_outputs(checks, grad, out, lse, q, v, a);
    return Device::gradients(a, g, q, k, v, weights);
}

#endif

}  // namespace vitrail
