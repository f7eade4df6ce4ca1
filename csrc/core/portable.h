// What code means to the compiler at hand: of C++, once for each instruction set, or of CUDA (VITRAIL_CUDA).
//
// Everything that is compiled more than once lives in a namespace of its own (VITRAIL_ISA) and is forced
// inline: two units compiled with different flags must never share a function, or the linker could pick the
// wide one for a narrow machine. For the same reason no standard library function is called from there.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VITRAIL_INLINE __host__ __device__ __forceinline__
#define VITRAIL_OUTLINE __host__ __device__ inline
#else
#define VITRAIL_INLINE inline __attribute__((always_inline))
#define VITRAIL_OUTLINE inline __attribute__((noinline))
#define VITRAIL_INLINED __attribute__((always_inline))  // of a lambda, after its parameters
#endif

namespace vitrail::VITRAIL_ISA {

// Where a token lies on its grid, or how many there are. A GPU divides 64 bits slowly; what is launched there
// has fewer than 2^31 tokens in an image. Offsets in memory always have 64 bits.
#if defined(VITRAIL_CUDA)
using Place = int32_t;
#else
using Place = int64_t;
#endif

}  // namespace vitrail::VITRAIL_ISA
