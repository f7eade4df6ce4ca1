// CUDA's execution model on the host, for tests on machines without a GPU: the kernels of this folder run as
// they are written, thread by thread.
//
// Every thread of a block is a fiber. A fiber runs until it needs others: at a barrier of the block, or at an
// instruction that a warp executes together. Between barriers warps run one after the other, in an order that
// changes from block to block, so that what lacks a barrier reads what nobody has written yet: shared memory
// is filled with NaNs. Asynchronous copies are carried out when they are waited for, and no earlier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

namespace vitrail::emulation {

// A stack of its own, and a way onto it and back.
class Fiber {
    static constexpr size_t kStack = 256 << 10;

  public:
    Fiber() : stack_(new char[kStack]) {}

    // Begins body(argument) at the next `enter`.
    void prepare(void (*body)(void*), void* argument);
    // Runs the fiber until it leaves.
    void enter();
    // Back to where it was entered, from inside. A fiber that has ended must not be entered again.
    void leave(bool ended);

  private:
    static void start(Fiber* fiber);

    std::unique_ptr<char[]> stack_;
    void (*body_)(void*) = nullptr;
    void* argument_ = nullptr;
#if defined(__x86_64__)
    void *inside_ = nullptr, *outside_ = nullptr;  // stack pointers
#else
    ucontext_t inside_, outside_;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack_ = nullptr;
    const void* outer_stack_ = nullptr;
    size_t outer_size_ = 0;
#endif
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

// A block of threads at work.
class Block {
    enum class State { kReady, kAtBarrier, kInWarp, kEnded };
    struct Thread {
        Fiber fiber;
        State state;
        std::vector<Copy> copies;
        std::deque<std::vector<Copy>> groups;
    };
    struct Warp {
        int arrived = 0;
        void* lanes[32] = {};
    };

  public:
    // Runs the body for every thread of every block.
    template <class Body>
    void run(unsigned blocks, int threads, int shared_bytes, const Body& body) {
        count_ = threads;
        while (int(threads_.size()) < threads) threads_.emplace_back(new Thread);
        warps_.resize((threads + 31) / 32);
        shared_.resize((shared_bytes + 63) / 64);
        kernel_ = &body;
        body_ = [](void* block) { (*static_cast<const Body*>(static_cast<Block*>(block)->kernel_))(); };
        for (index_ = 0; index_ < blocks; ++index_) run_one();
    }

    unsigned index() const { return index_; }
    int threads() const { return count_; }
    int thread() const { return current_; }
    void* shared() { return shared_.data(); }

    void barrier() {
        threads_[current_]->state = State::kAtBarrier;
        pause();
    }

    // Calls combine(lanes), where lanes[i] is what lane i brought, once all lanes of the warp are here.
    template <class Combine>
    void together(void* mine, Combine combine) {
        Warp& warp = warps_[current_ / 32];
        warp.lanes[current_ % 32] = mine;
        const int first = current_ / 32 * 32, lanes = count_ - first < 32 ? count_ - first : 32;
        if (++warp.arrived == lanes) {
            combine(warp.lanes);
            warp.arrived = 0;
            for (int i = first; i < first + lanes; ++i) threads_[i]->state = State::kReady;
            return;
        }
        threads_[current_]->state = State::kInWarp;
        pause();
    }

    void copy_later(const Copy& copy) { threads_[current_]->copies.push_back(copy); }
    void commit_copies() {
        Thread& t = *threads_[current_];
        t.groups.push_back(std::move(t.copies));
        t.copies.clear();
    }
    void wait_for_copies(size_t left) {
        Thread& t = *threads_[current_];
        for (; t.groups.size() > left; t.groups.pop_front())
            for (const Copy& c : t.groups.front()) std::memcpy(c.to, c.from, c.bytes);
    }

