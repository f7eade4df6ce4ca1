"""Linear layers and convolutions with what surrounds them, and the same of stock layers."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.ops import (
    depthwise_conv,
    pack_kernel,
    pack_weight,
    packed_conv,
    packed_grn_mlp,
    packed_linear,
    packed_mlp,
    response_norm,
)

from .problems import Problem, Setting

_EPS = 1e-6


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


def _layer(columns: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, packed, and the bias that goes with it."""
    weight = (torch.randn(columns, depth) * depth**-0.5).to(dtype)
    return weight, pack_weight(weight), torch.randn(columns)


def _projection(side: int, width: int, batch: int, dtype: torch.dtype) -> Problem:
    weight, packed, bias = _layer(3 * width, width, dtype)

    def stock(x: Tensor) -> Tensor:
        return F.linear(_norm(x), weight, bias.to(dtype))

    x = torch.randn(batch, side, side, width).to(dtype)
    fused = partial(packed_linear, weight=packed, bias=bias, columns=3 * width, norm_eps=_EPS)
    return Problem((x,), fused, {"norm, linear": stock})


def _mlp(side: int, width: int, batch: int, dtype: torch.dtype) -> Problem:
    weight1, packed1, bias1 = _layer(4 * width, width, dtype)
    weight2, packed2, bias2 = _layer(width, 4 * width, dtype)

    def fused(x: Tensor) -> Tensor:
        return packed_mlp(x, packed1, bias1, packed2, bias2, 4 * width, width, x, _EPS)

    def stock(x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(_norm(x), weight1, bias1.to(dtype)))
        return x + F.linear(hidden, weight2, bias2.to(dtype))

    return Problem(
        (torch.randn(batch, side, side, width).to(dtype),), fused, {"norm, linear, GELU, linear": stock}
    )


def _grn_mlp(side: int, width: int, batch: int, dtype: torch.dtype) -> Problem:
    weight1, packed1, bias1 = _layer(3 * width, width, dtype)
    weight2, packed2, bias2 = _layer(width, 3 * width, dtype)
    grn = torch.randn(3 * width)

    def fused(x: Tensor) -> Tensor:
        return packed_grn_mlp(x, packed1, bias1, grn, packed2, bias2, 3 * width, width, x, _EPS)

    def stock(x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(_norm(x), weight1, bias1.to(dtype)))
        norm = hidden.norm(dim=(1, 2), keepdim=True)
        hidden = hidden * (1 + grn.to(dtype) * norm / (norm.mean(-1, keepdim=True) + 1e-6))
        return x + F.linear(hidden, weight2, bias2.to(dtype))

    return Problem(
        (torch.randn(batch, side, side, width).to(dtype),), fused, {"norm, linear, GELU, GRN, linear": stock}
    )


def _depthwise(side: int, width: int, batch: int, dtype: torch.dtype, kernel: int) -> Problem:
    weight, bias = torch.randn(kernel, kernel, width) / kernel, torch.randn(width)
    stock_weight, stock_bias = weight.permute(2, 0, 1).unsqueeze(1).contiguous().to(dtype), bias.to(dtype)

    def stock(x: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), stock_weight, stock_bias, padding=kernel // 2, groups=width)
        return x + y.permute(0, 2, 3, 1)

    def fused(x: Tensor) -> Tensor:
        return depthwise_conv(x, weight, bias, x)

    return Problem((torch.randn(batch, side, side, width).to(dtype),), fused, {"convolution, sum": stock})


def _response(side: int, width: int, batch: int, dtype: torch.dtype) -> Problem:
    """Between the layers of Strip-MLP's channel mixing, whose hidden layer is three times as wide."""
    factor = torch.randn(3 * width)

    def stock(x: Tensor) -> Tensor:
        y = F.gelu(x)
        norm = y.float().norm(p=2, dim=(1, 2), keepdim=True)
        return (y * (1 + factor * (norm / (norm.mean(-1, keepdim=True) + _EPS)))).to(dtype)

    def fused(x: Tensor) -> Tensor:
        return response_norm(x, factor, _EPS, "gelu")

    x = torch.randn(batch, side, side, 3 * width).to(dtype)
    return Problem((x,), fused, {"GELU, norm, product": stock})


def _downsampling(
    side: int, width: int, batch: int, dtype: torch.dtype, kernel: int, stride: int, channels: int
) -> Problem:
    """The layer between stages, to `side` x `side` tokens of `width` channels."""
    weight = (torch.randn(width, channels, kernel, kernel) / (kernel * channels**0.5)).to(dtype)
    stock_weight = weight.contiguous(memory_format=torch.channels_last)
    packed, bias, padding = pack_kernel(weight), torch.randn(width), (kernel - stride + 1) // 2

    def stock(x: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), stock_weight, bias.to(dtype), stride, padding)
        return y.permute(0, 2, 3, 1)

    def fused(x: Tensor) -> Tensor:
        return packed_conv(x, packed, bias, width, [kernel] * 2, [stride] * 2, [padding] * 2)

    x = torch.randn(batch, side * stride, side * stride, channels).to(dtype)
    return Problem((x,), fused, {"convolution": stock})


_BIFORMER = ((1, 56, 64), (2, 28, 128), (3, 14, 256), (4, 7, 512))
_DAVIT = ((1, 56, 96), (2, 28, 192), (3, 14, 384), (4, 7, 768))
_STRIPS = ((1, 56, 80), (2, 28, 160), (3, 14, 320), (4, 7, 640))
SETTINGS = (
    tuple(
        Setting(
            operator, f"{model}, stage {stage}", partial(build, side, width), trains=False, gpu_batch=None
        )
        for operator, model, build, shapes in (
            ("packed_linear", "davit_fused_tiny", _projection, _DAVIT),
            ("packed_mlp", "davit_fused_tiny", _mlp, _DAVIT),
            ("packed_grn_mlp", "stripmlp_tiny", _grn_mlp, _STRIPS),
        )
        for stage, side, width in shapes
    )
    + tuple(
        Setting(
            "packed_conv",
            f"{model}, stage {stage}",
            partial(_downsampling, side, width, kernel=kernel, stride=stride, channels=channels),
            trains=False,
            gpu_batch=None,
        )
        for model, stage, side, width, kernel, stride, channels in (
            ("biformer_tiny", 3, 14, 256, 3, 2, 128),
            ("biformer_tiny", 4, 7, 512, 3, 2, 256),
            ("davit_fused_tiny", 3, 14, 384, 2, 2, 192),
            ("davit_fused_tiny", 4, 7, 768, 2, 2, 384),
        )
    )
    + tuple(
        Setting(
            "depthwise_conv",
            f"{model}, stage {stage}",
            partial(_depthwise, side, width, kernel=kernel),
            trains=False,
        )
        for model, kernel, shapes in (("biformer_tiny", 5, _BIFORMER), ("stripmlp_tiny", 7, _STRIPS))
        for stage, side, width in shapes
    )
    + tuple(
        Setting(
            "response_norm",
            f"stripmlp_tiny, stage {stage}",
            partial(_response, side, width),
            trains=False,
            on_cpu=False,
        )
        for stage, side, width in _STRIPS
    )
)
