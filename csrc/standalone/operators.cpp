#include "operators.h"

namespace vitrail::standalone {

std::map<std::string, Boxed>& registered() {
    static std::map<std::string, Boxed> functions;
    return functions;
}

const std::map<std::string, Operator>& operators() {
    static const std::map<std::string, Operator> all = {
        {"routed_attention",
         {{"q", "k", "v", "routes", "weights", "region_size", "kv_region_size", "num_heads", "scale"},
          {"routes"},
          {"weights"},
          false}},
        {"window_attention",
         {{"q", "k", "v", "bias", "pad_key", "pad_value", "window_size", "shift", "num_heads", "scale"},
          {},
          {"bias"},
          false}},
        {"semantic_attention",
         {{"q", "k", "v", "own_k", "own_v", "window_size", "patch_size", "num_heads", "scale"},
          {},
          {},
          false}},
        {"sparse_attention", {{"q", "k", "v", "keys", "num_heads", "scale"}, {"keys"}, {}, false}},
        {"channel_attention", {{"q", "k", "v", "num_heads", "scale"}, {}, {}, false}},
        {"strip_mix", {{"x", "weight", "bias", "axis"}, {}, {}, false}},
        {"region_route", {{"q", "k", "topk", "region_size", "kv_region_size"}, {}, {}, true}},
        {"connectivity_topk",
         {{"logits", "basis", "candidates", "num_keys", "num_coefficients", "coefficient_threshold",
           "basis_threshold", "score_threshold"},
          {"candidates"},
          {"basis"},
          true}},
    };
    return all;
}

std::string name_of_variant(const std::string& operation, int number) {
    return number == 1 ? operation : operation + "_" + std::to_string(number);
}

}  // namespace vitrail::standalone