  private:
    void run_one() {
        if (!shared_.empty())
            std::memset(static_cast<void*>(shared_.data()), 0xff, shared_.size() * sizeof(shared_[0]));
        for (int i = 0; i < count_; ++i) {
            threads_[i]->state = State::kReady;
            threads_[i]->fiber.prepare(body_, this);
        }
        for (Warp& warp : warps_) warp.arrived = 0;
        for (int ended = 0; ended < count_;) {
            const int warps = int(warps_.size());
            const int turn = int(++turns_ % unsigned(warps)), step = turns_ / warps % 2 ? 1 : warps - 1;
            for (int i = 0; i < warps; ++i) run_warp((turn + i * step) % warps);
            ended = 0;
            int waiting = 0;
            for (int i = 0; i < count_; ++i) {
                ended += threads_[i]->state == State::kEnded;
                waiting += threads_[i]->state == State::kAtBarrier;
            }
            if (ended + waiting < count_) stuck();
            for (int i = 0; i < count_; ++i)
                if (threads_[i]->state == State::kAtBarrier) threads_[i]->state = State::kReady;
        }
    }

    // Until none of its threads can go on.
    void run_warp(int warp) {
        const int first = warp * 32, end = first + 32 < count_ ? first + 32 : count_;
        for (bool some = true; some;) {
            some = false;
            for (int i = first; i < end; ++i)
                if (threads_[i]->state == State::kReady) {
                    current_ = i;
                    threads_[i]->fiber.enter();
                    some = true;
                }
        }
    }

    void pause() {
        const int mine = current_;
        threads_[mine]->fiber.leave(false);
        current_ = mine;
    }

    [[noreturn]] void stuck() const {
        std::fprintf(stderr, "block %u: some threads of a warp wait for others that will never come\n",
                     index_);
        std::abort();
    }

    friend class Fiber;
    void end() {
        Thread& t = *threads_[current_];
        t.state = State::kEnded;
        bool waited_for = t.copies.empty();
        for (; !t.groups.empty(); t.groups.pop_front()) waited_for &= t.groups.front().empty();
        if (waited_for) return;
        std::fprintf(stderr, "block %u: a copy that nobody waited for may arrive in what was written since\n",
                     index_);
        std::abort();
    }

    struct alignas(64) Line {
        char bytes[64];
    };

    unsigned index_ = 0;
    int count_ = 0, current_ = 0;
    unsigned turns_ = 0;
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<Warp> warps_;
    std::vector<Line> shared_;
    void (*body_)(void*) = nullptr;
    const void* kernel_ = nullptr;
};

// The block that runs on this thread of the host.
inline Block& block() {
    static thread_local Block block;
    return block;
}

#if defined(__x86_64__)
// Keeps the registers that a function must keep, and goes on where `to` was left.
extern "C" void vitrail_switch_stacks(void** from, void* to);
asm(R"(
.pushsection .text
.weak vitrail_switch_stacks
.hidden vitrail_switch_stacks
.type vitrail_switch_stacks, @function
vitrail_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.popsection
)");
#endif

inline thread_local Fiber* starting = nullptr;

inline void Fiber::start(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber->outer_stack_, &fiber->outer_size_);
#endif
    fiber->body_(fiber->argument_);
    static_cast<Block*>(fiber->argument_)->end();
    fiber->leave(true);
}

inline void Fiber::prepare(void (*body)(void*), void* argument) {
    body_ = body;
    argument_ = argument;
#if defined(__x86_64__)
    // As if `start` had been called from nowhere: its address is where the switch returns to.
    void** top = reinterpret_cast<void**>((uintptr_t(stack_.get()) + kStack) & ~uintptr_t(63)) - 3;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(+[] { start(starting); });
    inside_ = top - 6;
    std::memset(inside_, 0, 6 * sizeof(void*));
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_.get();
    inside_.uc_stack.ss_size = kStack;
    inside_.uc_link = nullptr;
    makecontext(&inside_, reinterpret_cast<void (*)()>(+[] { start(starting); }), 0);
#endif
}

inline void Fiber::enter() {
    starting = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStack);
#endif
#if defined(__x86_64__)
    vitrail_switch_stacks(&outside_, inside_);
#else
    swapcontext(&outside_, &inside_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void Fiber::leave([[maybe_unused]] bool ended) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack_, outer_stack_, outer_size_);
#endif
#if defined(__x86_64__)
    vitrail_switch_stacks(&inside_, outside_);
#else
    swapcontext(&inside_, &outside_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &outer_stack_, &outer_size_);
#endif
}

}  // namespace vitrail::emulation
