#include "results.h"

namespace vitrail::tensorrt {

Size Shapes::size(const std::string& name, size_t axis) const {
    const auto found = inputs.find(name);
    if (found == inputs.end() || axis >= found->second.size())
        throw std::invalid_argument("input " + name + " must have more than " + std::to_string(axis) +
                                    " dimensions");
    return found->second[axis];
}

const standalone::Value& Shapes::setting(const std::string& name) const {
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

using Result = std::vector<Size> (*)(const Shapes&);

const std::map<std::string, Result> kResults = {
    {"routed_attention", attended_grid},
    {"window_attention", attended_grid},
    {"semantic_attention", attended_grid},
    {"sparse_attention", [](const Shapes& s) { return attended(s, 3); }},
    {"channel_attention", attended_grid},
    {"strip_mix", [](const Shapes& s) { return like(s, "x", 4); }},
    {"region_route", routes},
    {"connectivity_topk", keys},
};

}  // namespace

std::vector<Size> result_of(const std::string& operation, const Shapes& shapes) {
    return kResults.at(operation)(shapes);
}

}  // namespace vitrail::tensorrt
