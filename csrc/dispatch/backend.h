// Tables of kernels, one per instruction set, of which the best for this process is used.
#pragma once

#include "capability.h"

// Declares `extern const Table name` in the namespace of every instruction set.
#define VITRAIL_DECLARE_KERNELS(Table, name) \
    namespace portable {                     \
    extern const Table name;                 \
    }                                        \
    namespace avx2 {                         \
    extern const Table name;                 \
    }                                        \
    namespace avx512 {                       \
    extern const Table name;                 \
    }                                        \
    namespace avx512_bf16 {                  \
    extern const Table name;                 \
    }

// The table that `name` stands for in this process; VITRAIL_PORTABLE: only one was compiled.
#if defined(__x86_64__) && !defined(VITRAIL_PORTABLE)
#define VITRAIL_KERNELS(name)                                                                    \
    ::vitrail::chosen(::vitrail::portable::name, ::vitrail::avx2::name, ::vitrail::avx512::name, \
                      ::vitrail::avx512_bf16::name)
#else
#define VITRAIL_KERNELS(name) ::vitrail::portable::name
#endif

namespace vitrail {

template <class Table>
const Table& chosen(const Table& portable, const Table& avx2, const Table& avx512, const Table& avx512_bf16) {
    switch (capability()) {
        case Capability::kAvx512Bf16:
            return avx512_bf16;
        case Capability::kAvx512:
            return avx512;
        case Capability::kAvx2:
            return avx2;
        default:
            return portable;
    }
}

}  // namespace vitrail
