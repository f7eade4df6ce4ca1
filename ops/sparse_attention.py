"""`sparse_attention`: every query attends to a list of keys of its own (Sparsifiner, arXiv 2303.13755, section 3.2)."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from ._attention import fits_tiles, join_heads, split_heads
from ._checks import check_token_attention
from ._operator import Operator, wide_dtype

# --- the definition ---------------------------------------------------------------------------------------------------


def _scores(
    q: Tensor, k: Tensor, keys: Tensor, num_heads: int, scale: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """Scores of the listed keys, `(B, heads, queries, slots)`; which slots are empty; key numbers fit for indexing."""
    dtype = wide_dtype(q)
    queries, all_keys = split_heads(q.to(dtype), num_heads) * scale, split_heads(k.to(dtype), num_heads)
    empty, slots = keys < 0, keys.clamp(min=0).long()
    # one product for all pairs of tokens, as gathered copies of the keys would be far larger than the scores
    scores = (queries @ all_keys.transpose(-2, -1)).gather(-1, slots)
    return scores.masked_fill(empty, -torch.inf), empty, slots


def _mix(
    attention: Tensor,
    empty: Tensor,
    slots: Tensor,
    v: Tensor,
    num_heads: int,
    like: Tensor,
    distinct: bool = False,
) -> Tensor:
    """The values of the listed keys, weighted; `(B, queries, Cv)`."""
    values = split_heads(v.to(attention.dtype), num_heads)
    attention = attention.masked_fill(empty, 0)  # the softmax of nothing is not a number
    shape, count = attention.shape[:3], v.shape[1]
    if distinct:  # empty slots go to a column of their own, so that nothing has to be added up
        spread = attention.new_zeros(*shape, count + 1).scatter(
            -1, slots.masked_fill(empty, count), attention
        )
        spread = spread[..., :count]
    else:
        spread = attention.new_zeros(*shape, count).scatter_add(-1, slots, attention)
    return join_heads(spread @ values).to(like.dtype)


def reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, num_heads: int, scale: float, distinct: bool = False
) -> Tensor:
    """The definition in plain PyTorch; differentiable, traceable, and the body that export uses.

    `distinct` says that no list names a key twice: not every runtime can scatter and add.
    """
    scores, empty, slots = _scores(q, k, keys, num_heads, scale)
    return _mix(scores.softmax(-1), empty, slots, v, num_heads, q, distinct)


def _forward(q, k, v, keys, num_heads, scale):
    """The same with the log-sum-exp of every query's scores, `(B, queries, heads)`."""
    scores, empty, slots = _scores(q, k, keys, num_heads, scale)
    lse = scores.logsumexp(-1, keepdim=True)
    out = _mix((scores - lse).exp(), empty, slots, v, num_heads, q)
    return out, lse.squeeze(-1).transpose(1, 2)


def _fake(q, k, v, keys, num_heads, scale):
    shape = (q.shape[0], q.shape[1])
    return q.new_empty((*shape, v.shape[2])), q.new_empty((*shape, num_heads), dtype=wide_dtype(q))


def _check_keys_in_range(q, k, v, keys, *_) -> None:
    """Every slot names a key or is empty, else an IndexError."""
    count = k.shape[1]
    if keys.numel() == 0:
        return
    low, high = keys.aminmax()
    if low < -1 or high >= count:
        at = ((keys < -1) | (keys >= count)).nonzero()[0].tolist()
        raise IndexError(
            f"keys{at} is {int(keys[tuple(at)])}, but there are {count} keys: "
            f"allowed are 0 to {count - 1}, and -1 for an empty slot"
        )


class _SparseAttention(Operator):
    def fits_gpu(self, *args: Any) -> bool:
        """Neither float64 nor heads that are wider than a tile."""
        return super().fits_gpu(*args) and fits_tiles(args[0], args[2], args[4])


_operator = _SparseAttention(
    "sparse_attention",
    "Tensor q, Tensor k, Tensor v, Tensor keys, int num_heads, float scale",
    reference,
    _fake,
    differentiable=("q", "k", "v"),
    outputs=("out", "lse"),
    forward=_forward,
    check_values=_check_keys_in_range,
    compiled=("cpu", "cuda"),
)

# --- the public function ----------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, num_heads: int) -> None:
    check_token_attention(q, k, v, num_heads)
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys must be a tensor of key numbers, got {type(keys).__name__}")
    if keys.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"keys must be int32 or int64, got {keys.dtype}; convert it with .long()")
    if keys.device != q.device:
        raise ValueError(f"keys is on {keys.device} but q is on {q.device}; move one of them with .to()")
    if keys.dim() != 4 or tuple(keys.shape[:3]) != (q.shape[0], num_heads, q.shape[1]):
        raise ValueError(
            f"keys must have shape (batch {q.shape[0]}, heads {num_heads}, queries {q.shape[1]}, slots), "
            f"got {tuple(keys.shape)}"
        )


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, num_heads: int, scale: Optional[float] = None
) -> Tensor:
    """Multi-head attention of every query to the keys of its own list.

    Sparsifiner, arXiv 2303.13755, section 3.2. The softmax runs over the listed keys alone; a key listed twice counts
    twice. A query whose list is empty gets zeros.

    Args:
        q: `(B, Nq, C)` queries, heads interleaved in C; float32, float64, bfloat16 or float16 (sums and softmax are
            float32, float64 for float64). Channels must be contiguous, other strides are free: views of a packed
            projection need no copy.
        k: `(B, Nk, C)` keys, dtype and device of `q`.
        v: `(B, Nk, Cv)` values.
        keys: `(B, num_heads, Nq, K)` int32 or int64: for each head and query the numbers of the keys that it attends
            to, in any order; -1 is an empty slot.
        num_heads: number of heads; divides C and Cv.
        scale: factor of the scores; default: (C / num_heads) ** -0.5.

    Returns:
        `(B, Nq, Cv)`, contiguous, dtype of `q`.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that differ.
        ValueError: shapes, devices or strides that do not fit.
        IndexError: a number that names no key.
    """
    if not torch.jit.is_scripting():
        _check(q, k, v, keys, num_heads)
    if scale is None:
        scale = (q.shape[2] // num_heads) ** -0.5
    if torch.jit.is_scripting():
        return torch.ops.vitrail.sparse_attention(q, k, v, keys, num_heads, scale)[0]
    return _operator(q, k, v, keys, num_heads, scale)
