"""Operators: which tokens a query may look at, each with a definition in plain PyTorch and compiled kernels.

`VITRAIL_OPS=auto|fused|reference` selects the path (default `auto`: compiled where possible), `use_ops` does so for a
block of code.
"""

from .library import use_ops
from .region_route import region_route
from .routed_attention import routed_attention
from .window_attention import window_attention

from . import flops  # isort: skip  (registers formulas of the operators above)

__all__ = ["flops", "region_route", "routed_attention", "use_ops", "window_attention"]
