// Tensors of a plugin: memory that TensorRT owns. They offer what the host sides of the operators ask of
// torch's, so that these serve both.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(VITRAIL_EMULATE)
#include <cuda_runtime.h>
#endif

struct CUstream_st;

namespace vitrail::tensorrt {

enum class ScalarType { Float, Double, BFloat16, Half, Int, Long };

inline int64_t bytes_of(ScalarType type) {
    if (type == ScalarType::BFloat16 || type == ScalarType::Half) return 2;
    return type == ScalarType::Double || type == ScalarType::Long ? 8 : 4;
}

// Contiguous, as all that TensorRT passes in the linear format.
class Tensor {
  public:
    Tensor(void* data, ScalarType type, std::vector<int64_t> sizes)
        : data_(data), type_(type), sizes_(std::move(sizes)) {}

    const void* const_data_ptr() const { return data_; }
    void* mutable_data_ptr() const { return data_; }
    ScalarType scalar_type() const { return type_; }
    int64_t element_size() const { return bytes_of(type_); }
    int64_t dim() const { return int64_t(sizes_.size()); }
    int64_t size(int64_t axis) const { return sizes_[axis]; }
    int64_t stride(int64_t axis) const {
        int64_t stride = 1;
        for (int64_t i = dim() - 1; i > axis; --i) stride *= sizes_[i];
        return stride;
    }
    int64_t numel() const {
        int64_t count = 1;
        for (int64_t size : sizes_) count *= size;
        return count;
    }
    bool is_cuda() const { return true; }
    bool is_cpu() const { return true; }
    int32_t get_device_index() const { return 0; }

  private:
    void* data_;
    ScalarType type_;
    std::vector<int64_t> sizes_;
};

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

inline std::vector<int64_t> sizes_of(const Tensor& t) {
    std::vector<int64_t> sizes;
    for (int64_t axis = 0; axis < t.dim(); ++axis) sizes.push_back(t.size(axis));
    return sizes;
}

inline Tensor contiguous(const Tensor& t) {
    return t;
}

}  // namespace vitrail::tensorrt
