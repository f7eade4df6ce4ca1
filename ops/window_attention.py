"""`window_attention`: every token attends to the tokens of its own window.

DaViT, arXiv 2204.03645, section 3.1 (spatial window attention); Swin, arXiv 2103.14030, section 3.2, with shifted
windows and a relative position bias, which STViT builds on.
"""

from typing import List, Optional

import torch
from torch import Tensor

from ._attention import AttentionOperator, Operands
from ._checks import check_grids, check_heads, check_parameter, check_region_size
from ._operator import wide_dtype
from .regions import ceil_div, concrete, crop_grid, merge_heads, pad_grid, partition, partition_heads

# --- the definition ---------------------------------------------------------------------------------------------------


def _windows(
    x: Tensor, window_size: List[int], shift: List[int], fill: Optional[Tensor], num_heads: int
) -> Tensor:
    """`(B, H, W, C)` to `(B, heads, windows, tokens, d)`; what windows reach past the grid is filled.

    Shifted windows are cut on the grid rolled by the shift. The last row and column of them then hold two pieces each,
    from both borders of the grid.
    """
    height = ceil_div(x.shape[1], window_size[0]) * window_size[0]
    width = ceil_div(x.shape[2], window_size[1]) * window_size[1]
    x = pad_grid(x, height, width, fill)
    if shift[0] != 0 or shift[1] != 0:
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    return partition_heads(x, window_size, num_heads)


def _pieces(q: Tensor, window_size: List[int], shift: List[int]) -> Tensor:
    """Which tokens of a shifted window lie in one piece, `(windows, tokens, tokens)`."""
    rows = torch.zeros(ceil_div(q.shape[1], window_size[0]) * window_size[0], device=q.device)
    cols = torch.zeros(ceil_div(q.shape[2], window_size[1]) * window_size[1], device=q.device)
    rows[rows.shape[0] - shift[0] :] = 1
    cols[cols.shape[0] - shift[1] :] = 2
    piece = partition((rows[:, None] + cols)[None, :, :, None], window_size)[0]
    return piece == piece.transpose(1, 2)


def _address(q, k, v, bias, pad_key, pad_value, window_size, shift, num_heads, scale) -> Operands:
    """Per window: its queries, keys and values."""
    visible = None
    if shift[0] != 0 or shift[1] != 0:
        visible = _pieces(q, window_size, shift)
    return Operands(
        _windows(q, window_size, shift, None, num_heads) * scale,
        _windows(k, window_size, shift, pad_key, num_heads),
        _windows(v, window_size, shift, pad_value, num_heads),
        bias=None if bias is None else bias.unsqueeze(1),
        visible=visible,
    )


def _collect(x, q, k, v, bias, pad_key, pad_value, window_size, shift, *_) -> Tensor:
    height = ceil_div(q.shape[1], window_size[0]) * window_size[0]
    width = ceil_div(q.shape[2], window_size[1]) * window_size[1]
    x = merge_heads(x, window_size, height, width)
    if shift[0] != 0 or shift[1] != 0:
        x = x.roll((shift[0], shift[1]), (1, 2))
    return crop_grid(x, q.shape[1], q.shape[2])


def _shapes(q, k, v, bias, pad_key, pad_value, window_size, shift, num_heads, scale):
    return (*q.shape[:3], v.shape[3]), (*q.shape[:3], num_heads)


_operator = AttentionOperator(
    "window_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? pad_key, Tensor? pad_value, "
    "SymInt[2] window_size, SymInt[2] shift, int num_heads, float scale",
    _address,
    _collect,
    _shapes,
    differentiable=("q", "k", "v", "bias", "pad_key", "pad_value"),
    cast=("q", "k", "v", "pad_key", "pad_value"),
    shared=("bias", "pad_key", "pad_value"),
    compiled=("cpu", "cuda"),
)
reference = _operator.definition

# --- the public function ----------------------------------------------------------------------------------------------


def _check(q, k, v, bias, pad_key, pad_value, window_size, shift, num_heads) -> None:
    check_grids(q, k, v)
    if q.shape[:3] != k.shape[:3]:
        raise ValueError(f"q and k must lie on the same grid, got {tuple(q.shape)} and {tuple(k.shape)}")
    check_heads(num_heads, q, v)
    check_region_size("window_size", window_size)
    if len(shift) != 2 or not all(0 <= s < w for s, w in zip(shift, window_size, strict=True)):
        raise ValueError(
            f"shift must be two numbers from 0 to below window_size {tuple(window_size)}, got {tuple(shift)}"
        )
    tokens = window_size[0] * window_size[1]
    for name, x, shape in (
        ("bias", bias, (num_heads, tokens, tokens)),
        ("pad_key", pad_key, k.shape[3:]),
        ("pad_value", pad_value, v.shape[3:]),
    ):
        if x is not None:
            check_parameter(name, x, shape, q)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: List[int],
    num_heads: int,
    scale: Optional[float] = None,
    shift: Optional[List[int]] = None,
    bias: Optional[Tensor] = None,
    pad_key: Optional[Tensor] = None,
    pad_value: Optional[Tensor] = None,
) -> Tensor:
    """Multi-head attention of every token to the tokens of its own window.

    DaViT, arXiv 2204.03645, section 3.1; with `shift` and `bias` Swin, arXiv 2103.14030, section 3.2.

    Windows need not divide the grid. What the last ones reach past it are keys like others: each is `pad_key` with the
    value `pad_value`. With the bias of the projection there, this equals padding its input with zeros.

    Args:
        q: `(B, H, W, C)` queries, heads interleaved in C; float32, float64, bfloat16 or float16 (sums and softmax are
            float32, float64 for float64). Channels must be contiguous, other strides are free: views of a packed
            projection need no copy.
        k: `(B, H, W, C)` keys, dtype and device of `q`.
        v: `(B, H, W, Cv)` values.
        window_size: `(height, width)` of a window.
        num_heads: number of heads; divides C and Cv.
        scale: factor of the scores; default: (C / num_heads) ** -0.5.
        shift: `(down, right)`, each below `window_size`: window borders start there. The pieces that this leaves at the
            borders of the (extended) grid are windows of their own, which is what Swin's cyclic shift and mask
            amount to. Default: none.
        bias: `(num_heads, N, N)`, added to the scores; N tokens of a window, row by row. Any floating-point dtype.
        pad_key: `(C,)`, any floating-point dtype; default: zeros.
        pad_value: `(Cv,)`; default: zeros.

    Returns:
        `(B, H, W, Cv)`, contiguous, dtype of `q`.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that differ.
        ValueError: shapes, devices or strides that do not fit.
    """
    if shift is None:
        shift = [0, 0]
    if not torch.jit.is_scripting():
        window_size, shift = concrete(window_size), concrete(shift)
        _check(q, k, v, bias, pad_key, pad_value, window_size, shift, num_heads)
    if scale is None:
        scale = (q.shape[3] // num_heads) ** -0.5
    if bias is not None:
        bias = bias.to(wide_dtype(q))
    if pad_key is not None:
        pad_key = pad_key.to(q.dtype)
    if pad_value is not None:
        pad_value = pad_value.to(q.dtype)
    if torch.jit.is_scripting():
        return torch.ops.vitrail.window_attention(
            q, k, v, bias, pad_key, pad_value, window_size, shift, num_heads, scale
        )[0]
    return _operator(q, k, v, bias, pad_key, pad_value, window_size, shift, num_heads, scale)
