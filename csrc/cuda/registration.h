// Making the GPU's operators known: to PyTorch, or to the plugins of TensorRT, which know no gradients.
#pragma once

#if defined(VITRAIL_TENSORRT)

#include "../tensorrt/boxed.h"

#define VITRAIL_REGISTER(name, ...)                                        \
    static const ::vitrail::tensorrt::Registration registration_of_##name( \
        #name, ::vitrail::tensorrt::boxed<__VA_ARGS__>());
#define VITRAIL_REGISTER_BACKWARD(name, ...)

#else

#include <torch/csrc/stable/library.h>

#define VITRAIL_REGISTER(name, ...)                             \
    STABLE_TORCH_LIBRARY_IMPL(vitrail, VITRAIL_DEVICE_KEY, m) { \
        m.impl(#name, TORCH_BOX(__VA_ARGS__));                  \
    }
#define VITRAIL_REGISTER_BACKWARD(name, ...) VITRAIL_REGISTER(name, __VA_ARGS__)

#endif
