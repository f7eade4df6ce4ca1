// Starting kernels, with every error checked: on PyTorch's current stream of the tensors' device, or on the
// stream that TensorRT passes to a plugin.
#pragma once

#include <algorithm>

#include "../ops/host.h"
#include "simt.h"

#if !defined(VITRAIL_EMULATE) && !defined(VITRAIL_STANDALONE)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace vitrail::cuda {

// Whether there is something to launch; a grid that is too large for CUDA is refused.
inline bool some(int64_t blocks) {
    if (blocks > std::numeric_limits<int32_t>::max())
        throw std::runtime_error("this would take " + std::to_string(blocks) +
                                 " blocks of threads, more than a launch may have; use a smaller batch");
#if defined(VITRAIL_STANDALONE)
    if (standalone::Call::current()->measures()) return false;
#endif
    return blocks > 0;
}

#if defined(VITRAIL_EMULATE)

class Launcher {
  public:
    explicit Launcher(const Tensor&) {}

    template <class... Parameters>
    void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                    std::common_type_t<Parameters>... arguments) const {
        if (!some(blocks)) return;
        emulation::block().run(unsigned(blocks), threads, shared_bytes, [&] { kernel(arguments...); });
    }
};

#else

inline void check(const char* what, cudaError_t error) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                                 cudaGetErrorString(error));
}

class Launcher {
  public:
#if defined(VITRAIL_STANDALONE)
    explicit Launcher(const Tensor&) : stream_(standalone::Call::current()->stream()) {}
#else
    explicit Launcher(const Tensor& like) : guard_(like.get_device_index()) {
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }
#endif

    // A grid of one dimension.
    template <class... Parameters>
    void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                    std::common_type_t<Parameters>... arguments) const {
        if (!some(blocks)) return;
        constexpr int kWithoutAsking = 48 << 10;
        if (shared_bytes > kWithoutAsking)
            check("shared memory of a kernel",
                  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        void* pointers[] = {static_cast<void*>(&arguments)...};
        check("launch of a kernel",
              cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)),
                               dim3(unsigned(threads)), pointers, size_t(shared_bytes), stream_));
    }

  private:
#if !defined(VITRAIL_STANDALONE)
    torch::stable::accelerator::DeviceGuard guard_;
#endif
    cudaStream_t stream_ = nullptr;
};

#endif

}  // namespace vitrail::cuda
