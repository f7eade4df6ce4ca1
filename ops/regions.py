"""Geometry of regions: a grid of tokens cut into rectangles, row by row.

Grids are channels last, `(B, H, W, C)`. Region sizes need not divide the grid: the last row and column of regions
then reach past it, and what lies there counts as zero tokens.
"""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def is_zero(n: int) -> bool:
    """Whether a number is zero; of an open size, whether it is for every value, which ties a graph to nothing."""
    return n == 0 if torch.jit.is_scripting() else _always_zero(n)


@torch.jit.unused
def _always_zero(n: int) -> bool:
    if not isinstance(n, torch.SymInt):
        return n == 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(n == 0)


def ceil_div(a: int, b: int) -> int:
    """Number of pieces of size `b` that cover `a`, in integer arithmetic alone.

    Open sizes stay as provable as they can be: n * s tokens are n pieces of s whatever s is, and any other number of
    pieces is one term (the numerator is odd, the denominator even: nothing can be split off), which cancels later.
    """
    return a // b if is_zero(a % b) else (2 * a + 2 * b - 1) // (2 * b)


def region_count(x: Tensor, region_size: List[int]) -> int:
    """Number of regions that cover a grid `(B, H, W, C)`."""
    return ceil_div(x.shape[1], region_size[0]) * ceil_div(x.shape[2], region_size[1])


def crop_grid(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left `(B, height, width, C)` of a grid."""
    more_h, more_w = x.shape[1] - height, x.shape[2] - width
    if is_zero(more_h) and is_zero(more_w):
        return x
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript reads the first as constant)
        # what a slice leaves is the smaller of two sizes, and no longer the one that is wanted
        if is_symbolic(x):
            return F.pad(x, (0, 0, 0, -more_w, 0, -more_h))
    return x[:, :height, :width]


@torch.jit.unused
def is_symbolic(x: Tensor) -> bool:
    """Whether sizes of a tensor are open: then a comparison of them would tie the graph to its outcome."""
    return any(isinstance(size, torch.SymInt) for size in x.shape)


def relaid(x: Tensor, shape: List[int]) -> Tensor:
    """A transposed tensor in another shape. `reshape` compares sizes to find out whether it must copy."""
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript reads the first as constant)
        if is_symbolic(x):
            return x.clone(memory_format=torch.contiguous_format).view(shape)
    return x.reshape(shape)


def pad_grid(x: Tensor, height: int, width: int, fill: Optional[Tensor] = None) -> Tensor:
    """Extend `(B, H, W, C)` at the bottom and right to `(B, height, width, C)` with zeros, or with the token `fill`."""
    b, h, w, c = x.shape
    if is_zero(height - h) and is_zero(width - w):
        return x
    if fill is None:
        return F.pad(x, (0, 0, 0, width - w, 0, height - h))
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript reads the first as constant)
        if is_symbolic(x):  # the filled rows may be none, which `expand` does not take on trust
            rows, cols = torch.arange(height, device=x.device) < h, torch.arange(width, device=x.device) < w
            inside = (rows[:, None] & cols).unsqueeze(-1)
            return torch.where(inside, F.pad(x, (0, 0, 0, width - w, 0, height - h)), fill)
    x = torch.cat([x, fill.expand(b, h, width - w, c)], 2)
    return torch.cat([x, fill.expand(b, height - h, width, c)], 1)


def partition(x: Tensor, region_size: List[int]) -> Tensor:
    """Cut `(B, H, W, C)` into `(B, regions, tokens of a region, C)`, with zeros for what reaches past the grid."""
    b, h, w, c = x.shape
    rh, rw = region_size
    nh, nw = ceil_div(h, rh), ceil_div(w, rw)
    x = pad_grid(x, nh * rh, nw * rw)
    return relaid(x.reshape(b, nh, rh, nw, rw, c).transpose(2, 3), [b, nh * nw, rh * rw, c])


def merge(x: Tensor, region_size: List[int], height: int, width: int) -> Tensor:
    """Inverse of `partition`: `(B, regions, tokens, C)` back to `(B, height, width, C)`."""
    b, _, _, c = x.shape
    rh, rw = region_size
    nh, nw = ceil_div(height, rh), ceil_div(width, rw)
    x = relaid(x.reshape(b, nh, nw, rh, rw, c).transpose(2, 3), [b, nh * rh, nw * rw, c])
    return crop_grid(x, height, width)


def partition_heads(x: Tensor, region_size: List[int], num_heads: int) -> Tensor:
    """Cut `(B, H, W, heads * d)` into `(B, heads, regions, tokens of a region, d)`, moving everything once."""
    b, h, w, c = x.shape
    rh, rw = region_size
    nh, nw = ceil_div(h, rh), ceil_div(w, rw)
    d = c // num_heads
    x = pad_grid(x, nh * rh, nw * rw).reshape(b, nh, rh, nw, rw, num_heads, d)
    return relaid(x.permute(0, 5, 1, 3, 2, 4, 6), [b, num_heads, nh * nw, rh * rw, d])


def merge_heads(x: Tensor, region_size: List[int], height: int, width: int) -> Tensor:
    """Inverse of `partition_heads`."""
    b, heads, _, _, d = x.shape
    rh, rw = region_size
    nh, nw = ceil_div(height, rh), ceil_div(width, rw)
    x = x.reshape(b, heads, nh, nw, rh, rw, d).permute(0, 2, 4, 3, 5, 1, 6)
    return crop_grid(relaid(x, [b, nh * rh, nw * rw, heads * d]), height, width)


def region_means(x: Tensor, region_size: List[int]) -> Tensor:
    """Mean token of every region, `(B, H, W, C)` to `(B, regions, C)`; what reaches past the grid is left out."""
    b, h, w, c = x.shape
    rh, rw = region_size
    nh, nw = ceil_div(h, rh), ceil_div(w, rw)
    regions = pad_grid(x, nh * rh, nw * rw).reshape(b, nh, rh, nw, rw, c)
    # one axis after the other, which leaves the tokens where they are
    if is_zero(h % rh) and is_zero(w % rw):
        return relaid(regions.mean(4).mean(2), [b, nh * nw, c])
    rows = (h - rh * torch.arange(nh, device=x.device)).clamp(max=rh)
    cols = (w - rw * torch.arange(nw, device=x.device)).clamp(max=rw)
    counts = (rows[:, None] * cols).reshape(1, -1, 1)
    return relaid(regions.sum(4).sum(2), [b, nh * nw, c]) / counts.to(x.dtype)


def concrete(size: List[int]) -> List[int]:
    """Plain integers: a legacy trace hands sizes around as tensors, which an operator's signature does not take."""
    return [int(x) for x in size] if torch.jit.is_tracing() else size
