"""`packed_linear` and `packed_mlp`: linear layers with what surrounds them, for inference.

A transformer block is mostly `x + W2 gelu(W1 norm(x))` and the like. Written with stock layers each norm, activation
and sum is a pass over memory, and the weights are laid out anew for the processor at every call. Here they are laid out
once (`pack_weight`), and rows of tokens go through norm, product, activation and residual while they are in cache; of
an MLP the hidden layer never reaches memory.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._operator import Operator, wide_dtype

PANEL = 32
"""Columns that lie together in packed weights."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ACTIVATIONS = ("none", "gelu")


def pack_weight(weight: Tensor) -> Tensor:
    """The weight of a linear layer in the layout that `packed_linear` and `packed_mlp` take.

    Args:
        weight: `(columns, depth)`, as `torch.nn.Linear` has it; float32, float64 or bfloat16.

    Returns:
        `(panels, depth, 32)`, a panel for every 32 columns, the last one filled up with zeros; bfloat16
        `(panels, depth / 2, 32, 2)`, as it is multiplied in pairs along the depth.

    Raises:
        TypeError: another dtype.
        ValueError: no matrix, or an empty one.
    """
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float32, float64 or bfloat16, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be a matrix (columns, depth), got shape {tuple(weight.shape)}")
    columns, depth = weight.shape
    pairs = weight.dtype == torch.bfloat16
    weight = F.pad(weight, (0, depth % 2 if pairs else 0, 0, -columns % PANEL))
    if pairs:
        return weight.unflatten(0, (-1, PANEL)).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()
    return weight.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def unpack_weight(weight: Tensor, columns: int, depth: int) -> Tensor:
    """Inverse of `pack_weight`, `(columns, depth)`."""
    weight = weight.transpose(1, 2)
    if weight.dim() == 4:
        weight = weight.flatten(2)
    return weight.flatten(0, 1)[:columns, :depth]


def _joined(x: Tensor, x2: Optional[Tensor], x3: Optional[Tensor]) -> Tensor:
    others = [y for y in (x2, x3) if y is not None]
    return torch.cat([x, *others], -1) if others else x


def _layer(x: Tensor, weight: Tensor, bias: Optional[Tensor], columns: int) -> Tensor:
    weight = unpack_weight(weight, columns, x.shape[1])
    if bias is None or bias.dim() == 1:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = F.linear(x, weight).unflatten(0, (-1, bias.shape[0]))
    return (y + bias.to(x.dtype)).flatten(0, 1)


def _normalised(x: Tensor, norm_eps: float) -> Tensor:
    return x if norm_eps < 0 else F.layer_norm(x, (x.shape[1],), eps=norm_eps)


