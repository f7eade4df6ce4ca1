"""Strip mixing at the shapes of Strip-MLP, and its formulations in stock PyTorch."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.ops import strip_mix

from .problems import Problem, Setting


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor, axis: int) -> Tensor:
    """Positions and patches of channels as channels of a grouped convolution over the strips, as published."""
    groups, length = weight.shape[3], weight.shape[1]
    strips = x if axis == 2 else x.transpose(1, 2)
    b, count, _, channels = strips.shape
    patches = channels // groups
    # (B, patches, groups, length, strips) to (B * patches, groups * length, 1, strips)
    maps = strips.reshape(b, count, length, patches, groups).permute(0, 3, 4, 2, 1)
    maps = maps.reshape(b * patches, groups * length, 1, count)
    kernel = weight.permute(3, 1, 2, 0).reshape(groups * length, length, 1, 3)
    out = F.conv2d(maps, kernel, bias.t().reshape(-1), padding=(0, 1), groups=groups)
    out = out.view(b, patches, groups, length, count).permute(0, 4, 3, 1, 2).reshape(strips.shape)
    return out if axis == 2 else out.transpose(1, 2)


def _matmul(x: Tensor, weight: Tensor, bias: Tensor, axis: int) -> Tensor:
    """A product of matrices for each group of channels, the three strips side by side."""
    groups, length = weight.shape[3], weight.shape[1]
    strips = x if axis == 2 else x.transpose(1, 2)
    b, count, _, _ = strips.shape
    padded = F.pad(strips, (0, 0, 0, 0, 1, 1)).unflatten(-1, (-1, groups))
    three = torch.stack([padded[:, t : t + count] for t in range(3)], -1)  # (B, S, L, patches, groups, 3)
    columns = three.permute(4, 5, 2, 0, 1, 3).reshape(groups, 3 * length, -1)
    kernel = weight.permute(3, 1, 0, 2).reshape(groups, length, 3 * length)
    out = torch.baddbmm(bias.t().unsqueeze(-1), kernel, columns).view(groups, length, b, count, -1)
    out = out.permute(2, 3, 1, 4, 0).reshape(strips.shape)
    return out if axis == 2 else out.transpose(1, 2)


def _strips(side: int, channels: int, axis: int, batch: int, dtype: torch.dtype) -> Problem:
    groups = channels // 2
    x = torch.randn(batch, side, side, channels).to(dtype)
    weight = (torch.randn(3, side, side, groups) / (3 * side) ** 0.5).to(dtype)
    bias = torch.randn(side, groups).to(dtype)
    stock = {"conv2d": partial(_conv2d, axis=axis), "matmul": partial(_matmul, axis=axis)}
    return Problem((x, weight, bias), partial(strip_mix, axis=axis), stock)


SETTINGS = tuple(
    Setting(
        "strip_mix",
        f"stripmlp_tiny, stage {stage}, {'rows' if axis == 2 else 'columns'}",
        partial(_strips, side, channels, axis),
    )
    for stage, side, channels in ((1, 56, 40), (2, 28, 80), (3, 14, 160), (4, 7, 320))
    for axis in (2, 1)
)
