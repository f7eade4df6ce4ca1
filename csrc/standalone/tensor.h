// Tensors of libraries without torch: memory that another runtime owns. They offer what the host sides of the
// operators ask of torch's, so that these serve all; `call.h` of each runtime says where memory comes from.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace vitrail::standalone {

enum class ScalarType { Float, Double, BFloat16, Half, Int, Long };

inline int64_t bytes_of(ScalarType type) {
    if (type == ScalarType::BFloat16 || type == ScalarType::Half) return 2;
    return type == ScalarType::Double || type == ScalarType::Long ? 8 : 4;
}

// Contiguous, as all that the runtimes pass.
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

inline std::vector<int64_t> sizes_of(const Tensor& t) {
    std::vector<int64_t> sizes;
    for (int64_t axis = 0; axis < t.dim(); ++axis) sizes.push_back(t.size(axis));
    return sizes;
}

inline Tensor contiguous(const Tensor& t) {
    return t;
}

}  // namespace vitrail::standalone
