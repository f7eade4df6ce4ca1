// Operators as functions of lists of values, for those who know their signatures at run time only.
#pragma once

#include <map>
#include <tuple>
#include <type_traits>

#include "tensor.h"

namespace vitrail::standalone {

enum class Kind { kTensor, kSizes, kInteger, kNumber };

// An argument of any kind. A tensor may be absent.
struct Value {
    std::optional<Tensor> tensor;
    std::vector<int64_t> sizes;
    int64_t integer = 0;
    double number = 0;
};

using Values = std::vector<Value>;

struct Boxed {
    void (*run)(const Values&);  // inside a `Call`, which has the memory for what it returns
    std::vector<Kind> kinds;
    std::vector<bool> required;  // tensors that may not be absent
};

template <class T>
constexpr Kind kind_of() {
    if (std::is_same_v<T, std::vector<int64_t>>) return Kind::kSizes;
    if (std::is_same_v<T, int64_t>) return Kind::kInteger;
    if (std::is_same_v<T, double>) return Kind::kNumber;
    return Kind::kTensor;
}

template <class T>
const T& unboxed(const Value& value) {
    if constexpr (std::is_same_v<T, std::vector<int64_t>>)
        return value.sizes;
    else if constexpr (std::is_same_v<T, int64_t>)
        return value.integer;
    else if constexpr (std::is_same_v<T, double>)
        return value.number;
    else if constexpr (std::is_same_v<T, Tensor>)
        return *value.tensor;
    else
        return value.tensor;
}

template <auto function, class Result, class... Arguments, size_t... places>
Boxed boxed(Result (*)(Arguments...), std::index_sequence<places...>) {
    return {[](const Values& values) { function(unboxed<std::decay_t<Arguments>>(values[places])...); },
            {kind_of<std::decay_t<Arguments>>()...},
            {std::is_same_v<std::decay_t<Arguments>, Tensor>...}};
}

template <auto function, class Result, class... Arguments>
Boxed boxed(Result (*signature)(Arguments...)) {
    return boxed<function>(signature, std::index_sequence_for<Arguments...>());
}

template <auto function>
Boxed boxed() {
    return boxed<function>(function);
}

// All that are registered, by name.
std::map<std::string, Boxed>& registered();

struct Registration {
    Registration(const char* name, Boxed function) { registered().emplace(name, std::move(function)); }
};

}  // namespace vitrail::standalone
