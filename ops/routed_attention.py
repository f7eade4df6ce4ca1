"""`routed_attention`: every token attends to the tokens of the regions that its own region chose.

BiFormer, arXiv 2303.08810, section 3.2 (token-to-token attention, eq. 5 and 6). The definition is `reference`; a
compiled library, where there is one, computes the same without gathering copies of keys and values and without
storing scores.
"""

from typing import List, Optional

import torch
from torch import Tensor

from ._attention import AttentionOperator, Operands
from ._checks import check_grids, check_heads, check_region_size, check_routes_in_range
from ._operator import wide_dtype
from .regions import concrete, merge_heads, partition_heads, region_count

# --- the definition ---------------------------------------------------------------------------------------------------


def _select(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens of chosen regions: `(B, heads, Rk, S, d)` and numbers `(B, heads, R, k)` to `(B, heads, R, k * S, d)`.

    Whole regions by a flat index: several times faster than an element-wise gather, here and in ONNX Runtime.
    """
    b, heads, regions, tokens, d = x.shape
    chosen = x.reshape(b * heads * regions, tokens * d).index_select(0, rows.flatten())
    return chosen.reshape(b, heads, rows.shape[2], rows.shape[3] * tokens, d)


def _address(q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale) -> Operands:
    """Per head and region: its queries, and the keys and values of the regions that it chose."""
    factors = None
    if weights is not None:
        tokens = kv_region_size[0] * kv_region_size[1]
        factors = weights.to(q.dtype).repeat_interleave(tokens, -1)[:, None, :, None]
    keys, values = (partition_heads(x, kv_region_size, num_heads) for x in (k, v))
    first = keys.shape[2] * torch.arange(keys.shape[0] * num_heads, device=routes.device, dtype=routes.dtype)
    rows = routes.unsqueeze(1) + first.view(-1, num_heads, 1, 1)
    return Operands(
        partition_heads(q, region_size, num_heads) * scale,
        _select(keys, rows),
        _select(values, rows),
        factors=factors,
    )


def _collect(x, q, k, v, routes, weights, region_size, *_) -> Tensor:
    return merge_heads(x, region_size, q.shape[1], q.shape[2])


def _shapes(q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale):
    return (*q.shape[:3], v.shape[3]), (*q.shape[:3], num_heads)


def _check_values(q, k, v, routes, weights, region_size, kv_region_size, *_) -> None:
    check_routes_in_range(routes, region_count(k, kv_region_size))


_operator = AttentionOperator(
    "routed_attention",
    "Tensor q, Tensor k, Tensor v, Tensor routes, Tensor? weights, "
    "SymInt[2] region_size, SymInt[2] kv_region_size, int num_heads, float scale",
    _address,
    _collect,
    _shapes,
    differentiable=("q", "k", "v", "weights"),
    cast=("q", "k", "v"),
    check_values=_check_values,
    compiled=("cpu", "cuda"),
)
reference = _operator.definition

# --- the public function ----------------------------------------------------------------------------------------------


def _check(q, k, v, routes, weights, region_size, kv_region_size, num_heads) -> None:
    check_grids(q, k, v)
    check_region_size("region_size", region_size)
    check_region_size("kv_region_size", kv_region_size)
    check_heads(num_heads, q, v)
    if routes.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"routes must be int32 or int64, got {routes.dtype}; convert it with .long()")
    if routes.device != q.device:
        raise ValueError(f"routes is on {routes.device} but q is on {q.device}; move one of them with .to()")
    regions = region_count(q, region_size)
    if routes.dim() != 3 or routes.shape[0] != q.shape[0] or routes.shape[1] != regions:
        raise ValueError(
            f"routes must have shape (batch {q.shape[0]}, regions {regions}, topk), got {tuple(routes.shape)}"
        )
    if routes.shape[2] < 1:
        raise ValueError("routes must name at least one region per region (topk >= 1), got topk 0")
    if weights is not None:
        if weights.shape != routes.shape:
            raise ValueError(
                f"weights must have the shape of routes, {tuple(routes.shape)}, got {tuple(weights.shape)}"
            )
        if weights.dtype != wide_dtype(q):
            raise TypeError(f"weights must be {wide_dtype(q)} for {q.dtype} queries, got {weights.dtype}")
        if weights.device != q.device:
            raise ValueError(
                f"weights is on {weights.device} but q is on {q.device}; move one of them with .to()"
            )


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    region_size: List[int],
    num_heads: int,
    scale: Optional[float] = None,
    kv_region_size: Optional[List[int]] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """Multi-head attention of every token to all tokens of the regions that its own region chose.

    BiFormer, arXiv 2303.08810, section 3.2. Regions are numbered row by row. Region sizes need not divide the grids:
    keys past the grid are zero vectors that do take part in the softmax, as in the authors' code.

    Args:
        q: `(B, H, W, C)` queries, heads interleaved in C; float32, float64, bfloat16 or float16 (sums and softmax are
            float32, float64 for float64). Channels must be contiguous, other strides are free: views of a packed
            projection need no copy.
        k: `(B, Hk, Wk, C)` keys, dtype and device of `q`.
        v: `(B, Hk, Wk, Cv)` values.
        routes: `(B, R, topk)` int32 or int64: for each of the R query regions the key regions it attends to.
        region_size: `(height, width)` of a query region.
        num_heads: number of heads; divides C and Cv.
        scale: factor of the scores; default: (C / num_heads) ** -0.5.
        kv_region_size: `(height, width)` of a key region; default: `region_size`.
        weights: `(B, R, topk)` float32 (float64 for float64 queries): soft routing; the keys and values of a chosen
            region are multiplied by its weight.

    Returns:
        `(B, H, W, Cv)`, contiguous, dtype of `q`.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that differ.
        ValueError: shapes, devices or strides that do not fit.
        IndexError: a route that names no region.
    """
    if kv_region_size is None:
        kv_region_size = region_size
    if not torch.jit.is_scripting():
        region_size, kv_region_size = concrete(region_size), concrete(kv_region_size)
        _check(q, k, v, routes, weights, region_size, kv_region_size, num_heads)
    if scale is None:
        scale = (q.shape[3] // num_heads) ** -0.5
    if torch.jit.is_scripting():
        return torch.ops.vitrail.routed_attention(
            q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale
        )[0]
    return _operator(q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale)
