"""BiFormer: vision transformer with bi-level routing attention.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", Zhu et al., CVPR 2023, arXiv 2303.08810.
Published code and weights: https://github.com/rayleizhu/BiFormer (MIT).

    image -> stem /4 -> stage 1 -> /8 -> stage 2 -> /16 -> stage 3 -> /32 -> stage 4 -> BatchNorm -> pool -> classifier

A block (figure 4) is a depthwise convolution for position, bi-level routing attention, and an MLP, each with a
residual. Bi-level routing attention (section 3.2) cuts the map into 7 x 7 regions. Each region picks the top-k regions
whose mean key suits its mean query best, and its tokens attend to all tokens of those: 1, 4 and 16 regions in stages 1
to 3. In stage 4 every token attends to every other. A 5 x 5 depthwise convolution of the values (LePE) is added.

`biformer_stl` has the layout of Swin-T instead (table 4 of the paper: 4 x 4 stem, no position convolution), and
`biformer_stl_nchw` is the authors' later rewrite of it, which pads and pools maps that 7 does not divide differently.

Inside a stage maps are channels last, `(B, H, W, C)`; between stages they are `(B, C, H, W)`, as timm wants them.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerScale, Mlp, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, named_apply, register_model, register_notrace_function
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from ..ops import region_route, routed_attention
from ..ops.regions import ceil_div, crop_grid, merge, pad_grid, partition, region_count, region_means
from .layers import Stage, StagedBackbone, check_image
from .weights import build_model, check_state_dict

for _function in (region_route, routed_attention, region_means, partition, merge, pad_grid, crop_grid):
    register_notrace_function(_function)  # they branch on sizes, which torch.fx cannot follow

# Of the modules below `**dd` are the device and the dtype of their weights.


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of channels-last maps, `(B, H, W, C)` to the same; a residual is added."""

    def __init__(self, dim: int, kernel_size: int, **dd: Any):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        x = self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)
        return x if residual is None else residual + x


# --- bi-level routing attention (section 3.2) -------------------------------------------------------------------------


