// What the host sides of the operators share: checks with messages that name the value and the rule, views of
// tensors, memory and threads. Not for kernels: it is compiled once, for the baseline instruction set.
#pragma once

#if !defined(VITRAIL_STANDALONE)
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#elif defined(VITRAIL_CUDA)
#include "../tensorrt/call.h"
#else
#include "../onnxruntime/call.h"
#endif

#include <algorithm>
#include <limits>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <exception>
#include <thread>
#endif

#include "../core/tensors.h"
#include "../dispatch/backend.h"

namespace vitrail {

// Whose tensors these are: PyTorch's, or those that TensorRT passes to a plugin and ONNX Runtime to a kernel.
#if defined(VITRAIL_STANDALONE)
namespace tensors = standalone;
using standalone::ScalarType;
#else
namespace tensors = torch::stable;
using torch::headeronly::ScalarType;
#endif
using tensors::Tensor;

using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// What an operator returns; without torch the runtime has the memory for it.
inline Tensor new_result(const Tensor& like, const Sizes& sizes, ScalarType type) {
#if defined(VITRAIL_STANDALONE)
    return tensors::returned(like, sizes, type);
#else
    return tensors::new_empty(like, sizes, type);
#endif
}
inline Tensor new_result(const Tensor& like, const Sizes& sizes) {
    return new_result(like, sizes, like.scalar_type());
}

// Of tokens in a row, of a region. A GPU counts all tokens of an image in 32 bits, with some to spare.
#if defined(VITRAIL_CUDA)
constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() - 1024;
#else
constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max();
#endif

inline std::string shape_of(const Tensor& t) {
    std::ostringstream text;
    text << "(";
    for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
    text << ")";
    return text.str();
}

inline const char* name_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        default:
            return "another type";
    }
}

// Checks of one operator's arguments; errors begin with its name.
class Checks {
  public:
    explicit constexpr Checks(const char* op) : op_(op) {}

    template <class Error = std::runtime_error, class... Parts>
    [[noreturn]] void fail(const Parts&... parts) const {
        std::ostringstream message;
        message << op_ << ": ";
        (message << ... << parts);
        throw Error(message.str());
    }

    Storage storage(const char* name, const Tensor& t) const {
        switch (t.scalar_type()) {
            case ScalarType::Float:
                return Storage::kFloat32;
            case ScalarType::Double:
                return Storage::kFloat64;
            case ScalarType::BFloat16:
                return Storage::kBFloat16;
            case ScalarType::Half:
                return Storage::kFloat16;
            default:
                fail(name, " must be float32, float64, bfloat16 or float16, got ", name_of(t.scalar_type()));
        }
    }

    // The same, of what kernels on this device compute in.
    Storage computed(const char* name, const Tensor& t) const {
#if defined(VITRAIL_CUDA)
        if (t.scalar_type() == ScalarType::Double)
            fail(name,
                 " must be float32, bfloat16 or float16 on a GPU, got float64; VITRAIL_OPS=reference takes "
                 "it");
#endif
        return storage(name, t);
    }

    // On the device that the operator is compiled for.
    void placed(const char* name, const Tensor& t) const {
#if defined(VITRAIL_CUDA) && !defined(VITRAIL_EMULATE)
        if (!t.is_cuda()) fail(name, " must be on a GPU");
#else
        if (!t.is_cpu()) fail(name, " must be on the CPU");
#endif
    }

    void dtype(const char* name, const Tensor& t, ScalarType type) const {
        if (t.scalar_type() != type)
            fail(name, " must be ", name_of(type), ", got ", name_of(t.scalar_type()));
    }

    void shape(const char* name, const Tensor& t, const std::vector<int64_t>& expected) const {
        bool same = t.dim() == int64_t(expected.size());
        for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected[i];
        if (same) return;
        std::ostringstream text;
        for (size_t i = 0; i < expected.size(); ++i) text << (i ? ", " : "") << expected[i];
        fail(name, " must have shape (", text.str(), "), got ", shape_of(t));
    }

    void contiguous_channels(const char* name, const Tensor& t) const {
        const int64_t last = t.dim() - 1;
        if (t.stride(last) != 1 && t.size(last) > 1 && t.numel() > 0)
            fail("the last dimension of ", name, " must be contiguous (stride 1), got stride ",
                 t.stride(last));
    }

    void heads(int64_t num_heads) const {
        if (num_heads < 1) fail("num_heads must be at least 1, got ", num_heads);
    }

    // Of a head, as far as tiles of attention have room on this device.
    void channels([[maybe_unused]] int64_t head_dim, [[maybe_unused]] int64_t value_dim) const {
#if defined(VITRAIL_CUDA)
        constexpr int64_t kWidest = 64;
        if (head_dim > kWidest || value_dim > kWidest)
            fail("q and v must have at most ", kWidest, " channels for each head on a GPU, got ", head_dim,
                 " and ", value_dim, "; VITRAIL_OPS=reference takes more");
#endif
    }

