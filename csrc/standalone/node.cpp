#include "node.h"

#include <algorithm>

#include "widen.h"

namespace vitrail::standalone {

bool contains(const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

int64_t quotient(int64_t n, int64_t size) {
    return (n + size - 1) / size;
}

Node::Node(const std::string& operation, const Attributes& attributes)
    : operation_(operation), operator_(operators().at(operation)), function_(registered().at(operation)) {
    read_inputs(attributes.text("inputs"));
    for (size_t i = 0; i < operator_.arguments.size(); ++i) {
        const std::string& name = operator_.arguments[i];
        const Kind kind = function_.kinds[i];
        if (kind == Kind::kTensor) continue;
        Value& value = settings_[name];
        if (kind == Kind::kSizes) {
            value.sizes = attributes.integers(name);
            const bool divides = name != "shift";
            if (divides && std::count(value.sizes.begin(), value.sizes.end(), 0))
                throw std::invalid_argument(name + " must be two numbers other than 0");
        } else if (kind == Kind::kInteger) {
            value.integer = attributes.integer(name);
        } else {
            value.number = attributes.number(name);
        }
    }
}

Kind Node::kind_of(const std::string& setting) const {
    const auto at = std::find(operator_.arguments.begin(), operator_.arguments.end(), setting);
    return function_.kinds[size_t(at - operator_.arguments.begin())];
}

void Node::check_inputs(size_t count) const {
    if (count != inputs_.size())
        throw std::invalid_argument("attribute inputs names " + std::to_string(inputs_.size()) +
                                    " tensors, and the node has " + std::to_string(count));
}

void Node::run(const std::vector<Tensor>& tensors) const {
    const std::map<std::string, Value> settings = resolved(tensors);
    Values values(operator_.arguments.size());
    for (size_t i = 0; i < values.size(); ++i) {
        const std::string& name = operator_.arguments[i];
        if (function_.kinds[i] != Kind::kTensor) {
            values[i] = settings.at(name);
            continue;
        }
        const auto at = std::find(inputs_.begin(), inputs_.end(), name);
        if (at == inputs_.end()) continue;
        const Tensor& tensor = tensors[size_t(at - inputs_.begin())];
        values[i].tensor.emplace(contains(operator_.widened, name) ? widened(tensor) : tensor);
    }
    function_.run(values);
}

void Node::read_inputs(const std::string& text) {
    std::string name;
    for (const char c : text + ",") {
        if (c == '\0') continue;
        if (c != ',') {
            name += c;
            continue;
        }
        const auto at = std::find(operator_.arguments.begin(), operator_.arguments.end(), name);
        if (at == operator_.arguments.end() ||
            function_.kinds[size_t(at - operator_.arguments.begin())] != Kind::kTensor)
            throw std::invalid_argument("attribute inputs names '" + name + "', which is no tensor of " +
                                        operation_);
        inputs_.push_back(name);
        name.clear();
    }
    for (size_t i = 0; i < function_.kinds.size(); ++i)
        if (function_.required[i] && !contains(inputs_, operator_.arguments[i]))
            throw std::invalid_argument("attribute inputs must name " + operator_.arguments[i]);
}

namespace {

int64_t extent(const std::vector<Tensor>& tensors, size_t place, size_t axis) {
    if (place >= tensors.size() || int64_t(axis) >= tensors[place].dim())
        throw std::invalid_argument("input " + std::to_string(place) + " must have more than " +
                                    std::to_string(axis) + " dimensions");
    return tensors[place].size(int64_t(axis));
}

int64_t regions(const std::vector<Tensor>& tensors, size_t place, const std::vector<int64_t>& size) {
    if (size.size() != 2 || std::min(size[0], size[1]) < 1)
        throw std::invalid_argument("kv_region_size must be two positive numbers");
    return quotient(extent(tensors, place, 1), size[0]) * quotient(extent(tensors, place, 2), size[1]);
}

}  // namespace

std::map<std::string, Value> Node::resolved(const std::vector<Tensor>& tensors) const {
    std::map<std::string, Value> settings = settings_;
    for (auto& [name, value] : settings) {
        const size_t grid = name.compare(0, 3, "kv_") == 0 ? 1 : 0;
        for (size_t i = 0; i < value.sizes.size(); ++i)
            if (value.sizes[i] < 0) value.sizes[i] = quotient(extent(tensors, grid, i + 1), -value.sizes[i]);
    }
    const auto chosen = settings.find("topk");
    if (chosen != settings.end() && chosen->second.integer < 0)
        chosen->second.integer =
            std::min(-chosen->second.integer, regions(tensors, 1, settings.at("kv_region_size").sizes));
    return settings;
}

}  // namespace vitrail::standalone
