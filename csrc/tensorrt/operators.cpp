#include "operators.h"

namespace vitrail::tensorrt {

std::map<std::string, Boxed>& registered() {
    static std::map<std::string, Boxed> functions;
    return functions;
}

Size Shapes::size(const std::string& name, size_t axis) const {
    const auto found = inputs.find(name);
    if (found == inputs.end() || axis >= found->second.size())
        throw std::invalid_argument("input " + name + " must have more than " + std::to_string(axis) +
                                    " dimensions");
    return found->second[axis];
}

const Value& Shapes::setting(const std::string& name) const {
    const auto found = settings.find(name);
    if (found == settings.end()) throw std::invalid_argument("the node has no attribute " + name);
    return found->second;
}

namespace {

std::vector<Size> like(const Shapes& s, const std::string& name, size_t dimensions) {
    std::vector<Size> sizes;
    for (size_t axis = 0; axis < dimensions; ++axis) sizes.push_back(s.size(name, axis));
    return sizes;
}

// The grid of the queries with the channels of the values.
std::vector<Size> attended(const Shapes& s, size_t dimensions) {
    std::vector<Size> sizes = like(s, "q", dimensions - 1);
    sizes.push_back(s.size("v", dimensions - 1));
    return sizes;
}

std::vector<Size> attended_grid(const Shapes& s) {
    return attended(s, 4);
}

// A region's size, which is negative where it is stated how many of them there are.
Size pieces(const Size& extent, int64_t size) {
    return size < 0 ? extent.pieces_of(extent.pieces_of(-size)) : extent.pieces_of(size);
}

Size regions(const Shapes& s, const std::string& grid, const std::string& setting) {
    const std::vector<int64_t>& size = s.setting(setting).sizes;
    if (size.size() != 2) throw std::invalid_argument(setting + " must be two numbers");
    return pieces(s.size(grid, 1), size[0]).times(pieces(s.size(grid, 2), size[1]));
}

std::vector<Size> routes(const Shapes& s) {
    const int64_t topk = s.setting("topk").integer;
    const Size chosen = topk < 0 ? regions(s, "k", "kv_region_size").at_most(-topk) : Size(s.builder, topk);
    return {s.size("q", 0), regions(s, "q", "region_size"), chosen};
}

std::vector<Size> keys(const Shapes& s) {
    std::vector<Size> sizes = like(s, "logits", 3);
    const int64_t count = s.setting("num_keys").integer;
    if (count > 0)
        sizes.push_back(Size(s.builder, count));
    else
        sizes.push_back(s.size(s.has("candidates") ? "candidates" : "basis", 1));
    return sizes;
}

}  // namespace

const std::map<std::string, Operator>& operators() {
    static const std::map<std::string, Operator> all = {
        {"routed_attention",
         {{"q", "k", "v", "routes", "weights", "region_size", "kv_region_size", "num_heads", "scale"},
          {"routes"},
          {"weights"},
          false,
          attended_grid}},
        {"window_attention",
         {{"q", "k", "v", "bias", "pad_key", "pad_value", "window_size", "shift", "num_heads", "scale"},
          {},
          {"bias"},
          false,
          attended_grid}},
        {"semantic_attention",
         {{"q", "k", "v", "own_k", "own_v", "window_size", "patch_size", "num_heads", "scale"},
          {},
          {},
          false,
          attended_grid}},
        {"sparse_attention",
         {{"q", "k", "v", "keys", "num_heads", "scale"},
          {"keys"},
          {},
          false,
          [](const Shapes& s) { return attended(s, 3); }}},
        {"channel_attention", {{"q", "k", "v", "num_heads", "scale"}, {}, {}, false, attended_grid}},
        {"strip_mix",
         {{"x", "weight", "bias", "axis"}, {}, {}, false, [](const Shapes& s) { return like(s, "x", 4); }}},
        {"region_route", {{"q", "k", "topk", "region_size", "kv_region_size"}, {}, {}, true, routes}},
        {"connectivity_topk",
         {{"logits", "basis", "candidates", "num_keys", "num_coefficients", "coefficient_threshold",
           "basis_threshold", "score_threshold"},
          {"candidates"},
          {"basis"},
          true,
          keys}},
    };
    return all;
}

}  // namespace vitrail::tensorrt
