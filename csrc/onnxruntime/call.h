// Memory and threads of a kernel in ONNX Runtime: results lie in the runtime's memory, everything else lives
// as long as the call, and work is shared out among the threads of the session.
#pragma once

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "../standalone/tensor.h"

namespace vitrail::standalone {

// One run of an operator.
class Call {
  public:
    Call() { current() = this; }
    virtual ~Call() { current() = nullptr; }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    // That of this thread; null on threads that help it.
    static Call*& current() {
        static thread_local Call* call = nullptr;
        return call;
    }

    // Memory for what the operator returns.
    virtual void* result(const std::vector<int64_t>& sizes) = 0;
    // Calls task(argument, i) for all i below `count`, on the threads of the session. It must not throw.
    virtual void share_out(size_t count, void (*task)(void*, size_t), void* argument) = 0;

    void* allocate(int64_t bytes) {
        memory_.emplace_back(::operator new(size_t(bytes), kAlignment));
        return memory_.back().get();
    }

  private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(void* data) const { ::operator delete(data, kAlignment); }
    };
    std::vector<std::unique_ptr<void, Free>> memory_;
};

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> sizes,
                        std::optional<ScalarType> type = std::nullopt) {
    Tensor t(nullptr, type.value_or(like.scalar_type()), sizes);
    return {Call::current()->allocate(t.numel() * t.element_size()), t.scalar_type(), std::move(sizes)};
}

inline Tensor returned(const Tensor&, std::vector<int64_t> sizes, ScalarType type) {
    void* const data = Call::current()->result(sizes);
    return {data, type, std::move(sizes)};
}

// Of half types only zero is ever asked for, whose bits are zero, too.
inline void fill_(const Tensor& t, double value) {
    if (t.scalar_type() == ScalarType::Float)
        std::fill_n(static_cast<float*>(t.mutable_data_ptr()), t.numel(), float(value));
    else if (value == 0)
        std::memset(t.mutable_data_ptr(), 0, size_t(t.numel() * t.element_size()));
    else
        throw std::runtime_error("half types are filled with zeros only");
}

// How many threads may be at work, at most: the runtime does not say how many a session has.
inline int64_t get_num_threads() {
    static const int64_t count = std::max(1u, std::thread::hardware_concurrency());
    return count;
}

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    struct Parts {
        const Body& body;
        int64_t begin, count, parts;
        std::mutex mutex;
        std::exception_ptr error;

        int64_t first(int64_t part) const {
            return begin + count / parts * part + std::min(part, count % parts);
        }
    };
    const int64_t count = end - begin, parts = std::min((count + grain - 1) / grain, get_num_threads());
    if (parts <= 1 || !Call::current()) return body(begin, end);
    Parts all = {body, begin, count, parts, {}, {}};
    const auto run = [](void* argument, size_t part) {
        Parts& all = *static_cast<Parts*>(argument);
        try {
            all.body(all.first(int64_t(part)), all.first(int64_t(part) + 1));
        } catch (...) {
            const std::lock_guard<std::mutex> lock(all.mutex);
            all.error = std::current_exception();
        }
    };
    Call::current()->share_out(size_t(parts), run, &all);
    if (all.error) std::rethrow_exception(all.error);
}

}  // namespace vitrail::standalone
