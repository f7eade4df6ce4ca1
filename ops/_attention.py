"""The attention core. An attention operator adds to it which keys a query looks at, and nothing else."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ._operator import Operator, wide_dtype


class Operands(NamedTuple):
    """What an addressing policy brings together: `(..., tokens, d)`, with any dimensions in front."""

    queries: Tensor
    """Scaled."""
    keys: Tensor
    values: Tensor
    bias: Optional[Tensor] = None
    """Added to the scores."""
    visible: Optional[Tensor] = None
    """Boolean, like the scores: which keys a query may see. A query that sees none gets zeros."""
    factors: Optional[Tensor] = None
    """Multiplied on keys and values, `(..., 1, keys)`."""


def fits_tiles(q: Tensor, v: Tensor, num_heads: int) -> bool:
    """Whether the tiles of the GPU kernels have room for the channels of a head."""
    return max(q.shape[-1], v.shape[-1]) <= 64 * num_heads


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(..., tokens, heads * d)` to `(..., heads, tokens, d)`."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """Inverse of `split_heads`."""
    return x.transpose(-3, -2).flatten(-2)


def _scores(o: Operands) -> Tensor:
    scores = o.queries @ o.keys.transpose(-2, -1)
    if o.factors is not None:
        scores = scores * o.factors
    if o.bias is not None:
        scores = scores + o.bias
    return scores if o.visible is None else scores.masked_fill(~o.visible, -torch.inf)


def _mix(attention: Tensor, o: Operands) -> Tensor:
    if o.visible is not None:
        attention = attention.masked_fill(~o.visible, 0)  # the softmax of nothing is not a number
    return (attention if o.factors is None else attention * o.factors) @ o.values


def attend(o: Operands) -> Tensor:
    """Softmax attention, `(..., queries, d)`."""
    return _mix(_scores(o).softmax(-1), o)


def attend_with_lse(o: Operands) -> Tuple[Tensor, Tensor]:
    """The same, and the log-sum-exp of every query's scores, `(..., queries, 1)`."""
    scores = _scores(o)
    lse = scores.logsumexp(-1, keepdim=True)
    return _mix((scores - lse).exp(), o), lse


class AttentionOperator(Operator):
    """An operator `(out, lse)`: `address` brings operands together, `collect` lays results out as the queries lie.

    Args:
        name, arguments, differentiable, options: see `Operator`; the first argument are the queries.
        address: from the arguments, half types as float32, to `Operands`.
        collect: from `(..., tokens, d)` results and the arguments to the layout of the queries, heads interleaved.
        shapes: from the arguments to the shapes of `out` and of `lse`.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        address: Callable[..., Operands],
        collect: Callable[..., Tensor],
        shapes: Callable[..., Tuple[Sequence[Any], Sequence[Any]]],
        differentiable: Sequence[str] = ("q", "k", "v"),
        **options: Any,
    ):
        def widened(args):
            """Half types as float32; what comes wide already, such as a bias, stays."""
            half = (torch.bfloat16, torch.float16)
            return [x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in args]

        def definition(*args):
            return collect(attend(address(*widened(args))), *args).to(args[0].dtype)

        def forward(*args):
            out, lse = attend_with_lse(address(*widened(args)))
            return collect(out, *args).to(args[0].dtype), collect(lse, *args)

        def fake(*args):
            out, lse = shapes(*args)
            return args[0].new_empty(out), args[0].new_empty(lse, dtype=wide_dtype(args[0]))

        super().__init__(
            name,
            arguments,
            definition,
            fake,
            differentiable=differentiable,
            outputs=("out", "lse"),
            forward=forward,
            **options,
        )

    def fits_gpu(self, *args: Any) -> bool:
        """Neither float64 nor heads that are wider than a tile."""
        return super().fits_gpu(*args) and fits_tiles(args[0], args[2], args[-2])
