"""DaViT: dual attention vision transformers.

Paper: "DaViT: Dual Attention Vision Transformers", Ding et al., ECCV 2022, arXiv 2204.03645.
Published code and weights: https://github.com/dingmyu/davit (MIT); weights in the layout of timm's `davit` on the hub.

    image -> stem /4 -> stage 1 -> /8 -> stage 2 -> /16 -> stage 3 -> /32 -> stage 4 -> pool -> LayerNorm -> classifier

A dual attention block is two blocks after each other. The first attends in space ("Spatial Window Attention"): tokens
look at the tokens of their 7 x 7 window. The second attends across channels ("Channel Group Attention"): channels look
at the channels of their group of 32, and a score sums over all tokens of the image, so that one block sees it whole.
Both cost linearly in the number of tokens. Each has a 3 x 3 depthwise convolution for position before its attention and
another before its MLP.

The family is called `davit_fused` because `davit_*` are timm's names. Parameters have the names that timm gives them,
and any input size runs: what windows lack at the border is filled as in the published code, without a padded map.

Inside a stage maps are channels last, `(B, H, W, C)`; between stages they are `(B, C, H, W)`, as timm wants them, with
the same memory underneath.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    Mlp,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_norm_layer,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from ..ops import channel_attention, window_attention
from .layers import Stage, StagedBackbone, check_image, depthwise_conv, pad_to_multiple
from .weights import build_model, check_state_dict

for _function in (channel_attention, window_attention):
    register_notrace_function(_function)  # they branch on sizes, which torch.fx cannot follow

# --- spatial window attention and channel group attention -------------------------------------------------------------


class WindowAttention(nn.Module):
    """Attention of every token to those of its window, `(B, H, W, C)` to the same.

    The published code pads a map that windows do not divide with zeros before the projection. Queries there are
    dropped, but keys and values take part: they are the projection's bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Tuple[int, int] = (7, 7),
        qkv_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = list(window_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        pad_key: Optional[Tensor] = None
        pad_value: Optional[Tensor] = None
        if self.qkv.bias is not None:
            dim = self.qkv.in_features
            pad_key, pad_value = self.qkv.bias[dim : 2 * dim], self.qkv.bias[2 * dim :]
        x = window_attention(q, k, v, self.window_size, self.num_heads, pad_key=pad_key, pad_value=pad_value)
        return self.proj(x)


@register_notrace_function
def token_scale(x: Tensor) -> float:
    """One over the root of the number of tokens of a `(B, H, W, C)` map."""
    return (x.shape[1] * x.shape[2]) ** -0.5


class ChannelAttention(nn.Module):
    """Attention of every channel to those of its group, over all tokens, `(B, H, W, C)` to the same.

    The projection's three parts are, in the terms of the operator, values, queries and keys: the released models
    multiply softmax(k^T v) by q. In the second version (`v2`: Florence-2's towers) they are what they are called, and
    scores are scaled by the number of tokens that they sum over, not by the width of a head.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        v2: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.v2 = v2
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.v2:
            return self.proj(channel_attention(q, k, v, self.num_heads, token_scale(x)))
        return self.proj(channel_attention(k, v, q, self.num_heads))


# --- block, stage, network --------------------------------------------------------------------------------------------


class ConvPosEnc(nn.Module):
    """A 3 x 3 depthwise convolution added to the map, `(B, H, W, C)` to the same: tells tokens where they are."""

    def __init__(self, dim: int, act: bool = False, device: Any = None, dtype: Any = None):
        super().__init__()
        self.proj = depthwise_conv(dim, 3, device=device, dtype=dtype)
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.proj(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class DaViTBlock(nn.Module):
    """Position, attention, position, MLP, each with a residual; the MLP may be left out."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        ffn: bool = True,
        cpe_act: bool = False,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = ConvPosEnc(dim, cpe_act, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = ConvPosEnc(dim, cpe_act, **dd)
        self.norm2 = norm_layer(dim, **dd) if ffn else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd) if ffn else None
        self.drop_path2 = DropPath(drop_path) if ffn and drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class Stem(nn.Module):
    """A 7 x 7 convolution of stride 4 and a norm, images to `(B, C, H / 4, W / 4)`, rounded up."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        norm_layer: Callable[..., nn.Module],
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # channels last from here on: the blocks work on (B, H, W, C), and no map is ever laid out anew
        return self.norm(self.conv(x.contiguous(memory_format=torch.channels_last)))


class Downsample(nn.Module):
    """A norm and a convolution of stride 2, `(B, C, H, W)` to half the size, rounded up.

    Even kernels see zeros past the border of a map of odd size: those come after the norm.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        norm_layer: Callable[..., nn.Module],
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = norm_layer(in_dim, **dd)
        self.even = kernel_size % 2 == 0
        padding = 0 if self.even else kernel_size // 2
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride=2, padding=padding, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.even:
            x = pad_to_multiple(x.permute(0, 2, 3, 1), 2).permute(0, 3, 1, 2)
        return self.conv(x)


class DaViT(StagedBackbone):
    """DaViT for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: size of the output; 0 for pooled features.
        global_pool: `avg`, `max`, `avgmax`, `fast`, or empty for the map itself (with `head_norm_first` also
            `catavgmax`).
        img_size: pixels, or (height, width); only checked, as any size runs.
        depths: dual attention blocks of each stage.
        embed_dims: width of each stage.
        num_heads: heads of spatial and groups of channel attention, by stage.
        window_size: tokens per side of a window, or (height, width).
        mlp_ratio: MLP expansion.
        qkv_bias: bias in the projections to queries, keys and values. Without it, padding has keys and values of zero.
        attn_types: what a dual attention block consists of, in order: `spatial`, `channel`.
        ffn: MLPs; without them a block is attention alone.
        cpe_act: GELU after the position convolutions (the authors' code for dense prediction has this option).
        patch_size: 4; the authors' code also accepts 2, but what it builds then cannot run.
        down_kernel_size: kernel of the downsampling convolutions, 2 or odd; 3 is the authors' `overlapped_patch`.
        channel_attn_v2: see `ChannelAttention`.
        norm_layer, norm_layer_cl: timm's names of the norms of `(B, C, H, W)` and of channels-last maps.
        norm_eps: their epsilon.
        head_norm_first: norm, pool, classifier instead of pool, norm, classifier.
        weight_init: empty, or `conv` for normal weights of deviation 0.02 in the convolutions as well.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        depths: Sequence[int] = (1, 1, 3, 1),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Union[int, Tuple[int, int]] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_types: Sequence[str] = ("spatial", "channel"),
        ffn: bool = True,
        cpe_act: bool = False,
        patch_size: int = 4,
        down_kernel_size: int = 2,
        channel_attn_v2: bool = False,
        norm_layer: str = "layernorm2d",
        norm_layer_cl: str = "layernorm",
        norm_eps: float = 1e-5,
        head_norm_first: bool = False,
        weight_init: str = "",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        for name, value in (("embed_dims", embed_dims), ("num_heads", num_heads)):
            if len(value) != len(depths):
                raise ValueError(
                    f"{name} must have one entry per stage ({len(depths)}, as depths), got {tuple(value)}"
                )
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            if heads < 1 or dim % heads:
                raise ValueError(f"num_heads must divide embed_dims, got {heads} and {dim} in stage {i}")
        window = to_2tuple(window_size)
        if min(window) < 1:
            raise ValueError(f"window_size must be positive, got {window_size}")
        if set(attn_types) - {"spatial", "channel"}:
            raise ValueError(f"attn_types must be some of 'spatial' and 'channel', got {tuple(attn_types)}")
        if patch_size != 4:
            raise ValueError(
                f"patch_size must be 4, got {patch_size}"
                + ": the published code builds 2, with a norm that does not fit the map" * (patch_size == 2)
            )
        if down_kernel_size < 1 or (down_kernel_size % 2 == 0 and down_kernel_size != 2):
            raise ValueError(f"down_kernel_size must be 2 or odd, got {down_kernel_size}")
        if "cat" in global_pool and not head_norm_first:
            raise ValueError(
                f"global_pool {global_pool!r} doubles the width, which the norm after it does not fit; "
                "use another, or head_norm_first=True"
            )
        if weight_init not in ("", "conv"):
            raise ValueError(f"weight_init must be empty or 'conv', got {weight_init!r}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.attn_types = tuple(attn_types)
        norm_2d = partial(get_norm_layer(norm_layer), eps=norm_eps)
        norm_cl = partial(get_norm_layer(norm_layer_cl), eps=norm_eps)

        def attention(kind: str, i: int) -> nn.Module:
            if kind == "spatial":
                return WindowAttention(embed_dims[i], num_heads[i], window, qkv_bias, **dd)
            return ChannelAttention(embed_dims[i], num_heads[i], qkv_bias, channel_attn_v2, **dd)

        self.stem = Stem(in_chans, embed_dims[0], norm_2d, **dd)
        per_stage = [depth * len(attn_types) for depth in depths]
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, per_stage, stagewise=True)
        stages = []
        self.feature_info = []
        for i, dim in enumerate(embed_dims):
            downsample = (
                Downsample(embed_dims[i - 1], dim, down_kernel_size, norm_2d, **dd) if i else nn.Identity()
            )
            rates = iter(drop_path_rates[i])
            blocks = [
                nn.Sequential(
                    *(
                        DaViTBlock(
                            dim, attention(kind, i), mlp_ratio, ffn, cpe_act, norm_cl, next(rates), **dd
                        )
                        for kind in attn_types
                    )
                )
                for _ in range(depths[i])
            ]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = norm_2d(self.num_features, **dd) if head_norm_first else nn.Identity()
        head: Any = ClassifierHead if head_norm_first else partial(NormMlpClassifierHead, norm_layer=norm_2d)
        self.head = head(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.apply(partial(self._init_weights, convolutions=weight_init == "conv"))
        if img_size is not None:
            check_image(torch.empty(0, in_chans, *to_2tuple(img_size), device="meta"), in_chans, 1, 1)

    @staticmethod
    def _init_weights(m: nn.Module, convolutions: bool) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
        elif convolutions and isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=0.02)
        else:
            return
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# --- weights ----------------------------------------------------------------------------------------------------------

# names of the authors' code, by pattern
_AUTHORS = (
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
# names of the image tower in Florence-2's checkpoints, behind their prefix
_FLORENCE_PREFIX = "vision_tower."
_FLORENCE = (
    (r"^convs\.0\.proj\.", "stem.conv."),
    (r"^convs\.0\.norm\.", "stem.norm."),
    (r"^convs\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^convs\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.conv([12])\.fn\.dw\.", r".cpe\1.proj."),
    (r"\.(?:window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(?:window|channel)_attn\.fn\.", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".mlp."),
)


def _rename(state_dict: dict[str, Tensor], patterns: Sequence[Tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in patterns:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn the layouts of the authors, of timm and of Florence-2 into ours. Refuses what does not fit the model.

    timm's names are ours but for two: blocks with a name where ours have a number, and the norm before the pooling.
    """
    state_dict = dict(state_dict)
    if "patch_embeds.0.proj.weight" in state_dict:
        state_dict = _rename(state_dict, _AUTHORS)
    elif f"{_FLORENCE_PREFIX}convs.0.proj.weight" in state_dict:
        tower = {k: v for k, v in state_dict.items() if k.startswith(_FLORENCE_PREFIX)}
        tower = {k.removeprefix(_FLORENCE_PREFIX): v for k, v in tower.items()}
        # the tower has no classifier and no norm before one: ours starts as new
        new = {k: v for k, v in model.state_dict().items() if k.startswith("head.norm.")}
        state_dict = new | _rename(tower, _FLORENCE)
    numbers = {f"{kind}_block": str(i) for i, kind in enumerate(getattr(model, "attn_types", ()))}
    named = "|".join(numbers) or "$^"
    state_dict = {
        re.sub(rf"\.({named})\.", lambda m: f".{numbers[m[1]]}.", key): value
        for key, value in _rename(state_dict, ((r"^norm_pre\.", "norm."),)).items()
    }
    return check_state_dict(state_dict, model)


_ADVICE = (
    "tiny, small and base were published, and the towers of Florence-2 (davit_fused_base_fl, davit_fused_huge_fl). "
    "Pass a file of your own: pretrained_cfg_overlay=dict(file=...)"
)


def _create_davit(variant: str, pretrained: bool = False, **kwargs: Any) -> DaViT:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs.get("depths", (1, 1, 3, 1))))))
    return build_model(
        DaViT,
        variant,
        pretrained,
        advice=_ADVICE,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2204.03645",
        "paper_name": "DaViT: Dual Attention Vision Transformers",
        "origin_url": "https://github.com/dingmyu/davit",
        **kwargs,
    }


