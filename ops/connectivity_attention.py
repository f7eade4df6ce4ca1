"""`connectivity_attention`: queries choose their keys and attend to them (Sparsifiner, arXiv 2303.13755, section 3).

`connectivity_topk` and `sparse_attention` in one: on the CPU neither the lists of keys nor what they are chosen by is
stored.
"""

from collections.abc import Callable, Sequence
from math import log
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention import join_heads, split_heads
from ._checks import check_parameter, check_token_attention, check_tokens
from ._operator import Operator, is_replaced, replacement, wide_dtype
from .connectivity_topk import check_candidates_in_range, check_choice, choose
from .connectivity_topk import reference as choose_by_definition
from .sparse_attention import _fake as fake_attention
from .sparse_attention import reference_of_masks, reference_of_sets, sparse_attention

# --- the definition ---------------------------------------------------------------------------------------------------


def connectivity_logits(
    q: Tensor, compressed: Tensor, offset: Tensor, projection: Optional[Tensor], num_heads: int
) -> Tensor:
    """Logits of the coefficients of the basis rows, `(B, heads, queries, n)`: what `connectivity_topk` takes."""
    queries, keys = split_heads(q.to(compressed.dtype), num_heads), split_heads(compressed, num_heads)
    if projection is not None:
        queries = F.linear(queries, projection)
    return queries @ keys.transpose(-2, -1) + offset.transpose(1, 2).unsqueeze(2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, num_pruned: int, num_heads: int, scale: float) -> Tensor:
    """Attention to all keys and to `num_pruned` keys of zeros with values of zeros: each adds exp(0) to the sum."""
    scores = split_heads(q * scale, num_heads) @ split_heads(k, num_heads).transpose(-2, -1)
    if num_pruned > 0:
        attention = F.pad(scores, (0, 1), value=log(num_pruned)).softmax(-1)[..., :-1]
    else:
        attention = scores.softmax(-1)
    return join_heads(attention @ split_heads(v, num_heads))


