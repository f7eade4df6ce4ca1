"""`strip_mix`: linear mixing along the rows (or columns) of a grid and across adjacent ones.

Strip-MLP, arXiv 2307.11458, section 3 (strip MLP layer; channels in groups as in cascade group strip mixing).
What a token receives does not depend on the tokens' values: the operator is linear in the grid, and in its weight.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ._checks import check_grid, check_parameter
from ._operator import Operator, wide_dtype

# --- the definition ---------------------------------------------------------------------------------------------------


def _strips(x: Tensor, axis: int) -> Tensor:
    """`(B, H, W, C)` to `(B, strips, length, C)`, or back."""
    return x if axis == 2 else x.transpose(1, 2)


def _fold(strips: Tensor, groups: int) -> Tensor:
    """`(B, S, L, C)` to `(B, groups * L, 1, S * patches)`: positions are the channels of a grouped convolution.

    In memory that is one transposition of positions and channels, and leaves the convolution's channels last.
    """
    b, s, n, c = strips.shape
    return strips.transpose(2, 3).reshape(b, 1, s * (c // groups), groups * n).permute(0, 3, 1, 2)


def _kernel(weight: Tensor) -> Tensor:
    """`(3, L, L, groups)` to the convolution's `(groups * L, L, 1, 3)`."""
    return weight.permute(3, 1, 2, 0).flatten(0, 1).unsqueeze(2)


def _geometry(x: Tensor, weight: Tensor) -> Tuple[List[int], List[int], List[int], int]:
    """Stride, padding and dilation of the convolution, and its groups: the same patch lies `patches` further on."""
    patches = x.shape[3] // weight.shape[3]
    return [1, 1], [0, patches], [1, patches], weight.shape[3]


def reference(x: Tensor, weight: Tensor, bias: Optional[Tensor], axis: int) -> Tensor:
    """The definition in plain PyTorch; differentiable, traceable, and the body that export uses."""
    wide = wide_dtype(x)
    strips = _strips(x, axis)
    b, s, n, c = strips.shape
    out = F.conv2d(
        _fold(strips.to(wide), weight.shape[3]),
        _kernel(weight.to(wide)),
        None if bias is None else bias.to(wide).t().flatten(),
        *_geometry(x, weight),
    )
    out = out.permute(0, 2, 3, 1).reshape(b, s, c, n).transpose(2, 3)
    return _strips(out, axis).to(x.dtype)


# --- the operator -----------------------------------------------------------------------------------------------------


class _StripMix(Operator):
    """A linear operator needs no forward pass to be differentiated."""

    def _differentiate(self, grad, x, weight, bias, axis):
        wide, n, groups = wide_dtype(x), weight.shape[1], weight.shape[3]
        grad_x = reference(
            grad, weight.flip(0).transpose(1, 2), None, axis
        )  # the transposed mixing is a mixing
        grad, x = _strips(grad.to(wide), axis), _strips(x.to(wide), axis)
        grad_kernel = conv2d_weight(
            _fold(x, groups), (groups * n, n, 1, 3), _fold(grad, groups), *_geometry(x, weight)
        )
        grad_weight = grad_kernel.view(groups, n, n, 3).permute(3, 1, 2, 0).to(weight.dtype)
        if bias is None:
            grad_bias = x.new_empty(0, dtype=weight.dtype)
        else:
            grad_bias = grad.sum((0, 1)).unflatten(1, (-1, groups)).sum(1).to(bias.dtype)
        return tuple(g.contiguous() for g in (grad_x, grad_weight, grad_bias))


_operator = _StripMix(
    "strip_mix",
    "Tensor x, Tensor weight, Tensor? bias, int axis",
    reference,
    lambda x, weight, bias, axis: x.new_empty(x.shape),
    differentiable=("x", "weight", "bias"),
    shared=("weight", "bias"),
    compiled=("cpu", "cuda"),
)

# --- the public function ----------------------------------------------------------------------------------------------


def _check(x: Tensor, weight: Tensor, bias: Optional[Tensor], axis: int) -> None:
    check_grid("x", x)
    if axis not in (1, 2):
        raise ValueError(f"axis must be 2 (mix along rows) or 1 (mix along columns), got {axis!r}")
    length, channels = x.shape[axis], x.shape[3]
    groups = weight.shape[3] if isinstance(weight, Tensor) and weight.dim() == 4 else channels
    if groups < 1 or channels % groups:
        raise ValueError(f"the groups of weight must divide the {channels} channels of x, got {groups}")
    check_parameter("weight", weight, (3, length, length, groups), x, "x")
    if groups > 1 and weight.stride(3) != 1:
        raise ValueError(
            f"weight must have contiguous groups (stride 1 in the last dimension), got stride {weight.stride(3)}; "
            "pass weight.contiguous()"
        )
    if bias is not None:
        check_parameter("bias", bias, (length, groups), x, "x")


def strip_mix(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, axis: int = 2) -> Tensor:
    """Every token receives a weighted sum of the tokens of its strip and of the two strips beside it.

    Strip-MLP, arXiv 2307.11458. A strip is a row (`axis` 2) or a column (`axis` 1). Of a row y, at position i and
    channel c, with g = c % groups:

        out[:, y, i, c] = bias[i, g] + sum over t in 0, 1, 2 and j of weight[t, i, j, g] * x[:, y + t - 1, j, c]

    Strips past the grid are zero. Channels of one group share a weight; neighbouring channels are in different groups,
    so that a kernel reads grid and weight side by side, as they lie in memory.

    Args:
        x: `(B, H, W, C)`; float32, float64, bfloat16 or float16 (sums are float32, float64 for float64). Channels must
            be contiguous, other strides are free.
        weight: `(3, L, L, groups)`: adjacent strip, position that receives, position that gives, group. L is the length
            of a strip, `x.shape[axis]`; groups divide C, contiguous. Any floating-point dtype.
        bias: `(L, groups)`. Any floating-point dtype; default: none.
        axis: 2 mixes along rows, 1 along columns.

    Returns:
        `(B, H, W, C)`, contiguous, dtype of `x`.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes, devices or strides that do not fit, or another axis.
    """
    if not torch.jit.is_scripting():
        _check(x, weight, bias, axis)
    weight = weight.to(x.dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    if torch.jit.is_scripting():
        return torch.ops.vitrail.strip_mix(x, weight, bias, axis)
    return _operator(x, weight, bias, axis)
