// What of the attention core is compiled once, in attention_kernel.cpp, for all operators: functions that are
// not inline, for all types and groupings (G).
#pragma once

#include "attention.h"

namespace vitrail::VITRAIL_ISA {

#if defined(__AVX512F__)
#define VITRAIL_GROUPINGS(M, S, ...) M(S, 1, __VA_ARGS__) M(S, 2, __VA_ARGS__) M(S, 4, __VA_ARGS__)
#define VITRAIL_GROUPINGS64(M, S, ...) M(S, 1, __VA_ARGS__) M(S, 2, __VA_ARGS__)
#elif defined(__AVX2__)
#define VITRAIL_GROUPINGS(M, S, ...) M(S, 1, __VA_ARGS__) M(S, 2, __VA_ARGS__)
#define VITRAIL_GROUPINGS64(M, S, ...) M(S, 1, __VA_ARGS__)
#else
#define VITRAIL_GROUPINGS(M, S, ...) M(S, 1, __VA_ARGS__)
#define VITRAIL_GROUPINGS64(M, S, ...) M(S, 1, __VA_ARGS__)
#endif

#define VITRAIL_STORAGE_PARTS(S, G, ...)                                                              \
    __VA_ARGS__ template void pack_group<S, G>(const BlockLayout<Packed<S>, G>&, const void* const*,  \
                                               int64_t, const void* const*, int64_t, int64_t, int,    \
                                               Packed<S>*);                                           \
    __VA_ARGS__ template void QueryBlock<Packed<S>, G>::load_queries<S>(const void* const*, int64_t); \
    __VA_ARGS__ template void QueryBlock<Packed<S>, G>::store_results<S>(void* const*, int64_t,       \
                                                                         void* const*, int64_t) const;
#define VITRAIL_BLOCK_PARTS(E, G, ...)                    \
    __VA_ARGS__ template void QueryBlock<E, G>::attend(); \
    __VA_ARGS__ template void QueryBlock<E, G>::finish();
#if defined(__AVX512BF16__)
#define VITRAIL_BFLOAT16_BLOCKS(...) VITRAIL_GROUPINGS(VITRAIL_BLOCK_PARTS, BFloat16, __VA_ARGS__)
#else
#define VITRAIL_BFLOAT16_BLOCKS(...)
#endif

#define VITRAIL_ATTENTION_PARTS(...)                                \
    VITRAIL_GROUPINGS(VITRAIL_STORAGE_PARTS, float, __VA_ARGS__)    \
    VITRAIL_GROUPINGS(VITRAIL_STORAGE_PARTS, BFloat16, __VA_ARGS__) \
    VITRAIL_GROUPINGS(VITRAIL_STORAGE_PARTS, Float16, __VA_ARGS__)  \
    VITRAIL_GROUPINGS64(VITRAIL_STORAGE_PARTS, double, __VA_ARGS__) \
    VITRAIL_GROUPINGS(VITRAIL_BLOCK_PARTS, float, __VA_ARGS__)      \
    VITRAIL_GROUPINGS64(VITRAIL_BLOCK_PARTS, double, __VA_ARGS__)   \
    VITRAIL_BFLOAT16_BLOCKS(__VA_ARGS__)

VITRAIL_ATTENTION_PARTS(extern)

}  // namespace vitrail::VITRAIL_ISA
