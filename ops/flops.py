"""What the operators cost, for `torch.utils.flop_counter` and for fvcore.

The first counts floating-point operations, the second multiply-accumulates (MACs, which papers print as "FLOPs"): one
MAC is two operations. Both get the same formulas from here. Neither library counts scaled-dot-product attention on the
CPU, so its formula is here too.

A formula takes the arguments of its operator, shapes in place of tensors, and returns MACs.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def attention_macs(q: Shape, k: Shape, v: Shape, *_: Any) -> int:
    """Scaled-dot-product attention of `(..., L, d)` queries over `(..., S, d)` keys and `(..., S, dv)` values."""
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def routed_attention_macs(
    q: Shape,
    k: Shape,
    v: Shape,
    routes: Shape,
    weights: Any,
    region_size: Shape,
    kv_region_size: Shape,
    *_: Any,
) -> int:
    """Scores and values: each of the query tokens meets all tokens of its `topk` regions."""
    return prod(q[:3]) * routes[2] * prod(kv_region_size) * (q[3] + v[3])


def window_attention_macs(
    q: Shape, k: Shape, v: Shape, bias: Any, pad_key: Any, pad_value: Any, window_size: Shape, *_: Any
) -> int:
    """Scores and values: each of the query tokens meets all tokens of its window."""
    return prod(q[:3]) * prod(window_size) * (q[3] + v[3])


def region_route_macs(q: Shape, k: Shape, topk: int, region_size: Shape, kv_region_size: Shape) -> int:
    """Products of all pairs of region means."""

    def regions(grid: Shape, size: Shape) -> int:
        return -(-grid[1] // size[0]) * -(-grid[2] // size[1])

    return q[0] * regions(q, region_size) * regions(k, kv_region_size) * q[3]


def _attention_backward(forward: Callable[..., int]) -> Callable[..., int]:
    """Scores again, then the gradients of queries, keys (C each), values and attention (Cv each)."""

    def backward(grad: Shape, out: Shape, lse: Shape, q: Shape, k: Shape, v: Shape, *rest: Any) -> int:
        c, cv = q[-1], v[-1]
        return forward(q, k, v, *rest) // (c + cv) * (3 * c + 2 * cv)

    return backward


_FORMULAS: dict[str, Callable[..., int]] = {
    "region_route": region_route_macs,
    "routed_attention": routed_attention_macs,
    "routed_attention_backward": _attention_backward(routed_attention_macs),
    "window_attention": window_attention_macs,
    "window_attention_backward": _attention_backward(window_attention_macs),
}


# --- torch.utils.flop_counter -----------------------------------------------------------------------------------------


def _twice(macs: Callable[..., int]) -> Callable[..., int]:
    def flops(*args: Any, out_shape: Any = None) -> int:
        return 2 * macs(*args)

    return flops


for _name, _macs in _FORMULAS.items():
    register_flop_formula(getattr(torch.ops.vitrail, _name))(_twice(_macs))


def torch_flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas that torch's counter lacks, for `FlopCounterMode(custom_mapping=...)`: attention on the CPU."""
    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}


def _sdpa_flops(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return 2 * attention_macs(q, k, v)


# --- fvcore -----------------------------------------------------------------------------------------------------------


def _argument(value: Any) -> Any:
    """A traced value as the formulas take it: the shape of a tensor, a list, a number, None."""
    kind = value.type()
    if kind.kind() == "TensorType":
        return kind.sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [item.toIValue() for item in value.node().inputs()]
    return value.toIValue()


def _handler(macs: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
    return lambda inputs, outputs: macs(*map(_argument, inputs))


def fvcore_handlers() -> dict[str, Callable[..., int]]:
    """Handlers for `fvcore.nn.FlopCountAnalysis(...).set_op_handle(**handlers)`, which counts MACs."""
    return {
        **{f"vitrail::{name}": _handler(macs) for name, macs in _FORMULAS.items()},
        "aten::scaled_dot_product_attention": lambda inputs, outputs: attention_macs(
            *map(_argument, inputs[:3])
        ),
    }
