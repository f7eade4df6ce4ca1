"""STViT and STViT-R: vision transformers with a handful of semantic tokens.

Paper: "Making Vision Transformers Efficient from A Token Sparsification View", Chang et al., CVPR 2023,
arXiv 2303.08685. Published code and weights of STViT-R on Swin: https://github.com/changsn/STViT-R (MIT).

After a few ordinary layers, two more make semantic tokens, which stand for clusters of image tokens, and the layers
after that work on these alone. Here are the parts of section 3: how the tokens are made, how they work, and how they
give back what they have learned. `stvit_deit.py` puts them into a global vision transformer, `stvit_swin.py` into a
local one, and `stvit_weights.py` reads checkpoints.

A layer here is a transformer layer with separate projections for queries and for keys and values, since these may come
from other tokens. Both pass the same first norm. Tokens are lists `(B, N, C)` or grids `(B, H, W, C)`.
"""

from collections.abc import Callable
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, RelPosBias
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..ops import semantic_attention, window_attention
from ..ops.regions import merge, partition
from .layers import depthwise_conv

# --- initial centres (section 3.1, "spatial pooling") -----------------------------------------------------------------


def _bins(size: int, count: int, like: Tensor) -> Tensor:
    """Tokens of each of `count` bins over `size`, as `nn.AdaptiveMaxPool2d` cuts them, `(count, tokens of a bin)`.

    Bin i reaches from `i * size / count`, rounded down, to `(i + 1) * size / count`, rounded up; shorter ones name
    their last token again. Whole numbers throughout, and only `arange` and arithmetic, so that every exporter follows.
    """
    rest = size % count
    longest = size // count + (0 if rest == 0 else 1 if count % rest == 0 else 2)
    bins = torch.arange(count, device=like.device)
    start, end = bins * size // count, ((bins + 1) * size + count - 1) // count
    tokens = start[:, None] + torch.arange(longest, device=like.device)
    return torch.minimum(tokens, end[:, None] - 1)


@register_notrace_function
def max_pool_bins(x: Tensor, height: int, width: int) -> Tensor:
    """Adaptive max pooling of a grid, `(B, H, W, C)` to `(B, height, width, C)`."""
    rows, cols = _bins(x.shape[1], height, x), _bins(x.shape[2], width, x)
    x = x.index_select(1, rows.flatten()).unflatten(1, rows.shape).amax(2)
    return x.index_select(2, cols.flatten()).unflatten(2, cols.shape).amax(3)


@register_notrace_function
def window_count(size: int, window: int) -> int:
    """How many windows make semantic tokens of `size` rows: as many as come closest to `window` rows each."""
    return max((2 * size + window) // (2 * window), 1)


# --- attention of tokens to other tokens ------------------------------------------------------------------------------


class TokenAttention(nn.Module):
    """What the attentions below have in common: their projections, and attention of every token to every other."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be positive and divide the width {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, x: Tensor, y: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """`(B, N, C)` queries, `(B, M, C)` keys; `bias` `(num_heads, N, M)` is added to the scores."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=bias)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class CrossAttention(TokenAttention):
    """Each of some tokens attends to all of others, `(B, N, C)` and `(B, M, C)` to `(B, N, C)`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attend(x, y)


@register_notrace_module  # like those below it computes with sizes, which torch.fx cannot follow
class PatchAttention(TokenAttention):
    """The centres of a window attend to one another and to a patch of the image around the window (section 3.2)."""

    def __init__(self, dim: int, num_heads: int, window_size: int, patch_size: int, **kwargs: Any):
        super().__init__(dim, num_heads, **kwargs)
        self.window_size = window_size
        self.patch_size = patch_size

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Grids `(B, Hs, Ws, C)` of centres and `(B, H, W, C)` of the image to the grid of centres."""
        own_k, own_v = self.kv(x).chunk(2, -1)
        k, v = self.kv(y).chunk(2, -1)
        window = [self.window_size, self.window_size]
        patch = [min(self.patch_size, y.shape[1]), min(self.patch_size, y.shape[2])]
        x = semantic_attention(self.q(x), k, v, own_k, own_v, window, patch, self.num_heads)
        return self.proj_drop(self.proj(x))


@register_notrace_module
class LocalAttention(TokenAttention):
    """Each semantic token attends to those of its window, `(B, H, W, C)` to the same."""

    def __init__(self, dim: int, num_heads: int, window_size: int, relative_pos: bool = False, **kwargs: Any):
        super().__init__(dim, num_heads, **kwargs)
        self.window_size = window_size
        self.rel_pos = (
            _relative_position((window_size, window_size), num_heads, **kwargs) if relative_pos else None
        )

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        bias = self.rel_pos.get_bias()[0] if self.rel_pos is not None else None
        x = window_attention(self.q(x), k, v, [self.window_size, self.window_size], self.num_heads, bias=bias)
        return self.proj_drop(self.proj(x))


@register_notrace_module
class GlobalAttention(TokenAttention):
    """Each semantic token attends to all others, `(B, H, W, C)` to the same.

    A table of relative positions is made for a grid of `grid_size`, and resampled for another.
    """

    def __init__(
        self, dim: int, num_heads: int, grid_size: Tuple[int, int], relative_pos: bool = False, **kwargs: Any
    ):
        super().__init__(dim, num_heads, **kwargs)
        self.grid_size = grid_size
        self.rel_pos = _relative_position(grid_size, num_heads, **kwargs) if relative_pos else None

    def forward(self, x: Tensor) -> Tensor:
        bias: Optional[Tensor] = None
        if self.rel_pos is not None:
            if x.shape[1] == self.grid_size[0] and x.shape[2] == self.grid_size[1]:
                bias = self.rel_pos.get_bias()[0]
            else:
                table = self.rel_pos.relative_position_bias_table
                table = resize_relative_table(table, self.grid_size, (x.shape[1], x.shape[2]))
                bias = _relative_bias(table, x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        return self.attend(tokens, tokens, bias).view(x.shape)


def _relative_position(
    size: Tuple[int, int], num_heads: int, device: Any = None, dtype: Any = None, **_: Any
) -> RelPosBias:
    return RelPosBias(size, num_heads, device=device, dtype=dtype)


@register_notrace_function
def resize_grid(x: Tensor, height: int, width: int) -> Tensor:
    """A table with an entry per position, `(1, H, W, C)`, for another grid, bicubic; as it is where that is its own."""
    if x.shape[1] == height and x.shape[2] == width:
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), [height, width], mode="bicubic").permute(0, 2, 3, 1)


