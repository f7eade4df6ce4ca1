"""`packed_conv`: convolutions of channels-last maps with weights laid out once, for inference.

The layers between late stages have many weights and few tokens, and stock convolutions lay their weights out anew at
every call: with one image that takes as long as the product. Here a patch is a row of the product that `packed_linear`
computes; rows are cut from the map, a block at a time, while they are in cache.
"""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_grid
from ._operator import Operator
from .packed_linear import check_packed, pack_weight, unpack_weight


def pack_kernel(weight: Tensor) -> Tensor:
    """The weight of a convolution in the layout that `packed_conv` takes.

    Args:
        weight: `(columns, C, height, width)`, as `torch.nn.Conv2d` has it; float32, float64 or bfloat16.

    Returns:
        `pack_weight` of `(columns, height * width * C)`.

    Raises:
        TypeError: another dtype.
        ValueError: another rank, or an empty weight.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"weight must have 4 dimensions (columns, C, height, width), got {tuple(weight.shape)}"
        )
    return pack_weight(weight.permute(0, 2, 3, 1).flatten(1))


# --- the definition ---------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    columns: int,
    kernel: List[int],
    stride: List[int],
    padding: List[int],
) -> Tensor:
    """The definition in plain PyTorch; differentiable and traceable."""
    taps = unpack_weight(weight, columns, kernel[0] * kernel[1] * x.shape[3])
    taps = taps.reshape(columns, kernel[0], kernel[1], x.shape[3]).permute(0, 3, 1, 2)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x.permute(0, 3, 1, 2), taps, bias, stride, padding).permute(0, 2, 3, 1)


def _like(x, weight, bias, columns, kernel, stride, padding) -> Tensor:
    size = [(x.shape[1 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    return x.new_empty((x.shape[0], *size, columns))


_operator = Operator(
    "packed_conv",
    "Tensor x, Tensor weight, Tensor? bias, int columns, int[] kernel, int[] stride, int[] padding",
    reference,
    _like,
    differentiable=("x", "weight", "bias"),
    cast=(),
    compiled=("cpu",),
    foldable=False,
)

# --- the public function ----------------------------------------------------------------------------------------------


def _check_window(x: Tensor, kernel: List[int], stride: List[int], padding: List[int]) -> None:
    for name, pair, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two numbers of at least {least}, got {tuple(pair)}")
    if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
        raise ValueError(f"padding must be less than the kernel, {tuple(kernel)}, got {tuple(padding)}")
    for name, size, taps, zeros in zip(("high", "wide"), x.shape[1:3], kernel, padding, strict=True):
        if size + 2 * zeros < taps:
            raise ValueError(
                f"x with its padding must be at least as {name} as the kernel, {taps}, got {size} + 2 * {zeros}"
            )


def packed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    columns: int,
    kernel: List[int],
    stride: List[int],
    padding: List[int],
) -> Tensor:
    """A convolution with a packed weight.

    Args:
        x: `(B, H, W, C)`; float32, float64 or bfloat16 (sums are float32, float64 for float64). Channels must be
            contiguous, other strides are free.
        weight: `pack_kernel` of `(columns, C, height, width)`, dtype of `x`.
        bias: `(columns,)` float32, or float64 for float64; None for none.
        columns: channels of the result; packed weights are padded, so they do not say.
        kernel, stride, padding: height and width of each; zeros stand past the map, fewer than the kernel is wide.

    Returns:
        `(B, H', W', columns)`, dtype of `x`, where H' = (H + 2 * padding - kernel) // stride + 1, and so W'.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, or a kernel larger than the map with its padding.
    """
    if not torch.jit.is_scripting():
        check_grid("x", x)
        _check_window(x, kernel, stride, padding)
        if bias is not None and tuple(bias.shape) != (columns,):
            raise ValueError(f"bias must have shape ({columns},), got {tuple(bias.shape)}")
        layer = ("", weight, bias, kernel[0] * kernel[1] * x.shape[3], columns)
        check_packed(x, [layer], columns, None, "none")
    if torch.jit.is_scripting():
        return torch.ops.vitrail.packed_conv(x, weight, bias, columns, kernel, stride, padding)
    return _operator(x, weight, bias, columns, kernel, stride, padding)
