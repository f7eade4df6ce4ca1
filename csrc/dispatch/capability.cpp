#include "capability.h"

#include <cstdlib>
#include <string_view>

namespace vitrail {
namespace {

Capability best_of_processor() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? Capability::kAvx512Bf16 : Capability::kAvx512;
    if (avx2) return Capability::kAvx2;
#endif
    return Capability::kPortable;
}

Capability asked_for() {
    const char* value = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view name = value ? value : "";
    if (name == "default") return Capability::kPortable;
    if (name == "avx2") return Capability::kAvx2;
    if (name == "avx512") return Capability::kAvx512;
    return Capability::kAvx512Bf16;
}

}  // namespace

Capability capability() {
    static const Capability chosen = [] {
        const Capability best = best_of_processor(), asked = asked_for();
        return asked < best ? asked : best;
    }();
    return chosen;
}

}  // namespace vitrail

// For the Python side, which loads the library without a Python ABI and asks through ctypes.
extern "C" __attribute__((visibility("default"))) const char* vitrail_cpu_capability() {
    switch (vitrail::capability()) {
        case vitrail::Capability::kAvx512Bf16:
            return "avx512_bf16";
        case vitrail::Capability::kAvx512:
            return "avx512";
        case vitrail::Capability::kAvx2:
            return "avx2";
        default:
            return "default";
    }
}