@register_notrace_function
def region_size_of(x: Tensor, n_win: int, up: bool) -> List[int]:
    """Size of a region when a `(B, H, W, C)` map is cut into `n_win` x `n_win` of them; rounded `up`, or down to 1."""
    if up:
        return [ceil_div(x.shape[1], n_win), ceil_div(x.shape[2], n_win)]
    return [max(x.shape[1] // n_win, 1), max(x.shape[2] // n_win, 1)]


@register_notrace_function
def limit_topk(topk: int, x: Tensor, region_size: List[int]) -> int:
    """A small map may have fewer regions than a region is to choose."""
    return min(topk, region_count(x, region_size))


class RegionRouter(nn.Module):
    """Region-to-region routing: which regions does each region attend to (eq. 2 to 4)?

    Plain routing carries no gradient. Options of the published code: `soft_routing` also weighs the chosen regions by
    the softmax of their scores, `diff_routing` lets the gradient through these weights, `param_routing` puts a linear
    layer before the product.
    """

    def __init__(
        self,
        dim: int,
        topk: int,
        scale: float,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        **dd: Any,
    ):
        super().__init__()
        if diff_routing and not soft_routing:
            raise ValueError("diff_routing needs soft_routing: a hard choice has no gradient")
        if param_routing and not diff_routing:
            raise ValueError("param_routing needs diff_routing: without it its weights would never learn")
        self.topk = topk
        self.scale = scale
        self.soft_routing = soft_routing
        self.diff_routing = diff_routing
        self.emb = nn.Linear(dim, dim, **dd) if param_routing else nn.Identity()

    def forward(self, q: Tensor, k: Tensor, region_size: List[int]) -> Tuple[Tensor, Optional[Tensor]]:
        """Routes `(B, R, topk)` and, for soft routing, their weights, from `(B, H, W, C)` queries and keys."""
        topk = limit_topk(self.topk, q, region_size)
        if not self.soft_routing:
            return region_route(q, k, topk, region_size), None
        q, k = region_means(q, region_size), region_means(k, region_size)
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        scores = (self.emb(q) * self.scale) @ self.emb(k).transpose(1, 2)
        scores, routes = scores.topk(topk, dim=-1)
        weights = scores.softmax(-1)
        return routes, weights if weights.dtype == torch.float64 else weights.float()


class KeyValuePool(nn.Module):
    """Fewer keys and values per region (`kv_downsample_mode` of the published code).

    Adaptive modes leave `per_win` x `per_win` tokens of each region, the others pool by `ratio`.
    """

    def __init__(self, mode: str, per_win: int, ratio: int):
        super().__init__()
        pools: dict[str, Callable[[], nn.Module]] = {
            "ada_avgpool": lambda: nn.AdaptiveAvgPool2d(per_win),
            "ada_maxpool": lambda: nn.AdaptiveMaxPool2d(per_win),
            "avgpool": lambda: nn.AvgPool2d(ratio),
            "maxpool": lambda: nn.MaxPool2d(ratio),
        }
        if mode not in pools:
            raise ValueError(
                f"kv_downsample_mode must be identity, {', '.join(pools)}, got {mode!r}"
                + (" (announced by the authors, never built)" if mode in ("fracpool", "conv") else "")
            )
        name, size = ("kv_per_wins", per_win) if mode.startswith("ada") else ("kv_downsample_ratios", ratio)
        if size < 1:
            raise ValueError(f"{name} must be at least 1 with kv_downsample_mode {mode!r}, got {size}")
        self.pool = pools[mode]()

    def forward(self, x: Tensor, region_size: List[int]) -> Tuple[Tensor, List[int]]:
        """Pool `(B, H, W, C)` inside each region; returns the smaller map and the size of its regions."""
        b, h, w = x.shape[:3]
        nh, nw = h // region_size[0], w // region_size[1]
        regions = partition(x, region_size).flatten(0, 1).transpose(1, 2)
        pooled = self.pool(regions.unflatten(2, (region_size[0], region_size[1])))
        size = [pooled.shape[2], pooled.shape[3]]
        pooled = pooled.flatten(2).transpose(1, 2).unflatten(0, (b, nh * nw))
        return merge(pooled, size, nh * size[0], nw * size[1]), size


class BiLevelRoutingAttention(nn.Module):
    """Attention of every token to the tokens of the top-k regions of its region, `(B, H, W, C)` to the same.

    `pad_after` chooses how a map that `n_win` does not divide is treated: False (the released models) pads it before
    the projection, so that padded tokens count like others; True (`biformer_stl_nchw`) rounds the region size down and
    pads with zeros after the projection, leaving them out of the regions' means.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        qk_dim: Optional[int] = None,
        qk_scale: Optional[float] = None,
        side_dwconv: int = 5,
        kv_downsample_mode: str = "identity",
        kv_per_win: int = -1,
        kv_downsample_ratio: int = 1,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        param_attention: str = "qkvo",
        auto_pad: bool = True,
        pad_after: bool = False,
        **dd: Any,
    ):
        super().__init__()
        self.dim = dim
        self.qk_dim = qk_dim or dim
        if num_heads < 1 or self.qk_dim % num_heads or dim % num_heads:
            raise ValueError(
                f"the number of heads, query width // head_dim = {num_heads}, must be positive and divide "
                f"the width {dim} and the query width {self.qk_dim}"
            )
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f"param_attention must be 'qkvo' or 'qkv', got {param_attention!r}")
        self.num_heads = num_heads
        self.n_win = n_win
        self.pad_before = auto_pad and not pad_after
        # by width, not by head width: what the released weights expect
        self.scale = qk_scale or self.qk_dim**-0.5
        self.router = RegionRouter(
            self.qk_dim, topk, self.scale, soft_routing, diff_routing, param_routing, **dd
        )
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim, **dd)
        has_pool = kv_downsample_mode not in ("identity", "maxpool", "avgpool") or (
            kv_downsample_mode != "identity" and kv_downsample_ratio != 1
        )
        self.kv_pool = KeyValuePool(kv_downsample_mode, kv_per_win, kv_downsample_ratio) if has_pool else None
        self.lepe = DepthwiseConv(dim, side_dwconv, **dd) if side_dwconv > 0 else None
        self.proj = nn.Linear(dim, dim, **dd) if param_attention == "qkvo" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1], x.shape[2]
        region_size = region_size_of(x, self.n_win, self.pad_before)
        qkv = self.qkv(x)
        if self.pad_before:  # what the projection makes of zeros is its bias
            qkv = pad_grid(qkv, region_size[0] * self.n_win, region_size[1] * self.n_win, self.qkv.bias)
        q, k, v = qkv.split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        routes, weights = self.router(q, k, region_size)
        values, kv_size = v, region_size
        if self.kv_pool is not None:
            kv, kv_size = self.kv_pool(torch.cat([k, v], dim=-1), region_size)
            k, v = kv.split([self.qk_dim, self.dim], dim=-1)
        x = routed_attention(q, k, v, routes, region_size, self.num_heads, self.scale, kv_size, weights)
        if self.lepe is not None:
            x = self.lepe(values, x)
        return self.proj(crop_grid(x, h, w))


class FullAttention(nn.Module):
    """Attention of every token to every other, `(B, H, W, C)` to the same (stage 4).

    The published code has 8 heads here whatever the width, no bias in the projection, and adds LePE of the attention's
    *input* (`lepe_of="input"`), of the values (`"value"`, in `biformer_stl_nchw`), or none.
    """

    def __init__(self, dim: int, num_heads: int = 8, side_dwconv: int = 5, lepe_of: str = "input", **dd: Any):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads must divide the width {dim}; set num_heads_full")
        self.num_heads = num_heads
        self.lepe_of_input = lepe_of == "input"
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = DepthwiseConv(dim, side_dwconv, **dd) if lepe_of != "none" and side_dwconv > 0 else None
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        qkv = self.qkv(x)
        local = x if self.lepe_of_input else qkv[..., 2 * c :]
        head_dim = c // self.num_heads
        q, k, v = qkv.reshape(b, h * w, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c)
        if self.lepe is not None:
            x = self.lepe(local, x)
        return self.proj(x)


class ConvAttention(nn.Module):
    """The authors' attention-free ablation (`topk` 0): a 5 x 5 depthwise convolution between two projections."""

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        self.conv1 = nn.Linear(dim, dim, **dd)
        self.dwconv = DepthwiseConv(dim, 5, **dd)
        self.conv2 = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.dwconv(self.conv1(x)))


# --- block, stage, network (section 3.3) ------------------------------------------------------------------------------


class BiFormerBlock(nn.Module):
    """Position, attention, MLP, each with a residual (figure 4)."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 3.0,
        mlp_dwconv: bool = False,
        before_attn_dwconv: int = 3,
        pre_norm: bool = True,
        layer_scale_init_value: float = -1.0,
        drop_path: float = 0.0,
        **dd: Any,
    ):
        super().__init__()
        scale = layer_scale_init_value
        self.pre_norm = pre_norm
        self.pos_embed = DepthwiseConv(dim, before_attn_dwconv, **dd) if before_attn_dwconv > 0 else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.ls1 = LayerScale(dim, scale, **dd) if scale > 0 else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        hidden = int(mlp_ratio * dim)
        self.mlp = Mlp(dim, hidden, **dd)
        if mlp_dwconv:
            self.mlp.act = nn.Sequential(DepthwiseConv(hidden, 3, **dd), nn.GELU())
        self.ls2 = LayerScale(dim, scale, **dd) if scale > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = self.pos_embed(x, x)
        if self.pre_norm:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x))))
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))


class Stem(nn.Sequential):
    """Two 3 x 3 convolutions of stride 2, or one 4 x 4 of stride 4 (Swin's layout)."""

    def __init__(self, in_chans: int, dim: int, swin_layout: bool, **dd: Any):
        if swin_layout:
            super().__init__(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd))
        else:
            super().__init__(
                nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
                nn.BatchNorm2d(dim // 2, **dd),
                nn.GELU(),
                nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
                nn.BatchNorm2d(dim, **dd),
            )

    def forward(self, x: Tensor) -> Tensor:
        # channels last from here on: the blocks work on (B, H, W, C), and no map is ever laid out anew
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self:
            x = layer(x)
        return x


def downsample(in_dim: int, dim: int, swin_layout: bool, **dd: Any) -> nn.Module:
    """Halves the map between stages: 3 x 3 convolution and norm, or norm and 2 x 2 convolution (Swin's layout)."""
    if swin_layout:
        return nn.Sequential(nn.BatchNorm2d(in_dim, **dd), nn.Conv2d(in_dim, dim, 2, stride=2, **dd))
    return nn.Sequential(nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(dim, **dd))


class BiFormer(StagedBackbone):
    """BiFormer for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: size of the output; 0 for pooled features.
        global_pool: `avg`, `max`, `avgmax`, `catavgmax`, `fast`, or empty for the map itself.
        img_size: pixels, or (height, width); only checked, as any size runs (but see `auto_pad`).
        depths: blocks of each stage.
        embed_dims: width of each stage.
        head_dim: width of a head in routed attention.
        num_heads_full: number of heads where every token attends to every other.
        n_win: regions per side.
        topks: regions that each region attends to, by stage; -2 for full attention with LePE, -1 without, 0 for a
            convolution instead.
        qk_dims: width of queries and keys by stage; default: `embed_dims`.
        qk_scale: factor of the scores in routed attention; default: width ** -0.5.
        mlp_ratios: MLP expansion by stage.
        mlp_dwconv: 3 x 3 depthwise convolution inside the MLP.
        side_dwconv: kernel size of LePE, 0 for none.
        before_attn_dwconv: kernel size of the position convolution, 0 for none.
        layer_scale_init_value: initial layer scale; none when not positive.
        pre_norm: LayerNorm before attention and MLP (default) or after their residual.
        kv_downsample_mode: pooling of keys and values inside a region: `identity`, `maxpool`, `avgpool`,
            `ada_maxpool`, `ada_avgpool`.
        kv_per_wins: keys per side and region for the adaptive modes, by stage.
        kv_downsample_ratios: pooling ratio for the others, by stage.
        soft_routing, diff_routing, param_routing: see `RegionRouter`.
        param_attention: `qkvo`, or `qkv` for no output projection.
        auto_pad: pad maps that `n_win` does not divide; when False such image sizes are refused.
        swin_layout: Swin-T's stem and merging (`biformer_stl*`).
        pad_after: padding as in `biformer_stl_nchw`, see `BiLevelRoutingAttention`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        head_dim: int = 32,
        num_heads_full: int = 8,
        n_win: int = 7,
        topks: Sequence[int] = (1, 4, 16, -2),
        qk_dims: Optional[Sequence[int]] = None,
        qk_scale: Optional[float] = None,
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        layer_scale_init_value: float = -1.0,
        pre_norm: bool = True,
        kv_downsample_mode: str = "identity",
        kv_per_wins: Sequence[int] = (-1, -1, -1, -1),
        kv_downsample_ratios: Sequence[int] = (1, 1, 1, 1),
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        param_attention: str = "qkvo",
        auto_pad: bool = True,
        swin_layout: bool = False,
        pad_after: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        num_stages = len(depths)
        qk_dims = qk_dims or embed_dims
        for name, value in (
            ("embed_dims", embed_dims), ("topks", topks), ("qk_dims", qk_dims), ("mlp_ratios", mlp_ratios),
            ("kv_per_wins", kv_per_wins), ("kv_downsample_ratios", kv_downsample_ratios),
        ):  # fmt: skip
            if len(value) != num_stages:
                raise ValueError(
                    f"{name} must have one entry per stage ({num_stages}, as depths), got {tuple(value)}"
                )
        if pad_after and (kv_downsample_mode != "identity" or soft_routing):
            raise ValueError("pad_after goes with plain routing only, as in the published biformer_stl_nchw")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.smallest_image = 2 ** (num_stages + 1) if swin_layout else 1
        # the map of the last routed stage must divide into regions, and with it all the larger ones
        routed = [i for i, topk in enumerate(topks) if topk > 0]
        self.image_multiple = 1 if auto_pad or not routed else n_win * 2 ** (routed[-1] + 2)

        def attention(i: int) -> nn.Module:
            dim = embed_dims[i]
            if topks[i] == 0:
                return ConvAttention(dim, **dd)
            if topks[i] < 0:
                lepe_of = "none" if topks[i] == -1 else "value" if pad_after else "input"
                return FullAttention(dim, num_heads_full, side_dwconv, lepe_of, **dd)
            heads = qk_dims[i] // head_dim
            pool = kv_downsample_mode, kv_per_wins[i], kv_downsample_ratios[i]
            routing = soft_routing, diff_routing, param_routing
            return BiLevelRoutingAttention(
                dim, heads, n_win, topks[i], qk_dims[i], qk_scale, side_dwconv, *pool, *routing,
                param_attention=param_attention, auto_pad=auto_pad, pad_after=pad_after, **dd,
            )  # fmt: skip

        self.stem = Stem(in_chans, embed_dims[0], swin_layout, **dd)
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        self.feature_info = []
        for i, dim in enumerate(embed_dims):
            options = mlp_ratios[i], mlp_dwconv, before_attn_dwconv, pre_norm, layer_scale_init_value
            blocks = [
                BiFormerBlock(dim, attention(i), *options, drop_path=r, **dd) for r in drop_path_rates[i]
            ]
            down = downsample(embed_dims[i - 1], dim, swin_layout, **dd) if i else nn.Identity()
            stages.append(Stage(down, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        named_apply(init_weights_vit_timm, self)
        if img_size is not None:
            image = torch.empty(0, in_chans, *to_2tuple(img_size), device="meta")
            check_image(image, in_chans, self.smallest_image, self.image_multiple)


# --- weights ----------------------------------------------------------------------------------------------------------

# the authors' names, by pattern; order matters
_RENAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
    (r"\.attn\.1\.", ".attn.conv1."),
    (r"\.attn\.2\.", ".attn.dwconv."),
    (r"\.attn\.3\.", ".attn.conv2."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.dwconv\.", ".mlp.act.0."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn the authors' checkpoint layouts into ours; ours passes through. Refuses what does not fit the model."""
    state_dict = dict(state_dict)
    if any(key.startswith("downsample_layers.") for key in state_dict):
        renamed = {}
        for key, value in state_dict.items():
            for pattern, replacement in _RENAMES:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value
        state_dict = renamed
    # the authors' later rewrite has 1 x 1 convolutions where we have linear layers
    for key, value in model.state_dict().items():
        if value.dim() == 2 and key in state_dict and state_dict[key].shape[2:] == (1, 1):
            state_dict[key] = state_dict[key].flatten(1)
    return check_state_dict(state_dict, model)


def _create_biformer(variant: str, pretrained: bool = False, **kwargs: Any) -> BiFormer:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs.get("depths", (2, 2, 8, 2))))))
    return build_model(
        BiFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **kwargs,
    )


