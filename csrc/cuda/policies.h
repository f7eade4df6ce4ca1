// The addressing policies of block attention as one type, so that a kernel is compiled once for all of them.
// Which one it is, is the same for all threads of a launch.
#pragma once

#include "../addressing/patches.h"
#include "../addressing/routed_regions.h"
#include "../addressing/windows.h"

namespace vitrail::cuda {

class AnyPolicy {
    enum class Kind { kRoutedRegions, kWindows, kPatches };

  public:
    AnyPolicy(const RoutedRegions<float>& policy) : kind_(Kind::kRoutedRegions), routed_regions_(policy) {}
    AnyPolicy(const Windows<float>& policy) : kind_(Kind::kWindows), windows_(policy) {}
    AnyPolicy(const Patches<float>& policy) : kind_(Kind::kPatches), patches_(policy) {}

    // Calls action with the policy.
    template <class Action>
    VITRAIL_INLINE auto with(Action action) const {
        switch (kind_) {
            case Kind::kRoutedRegions:
                return action(routed_regions_);
            case Kind::kWindows:
                return action(windows_);
            default:
                return action(patches_);
        }
    }

  private:
    Kind kind_;
    union {
        RoutedRegions<float> routed_regions_;
        Windows<float> windows_;
        Patches<float> patches_;
    };
};

}  // namespace vitrail::cuda
