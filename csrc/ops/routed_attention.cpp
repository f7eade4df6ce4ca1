// vitrail::routed_attention and its backward on the CPU.
#include "../dispatch/registration.h"
#include "routed_attention_host.h"

namespace vitrail {
namespace {

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

struct OnCpu {
    using Routing = vitrail::Routing;

    static void attend(const RoutedAttention& a, const Tensor& q) {
        run_forward(VITRAIL_KERNELS(kRoutedAttention), a, q.size(0));
    }

#if !defined(VITRAIL_STANDALONE)
    static RoutedGradients gradients(const RoutedAttention& a, BlockGradients& g, const Tensor& q,
                                     const Tensor& k, const Tensor& v, const Optional& weights) {
        const ScalarType type = q.scalar_type(), wide = compute_type(a.storage);
        Tensor dq = empty_gradient(q, g.q), dk = zero_gradient(k, wide, g.k[0]),
               dv = zero_gradient(v, wide, g.v[0]);
        Tensor dweights = tensors::new_empty(q, {0});
        // a sum of its own for each head
        Tensor by_head =
            tensors::new_zeros(q, {q.size(0), weights ? a.heads : 0, a.q_regions.count * a.topk}, wide);
        if (weights) g.weights = by_head.mutable_data_ptr();
        if (q.numel() > 0) run_gradients(VITRAIL_KERNELS(kRoutedAttention), a, g, q.size(0));
        if (weights) dweights = summed(by_head, sizes_of(*weights));
        return {dq, converted(dk, type), converted(dv, type), dweights};
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(routed_attention, &vitrail::routed_attention<vitrail::OnCpu>)
VITRAIL_REGISTER_BACKWARD(routed_attention_backward, &vitrail::routed_attention_backward<vitrail::OnCpu>)
