"""Argument checks that the operators share. Every message names the argument, what came and what is allowed."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_tokens(name: str, x: Tensor, layout: str, dims: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(x).__name__}")
    if x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {layout}, got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}; convert it with .to()"
        )
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} must have contiguous channels (stride 1 in the last dimension), got stride {x.stride(-1)}; "
            f"pass {name}.contiguous()"
        )


def check_grid(name: str, x: Tensor) -> None:
    """A floating-point token grid `(B, H, W, C)` whose channels lie next to each other in memory."""
    _check_tokens(name, x, "(B, H, W, C)", 4)


def check_tokens(name: str, x: Tensor) -> None:
    """A floating-point list of tokens `(B, N, C)` whose channels lie next to each other in memory."""
    _check_tokens(name, x, "(B, N, C)", 3)


def check_like(name: str, x: Tensor, ref_name: str, ref: Tensor) -> None:
    """Same dtype and device as another argument."""
    if x.dtype != ref.dtype:
        raise TypeError(f"{name} is {x.dtype} but {ref_name} is {ref.dtype}; convert one of them with .to()")
    if x.device != ref.device:
        raise ValueError(
            f"{name} is on {x.device} but {ref_name} is on {ref.device}; move one of them with .to()"
        )


def check_region_size(name: str, size: Sequence[int]) -> None:
    """A (height, width) of positive integers."""
    if len(size) != 2:
        raise ValueError(f"{name} must be (height, width), got {tuple(size)}")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"{name} must be positive, got {tuple(size)}")


def check_grids(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries and keys of one width, keys and values on one grid, all of one batch, dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_grid(name, x)
        check_like(name, x, "q", q)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and channels, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v must lie on the same grid, got {tuple(k.shape)} and {tuple(v.shape)}")


def check_parameter(name: str, x: Tensor, shape: Sequence[int], ref: Tensor, ref_name: str = "q") -> None:
    """A floating-point tensor of a given shape on the device of `ref`; its dtype may differ, it is converted."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {tuple(shape)}, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}; convert it with .to()")
    if x.device != ref.device:
        raise ValueError(
            f"{name} is on {x.device} but {ref_name} is on {ref.device}; move one of them with .to()"
        )


def check_heads(num_heads: int, q: Tensor, v: Tensor) -> None:
    """Heads of one width each."""
    if num_heads < 1 or q.shape[-1] % num_heads or v.shape[-1] % num_heads:
        raise ValueError(
            f"num_heads must divide the channels of q ({q.shape[-1]}) and of v ({v.shape[-1]}), got {num_heads}"
        )


def check_routes_in_range(routes: Tensor, regions: int) -> None:
    """Every route names an existing region, else an IndexError. Reads values: for real tensors outside of tracing."""
    wrong = ((routes < 0) | (routes >= regions)).nonzero()
    if len(wrong):
        at = wrong[0].tolist()
        raise IndexError(
            f"routes{at} is {int(routes[tuple(at)])}, but there are {regions} key regions: "
            f"allowed are 0 to {regions - 1}"
        )


def check_token_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> None:
    """Queries `(B, Nq, C)`, keys `(B, Nk, C)` and values `(B, Nk, Cv)` of one attention."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tokens(name, x)
        check_like(name, x, "q", q)
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"q and k must agree in batch and channels, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.shape[1] < 1:
        raise ValueError(f"k must hold at least one token, got shape {tuple(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"k and v must hold the same tokens, got {tuple(k.shape)} and {tuple(v.shape)}")
    check_heads(num_heads, q, v)