    // On the device of another tensor.
    void placed(const char* name, const Tensor& t, const Tensor& like, const char* other = "q") const {
        placed(name, t);
        if (t.get_device_index() != like.get_device_index())
            fail(name, " must be on the GPU of ", other, ", number ", like.get_device_index(), ", got ",
                 t.get_device_index());
    }

    // A (B, H, W, C) grid with contiguous channels.
    void grid(const char* name, const Tensor& t) const {
        placed(name, t);
        if (t.dim() != 4) fail(name, " must have 4 dimensions (B, H, W, C), got shape ", shape_of(t));
        contiguous_channels(name, t);
        if (t.size(1) > kMaxExtent || t.size(2) > kMaxExtent)
            fail(name, " must be at most ", kMaxExtent, " tokens high and wide, got shape ", shape_of(t));
#if defined(VITRAIL_CUDA)
        if (t.size(1) * t.size(2) > kMaxExtent)
            fail(name, " must have at most ", kMaxExtent, " tokens on a GPU, got shape ", shape_of(t));
#endif
    }

    // The same, whose channels `heads` divides, like `q` in dtype and batch.
    void grid(const char* name, const Tensor& t, const Tensor& q, int64_t heads) const {
        grid(name, t);
        like(name, t, q, heads);
    }

    // A (B, N, C) row of tokens whose channels `heads` divides, like `q` in dtype and batch.
    void tokens(const char* name, const Tensor& t, const Tensor& q, int64_t heads) const {
        placed(name, t);
        if (t.dim() != 3) fail(name, " must have 3 dimensions (B, N, C), got shape ", shape_of(t));
        like(name, t, q, heads);
        if (t.size(1) > kMaxExtent)
            fail(name, " must hold at most ", kMaxExtent, " tokens, got shape ", shape_of(t));
    }

    // Keys or values on a grid of their own.
    void same_grid(const char* name, const Tensor& t, const char* other, const Tensor& like) const {
        if (t.size(1) != like.size(1) || t.size(2) != like.size(2))
            fail(name, " must lie on the grid of ", other, ", ", like.size(1), " x ", like.size(2), ", got ",
                 t.size(1), " x ", t.size(2));
    }

    void extent(const char* name, const std::vector<int64_t>& size) const {
        if (size.size() == 2 && std::min(size[0], size[1]) >= 1 && std::max(size[0], size[1]) <= kMaxExtent &&
            size[0] <= kMaxExtent / size[1])
            return;
        std::ostringstream text;
        for (size_t i = 0; i < size.size(); ++i) text << (i ? ", " : "") << size[i];
        fail(name, " must be two positive numbers whose product is at most ", kMaxExtent, ", got (",
             text.str(), ")");
    }

  private:
    // Dtype and batch of `q`, contiguous channels that `heads` divides.
    void like(const char* name, const Tensor& t, const Tensor& q, int64_t heads) const {
        const int64_t channels = t.size(t.dim() - 1);
        if (t.scalar_type() != q.scalar_type())
            fail(name, " must have the dtype of q, ", name_of(q.scalar_type()), ", got ",
                 name_of(t.scalar_type()));
        placed(name, t, q);
        if (t.size(0) != q.size(0))
            fail(name, " must have the batch size of q, ", q.size(0), ", got ", t.size(0));
        if (channels == 0 || channels % heads != 0)
            fail(name, " must have a positive multiple of num_heads = ", heads, " channels, got ", channels);
        contiguous_channels(name, t);
    }

    const char* const op_;
};

inline ScalarType compute_type(Storage storage) {
    return storage == Storage::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline Grid grid_of(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

inline Tokens tokens_of(const Tensor& t) {
    return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

#if !defined(VITRAIL_CUDA)

// --- memory and threads of a CPU ---

struct AlignedBuffer {
    explicit AlignedBuffer(int64_t bytes) : data(::operator new(size_t(bytes), kAlignment, std::nothrow)) {
        if (!data) throw std::bad_alloc();  // which sanitizers would not
    }
    ~AlignedBuffer() { ::operator delete(data, kAlignment); }
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;

    static constexpr std::align_val_t kAlignment{64};
    void* const data;
};

// How many tasks a thread should take at least, so that waking it is worth while: `least` work, of which each
// is `work`.
inline int64_t grain(double least, double work) {
    return int64_t(std::clamp(least / std::max(work, 1.0), 1.0, 1e9));
}

// Calls body(begin, end) for parts of [0, count), on the threads of torch or ONNX Runtime.
#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer knows nothing of the barriers of torch's OpenMP, so here are threads whose start and end it
// sees.
template <class Body>
void parallel(int64_t count, int64_t, const Body& body) {
    const int64_t parts = std::min<int64_t>(tensors::get_num_threads(), count);
    std::vector<std::thread> threads;
    std::vector<std::exception_ptr> errors(std::max<int64_t>(parts, 0));
    for (int64_t i = 0; i < parts; ++i)
        threads.emplace_back([&, i] {
            try {
                body(count * i / parts, count * (i + 1) / parts);
            } catch (...) {
                errors[i] = std::current_exception();
            }
        });
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}
#else
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
    if (count > 0) tensors::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}
#endif

#endif

}  // namespace vitrail
