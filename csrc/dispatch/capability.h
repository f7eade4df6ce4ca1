// Which of the compiled instruction sets this process uses.
#pragma once

namespace vitrail {

enum class Capability { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best one that the processor has, or less if ATEN_CPU_CAPABILITY (default, avx2, avx512) asks for less.
// Decided once.
Capability capability();

}  // namespace vitrail
