// The addressing policies of block attention as one type, so that a kernel is compiled once for all of them.
// Which one it is, is the same for all threads of a launch.
#pragma once

#include "../addressing/patches.h"
#include "../addressing/routed_regions.h"
#include "../addressing/windows.h"
#include "key_masks.h"

namespace vitrail::cuda {

class AnyPolicy {
    enum class Kind { kRoutedRegions, kWindows, kPatches, kKeyMasks };

  public:
    AnyPolicy(const RoutedRegions<float>& policy) : kind_(Kind::kRoutedRegions), routed_regions_(policy) {}
    AnyPolicy(const Windows<float>& policy) : kind_(Kind::kWindows), windows_(policy) {}
    AnyPolicy(const Patches<float>& policy) : kind_(Kind::kPatches), patches_(policy) {}
    AnyPolicy(const KeyMasks& policy) : kind_(Kind::kKeyMasks), key_masks_(policy) {}

    // Calls action with the policy.
    template <class Action>
    VITRAIL_INLINE auto with(Action action) const {
        switch (kind_) {
            case Kind::kRoutedRegions:
                return action(routed_regions_);
            case Kind::kWindows:
                return action(windows_);
            case Kind::kPatches:
                return action(patches_);
            default:
                return action(key_masks_);
        }
    }

    // Where queries attend to some of the keys only that they look at; else null.
    VITRAIL_INLINE const KeyMasks* masks() const { return kind_ == Kind::kKeyMasks ? &key_masks_ : nullptr; }

  private:
    Kind kind_;
    union {
        RoutedRegions<float> routed_regions_;
        Windows<float> windows_;
        Patches<float> patches_;
        KeyMasks key_masks_;
    };
};

}  // namespace vitrail::cuda