def _tower(repository: str) -> dict[str, Any]:
    """The image tower of a Florence-2 model on the hub."""
    return _cfg(
        hf_hub_id=repository,
        num_classes=0,
        input_size=(3, 768, 768),
        pool_size=(24, 24),
        paper_ids="arXiv:2311.06242",
        paper_name="Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks",
        origin_url=f"https://huggingface.co/{repository}",
    )


default_cfgs = generate_default_cfgs(
    {
        "davit_fused_tiny.msft_in1k": _cfg(hf_hub_id="timm/davit_tiny.msft_in1k"),
        "davit_fused_small.msft_in1k": _cfg(hf_hub_id="timm/davit_small.msft_in1k"),
        "davit_fused_base.msft_in1k": _cfg(hf_hub_id="timm/davit_base.msft_in1k"),
        "davit_fused_large": _cfg(),
        "davit_fused_large_window12_384": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
        "davit_fused_huge": _cfg(),
        "davit_fused_giant": _cfg(),
        "davit_fused_base_fl.msft_florence2": _tower("microsoft/Florence-2-base"),
        "davit_fused_huge_fl.msft_florence2": _tower("microsoft/Florence-2-large"),
        "davit_fused_pico": _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0),
    }
)

_BASE = {"depths": (1, 1, 9, 1), "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_LARGE = {"depths": (1, 1, 9, 1), "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}
_HUGE = {"depths": (1, 1, 9, 1), "embed_dims": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)}
_FLORENCE_ARGS = {"window_size": 12, "down_kernel_size": 3, "channel_attn_v2": True}


