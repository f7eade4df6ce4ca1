"""`depthwise_conv`: depthwise convolutions of channels-last maps with what surrounds them, for inference.

They are a few multiplications per number, so that each pass over memory beside them (making the map contiguous, a
normalisation, an activation, a residual) costs as much as they do.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_grid, check_like
from ._operator import Operator, wide_dtype
from .packed_linear import ACTIVATIONS

# --- the definition ---------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    scale: Optional[Tensor],
    shift: Optional[Tensor],
    activation: str,
) -> Tensor:
    """The definition in plain PyTorch; differentiable and traceable."""
    if x.numel() == 0:  # stock convolutions refuse empty maps
        return x.clone()
    y = x.to(wide_dtype(x))
    if scale is not None:
        y = y * scale
    if shift is not None:
        y = y + shift
    if activation == "gelu":
        y = F.gelu(y)
    kernel = [weight.shape[-3], weight.shape[-2]]
    images = x.shape[0] if weight.dim() == 4 else 1  # whose channels are convolved as those of one
    maps = y.permute(0, 3, 1, 2)
    if images != 1:
        maps = maps.flatten(0, 1).unsqueeze(0)
    taps = weight.movedim(-1, -3).reshape(-1, 1, kernel[0], kernel[1])
    y = F.conv2d(maps, taps, padding=[kernel[0] // 2, kernel[1] // 2], groups=taps.shape[0])
    if images != 1:
        y = y.view(images, x.shape[3], x.shape[1], x.shape[2])
    y = y.permute(0, 2, 3, 1)
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


_operator = Operator(
    "depthwise_conv",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift, str activation",
    reference,
    lambda x, *_: x.new_empty(x.shape),
    differentiable=("x", "weight", "bias", "residual", "scale", "shift"),
    cast=(),
    compiled=("cpu", "cuda"),
    foldable=False,
)

# --- the public function ----------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    weight: Tensor,
    parameters: List[Tuple[str, Optional[Tensor]]],
    residual: Optional[Tensor],
    activation: str,
) -> None:
    check_grid("x", x)
    wide = wide_dtype(x)
    if weight.dim() not in (3, 4) or weight.shape[-1] != x.shape[3] or weight.dtype != wide:
        raise ValueError(
            f"weight must have shape (height, width, {x.shape[3]}), or one for each of the {x.shape[0]} images, and "
            f"dtype {wide}, got {tuple(weight.shape)} of {weight.dtype}"
        )
    if weight.dim() == 4 and weight.shape[0] != x.shape[0]:
        raise ValueError(f"weight must be given for {x.shape[0]} images, got {weight.shape[0]}")
    if weight.shape[-3] % 2 == 0 or weight.shape[-2] % 2 == 0:
        raise ValueError(f"the kernel must be odd, got {weight.shape[-3]} x {weight.shape[-2]}")
    for name, values in parameters:
        if values is not None and (tuple(values.shape) != (x.shape[3],) or values.dtype != wide):
            raise ValueError(
                f"{name} must have shape ({x.shape[3]},) and dtype {wide}, "
                f"got {tuple(values.shape)} of {values.dtype}"
            )
    if residual is not None:
        check_grid("residual", residual)
        check_like("residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    residual: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
    activation: str = "none",
) -> Tensor:
    """`residual + bias + convolution(activation(x * scale + shift))`, each channel with a kernel of its own.

    The stride is 1, and zeros stand past the map, so that it keeps its size.

    Args:
        x: `(B, H, W, C)`; float32, float64, bfloat16 or float16 (sums are float32, float64 for float64). Channels must
            be contiguous, other strides are free.
        weight: `(height, width, C)`, both odd, float32, or float64 for float64; or `(B, height, width, C)`, a kernel
            for every image.
        bias: `(C,)`, dtype of `weight`; None for none.
        residual: `(B, H, W, C)`, added last; dtype of `x`.
        scale, shift: `(C,)`, dtype of `weight`: what a BatchNorm in front has become.
        activation: `none` or `gelu` (the exact one).

    Returns:
        `(B, H, W, C)`, contiguous, dtype of `x`.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, an even kernel, or an unknown activation.
    """
    if not torch.jit.is_scripting():
        parameters = [("bias", bias), ("scale", scale), ("shift", shift)]
        _check(x, weight, parameters, residual, activation)
    weight = weight.contiguous()
    if torch.jit.is_scripting():
        return torch.ops.vitrail.depthwise_conv(x, weight, bias, residual, scale, shift, activation)
    return _operator(x, weight, bias, residual, scale, shift, activation)
