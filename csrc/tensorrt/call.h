// Memory of a plugin: results lie where TensorRT wants them, everything else is cut from the workspace.
#pragma once

#include "../standalone/tensor.h"

#if !defined(VITRAIL_EMULATE)
#include <cuda_runtime.h>
#endif

struct CUstream_st;

namespace vitrail::standalone {

// One run of an operator, or of its host side alone, which measures how much memory it takes.
class Call {
  public:
    // Of a run on memory for its result, and as much workspace as measuring said.
    Call(void* result, void* workspace, CUstream_st* stream)
        : result_(result), workspace_(static_cast<char*>(workspace)), stream_(stream) {
        current() = this;
    }
    // Of a run that only measures.
    Call() : measures_(true) { current() = this; }
    ~Call() { current() = nullptr; }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    static Call*& current() {
        static thread_local Call* call = nullptr;
        return call;
    }

    bool measures() const { return measures_; }
    CUstream_st* stream() const { return stream_; }
    size_t used() const { return used_; }
    void* result() const { return result_; }

    void* allocate(int64_t bytes) {
        constexpr size_t kAlignment = 256;
        const size_t begin = used_;
        used_ += (size_t(bytes) + kAlignment - 1) / kAlignment * kAlignment;
        return measures_ ? nullptr : workspace_ + begin;
    }

  private:
    void* result_ = nullptr;
    char* workspace_ = nullptr;
    size_t used_ = 0;
    CUstream_st* stream_ = nullptr;
    bool measures_ = false;
};

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> sizes,
                        std::optional<ScalarType> type = std::nullopt) {
    Tensor t(nullptr, type.value_or(like.scalar_type()), sizes);
    return {Call::current()->allocate(t.numel() * t.element_size()), t.scalar_type(), std::move(sizes)};
}

// What an operator returns lies where TensorRT wants it.
inline Tensor returned(const Tensor&, std::vector<int64_t> sizes, ScalarType type) {
    return {Call::current()->result(), type, std::move(sizes)};
}

inline void zero_(const Tensor& t) {
    if (Call::current()->measures()) return;
    const size_t bytes = size_t(t.numel() * t.element_size());
#if defined(VITRAIL_EMULATE)
    std::memset(t.mutable_data_ptr(), 0, bytes);
#else
    const cudaError_t error = cudaMemsetAsync(t.mutable_data_ptr(), 0, bytes, Call::current()->stream());
    if (error != cudaSuccess) throw std::runtime_error(std::string("zeros: ") + cudaGetErrorString(error));
#endif
}

inline Tensor new_zeros(const Tensor& like, std::vector<int64_t> sizes,
                        std::optional<ScalarType> type = std::nullopt) {
    Tensor t = new_empty(like, std::move(sizes), type);
    zero_(t);
    return t;
}

// Only what nothing is computed from is filled, which a plugin is never asked for.
inline void fill_(const Tensor& t, double) {
    if (t.numel() > 0) throw std::runtime_error("there is nothing to attend to");
}

}  // namespace vitrail::standalone