@register_model
def davit_fused_tiny(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-T: 28.4 M parameters, 4.5 GMAC, 82.8% top-1 (published)."""
    model_args = {"depths": (1, 1, 3, 1), "embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
    return _create_davit("davit_fused_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def davit_fused_small(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-S: 49.7 M parameters, 8.8 GMAC, 84.2% top-1 (published)."""
    model_args = {"depths": (1, 1, 9, 1), "embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
    return _create_davit("davit_fused_small", pretrained, **dict(model_args, **kwargs))


@register_model
def davit_fused_base(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-B: 88.0 M parameters, 15.5 GMAC, 84.6% top-1 (published)."""
    return _create_davit("davit_fused_base", pretrained, **dict(_BASE, **kwargs))


@register_model
def davit_fused_large(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-L: 196.8 M parameters, 34.6 GMAC; no published weights."""
    return _create_davit("davit_fused_large", pretrained, **dict(_LARGE, **kwargs))


@register_model
def davit_fused_large_window12_384(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-L for 384 x 384 images, with 12 x 12 windows: 103.0 GMAC; no published weights."""
    model_args = dict(_LARGE, window_size=12)
    return _create_davit("davit_fused_large_window12_384", pretrained, **dict(model_args, **kwargs))


@register_model
def davit_fused_huge(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-H: 348.9 M parameters, 61.2 GMAC; no published weights."""
    return _create_davit("davit_fused_huge", pretrained, **dict(_HUGE, **kwargs))


@register_model
def davit_fused_giant(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-G: 1406 M parameters, 192.9 GMAC, 90.4% top-1 with extra data (published); no published weights."""
    model_args = {
        "depths": (1, 1, 12, 3),
        "embed_dims": (384, 768, 1536, 3072),
        "num_heads": (12, 24, 48, 96),
    }
    return _create_davit("davit_fused_giant", pretrained, **dict(model_args, **kwargs))


@register_model
def davit_fused_base_fl(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """Image tower of Florence-2-base: 12 x 12 windows, overlapping downsampling, channel attention v2."""
    return _create_davit("davit_fused_base_fl", pretrained, **{**_BASE, **_FLORENCE_ARGS, **kwargs})


@register_model
def davit_fused_huge_fl(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """Image tower of Florence-2-large (DaViT-H in width): as `davit_fused_base_fl`."""
    return _create_davit("davit_fused_huge_fl", pretrained, **{**_HUGE, **_FLORENCE_ARGS, **kwargs})


@register_model
def davit_fused_pico(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """Ours, for 32 x 32 images and a minute of training on a CPU; no weights."""
    model_args = {"depths": (1, 1, 1), "embed_dims": (32, 64, 128), "num_heads": (2, 4, 8), "window_size": 4}
    return _create_davit("davit_fused_pico", pretrained, **dict(model_args, **kwargs))
