"""Multiply-accumulates of a call, as both counters have them."""

from collections.abc import Callable

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import flops


def macs_by_both(call: Callable[..., Tensor], *tensors: Tensor) -> tuple[float, float]:
    """fvcore's figure and torch's."""

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    analysis = FlopCountAnalysis(Module(), tensors).set_op_handle(**flops.fvcore_handlers())
    by_fvcore = analysis.unsupported_ops_warnings(False).tracer_warnings("none").total()
    with FlopCounterMode(display=False) as counter:
        call(*tensors)
    return by_fvcore, counter.get_total_flops() / 2
