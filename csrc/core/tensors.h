// What the host side of an operator (checks, memory, threads) tells its kernels about tensors.
// Plain data only: a function here would be compiled with several instruction sets under one name.
#pragma once

#include <cstdint>

namespace vitrail {

enum class Storage : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum class Activation : int32_t { kNone, kGelu };

// Tokens in a row, channels contiguous; strides in elements.
struct Tokens {
    void* data;
    int64_t image, token;
};

// A grid of tokens, channels last and contiguous; strides in elements.
struct Grid {
    void* data;
    int64_t image, row, column;
};

}  // namespace vitrail
