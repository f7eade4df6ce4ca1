"""Layers of the inference form: linear layers and convolutions that have taken in what surrounds them.

Weights lie as the device wants them that they are on: in panels for the CPU's kernels, elsewhere as stock layers have
them, whose products are those of the device's own library.
"""

import math
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import depthwise_conv, packed_conv, response_norm
from ..ops._operator import wide_dtype
from ..ops.packed_linear import (
    DTYPES,
    pack_weight,
    packed_grn_mlp,
    packed_linear,
    packed_mlp,
    unpack_weight,
)


def takes_panels(weight: Tensor) -> bool:
    """Whether there are kernels for packed weights where this one is."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES


def _laid_out(weight: Tensor, columns: int, depth: int) -> Tensor:
    """A matrix, packed or not, as it is multiplied where it is."""
    panels = takes_panels(weight)
    rank = 4 if weight.dtype == torch.bfloat16 else 3
    if weight.dim() > 2 and not (panels and weight.dim() == rank):
        weight = unpack_weight(weight, columns, depth).contiguous()
    return pack_weight(weight) if panels and weight.dim() == 2 else weight


class Placed(nn.Module):
    """A module that follows when it is moved or converted.

    Args:
        pack: whether it runs on the operators of this package; else on standard ones alone, for other runtimes.
    """

    wide: tuple[str, ...] = ()
    """Names of the buffers that the operators take in the type of sums."""

    def __init__(self, pack: bool):
        super().__init__()
        self.pack = pack

    def place(self) -> None:
        """Brings buffers into the layout and dtype that the operators take; called for modules that pack."""
        for name in self.wide:
            x = getattr(self, name)
            setattr(self, name, None if x is None else x.to(wide_dtype(x)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Placed":
        super()._apply(fn, recurse)
        if self.pack:
            self.place()
        return self


class _Folded(Placed):
    """Linear layers whose weights have taken in what surrounds them."""

    def __init__(
        self, like: nn.Linear, norm: Optional[nn.LayerNorm], pack: bool, dtype: Optional[torch.dtype] = None
    ):
        super().__init__(pack)
        self.in_features = like.in_features
        self.norm_eps = None if norm is None else norm.eps
        self.dtype = dtype or like.weight.dtype
        self.packed = False
        self.sizes: dict[str, tuple[int, int]] = {}

    def fold(
        self,
        name: str,
        linear: nn.Linear,
        norm: Optional[nn.LayerNorm] = None,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
        columns: slice = slice(None),
    ) -> int:
        """Buffers `weight<name>` and `shift<name>` for `scale * linear(norm without its scale and shift) + shift`.

        The shift may depend on the token, `(..., columns)`. Worked out in float64; returns the number of columns.
        """
        weight = linear.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()
        if norm is not None and norm.bias is not None:
            bias = bias + weight @ norm.bias.double()
        if norm is not None and norm.weight is not None:
            weight = weight * norm.weight.double()
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        if shift is not None:
            bias = bias + shift
        weight, bias = weight[columns].to(self.dtype), bias[..., columns]
        self.register_buffer(f"weight{name}", weight)
        self.register_buffer(f"shift{name}", bias.to(wide_dtype(weight) if self.pack else self.dtype))
        self.sizes[name] = (len(weight), weight.shape[1])
        if self.pack:
            self.place()
        return len(weight)

    def place(self) -> None:
        super().place()
        for name, (columns, depth) in self.sizes.items():
            weight = _laid_out(getattr(self, f"weight{name}"), columns, depth)
            self.packed = weight.dim() > 2
            shift = getattr(self, f"shift{name}").to(wide_dtype(weight) if self.packed else weight.dtype)
            setattr(self, f"weight{name}", weight)
            setattr(self, f"shift{name}", shift)

    def normalised(self, x: Tensor) -> Tensor:
        """The norm, without scale and shift; for layers that are not packed."""
        return x if self.norm_eps is None else F.layer_norm(x, [self.in_features], eps=self.norm_eps)


class FoldedLinear(_Folded):
    """`residual + activation(scale * linear(norm(x)) + shift)`, of whose columns some may be picked.

    Where `x2` and `x3` are given the layer acts on all joined.
    """

    weight: Tensor
    shift: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        pack: bool,
        norm: Optional[nn.LayerNorm] = None,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
        activation: str = "none",
        columns: slice = slice(None),
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(linear, norm, pack, dtype)
        self.out_features = self.fold("", linear, norm, scale, shift, columns)
        # what the layer makes of zeros, which attention asks for where it pads
        self.bias = linear.bias
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        residual: Optional[Tensor] = None,
        x2: Optional[Tensor] = None,
        x3: Optional[Tensor] = None,
    ) -> Tensor:
        if self.packed:
            return packed_linear(
                x,
                self.weight,
                self.shift,
                self.out_features,
                residual,
                self.norm_eps,
                self.activation,
                x2,
                x3,
            )
        if x2 is not None:
            x = torch.cat([x, x2] if x3 is None else [x, x2, x3], -1)
        if self.shift.dim() == 1:
            x = F.linear(self.normalised(x), self.weight, self.shift)
        else:
            x = F.linear(self.normalised(x), self.weight) + self.shift
        if self.activation == "gelu":
            x = F.gelu(x)
        return x if residual is None else residual + x

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, norm_eps={self.norm_eps}, activation={self.activation}"
        )


class MlpBranch(_Folded):
    """`x + scale * fc2(gelu(fc1(norm(x))))`."""

    weight1: Tensor
    weight2: Tensor
    shift1: Tensor
    shift2: Tensor

    def __init__(self, norm: nn.LayerNorm, mlp: Any, pack: bool, scale: Optional[Tensor] = None):
        super().__init__(mlp.fc1, norm, pack)
        self.hidden_features = self.fold("1", mlp.fc1, norm)
        self.out_features = self.fold("2", mlp.fc2, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return packed_mlp(
                x, self.weight1, self.shift1, self.weight2, self.shift2, self.hidden_features, self.out_features,
                x, self.norm_eps,
            )  # fmt: skip
        hidden = F.gelu(F.linear(self.normalised(x), self.weight1, self.shift1))
        return x + F.linear(hidden, self.weight2, self.shift2)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.hidden_features}, {self.out_features}, norm_eps={self.norm_eps}"


class ResponseMlp(_Folded):
    """`residual + fc2(grn(gelu(fc1(norm(x)))))`, with global response normalisation."""

    weight1: Tensor
    weight2: Tensor
    shift1: Tensor
    shift2: Tensor
    grn_weight: Tensor
    wide = ("grn_weight",)

    def __init__(self, norm: nn.LayerNorm, mlp: Any, pack: bool):
        super().__init__(mlp.fc1, norm, pack)
        grn = mlp.grn
        self.register_buffer("grn_weight", grn.weight.detach().flatten().to(self.dtype))
        self.hidden_features = self.fold("1", mlp.fc1, norm)
        shift = mlp.fc2.weight.double() @ grn.bias.double().flatten()
        self.out_features = self.fold("2", mlp.fc2, shift=shift)
        self.grn_eps = grn.eps

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.packed:
            return packed_grn_mlp(
                x, self.weight1, self.shift1, self.grn_weight, self.weight2, self.shift2, self.hidden_features,
                self.out_features, residual, self.norm_eps, self.grn_eps,
            )  # fmt: skip
        hidden = F.linear(self.normalised(x), self.weight1, self.shift1)
        if self.pack:
            hidden = response_norm(hidden, self.grn_weight, self.grn_eps, "gelu")
            return residual + F.linear(hidden, self.weight2, self.shift2)
        hidden = F.gelu(hidden)
        norm = hidden.norm(p=2, dim=(1, 2), keepdim=True)
        hidden = hidden * (1 + self.grn_weight * (norm / (norm.mean(-1, keepdim=True) + self.grn_eps)))
        return residual + F.linear(hidden, self.weight2, self.shift2)


class PackedConv(Placed):
    """A convolution of maps `(B, C, H, W)`, channels-last within."""

    weight: Tensor
    bias: Optional[Tensor]

    def __init__(self, conv: nn.Conv2d):
        super().__init__(pack=True)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel, self.stride = list(conv.kernel_size), list(conv.stride)
        self.padding = [int(size) for size in conv.padding]
        self.packed = False
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self.place()

    def place(self) -> None:
        taps = (*self.kernel, self.in_channels)
        weight = self.weight if self.packed else self.weight.permute(0, 2, 3, 1).flatten(1)
        weight = _laid_out(weight, self.out_channels, math.prod(taps))
        self.packed = weight.dim() > 2
        # what stock convolutions get is channels-last
        self.weight = weight if self.packed else weight.unflatten(1, taps).permute(0, 3, 1, 2)
        if self.bias is not None:
            self.bias = self.bias.to(wide_dtype(weight) if self.packed else weight.dtype)

    @staticmethod
    def pays(conv: nn.Conv2d) -> bool:
        """Whether this can stand for a layer, and has so many weights that laying them out once is worth more than
        what stock convolutions do better, to cut patches.
        """
        if (
            conv.groups != 1
            or conv.dilation != (1, 1)
            or conv.padding_mode != "zeros"
            or isinstance(conv.padding, str)
        ):
            return False
        inside = all(zeros < taps for zeros, taps in zip(conv.padding, conv.kernel_size, strict=True))
        return inside and conv.weight.numel() >= 1 << 17

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        x = x.permute(0, 2, 3, 1)
        if x.stride(3) != 1:
            x = x.contiguous()
        y = packed_conv(x, self.weight, self.bias, self.out_channels, self.kernel, self.stride, self.padding)
        return y.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        window = f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}"
        return f"{self.in_channels}, {self.out_channels}, {window}"


class FoldedConv(Placed):
    """`residual + conv(activation(x * scale + shift))` for a depthwise convolution of channels-last maps."""

    weight: Tensor
    bias: Optional[Tensor]
    scale: Optional[Tensor]
    shift: Optional[Tensor]
    wide = ("weight", "bias", "scale", "shift")

    def __init__(
        self,
        conv: Any,
        pack: bool,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
        activation: str = "none",
    ):
        super().__init__(pack)
        self.activation = activation
        self.padding = conv.padding
        # scale and shift come in float64 and are rounded once
        dtype = wide_dtype(conv.weight) if pack else conv.weight.dtype
        self.register_buffer("weight", taps_of(conv).to(dtype) if pack else conv.weight.detach())
        for name, x in (("bias", conv.bias), ("scale", scale), ("shift", shift)):
            self.register_buffer(name, None if x is None else x.detach().to(dtype))

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        if self.pack:
            if x.stride(3) != 1:
                x = x.contiguous()
            if residual is not None and residual.stride(3) != 1:
                residual = residual.contiguous()
            return depthwise_conv(
                x, self.weight, self.bias, residual, self.scale, self.shift, self.activation
            )
        if self.scale is not None and self.shift is not None:
            x = torch.addcmul(self.shift, x, self.scale)
        if self.activation == "gelu":
            x = F.gelu(x)
        x = F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=self.padding, groups=x.shape[3])
        x = x.permute(0, 2, 3, 1)
        return x if residual is None else residual + x

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, activation={self.activation}"


def taps_of(conv: nn.Conv2d) -> Tensor:
    """The kernel of a depthwise convolution, `(height, width, C)`."""
    return conv.weight.detach().squeeze(1).permute(1, 2, 0).contiguous()
