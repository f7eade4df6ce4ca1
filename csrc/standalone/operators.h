// The operators that other runtimes know: names of their arguments, and of which types these may be.
#pragma once

#include "boxed.h"

namespace vitrail::standalone {

constexpr const char* kNamespace = "vitrail";  // the domain of their nodes
constexpr int kMostVariants = 32;              // names that each has

struct Operator {
    std::vector<std::string> arguments;  // in the order of the function's
    std::vector<std::string> indices;    // inputs that are int32 or int64; the others are numbers
    std::vector<std::string> widened;    // inputs that kernels read as float32, and that may come in any type
    bool chooses;                        // the result is int64
};

const std::map<std::string, Operator>& operators();

// `routed_attention`, `routed_attention_2`, ...: functions of a file are told apart by their names alone.
std::string name_of_variant(const std::string& operation, int number);

}  // namespace vitrail::standalone
