"""Operators: which tokens a query may look at, each with a definition in plain PyTorch and compiled kernels.

`VITRAIL_OPS=auto|fused|reference` selects the path (default `auto`: compiled where possible), `use_ops` does so for a
block of code.
"""

from .channel_attention import channel_attention
from .connectivity_attention import connectivity_attention
from .connectivity_topk import connectivity_topk
from .depthwise_conv import depthwise_conv
from .library import use_ops
from .packed_conv import pack_kernel, packed_conv
from .packed_linear import pack_weight, packed_grn_mlp, packed_linear, packed_mlp
from .region_route import region_route
from .response_norm import response_norm
from .routed_attention import routed_attention
from .semantic_attention import semantic_attention
from .sparse_attention import sparse_attention
from .strip_mix import strip_mix
from .window_attention import window_attention

from . import flops  # isort: skip  (registers formulas of the operators above)

__all__ = [
    "channel_attention",
    "connectivity_attention",
    "connectivity_topk",
    "depthwise_conv",
    "flops",
    "pack_kernel",
    "pack_weight",
    "packed_conv",
    "packed_grn_mlp",
    "packed_linear",
    "packed_mlp",
    "region_route",
    "response_norm",
    "routed_attention",
    "semantic_attention",
    "sparse_attention",
    "strip_mix",
    "use_ops",
    "window_attention",
]
