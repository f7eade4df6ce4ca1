"""`semantic_attention`: the semantic tokens of a window attend to a patch of the image and to themselves.

STViT, arXiv 2303.08685, section 3.2 (generation of semantic tokens in local vision transformers). The authors copy
overlapping patches out of the map, put the semantic tokens in front of each copy, and project all of that to keys and
values; here each token is projected once and a patch is an address.
"""

from typing import List, Optional

import torch
from torch import Tensor

from ._attention import AttentionOperator, Operands
from ._checks import check_grid, check_grids, check_heads, check_like, check_region_size
from .regions import concrete, merge_heads, partition_heads

# --- the definition ---------------------------------------------------------------------------------------------------


def _offsets(size: int, patch: int, count: int, like: Tensor) -> Tensor:
    """Rows (or columns) of `count` patches spread evenly over `size`, `(count, patch)`; whole numbers throughout."""
    start = torch.arange(count, device=like.device) * (size - patch) // max(count - 1, 1)
    return start[:, None] + torch.arange(patch, device=like.device)


def _patches(x: Tensor, q: Tensor, window_size: List[int], patch_size: List[int], num_heads: int) -> Tensor:
    """`(B, H, W, C)` to `(B, heads, windows, tokens, d)`: a patch for each window of the semantic tokens."""
    rows = _offsets(x.shape[1], patch_size[0], q.shape[1] // window_size[0], x)
    cols = _offsets(x.shape[2], patch_size[1], q.shape[2] // window_size[1], x)
    index = (rows * x.shape[2])[:, None, :, None] + cols[None, :, None, :]
    tokens = x.flatten(1, 2).unflatten(2, (num_heads, x.shape[3] // num_heads)).transpose(1, 2)
    chosen = tokens.index_select(2, index.flatten())
    return chosen.unflatten(2, (rows.shape[0] * cols.shape[0], patch_size[0] * patch_size[1]))


def _address(q, k, v, own_k, own_v, window_size, patch_size, num_heads, scale) -> Operands:
    """Per window: its queries, and the keys and values of itself and of its patch."""

    def both(own, image):
        own = partition_heads(own, window_size, num_heads)
        return torch.cat([own, _patches(image, q, window_size, patch_size, num_heads)], 3)

    queries = partition_heads(q, window_size, num_heads) * scale
    return Operands(queries, both(own_k, k), both(own_v, v))


def _collect(x, q, k, v, own_k, own_v, window_size, *_) -> Tensor:
    return merge_heads(x, window_size, q.shape[1], q.shape[2])


def _shapes(q, k, v, own_k, own_v, window_size, patch_size, num_heads, scale):
    return (*q.shape[:3], v.shape[3]), (*q.shape[:3], num_heads)


_operator = AttentionOperator(
    "semantic_attention",
    "Tensor q, Tensor k, Tensor v, Tensor own_k, Tensor own_v, "
    "SymInt[2] window_size, SymInt[2] patch_size, int num_heads, float scale",
    _address,
    _collect,
    _shapes,
    differentiable=("q", "k", "v", "own_k", "own_v"),
    compiled=("cpu", "cuda"),
)
reference = _operator.definition

# --- the public function ----------------------------------------------------------------------------------------------


def _check(q, k, v, own_k, own_v, window_size, patch_size, num_heads) -> None:
    check_grids(q, k, v)
    check_heads(num_heads, q, v)
    for name, x, channels in (("own_k", own_k, q.shape[3]), ("own_v", own_v, v.shape[3])):
        check_grid(name, x)
        check_like(name, x, "q", q)
        if tuple(x.shape) != (*q.shape[:3], channels):
            raise ValueError(
                f"{name} must lie on the grid of q and have the channels of {name[-1]}: shape "
                f"{(*q.shape[:3], channels)}, got {tuple(x.shape)}"
            )
    check_region_size("window_size", window_size)
    if q.shape[1] % window_size[0] or q.shape[2] % window_size[1]:
        raise ValueError(
            f"window_size {tuple(window_size)} must divide the grid of q, {tuple(q.shape[1:3])}: "
            "every window has its full number of semantic tokens"
        )
    check_region_size("patch_size", patch_size)
    if patch_size[0] > k.shape[1] or patch_size[1] > k.shape[2]:
        raise ValueError(
            f"patch_size {tuple(patch_size)} must not exceed the grid of k, {tuple(k.shape[1:3])}: "
            "patches lie inside the image"
        )


def semantic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    window_size: List[int],
    patch_size: List[int],
    num_heads: int,
    scale: Optional[float] = None,
) -> Tensor:
    """Multi-head attention of a window's semantic tokens to a patch of the image and to one another.

    STViT, arXiv 2303.08685, section 3.2. There is one patch for each window. Patches overlap, and are spread evenly
    over the image: the first begins at its first row, the last ends at its last, and in between patch i of n begins at
    row `i * (H - patch) // (n - 1)`; likewise columns. (A single patch begins at the first row.) All keys are tokens
    of the image: nothing is padded. Two patches of 10 on 14 rows begin at 0 and 4, as in the authors' code.

    Args:
        q: `(B, Hs, Ws, C)` queries of the semantic tokens, heads interleaved in C; float32, float64, bfloat16 or
            float16 (sums and softmax are float32, float64 for float64). Channels must be contiguous, other strides are
            free: views of a packed projection need no copy.
        k: `(B, H, W, C)` keys of the image, dtype and device of `q`.
        v: `(B, H, W, Cv)` values of the image.
        own_k: `(B, Hs, Ws, C)` keys of the semantic tokens.
        own_v: `(B, Hs, Ws, Cv)` values of the semantic tokens.
        window_size: `(height, width)` of a window on the grid of semantic tokens; divides it.
        patch_size: `(height, width)` of a patch on the grid of the image; at most that grid.
        num_heads: number of heads; divides C and Cv.
        scale: factor of the scores; default: (C / num_heads) ** -0.5.

    Returns:
        `(B, Hs, Ws, Cv)`, contiguous, dtype of `q`.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that differ.
        ValueError: shapes, devices or strides that do not fit.
    """
    if not torch.jit.is_scripting():
        window_size, patch_size = concrete(window_size), concrete(patch_size)
        _check(q, k, v, own_k, own_v, window_size, patch_size, num_heads)
    if scale is None:
        scale = (q.shape[3] // num_heads) ** -0.5
    if torch.jit.is_scripting():
        return torch.ops.vitrail.semantic_attention(
            q, k, v, own_k, own_v, window_size, patch_size, num_heads, scale
        )[0]
    return _operator(q, k, v, own_k, own_v, window_size, patch_size, num_heads, scale)
