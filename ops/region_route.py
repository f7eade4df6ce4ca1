"""`region_route`: which regions each region looks at (BiFormer, arXiv 2303.08810, section 3.2, eq. 2 to 4)."""

from typing import Any, List, Optional

import torch
from torch import Tensor

from . import library
from ._checks import check_grid, check_like, check_region_size
from ._operator import hands_over, replacement
from .regions import concrete, region_count, region_means


def reference(q: Tensor, k: Tensor, topk: int, region_size: List[int], kv_region_size: List[int]) -> Tensor:
    """The definition: top-k of the products of the regions' mean queries and keys."""
    if q.dtype in (torch.bfloat16, torch.float16):
        q, k = q.float(), k.float()
    scores = region_means(q, region_size) @ region_means(k, kv_region_size).transpose(1, 2)
    # arg-max is the same choice for k = 1, and a single cheap node for export
    return scores.argmax(-1, keepdim=True) if topk == 1 else scores.topk(topk, -1).indices


_lib = torch.library.Library("vitrail", "FRAGMENT")
_lib.define(
    "region_route(Tensor q, Tensor k, int topk, SymInt[2] region_size, SymInt[2] kv_region_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _kernel(q: Tensor, k: Tensor, topk: int, region_size: List[int], kv_region_size: List[int]) -> Tensor:
    """Kernel of last resort: hands over to the compiled library once that is loaded, else runs the definition."""
    if hands_over("region_route", q.device.type, ("cpu", "cuda")):
        return torch.ops.vitrail.region_route(q, k, topk, region_size, kv_region_size)
    return reference(q, k, topk, region_size, kv_region_size)


_lib.impl("region_route", _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("vitrail::region_route", lib=_lib)
def _fake(q: Tensor, k: Tensor, topk: int, region_size: List[int], kv_region_size: List[int]) -> Tensor:
    return q.new_empty((q.shape[0], region_count(q, region_size), topk), dtype=torch.int64)


def _check(q: Tensor, k: Tensor, topk: int, region_size: List[int], kv_region_size: List[int]) -> None:
    check_grid("q", q)
    check_grid("k", k)
    check_like("k", k, "q", q)
    check_region_size("region_size", region_size)
    check_region_size("kv_region_size", kv_region_size)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and channels, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    regions = region_count(k, kv_region_size)
    if not 1 <= topk <= regions:
        raise ValueError(f"topk must lie between 1 and the number of key regions, {regions}; got {topk}")


def _choose(*args: Any) -> Tensor:
    """The choice along the path in force; arguments are checked."""
    if (stands_for := replacement("region_route", reference, _fake, args)) is not None:
        return stands_for
    # GPU kernels know no float64
    if library.mode() == "reference" or (args[0].is_cuda and args[0].dtype == torch.float64):
        return reference(*args)
    return torch.ops.vitrail.region_route(*args)


def region_route(
    q: Tensor, k: Tensor, topk: int, region_size: List[int], kv_region_size: Optional[List[int]] = None
) -> Tensor:
    """For every region of queries, the `topk` regions of keys with the largest product of mean query and mean key.

    BiFormer, arXiv 2303.08810, section 3.2 (region-to-region routing with a directed graph). The choice carries no
    gradient.

    Args:
        q: `(B, H, W, C)` queries, floating point, contiguous channels (other strides are free).
        k: `(B, Hk, Wk, C)` keys, dtype and device of `q`.
        topk: number of regions to keep, 1 to the number of key regions.
        region_size: `(height, width)` of a query region. It need not divide the grid; tokens past it do not count.
        kv_region_size: same for the keys; default: `region_size`.

    Returns:
        `(B, R, topk)` int64 numbers of key regions (row by row), best first, for the R regions of queries.

    Raises:
        TypeError: wrong dtype, or `q` and `k` differ in it.
        ValueError: wrong rank, sizes that do not fit together, `topk` out of range.
    """
    if kv_region_size is None:
        kv_region_size = region_size
    q, k = q.detach(), k.detach()
    if torch.jit.is_scripting():
        return torch.ops.vitrail.region_route(q, k, topk, region_size, kv_region_size)
    region_size, kv_region_size = concrete(region_size), concrete(kv_region_size)
    _check(q, k, topk, region_size, kv_region_size)
    return _choose(q, k, topk, region_size, kv_region_size)