@register_notrace_function
def resize_relative_table(table: Tensor, size: Tuple[int, int], new: Tuple[int, int]) -> Tensor:
    """A table of relative positions `((2 H - 1) (2 W - 1), heads)` for windows of another size, bicubic."""
    table = table.t().reshape(1, table.shape[1], 2 * size[0] - 1, 2 * size[1] - 1)
    table = F.interpolate(table, [2 * new[0] - 1, 2 * new[1] - 1], mode="bicubic")
    return table[0].flatten(1).t()


def _relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Bias `(heads, N, N)` between the tokens of a `height` x `width` grid, from its table."""
    rows, cols = torch.arange(height, device=table.device), torch.arange(width, device=table.device)
    rows = (rows[:, None] - rows + height - 1)[:, None, :, None] * (2 * width - 1)
    cols = (cols[:, None] - cols + width - 1)[None, :, None, :]
    index = (rows + cols).reshape(height * width, height * width)
    return table[index].permute(2, 0, 1)


# --- layers -----------------------------------------------------------------------------------------------------------


class TokenLayer(nn.Module):
    """What the layers below have in common: two norms, an attention, an MLP, layer scale and stochastic depth."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        init_values: Optional[float] = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half of a layer."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SelfLayer(TokenLayer):
    """Semantic tokens attend to one another, `(B, H, W, C)` to the same; also Swin's block."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return self.feed_forward(x)


class CrossLayer(TokenLayer):
    """Tokens `x` attend to tokens `y`, lists both.

    With semantic tokens for `x` it is the second layer of generation (eq. 2), with semantic tokens for `y` it gives the
    image tokens what the semantic ones have learned: recovery (section 3.3, eq. 6).
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), self.norm1(y))))
        return self.feed_forward(x)


class WindowPosition(nn.Module):
    """Position encoding by a 3 x 3 depthwise convolution and a residual, inside each window (`use_conv_pos`)."""

    def __init__(self, dim: int, window_size: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.window_size = window_size
        self.proj = depthwise_conv(dim, 3, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        size = [self.window_size, self.window_size]
        windows = partition(x, size)
        b, n = windows.shape[:2]
        maps = windows.flatten(0, 1).transpose(1, 2).unflatten(2, size)
        windows = windows + self.proj(maps).flatten(2).transpose(1, 2).unflatten(0, (b, n))
        return merge(windows, size, x.shape[1], x.shape[2])


class CenterLayer(TokenLayer):
    """First layer of generation (eq. 1): pooled centres gather from the image, `(B, H, W, C)` to `(B, Hs, Ws, C)`.

    Each window of (about) `image_window` x `image_window` image tokens makes `window_size` x `window_size` centres.
    Without `shortcut`, as released, they are queries only and nothing is added to what they gather.
    """

    def __init__(
        self,
        dim: int,
        attn: PatchAttention,
        image_window: int,
        use_conv_pos: bool = False,
        shortcut: bool = True,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ):
        super().__init__(dim, attn, device=device, dtype=dtype, **kwargs)
        self.image_window = image_window
        self.window_size = attn.window_size
        self.shortcut = shortcut
        self.conv_pos = (
            WindowPosition(dim, attn.window_size, device, dtype) if use_conv_pos else nn.Identity()
        )

    def pool(self, x: Tensor) -> Tensor:
        """The centres before they gather."""
        height = window_count(x.shape[1], self.image_window) * self.window_size
        width = window_count(x.shape[2], self.image_window) * self.window_size
        return self.conv_pos(max_pool_bins(x, height, width))

    def forward(self, x: Tensor) -> Tensor:
        centers = self.pool(x)
        gathered = self.ls1(self.attn(self.norm1(centers), self.norm1(x)))
        return self.feed_forward(centers + self.drop_path1(gathered) if self.shortcut else gathered)