def activated(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS`."""
    return F.gelu(x) if activation == "gelu" else x


def _linear(x, x2, x3, weight, bias, residual, columns, norm_eps, activation) -> Tensor:
    x = _normalised(_joined(x, x2, x3), norm_eps)
    y = activated(_layer(x, weight, bias, columns), activation)
    return y if residual is None else residual + y


def _mlp(x, weight1, bias1, weight2, bias2, residual, hidden, columns, norm_eps, activation) -> Tensor:
    y = activated(_layer(_normalised(x, norm_eps), weight1, bias1, hidden), activation)
    y = _layer(y, weight2, bias2, columns)
    return y if residual is None else residual + y


def response_factors(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Factors of global response normalisation (ConvNeXt V2, arXiv 2301.00808) of `(images, tokens, hidden)`."""
    norm = hidden.norm(p=2, dim=1, keepdim=True)
    return 1 + weight * (norm / (norm.mean(-1, keepdim=True) + eps))


def _grn_mlp(
    x, weight1, bias1, grn_weight, weight2, bias2, residual, images, hidden, columns, norm_eps, grn_eps
) -> Tensor:
    y = F.gelu(_layer(_normalised(x, norm_eps), weight1, bias1, hidden))
    y = y.unflatten(0, (images, -1)) if images != 0 else y.unsqueeze(0)
    wide = y.to(wide_dtype(y))
    y = (wide * response_factors(wide, grn_weight, grn_eps)).to(y.dtype).flatten(0, 1)
    y = _layer(y, weight2, bias2, columns)
    return y if residual is None else residual + y


_packed_linear = Operator(
    "packed_linear",
    "Tensor x, Tensor? x2, Tensor? x3, Tensor weight, Tensor? bias, Tensor? residual, int columns, float norm_eps, "
    "str activation",
    _linear,
    lambda x, x2, x3, weight, bias, residual, columns, *_: x.new_empty((x.shape[0], columns)),
    differentiable=("x", "x2", "x3", "weight", "bias", "residual"),
    cast=(),
    compiled=("cpu",),
    foldable=False,
)
_packed_mlp = Operator(
    "packed_mlp",
    "Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? residual, int hidden, "
    "int columns, float norm_eps, str activation",
    _mlp,
    lambda x, w1, b1, w2, b2, residual, hidden, columns, *_: x.new_empty((x.shape[0], columns)),
    differentiable=("x", "weight1", "bias1", "weight2", "bias2", "residual"),
    cast=(),
    compiled=("cpu",),
    foldable=False,
)
_packed_grn_mlp = Operator(
    "packed_grn_mlp",
    "Tensor x, Tensor weight1, Tensor? bias1, Tensor grn_weight, Tensor weight2, Tensor? bias2, Tensor? residual, "
    "int images, int hidden, int columns, float norm_eps, float grn_eps",
    _grn_mlp,
    lambda x, w1, b1, grn, w2, b2, residual, images, hidden, columns, *_: x.new_empty((x.shape[0], columns)),
    differentiable=("x", "weight1", "bias1", "grn_weight", "weight2", "bias2", "residual"),
    cast=(),
    compiled=("cpu",),
    foldable=False,
)
linear_reference = _packed_linear.definition
mlp_reference = _packed_mlp.definition
grn_mlp_reference = _packed_grn_mlp.definition


def _check_joined(x: Tensor, others: List[Tuple[str, Optional[Tensor]]]) -> int:
    """The channels of all."""
    depth = 0 if not isinstance(x, Tensor) or x.dim() < 1 else x.shape[-1]
    for name, other in others:
        if other is None:
            continue
        if other.dtype != x.dtype or other.dim() < 1 or other.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {(*x.shape[:-1], 'channels')} and dtype {x.dtype}, "
                f"got {tuple(other.shape)} of {other.dtype}"
            )
        depth += other.shape[-1]
    return depth


def check_packed(
    x: Tensor,
    layers: List[Tuple[str, Tensor, Optional[Tensor], int, int]],
    columns: int,
    residual: Optional[Tensor],
    activation: str,
) -> None:
    """Layers are given as suffix of their arguments' names, weight, bias, depth (0: that of x) and width."""
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise TypeError(f"x must be a tensor (..., channels), got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64 or bfloat16, got {x.dtype}; convert it with .to()")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    wide = wide_dtype(x)
    for suffix, weight, bias, depth, width in layers:
        depth = depth or x.shape[-1]
        pairs = (PANEL, 2) if x.dtype == torch.bfloat16 else (PANEL,)
        expected = (-(-width // PANEL), -(-depth // len(pairs)), *pairs)
        if tuple(weight.shape) != expected or weight.dtype != x.dtype:
            raise ValueError(
                f"weight{suffix} must be what pack_weight makes of a {x.dtype} matrix ({width}, {depth}): shape "
                f"{expected}, got {tuple(weight.shape)} of {weight.dtype}"
            )
        if bias is not None and (
            bias.dim() < 1 or bias.shape != (*x.shape[:-1], width)[-bias.dim() :] or bias.dtype != wide
        ):
            raise ValueError(
                f"bias{suffix} must have shape ({width},), or the last dimensions of {(*x.shape[:-1], width)}, and "
                f"dtype {wide}, got {tuple(bias.shape)} of {bias.dtype}"
            )
    if residual is not None and (residual.shape != (*x.shape[:-1], columns) or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must have shape {(*x.shape[:-1], columns)} and dtype {x.dtype}, "
            f"got {tuple(residual.shape)} of {residual.dtype}"
        )


def _rows(x: Optional[Tensor]) -> Optional[Tensor]:
    if x is None:
        return None
    x = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _bias(bias: Optional[Tensor]) -> Optional[Tensor]:
    """Of one token, or of several in rows."""
    return bias if bias is None or bias.dim() == 1 else bias.flatten(0, -2).contiguous()


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    columns: int,
    residual: Optional[Tensor] = None,
    norm_eps: Optional[float] = None,
    activation: str = "none",
    x2: Optional[Tensor] = None,
    x3: Optional[Tensor] = None,
) -> Tensor:
    """`residual + activation(norm(x) W^T + bias)` with a packed weight.

    Args:
        x: `(..., depth)`; float32, float64 or bfloat16 (sums are float32, float64 for float64).
        weight: `pack_weight(W)`, dtype of `x`.
        bias: `(columns,)` float32, or float64 for float64; None for none. One that depends on the token has more of the
            result's last dimensions, such as `(H, W, columns)`.
        columns: width of the result; packed weights are padded, so they do not say.
        residual: `(..., columns)`, added last; dtype of `x`.
        norm_eps: epsilon of a LayerNorm without scale and shift before the product; None for no norm. Fold scale and
            shift into weight and bias.
        activation: `none` or `gelu` (the exact one).
        x2, x3: `(..., more)`, dtype of `x`: the layer then acts on x, x2 and x3 joined along the channels, without a
            joined copy.

    Returns:
        `(..., columns)`, contiguous, dtype of `x`.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, or an unknown activation.
    """
    if not torch.jit.is_scripting():
        depth = _check_joined(x, [("x2", x2), ("x3", x3)])
        check_packed(x, [("", weight, bias, depth, columns)], columns, residual, activation)
    eps = -1.0 if norm_eps is None else norm_eps
    y = _packed_linear(
        _rows(x), _rows(x2), _rows(x3), weight, _bias(bias), _rows(residual), columns, eps, activation
    )
    return y.view(*x.shape[:-1], columns)


def packed_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Optional[Tensor],
    weight2: Tensor,
    bias2: Optional[Tensor],
    hidden: int,
    columns: int,
    residual: Optional[Tensor] = None,
    norm_eps: Optional[float] = None,
    activation: str = "gelu",
) -> Tensor:
    """`residual + W2 activation(W1 norm(x) + bias1) + bias2` with packed weights.

    Args:
        x: `(..., depth)`; float32, float64 or bfloat16 (sums are float32, float64 for float64).
        weight1, weight2: `pack_weight` of `(hidden, depth)` and `(columns, hidden)`, dtype of `x`.
        bias1, bias2: `(hidden,)` and `(columns,)`; as for `packed_linear`.
        hidden: width of the hidden layer.
        columns: width of the result.
        residual, norm_eps, activation: as for `packed_linear`.

    Returns:
        `(..., columns)`, contiguous, dtype of `x`.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, or an unknown activation.
    """
    if not torch.jit.is_scripting():
        layers = [("1", weight1, bias1, 0, hidden), ("2", weight2, bias2, hidden, columns)]
        check_packed(x, layers, columns, residual, activation)
    eps = -1.0 if norm_eps is None else norm_eps
    y = _packed_mlp(
        _rows(x),
        weight1,
        _bias(bias1),
        weight2,
        _bias(bias2),
        _rows(residual),
        hidden,
        columns,
        eps,
        activation,
    )
    return y.view(*x.shape[:-1], columns)


def packed_grn_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Optional[Tensor],
    grn_weight: Tensor,
    weight2: Tensor,
    bias2: Optional[Tensor],
    hidden: int,
    columns: int,
    residual: Optional[Tensor] = None,
    norm_eps: Optional[float] = None,
    grn_eps: float = 1e-6,
) -> Tensor:
    """An MLP with global response normalisation: `residual + W2 (f * gelu(W1 norm(x) + bias1)) + bias2`.

    The factors f = 1 + grn_weight * n / (mean of n + grn_eps) are those of ConvNeXt V2, arXiv 2301.00808, where n are
    the norms of the hidden channels over the tokens of an image. (Fold the normalisation's bias into `bias2`.)

    Args:
        x: `(B, ..., depth)`, one image in each entry of the first dimension; float32, float64 or bfloat16.
        grn_weight: `(hidden,)` float32, or float64 for float64.
        grn_eps: see above.
        weight1, bias1, weight2, bias2, hidden, columns, residual, norm_eps: as for `packed_mlp`.

    Returns:
        `(B, ..., columns)`, contiguous, dtype of `x`.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit.
    """
    if not torch.jit.is_scripting():
        layers = [("1", weight1, bias1, 0, hidden), ("2", weight2, bias2, hidden, columns)]
        check_packed(x, layers, columns, residual, "gelu")
        if tuple(grn_weight.shape) != (hidden,) or grn_weight.dtype != wide_dtype(x):
            raise ValueError(
                f"grn_weight must have shape ({hidden},) and dtype {wide_dtype(x)}, "
                f"got {tuple(grn_weight.shape)} of {grn_weight.dtype}"
            )
    eps = -1.0 if norm_eps is None else norm_eps
    y = _packed_grn_mlp(
        _rows(x), weight1, _bias(bias1), grn_weight, weight2, _bias(bias2), _rows(residual), x.shape[0], hidden,
        columns, eps, grn_eps,
    )  # fmt: skip
    return y.view(*x.shape[:-1], columns)
