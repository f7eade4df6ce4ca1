"""What the operators cost, for `torch.utils.flop_counter` and for fvcore.

The first counts floating-point operations, the second multiply-accumulates (MACs, which papers print as "FLOPs"): one
MAC is two operations. Both get the same formulas from here. Neither library counts scaled-dot-product attention on the
CPU, so its formula is here too.

A formula takes the arguments of its operator, shapes in place of tensors, and returns MACs. What a call must move to
and from memory needs no formula: it is what its arguments and results hold.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
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


def channel_attention_macs(q: Shape, k: Shape, v: Shape, num_heads: int, *_: Any) -> int:
    """Scores and values: at each token, each channel meets all channels of its head."""
    return prod(q[:3]) * (q[3] // num_heads) * (q[3] + v[3])


def semantic_attention_macs(
    q: Shape, k: Shape, v: Shape, own_k: Shape, own_v: Shape, window_size: Shape, patch_size: Shape, *_: Any
) -> int:
    """Scores and values: each semantic token meets those of its window and the tokens of its patch."""
    return prod(q[:3]) * (prod(window_size) + prod(patch_size)) * (q[3] + v[3])


def strip_mix_macs(x: Shape, weight: Shape, *_: Any) -> int:
    """Each value of the grid is a sum over three strips."""
    return prod(x) * 3 * weight[2]


def strip_mix_backward_macs(grad: Shape, x: Shape, weight: Shape, *_: Any) -> int:
    """The gradients of grid and weight are as large as the forward pass, which is not repeated."""
    return 2 * strip_mix_macs(x, weight)


def packed_linear_macs(
    x: Shape, x2: Any, x3: Any, weight: Shape, bias: Any, residual: Any, columns: int, *_: Any
) -> int:
    """Each row meets each column."""
    depth = sum(shape[-1] for shape in (x, x2, x3) if shape)
    return x[0] * depth * columns


def packed_mlp_macs(
    x: Shape,
    weight1: Shape,
    bias1: Any,
    weight2: Shape,
    bias2: Any,
    residual: Any,
    hidden: int,
    columns: int,
    *_: Any,
) -> int:
    """Both layers."""
    return x[0] * hidden * (x[1] + columns)


def packed_grn_mlp_macs(
    x: Shape, weight1: Shape, bias1: Any, grn_weight: Shape, weight2: Shape, bias2: Any, residual: Any, images: int,
    hidden: int, columns: int, *_: Any,
) -> int:  # fmt: skip
    """Both layers."""
    return x[0] * hidden * (x[1] + columns)


def packed_conv_macs(
    x: Shape, weight: Shape, bias: Any, columns: int, kernel: Shape, stride: Shape, padding: Shape, *_: Any
) -> int:
    """Each patch meets each column."""
    patches = [(x[1 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    return x[0] * prod(patches) * prod(kernel) * x[3] * columns


def depthwise_conv_macs(x: Shape, weight: Shape, *_: Any) -> int:
    """Each number of the map is a sum over the kernel."""
    return prod(x) * prod(weight[-3:-1])


def _nothing(*_: Any) -> int:
    """Norms count as nothing, as stock ones do."""
    return 0


def _dense_backward(forward: Callable[..., int]) -> Callable[..., int]:
    """The layers again (but for a lone one, whose result nothing needs), and twice that for the gradients."""

    def backward(grad: Shape, *args: Any) -> int:
        alone = forward in (packed_linear_macs, packed_conv_macs, depthwise_conv_macs)
        return (2 if alone else 3) * forward(*args)

    return backward


def region_route_macs(q: Shape, k: Shape, topk: int, region_size: Shape, kv_region_size: Shape) -> int:
    """Products of all pairs of region means."""

    def regions(grid: Shape, size: Shape) -> int:
        return -(-grid[1] // size[0]) * -(-grid[2] // size[1])

    return q[0] * regions(q, region_size) * regions(k, kv_region_size) * q[3]


def sparse_attention_macs(q: Shape, k: Shape, v: Shape, keys: Shape, *_: Any) -> int:
    """Scores and values: each query meets the keys of its list (empty slots count, as their number is not known)."""
    return q[0] * q[1] * keys[3] * (q[2] + v[2])


def connectivity_topk_macs(
    logits: Shape, basis: Shape, candidates: Any, num_keys: int, num_coefficients: int, *_: Any
) -> int:
    """Each query mixes the basis rows of the coefficients it keeps (all, where a threshold chooses)."""
    tokens = basis[1] if candidates is None else candidates[1]
    return prod(logits[:3]) * min(num_coefficients or basis[0], basis[0]) * tokens


def _connectivity_attention(q: Shape, k: Shape, v: Shape, *args: Any) -> tuple[int, int]:
    """Of logits and choice; and how many pairs of a query and a key meet, all heads together."""
    (
        compressed,
        _,
        projection,
        basis,
        candidates,
        num_keys,
        num_coefficients,
        _,
        _,
        _,
        num_dense,
        _,
        num_heads,
    ) = args[:13]
    queries, rows = q[1] - num_dense, compressed[1]
    shape = (q[0], num_heads, queries, rows)
    choice = connectivity_topk_macs(shape, basis, candidates, num_keys, num_coefficients)
    pairs = q[0] * (queries * (num_keys or k[1]) + num_dense * k[1])
    logits = rows * compressed[2] + (q[2] * projection[0] if projection else 0)  # of a query
    return q[0] * queries * logits + choice, pairs


def connectivity_attention_macs(q: Shape, k: Shape, v: Shape, *args: Any) -> int:
    """Logits, choice, and scores and values of the keys chosen, or of all keys for queries that do not choose."""
    choice, pairs = _connectivity_attention(q, k, v, *args)
    return choice + pairs * (q[2] + v[2])


def connectivity_attention_backward_macs(grad: Shape, q: Shape, k: Shape, v: Shape, *args: Any) -> int:
    """The choice and the scores again, then the gradients of queries, keys, values and attention."""
    choice, pairs = _connectivity_attention(q, k, v, *args)
    return choice + pairs * (3 * q[2] + 2 * v[2])


def _attention_backward(forward: Callable[..., int]) -> Callable[..., int]:
    """Scores again, then the gradients of queries, keys (C each), values and attention (Cv each)."""

    def backward(grad: Shape, out: Shape, lse: Shape, q: Shape, k: Shape, v: Shape, *rest: Any) -> int:
        c, cv = q[-1], v[-1]
        return forward(q, k, v, *rest) // (c + cv) * (3 * c + 2 * cv)

    return backward


_FORMULAS: dict[str, Callable[..., int]] = {
    "channel_attention": channel_attention_macs,
    "channel_attention_backward": _attention_backward(channel_attention_macs),
    "connectivity_attention": connectivity_attention_macs,
    "connectivity_attention_backward": connectivity_attention_backward_macs,
    "connectivity_topk": connectivity_topk_macs,
    "depthwise_conv": depthwise_conv_macs,
    "depthwise_conv_backward": _dense_backward(depthwise_conv_macs),
    "packed_conv": packed_conv_macs,
    "packed_conv_backward": _dense_backward(packed_conv_macs),
    "packed_grn_mlp": packed_grn_mlp_macs,
    "packed_grn_mlp_backward": _dense_backward(packed_grn_mlp_macs),
    "packed_linear": packed_linear_macs,
    "packed_linear_backward": _dense_backward(packed_linear_macs),
    "packed_mlp": packed_mlp_macs,
    "packed_mlp_backward": _dense_backward(packed_mlp_macs),
    "region_route": region_route_macs,
    "response_norm": _nothing,
    "response_norm_backward": _nothing,
    "routed_attention": routed_attention_macs,
    "routed_attention_backward": _attention_backward(routed_attention_macs),
    "semantic_attention": semantic_attention_macs,
    "semantic_attention_backward": _attention_backward(semantic_attention_macs),
    "sparse_attention": sparse_attention_macs,
    "sparse_attention_backward": _attention_backward(sparse_attention_macs),
    "strip_mix": strip_mix_macs,
    "strip_mix_backward": strip_mix_backward_macs,
    "window_attention": window_attention_macs,
    "window_attention_backward": _attention_backward(window_attention_macs),
}


# --- bytes ------------------------------------------------------------------------------------------------------------


def _held(x: Any) -> int:
    """Bytes of a tensor's elements, those that it repeats counted once; of a sequence's tensors together."""
    if isinstance(x, (tuple, list)):
        return sum(map(_held, x))
    if not isinstance(x, Tensor):
        return 0
    distinct = prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0 or n == 0)
    return distinct * x.element_size()


def moved_bytes(arguments: Sequence[Any], results: Any) -> int:
    """The least that a call moves: every argument read once, every result written once."""
    return _held(arguments) + _held(results)


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
