"""Geometry of regions: a grid of tokens cut into rectangles, row by row.

Grids are channels last, `(B, H, W, C)`. Region sizes need not divide the grid: the last row and column of regions
then reach past it, and what lies there counts as zero tokens.
"""

from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    """Number of pieces of size `b` that cover `a`; integer arithmetic only, so that symbolic sizes stay exact."""
    return (a + b - 1) // b


def region_count(x: Tensor, region_size: List[int]) -> int:
    """Number of regions that cover a grid `(B, H, W, C)`."""
    return ceil_div(x.shape[1], region_size[0]) * ceil_div(x.shape[2], region_size[1])


def is_symbolic(x: Tensor) -> bool:
    """Whether height or width of `(B, H, W, C)` are open, so that a comparison would tie a graph to its outcome."""
    return isinstance(x.shape[1], torch.SymInt) or isinstance(x.shape[2], torch.SymInt)


def pad_grid(x: Tensor, height: int, width: int, fill: Optional[Tensor] = None) -> Tensor:
    """Extend `(B, H, W, C)` at the bottom and right to `(B, height, width, C)` with zeros, or with the token `fill`."""
    b, h, w, c = x.shape
    fixed = torch.jit.is_scripting() or not is_symbolic(x)
    if fixed and h == height and w == width:
        return x
    if fill is not None and fixed:
        x = torch.cat([x, fill.expand(b, h, width - w, c)], 2)
        return torch.cat([x, fill.expand(b, height - h, width, c)], 1)
    x = F.pad(x, (0, 0, 0, width - w, 0, height - h))
    if fill is None:
        return x
    # of open sizes it is not known whether there is anything to fill, so everything may be
    rows, columns = torch.arange(height, device=x.device) < h, torch.arange(width, device=x.device) < w
    return torch.where((rows[:, None] & columns)[:, :, None], x, fill)


def crop_grid(x: Tensor, height: int, width: int) -> Tensor:
    """The top left `height` x `width` of a `(B, H, W, C)` grid."""
    if torch.jit.is_scripting() or not is_symbolic(x):
        return x[:, :height, :width]
    # a slice would tie the graph to which of the sizes is the smaller
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return x.index_select(1, rows).index_select(2, columns)


def _laid_out(x: Tensor, shape: List[int]) -> Tensor:
    """`x.reshape(shape)` of a transposed grid; open sizes copy always, as whether they must depends on them."""
    if torch.jit.is_scripting() or not any(isinstance(n, torch.SymInt) for n in x.shape[1:]):
        return x.reshape(shape)
    return x.clone(memory_format=torch.contiguous_format).view(shape)


def partition(x: Tensor, region_size: List[int]) -> Tensor:
    """Cut `(B, H, W, C)` into `(B, regions, tokens of a region, C)`, with zeros for what reaches past the grid."""
    b, h, w, c = x.shape
    rh, rw = region_size
    nh, nw = ceil_div(h, rh), ceil_div(w, rw)
    x = pad_grid(x, nh * rh, nw * rw)
    return _laid_out(x.reshape(b, nh, rh, nw, rw, c).transpose(2, 3), [b, nh * nw, rh * rw, c])


def merge(x: Tensor, region_size: List[int], height: int, width: int) -> Tensor:
    """Inverse of `partition`: `(B, regions, tokens, C)` back to `(B, height, width, C)`."""
    b, _, _, c = x.shape
    rh, rw = region_size
    nh, nw = ceil_div(height, rh), ceil_div(width, rw)
    x = _laid_out(x.reshape(b, nh, nw, rh, rw, c).transpose(2, 3), [b, nh * rh, nw * rw, c])
    return crop_grid(x, height, width)


def region_means(x: Tensor, region_size: List[int]) -> Tensor:
    """Mean token of every region, `(B, H, W, C)` to `(B, regions, C)`; what reaches past the grid is left out."""
    _, h, w, _ = x.shape
    rh, rw = region_size
    regions = partition(x, region_size)
    if h % rh == 0 and w % rw == 0:
        return regions.mean(2)
    rows = (h - rh * torch.arange(ceil_div(h, rh), device=x.device)).clamp(max=rh)
    cols = (w - rw * torch.arange(ceil_div(w, rw), device=x.device)).clamp(max=rw)
    counts = (rows[:, None] * cols).reshape(1, -1, 1)
    return regions.sum(2) / counts.to(x.dtype)


def concrete(size: List[int]) -> List[int]:
    """Plain integers: a legacy trace hands sizes around as tensors, which an operator's signature does not take."""
    return [int(x) for x in size] if torch.jit.is_tracing() else size
