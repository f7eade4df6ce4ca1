"""What the operators cost, for `torch.utils.flop_counter` and for fvcore.

The first counts floating-point operations, the second multiply-accumulates (MACs, which papers print as "FLOPs"): one
MAC is two operations. Both get the same formulas from here. Neither library counts scaled-dot-product attention on the
CPU, so its formula is here too.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def routed_attention_macs(q: Shape, v: Shape, routes: Shape, kv_region_size: Shape) -> int:
    """Scores and values: each of the query tokens meets all tokens of its `topk` regions."""
    return prod(q[:3]) * routes[2] * prod(kv_region_size) * (q[3] + v[3])


def routed_attention_backward_macs(q: Shape, v: Shape, routes: Shape, kv_region_size: Shape) -> int:
    """Scores again, then the gradients of queries, keys (C each), values and attention (Cv each)."""
    return prod(q[:3]) * routes[2] * prod(kv_region_size) * (3 * q[3] + 2 * v[3])


def region_route_macs(q: Shape, k: Shape, region_size: Shape, kv_region_size: Shape) -> int:
    """Products of all pairs of region means."""

    def regions(grid: Shape, size: Shape) -> int:
        return -(-grid[1] // size[0]) * -(-grid[2] // size[1])

    return q[0] * regions(q, region_size) * regions(k, kv_region_size) * q[3]


def attention_macs(q: Shape, k: Shape, v: Shape) -> int:
    """Scaled-dot-product attention of `(..., L, d)` queries over `(..., S, d)` keys and `(..., S, dv)` values."""
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


# --- torch.utils.flop_counter -----------------------------------------------------------------------------------------

_ops = torch.ops.vitrail


@register_flop_formula(_ops.routed_attention)
def _routed_attention_flops(q, k, v, routes, weights, region_size, kv_region_size, *_, **__) -> int:
    return 2 * routed_attention_macs(q, v, routes, kv_region_size)


@register_flop_formula(_ops.routed_attention_backward)
def _routed_attention_backward_flops(
    grad, out, lse, q, k, v, routes, weights, region_size, kv_region_size, *_, **__
) -> int:
    return 2 * routed_attention_backward_macs(q, v, routes, kv_region_size)


@register_flop_formula(_ops.region_route)
def _region_route_flops(q, k, topk, region_size, kv_region_size, *_, **__) -> int:
    return 2 * region_route_macs(q, k, region_size, kv_region_size)


def torch_flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas that torch's counter lacks, for `FlopCounterMode(custom_mapping=...)`: attention on the CPU."""

    def sdpa(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
        return 2 * attention_macs(q, k, v)

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa}


# --- fvcore -----------------------------------------------------------------------------------------------------------


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _ints(value: Any) -> list[int]:
    return [item.toIValue() for item in value.node().inputs()]


def fvcore_handlers() -> dict[str, Callable[..., int]]:
    """Handlers for `fvcore.nn.FlopCountAnalysis(...).set_op_handle(**handlers)`, which counts MACs."""

    def routed(inputs: list[Any], outputs: list[Any]) -> int:
        q, _, v, routes, *_ = inputs
        return routed_attention_macs(_shape(q), _shape(v), _shape(routes), _ints(inputs[6]))

    def route(inputs: list[Any], outputs: list[Any]) -> int:
        return region_route_macs(_shape(inputs[0]), _shape(inputs[1]), _ints(inputs[3]), _ints(inputs[4]))

    def sdpa(inputs: list[Any], outputs: list[Any]) -> int:
        return attention_macs(*map(_shape, inputs[:3]))

    return {
        "vitrail::routed_attention": routed,
        "vitrail::region_route": route,
        "aten::scaled_dot_product_attention": sdpa,
    }
