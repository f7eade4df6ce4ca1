"""`channel_attention`: channels attend to the channels of their head, over all tokens.

DaViT, arXiv 2204.03645, section 3.3 (channel group attention): the transpose of ordinary attention. Channels are the
tokens and tokens the channels, so that the matrix of scores is as large as a head is wide, whatever the image, and
every channel sees the whole of it.
"""

from typing import Optional

import torch
from torch import Tensor

from . import library
from ._checks import check_grid, check_like

# --- the definition ---------------------------------------------------------------------------------------------------


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """`(B, H, W, heads * d)` to `(B, heads, H * W, d)`."""
    return x.flatten(1, 2).unflatten(-1, (num_heads, x.shape[3] // num_heads)).transpose(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """The definition in plain PyTorch; differentiable, traceable, and the body that export uses."""
    dtype = q.dtype
    if dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
    queries, keys, values = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
    attention = (queries.transpose(-2, -1) @ keys * scale).softmax(-1)
    out = values @ attention.transpose(-2, -1)
    return out.transpose(1, 2).reshape(v.shape).to(dtype)


# --- the public function ----------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_grid(name, x)
        check_like(name, x, "q", q)
        if x.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}")
    if num_heads < 1 or q.shape[3] % num_heads:
        raise ValueError(f"num_heads must divide the channels of q ({q.shape[3]}), got {num_heads}")


def channel_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: Optional[float] = None) -> Tensor:
    """Multi-head attention of channels to channels: softmax(scale * q^T k) mixes the channels of v in each head.

    DaViT, arXiv 2204.03645, section 3.3, eq. 4. With d channels in a head, `scores[i, j] = scale * sum over all tokens
    t of q[t, i] * k[t, j]`, and output channel i of a token is the softmax(scores[i])-weighted mean of its d values.
    The roles are those of the argument names; the authors' code names its projections otherwise (see `zoo`).

    Args:
        q: `(B, H, W, C)` queries, heads interleaved in C; float32, float64, bfloat16 or float16 (sums and softmax are
            float32, float64 for float64). Channels must be contiguous, other strides are free: views of a packed
            projection need no copy.
        k: keys, shape, dtype and device of `q`.
        v: values, shape, dtype and device of `q`.
        num_heads: number of heads (groups of channels); divides C.
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
    return reference(q, k, v, num_heads, scale)