def _one_after_the_other(
    choose: Callable[..., Tensor],
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: Tensor,
    offset: Tensor,
    projection: Optional[Tensor],
    basis: Tensor,
    candidates: Optional[Tensor],
    num_keys: int,
    num_coefficients: int,
    coefficient_threshold: float,
    basis_threshold: float,
    score_threshold: float,
    num_dense: int,
    num_pruned: int,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Logits, choice, attention: `choose` and `attend` are operators or their definitions."""
    chooses = q[:, num_dense:]
    logits = connectivity_logits(chooses.detach(), compressed, offset, projection, num_heads)
    settings = (num_keys, num_coefficients, coefficient_threshold, basis_threshold, score_threshold)
    out = attend(chooses, k, v, choose(logits, basis, candidates, *settings), num_heads, scale)
    if num_dense > 0:
        queries, keys, values = (x.to(wide_dtype(x)) for x in (q[:, :num_dense], k, v))
        first = dense_attention(queries, keys, values, num_pruned, num_heads, scale)
        out = torch.cat([first.to(out.dtype), out], 1)
    return out


def reference(*args: Any) -> Tensor:
    """The definition in plain PyTorch; differentiable, traceable, and the body that export uses."""
    wide = (x.to(wide_dtype(x)) for x in args[:3])
    out = _one_after_the_other(choose_by_definition, _definition_for(args), *wide, *args[3:])
    return out.to(args[0].dtype)


def _definition_for(args: Sequence[Any]) -> Callable[..., Tensor]:
    """That of attention to the lists that are chosen: so many keys for each query, or those above a threshold."""
    num_keys = args[8]
    return reference_of_sets if num_keys > 0 else reference_of_masks


def _replaced(*args: Any) -> Tensor:
    """What stands for the two operators inside `replaced`."""

    def attend(*lists: Any) -> Tensor:
        stands_for = replacement("sparse_attention", _definition_for(args), fake_attention, lists)
        assert stands_for is not None
        return stands_for

    return _one_after_the_other(choose, attend, *args)


def composed(*args: Any) -> Tensor:
    """The same by the operators that this one joins, which have kernels and gradients of their own.

    On a GPU this is how it runs: logits are one product of matrices, and lists are small beside what they save. On the
    CPU a kernel does all at once, as it can keep the lists of some queries in the cache.
    """
    return _one_after_the_other(choose, sparse_attention, *args)


def _fake(q, k, v, *_):
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def _check_values(q, k, v, compressed, offset, projection, basis, candidates, *_) -> None:
    if candidates is not None:
        check_candidates_in_range(candidates, basis.shape[1])


_operator = Operator(
    "connectivity_attention",
    "Tensor q, Tensor k, Tensor v, Tensor compressed, Tensor offset, Tensor? projection, Tensor basis, "
    "Tensor? candidates, int num_keys, int num_coefficients, float coefficient_threshold, float basis_threshold, "
    "float score_threshold, int num_dense, int num_pruned, int num_heads, float scale",
    reference,
    _fake,
    differentiable=("q", "k", "v"),
    forward=composed,
    shared=("projection", "basis"),
    check_values=_check_values,
    compiled=("cpu",),
)

# --- the public function ----------------------------------------------------------------------------------------------


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: Tensor,
    offset: Tensor,
    projection: Optional[Tensor],
    num_dense: int,
    num_pruned: int,
    num_heads: int,
) -> None:
    check_token_attention(q, k, v, num_heads)
    check_tokens("compressed", compressed)
    width = q.shape[2] // num_heads
    if projection is not None:
        if projection.dim() != 2:
            raise ValueError(f"projection must have shape (c, {width}), got {tuple(projection.shape)}")
        check_parameter("projection", projection, (projection.shape[0], width), q)
        width = projection.shape[0]
    check_parameter("compressed", compressed, (q.shape[0], compressed.shape[1], num_heads * width), q)
    check_parameter("offset", offset, (q.shape[0], compressed.shape[1], num_heads), q)
    if not 0 <= num_dense <= q.shape[1]:
        raise ValueError(
            f"num_dense must lie between 0 and the number of queries, {q.shape[1]}, got {num_dense}"
        )
    if num_pruned < 0:
        raise ValueError(f"num_pruned must not be negative, got {num_pruned}")


def connectivity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: Tensor,
    offset: Tensor,
    basis: Tensor,
    num_heads: int,
    num_keys: int = 0,
    num_coefficients: int = 0,
    basis_threshold: float = 0.0,
    coefficient_threshold: float = 0.0,
    score_threshold: float = 0.0,
    candidates: Optional[Tensor] = None,
    num_dense: int = 0,
    num_pruned: int = 0,
    scale: Optional[float] = None,
    projection: Optional[Tensor] = None,
) -> Tensor:
    """Multi-head attention of every query to the keys that it chooses.

    Sparsifiner, arXiv 2303.13755, section 3. A query's logits are its products with the compressed keys of its head,
    plus the offset; from there on `connectivity_topk` says which keys it attends to, `sparse_attention` how. The first
    `num_dense` queries, the class token, attend to all keys.

    The choice carries no gradient. Where queries, keys or values want one, the operators named above are called one
    after the other, and the lists of keys are kept for the backward pass.

    Args:
        q: `(B, Nq, C)` queries, heads interleaved in C; float32, float64, bfloat16 or float16 (sums and softmax are
            float32, float64 for float64). Channels must be contiguous, other strides are free.
        k: `(B, Nk, C)` keys, dtype and device of `q`.
        v: `(B, Nk, Cv)` values.
        compressed: `(B, n, C)` compressed keys, one per basis row; any floating-point dtype.
        offset: `(B, n, num_heads)`, added to the logits; any floating-point dtype.
        basis, num_keys, num_coefficients, basis_threshold, coefficient_threshold, score_threshold, candidates: see
            `connectivity_topk`; the keys that are chosen among are those of `k`.
        num_heads: number of heads; divides C and Cv.
        num_dense: how many queries, the first, attend to all keys.
        num_pruned: keys of zeros, with values of zeros, that the dense queries attend to besides: each adds exp(0) to
            the sum of their softmax.
        scale: factor of the scores; default: (C / num_heads) ** -0.5.
        projection: `(c, C / num_heads)`, any floating-point dtype: what the queries of every head go through before
            they meet the compressed keys, which then have c channels per head, `(B, n, num_heads * c)`. Worth while
            where there are many basis rows.

    Returns:
        `(B, Nq, Cv)`, contiguous, dtype of `q`.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that differ.
        ValueError: shapes, devices, strides or numbers that do not fit.
        IndexError: a candidate that names no token.
    """
    if scale is None:
        scale = (q.shape[2] // num_heads) ** -0.5
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if torch.jit.is_scripting():
        return torch.ops.vitrail.connectivity_attention(
            q,
            k,
            v,
            compressed.detach().to(dtype),
            offset.detach().to(dtype),
            None if projection is None else projection.detach().to(dtype),
            basis.detach(),
            candidates,
            num_keys,
            num_coefficients,
            coefficient_threshold,
            basis_threshold,
            score_threshold,
            num_dense,
            num_pruned,
            num_heads,
            scale,
        )
    settings = (num_keys, num_coefficients, coefficient_threshold, basis_threshold, score_threshold)
    _check(q, k, v, compressed, offset, projection, num_dense, num_pruned, num_heads)
    check_choice("q", q, compressed.shape[1], basis, *settings, candidates)
    tokens = basis.shape[1] if candidates is None else candidates.shape[1]
    if tokens != k.shape[1]:
        name = "basis" if candidates is None else "candidates"
        raise ValueError(f"{name} must have the tokens of k, {k.shape[1]}, got {tokens}")
    compressed, offset, basis = compressed.detach().to(dtype), offset.detach().to(dtype), basis.detach()
    if projection is not None:
        projection = projection.detach().to(dtype)
    wants_gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (_replaced if is_replaced() else composed if wants_gradients else _operator)(
        q,
        k,
        v,
        compressed,
        offset,
        projection,
        basis,
        candidates,
        *settings,
        num_dense,
        num_pruned,
        num_heads,
        scale,
    )
