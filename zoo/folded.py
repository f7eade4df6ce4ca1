"""Layers of the inference form: linear layers and convolutions that have taken in what surrounds them."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import depthwise_conv, pack_kernel, packed_conv
from ..ops.packed_linear import pack_weight, packed_grn_mlp, packed_linear, packed_mlp


class _Folded(nn.Module):
    """Linear layers whose weights have taken in what surrounds them; packed, or as they are for other runtimes."""

    def __init__(
        self, like: nn.Linear, norm: Optional[nn.LayerNorm], pack: bool, dtype: Optional[torch.dtype] = None
    ):
        super().__init__()
        self.in_features = like.in_features
        self.norm_eps = None if norm is None else norm.eps
        self.pack = pack
        self.dtype = dtype or like.weight.dtype

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
        bias = torch.zeros(len(weight), dtype=torch.float64) if linear.bias is None else linear.bias.double()
        if norm is not None and norm.bias is not None:
            bias = bias + weight @ norm.bias.double()
        if norm is not None and norm.weight is not None:
            weight = weight * norm.weight.double()
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        if shift is not None:
            bias = bias + shift
        weight, bias = weight[columns].to(self.dtype), bias[..., columns]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.register_buffer(f"weight{name}", pack_weight(weight) if self.pack else weight)
        self.register_buffer(f"shift{name}", bias.to(wide if self.pack else self.dtype))
        return len(weight)

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
        if self.pack:
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
        if self.pack:
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

    def __init__(self, norm: nn.LayerNorm, mlp: Any, pack: bool):
        super().__init__(mlp.fc1, norm, pack)
        grn = mlp.grn
        self.hidden_features = self.fold("1", mlp.fc1, norm)
        shift = mlp.fc2.weight.double() @ grn.bias.double().flatten()
        self.out_features = self.fold("2", mlp.fc2, shift=shift)
        self.grn_eps = grn.eps
        self.register_buffer("grn_weight", grn.weight.detach().flatten().to(self.shift1.dtype))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.pack:
            return packed_grn_mlp(
                x, self.weight1, self.shift1, self.grn_weight, self.weight2, self.shift2, self.hidden_features,
                self.out_features, residual, self.norm_eps, self.grn_eps,
            )  # fmt: skip
        hidden = F.gelu(F.linear(self.normalised(x), self.weight1, self.shift1))
        norm = hidden.norm(p=2, dim=(1, 2), keepdim=True)
        hidden = hidden * (1 + self.grn_weight * (norm / (norm.mean(-1, keepdim=True) + self.grn_eps)))
        return residual + F.linear(hidden, self.weight2, self.shift2)


class PackedConv(nn.Module):
    """A convolution of maps `(B, C, H, W)`, channels-last within."""

    weight: Tensor
    bias: Optional[Tensor]

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel, self.stride = list(conv.kernel_size), list(conv.stride)
        self.padding = [int(size) for size in conv.padding]
        wide = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
        self.register_buffer("weight", pack_kernel(conv.weight.detach()))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().to(wide))

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
        x = x.permute(0, 2, 3, 1)
        if x.stride(3) != 1:
            x = x.contiguous()
        y = packed_conv(x, self.weight, self.bias, self.out_channels, self.kernel, self.stride, self.padding)
        return y.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        window = f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}"
        return f"{self.in_channels}, {self.out_channels}, {window}"


class FoldedConv(nn.Module):
    """`residual + conv(activation(x * scale + shift))` for a depthwise convolution of channels-last maps."""

    weight: Tensor
    bias: Optional[Tensor]
    scale: Optional[Tensor]
    shift: Optional[Tensor]

    def __init__(
        self,
        conv: Any,
        pack: bool,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
        activation: str = "none",
    ):
        super().__init__()
        self.pack = pack
        self.activation = activation
        self.padding = conv.padding
        dtype = conv.weight.dtype
        if pack and dtype != torch.float64:
            dtype = torch.float32
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
