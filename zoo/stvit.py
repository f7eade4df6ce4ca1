"""STViT and STViT-R: vision transformers with a handful of semantic tokens.

Paper: "Making Vision Transformers Efficient from A Token Sparsification View", Chang et al., CVPR 2023,
arXiv 2303.08685. Published code and weights of STViT-R on Swin: https://github.com/changsn/STViT-R (MIT).

After a few ordinary layers, two more make semantic tokens, which stand for clusters of image tokens; the layers after
that work on these alone. The family spans three files, in the order of the paper:

- `stvit_tokens.py`: how tokens are made, work, and give back what they have learned (section 3),
- `stvit_deit.py`: on a global vision transformer (section 3.1),
- `stvit_swin.py`: on a local one (section 3.2), and with recovery for detectors (section 3.3),

and `stvit_weights.py` reads checkpoints. This one brings the models together.
"""

from .stvit_deit import (
    STViTDeiT,
    stvit_deit_base,
    stvit_deit_pico,
    stvit_deit_small,
    stvit_deit_tiny,
    stvit_r_deit_small,
)
from .stvit_swin import (
    STViTSwin,
    stvit_r_swin_base,
    stvit_r_swin_pico,
    stvit_r_swin_small,
    stvit_r_swin_tiny,
    stvit_swin_base,
    stvit_swin_pico,
    stvit_swin_small,
    stvit_swin_tiny,
)

__all__ = [
    "STViTDeiT",
    "STViTSwin",
    "stvit_deit_base",
    "stvit_deit_pico",
    "stvit_deit_small",
    "stvit_deit_tiny",
    "stvit_r_deit_small",
    "stvit_r_swin_base",
    "stvit_r_swin_pico",
    "stvit_r_swin_small",
    "stvit_r_swin_tiny",
    "stvit_swin_base",
    "stvit_swin_pico",
    "stvit_swin_small",
    "stvit_swin_tiny",
]
