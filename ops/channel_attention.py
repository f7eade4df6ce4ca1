"""`channel_attention`: every channel attends to the channels of its head, over all tokens.

DaViT, arXiv 2204.03645, "Channel Group Attention": ordinary attention with the matrices transposed. The channels are
what attends and the tokens are their features, so that scores sum over the whole image, and their number is that of
channels times the width of a head, whatever the image's size.
"""

from typing import Optional

import torch
from torch import Tensor

from ._attention import AttentionOperator, Operands, join_heads, split_heads
from ._checks import check_grids, check_heads

# --- the definition ---------------------------------------------------------------------------------------------------


def _channels(x: Tensor, num_heads: int) -> Tensor:
    """`(B, H, W, heads * d)` to `(B, heads, d, tokens)`."""
    return split_heads(x.flatten(1, 2), num_heads).transpose(-2, -1)


def _address(q, k, v, num_heads, scale) -> Operands:
    """Per head: its channels, with a value for every token."""
    return Operands(_channels(q * scale, num_heads), _channels(k, num_heads), _channels(v, num_heads))


def _collect(x, q, *_) -> Tensor:
    x = join_heads(x.transpose(-2, -1))
    # of the log-sum-exp there is one for all tokens
    size = q.shape[1:3] if x.shape[1] == q.shape[1] * q.shape[2] else (1, 1)
    return x.unflatten(1, size)


def _shapes(q, k, v, num_heads, scale):
    return v.shape, (v.shape[0], 1, 1, v.shape[3])


_operator = AttentionOperator(
    "channel_attention",
    "Tensor q, Tensor k, Tensor v, int num_heads, float scale",
    _address,
    _collect,
    _shapes,
    compiled=("cpu", "cuda"),
)
reference = _operator.definition

# --- the public function ----------------------------------------------------------------------------------------------


def _check(q, k, v, num_heads) -> None:
    check_grids(q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}")
    check_heads(num_heads, q, v)


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: Optional[float] = None
) -> Tensor:
    """Multi-head attention of every channel to the channels of its head, over all tokens.

    DaViT, arXiv 2204.03645, "Channel Group Attention". In a head of d channels, `scores[i, j]` is `scale` times the sum
    over all tokens t of `q[t, i] * k[t, j]`, and channel i of the result is, at every token, the mean of v's d channels
    weighted by softmax(scores[i]). (The authors' code calls k, v, q what are q, k, v here.)

    Args:
        q: `(B, H, W, C)` queries, heads interleaved in C; float32, float64, bfloat16 or float16 (sums and softmax are
            float32, float64 for float64). Channels must be contiguous, other strides are free: views of a packed
            projection need no copy.
        k: keys; shape, dtype and device of `q`.
        v: values; shape, dtype and device of `q`.
        num_heads: number of heads; divides C.
        scale: factor of the scores; default: (C / num_heads) ** -0.5.

    Returns:
        `(B, H, W, C)`, contiguous, dtype of `q`.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that differ.
        ValueError: shapes, devices or strides that do not fit.
    """
    if not torch.jit.is_scripting():
        _check(q, k, v, num_heads)
    if scale is None:
        scale = (q.shape[3] // num_heads) ** -0.5
    if torch.jit.is_scripting():
        return torch.ops.vitrail.channel_attention(q, k, v, num_heads, scale)[0]
    return _operator(q, k, v, num_heads, scale)
