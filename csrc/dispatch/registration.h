// Making operators known: to PyTorch, or to the libraries without it, which know no gradients.
#pragma once

#if defined(VITRAIL_STANDALONE)

#include "../standalone/boxed.h"

#define VITRAIL_REGISTER(name, ...)                                          \
    static const ::vitrail::standalone::Registration registration_of_##name( \
        #name, ::vitrail::standalone::boxed<__VA_ARGS__>());
#define VITRAIL_REGISTER_BACKWARD(name, ...)

#else

#include <torch/csrc/stable/library.h>

#if !defined(VITRAIL_DEVICE_KEY)
#define VITRAIL_DEVICE_KEY CPU
#endif

#define VITRAIL_REGISTER(name, ...)                             \
    STABLE_TORCH_LIBRARY_IMPL(vitrail, VITRAIL_DEVICE_KEY, m) { \
        m.impl(#name, TORCH_BOX(__VA_ARGS__));                  \
    }
#define VITRAIL_REGISTER_BACKWARD(name, ...) VITRAIL_REGISTER(name, __VA_ARGS__)

#endif
