"""`response_norm`: global response normalisation behind an activation, for the inference form on a GPU.

There the layers around it are products of a library, and what is left are passes over the widest tensor of a block:
activation, squares, sums, factors, product. Two are enough. (On the CPU `packed_grn_mlp` takes it into the layers.)
"""

import torch
from torch import Tensor

from ._checks import FLOATS
from ._operator import Operator, wide_dtype
from .packed_linear import ACTIVATIONS, activated, response_factors

# --- the definition ---------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """The definition in plain PyTorch, of tokens `(B, N, C)`; differentiable and traceable."""
    y = activated(x.to(wide_dtype(x)), activation)
    return (y * response_factors(y, weight, eps)).to(x.dtype)


_operator = Operator(
    "response_norm",
    "Tensor x, Tensor weight, float eps, str activation",
    reference,
    lambda x, *_: x.new_empty(x.shape),
    differentiable=("x", "weight"),
    cast=(),
    shared=("weight",),
    compiled=("cuda",),
)

# --- the public function ----------------------------------------------------------------------------------------------


def _check(x: Tensor, weight: Tensor, activation: str) -> None:
    if not isinstance(x, Tensor) or x.dim() < 2:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor (B, ..., channels), got {shape}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"x must be float32, float64, bfloat16 or float16, got {x.dtype}; convert it with .to()"
        )
    if tuple(weight.shape) != (x.shape[-1],) or weight.dtype != wide_dtype(x):
        raise ValueError(
            f"weight must have shape ({x.shape[-1]},) and dtype {wide_dtype(x)}, "
            f"got {tuple(weight.shape)} of {weight.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def response_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, activation: str = "none") -> Tensor:
    """Global response normalisation of activated tokens: `f * activation(x)`.

    The factors f = 1 + weight * n / (mean of n + eps) are those of ConvNeXt V2, arXiv 2301.00808, where n are the norms
    of the channels over the tokens of an image. (Fold the normalisation's bias into the layer behind.)

    Args:
        x: `(B, ..., C)`, one image in each entry of the first dimension; float32, float64, bfloat16 or float16 (sums
            are float32, float64 for float64).
        weight: `(C,)` float32, or float64 for float64.
        eps: see above.
        activation: `none` or `gelu` (the exact one).

    Returns:
        Like `x`, contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, or an unknown activation.
    """
    if not torch.jit.is_scripting():
        _check(x, weight, activation)
    tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    if torch.jit.is_scripting():
        return torch.ops.vitrail.response_norm(tokens, weight, eps, activation).view(x.shape)
    return _operator(tokens, weight, eps, activation).view(x.shape)