def _cfg(share: str = "", **kwargs: Any) -> dict[str, Any]:
    """`share` is the id under which the authors share the file."""
    return {
        "url": f"https://api.onedrive.com/v1.0/shares/s!{share}/root/content" if share else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2303.08810",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.in1k": _cfg("AkBbczdRlZvChHEOoGkgwgQzEDlM"),
        "biformer_small.in1k": _cfg("AkBbczdRlZvChHDyM-x9KWRBZ832"),
        "biformer_base.in1k": _cfg("AkBbczdRlZvChHI_XPhoadjaNxtO"),
        "biformer_stl.in1k": _cfg("AkBbczdRlZvChSf-m7ujkvx9lIQ1"),
        "biformer_stl_nchw.in1k": _cfg("AkBbczdRlZvChWYrKbWbMgqd2Ai0"),
        "biformer_pico.untrained": _cfg(
            input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0, license="apache-2.0"
        ),
    }
)

_SWIN_T = {
    "depths": (2, 2, 6, 2),
    "embed_dims": (96, 192, 384, 768),
    "mlp_ratios": (4, 4, 4, 4),
    "before_attn_dwconv": 0,
    "swin_layout": True,
}


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 GMAC, 81.4% top-1 (published)."""
    model_args = {"depths": (2, 2, 8, 2), "embed_dims": (64, 128, 256, 512)}
    return _create_biformer("biformer_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 GMAC, 83.8% top-1 (published)."""
    model_args = {"depths": (4, 4, 18, 4), "embed_dims": (64, 128, 256, 512)}
    return _create_biformer("biformer_small", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 GMAC, 84.3% top-1 (published)."""
    model_args = {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768)}
    return _create_biformer("biformer_base", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-STL, in Swin-T's layout: 28.4 M parameters, 4.6 GMAC, 82.7% top-1 (published)."""
    return _create_biformer("biformer_stl", pretrained, **dict(_SWIN_T, **kwargs))


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """The authors' rewrite of BiFormer-STL: same figures, other padding, LePE of the values in stage 4."""
    model_args = dict(_SWIN_T, pad_after=True)
    return _create_biformer("biformer_stl_nchw", pretrained, **dict(model_args, **kwargs))


@register_model
def biformer_pico(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """Ours, for images of 32 x 32 and training on a laptop: 0.9 M parameters, no published weights."""
    model_args = {
        "depths": (1, 1, 1, 1),
        "embed_dims": (32, 64, 128, 160),
        "n_win": 4,
        "topks": (2, 4, -2, -2),
    }
    return _create_biformer("biformer_pico", pretrained, **dict(model_args, **kwargs))
