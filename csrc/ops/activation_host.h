// Activations by the names that operators take.
#pragma once

#include "host.h"

namespace vitrail {

inline Activation activation_of(const Checks& checks, const std::string& name) {
    if (name == "none") return Activation::kNone;
    if (name == "gelu") return Activation::kGelu;
    checks.fail("activation must be 'none' or 'gelu', got '", name, "'");
}

}  // namespace vitrail
