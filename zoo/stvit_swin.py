"""STViT on Swin: fewer tokens inside the windows of a local vision transformer.

Paper: "Making Vision Transformers Efficient from A Token Sparsification View", Chang et al., CVPR 2023,
arXiv 2303.08685, sections 3.2 and 3.3. Published code and weights of STViT-R: https://github.com/changsn/STViT-R (MIT).

    image -> stem /4 -> stage 1 -> /8 -> stage 2 -> /16 -> stage 3 -> /32 -> stage 4 -> LayerNorm -> pool -> classifier

Stages 1, 2 and 4 are Swin's: blocks whose windows of 7 x 7 tokens are shifted in every other block. Stage 3 has most
of the blocks, and there semantic tokens take over:

- STViT (`stvit_swin_*`, section 3.2): after some of Swin's blocks two generation layers turn each window into 4 x 4
  semantic tokens. The other layers of the stage, and stage 4, work on these alone.
- STViT-R (`stvit_r_swin_*`, section 3.3): three rounds of one of Swin's blocks and a *dumbbell unit*: two generation
  layers (3 x 3 tokens a window), two layers on the semantic tokens, and a recovery layer that hands what these have
  learned back to the image tokens. The full map goes on, as detectors want it.

Inside a stage maps are channels last, `(B, H, W, C)`; between stages they are `(B, C, H, W)`, as timm wants them.

Images of any size: the stem pads to multiples of the patch with zeros, merging pads odd maps with zeros, and windows
that reach past a map see tokens that are zero before the projection, all as in the authors' code for detection. A map
that is no larger than a window, in height or width, is not shifted. Semantic tokens need no padding: the map is cut
into the number of windows that come closest to 7 x 7 tokens, by the bins of adaptive pooling.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    LayerNorm2d,
    RelPosBias,
    calculate_drop_path_rates,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..ops import window_attention
from ..ops.regions import ceil_div
from .layers import StagedBackbone, check_image
from .stvit import (
    CenterLayer,
    CrossAttention,
    CrossLayer,
    GlobalAttention,
    LocalAttention,
    PatchAttention,
    SelfLayer,
    resize_grid,
    window_count,
)
from .stvit_weights import ADVICE
from .stvit_weights import swin_filter_fn as checkpoint_filter_fn
from .weights import build_model

# --- Swin's parts -----------------------------------------------------------------------------------------------------


@register_notrace_function
def pad_image(x: Tensor, multiple: int) -> Tensor:
    """Pad `(B, C, H, W)` with zeros at the bottom and right so that `multiple` divides height and width."""
    h, w = x.shape[2], x.shape[3]
    pad_h, pad_w = ceil_div(h, multiple) * multiple - h, ceil_div(w, multiple) * multiple - w
    return F.pad(x, (0, pad_w, 0, pad_h)) if pad_h != 0 or pad_w != 0 else x


class Stem(nn.Module):
    """Image to the first map: Swin's patch embedding, or two 3 x 3 convolutions with Hardswish (STViT-R).

    `ape` adds a table of absolute positions, made for a map of `grid_size` and resampled for others.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        grid_size: Tuple[int, int],
        conv: bool = True,
        ape: bool = False,
        drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        if conv:
            strides = {2: (2, 1), 4: (2, 2)}.get(patch_size)
            if strides is None:
                raise ValueError(f"patch_size must be 2 or 4 with a convolutional stem, got {patch_size}")
            self.proj = nn.Sequential(
                nn.Conv2d(in_chans, dim // 2, 3, strides[0], padding=1, bias=False, **dd),
                nn.BatchNorm2d(dim // 2, **dd),
                nn.Hardswish(),
                nn.Conv2d(dim // 2, dim, 3, strides[1], padding=1, bias=False, **dd),
                nn.BatchNorm2d(dim, **dd),
                nn.Hardswish(),
            )
        else:
            conv1 = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
            self.proj = nn.Sequential(conv1, LayerNorm2d(dim, eps=1e-5, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, *grid_size, dim, **dd)) if ape else None
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        # channels last from here on: the blocks work on (B, H, W, C), and no map is ever laid out anew
        x = pad_image(x, self.patch_size).contiguous(memory_format=torch.channels_last)
        x = self.proj(x)
        if self.pos_embed is not None:
            x = x + resize_grid(self.pos_embed, x.shape[2], x.shape[3]).permute(0, 3, 1, 2)
        return self.drop(x)


@register_notrace_module  # it computes with sizes, which torch.fx cannot follow
class WindowAttention(nn.Module):
    """Swin's attention inside (shifted) windows with a relative position bias, `(B, H, W, C)` to the same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shifted: bool = False,
        qkv_bias: bool = True,
        qk_scale: Optional[float] = None,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be positive and divide the width {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.window_size = window_size
        self.shifted = shifted
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rel_pos = RelPosBias((window_size, window_size), num_heads, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        size = self.window_size
        h, w = min(size, x.shape[1]), min(size, x.shape[2])
        shift = size // 2 if self.shifted and x.shape[1] > size and x.shape[2] > size else 0
        index = self.rel_pos.relative_position_index.view(size, size, size, size)  # type: ignore[operator]
        index = index[:h, :w, :h, :w]
        bias = self.rel_pos.relative_position_bias_table[index.reshape(-1)]
        bias = bias.view(h * w, h * w, self.num_heads).permute(2, 0, 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        # what lies past the map is zero before the projection, so its bias is what comes out there
        pad_key: Optional[Tensor] = None
        pad_value: Optional[Tensor] = None
        if self.qkv.bias is not None:
            _, pad_key, pad_value = self.qkv.bias.chunk(3)
        x = window_attention(
            q, k, v, [h, w], self.num_heads, self.scale, [shift, shift], bias, pad_key, pad_value
        )
        return self.proj_drop(self.proj(x))


class Stage(nn.Module):
    """Merging (but for the first stage) and the blocks of one resolution, `(B, C, H, W)` to the same."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x.permute(0, 2, 3, 1))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


# --- semantic tokens (sections 3.1 to 3.3) ----------------------------------------------------------------------------


class SemanticTokens(nn.Module):
    """The semantic token generation module: image `(B, H, W, C)` to semantic tokens `(B, Hs, Ws, C)`.

    In the first layer pooled centres of a window query the image around it. In the second all of them, plus a learned
    global centre each where `use_global`, query one another and the whole image.
    """

    def __init__(self, layer1: CenterLayer, layer2: CrossLayer, centers: Optional[nn.Parameter] = None):
        super().__init__()
        self.layer1 = layer1
        self.layer2 = layer2
        self.centers = centers
        if centers is not None:
            trunc_normal_(centers, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        s = self.layer1(x)
        keys = torch.cat([s.flatten(1, 2), x.flatten(1, 2)], 1)
        if self.centers is not None:
            s = s + resize_grid(self.centers, s.shape[1], s.shape[2])
        return self.layer2(s.flatten(1, 2), keys).view(s.shape)


class DumbbellUnit(nn.Module):
    """Generation, layers on the semantic tokens, recovery, `(B, H, W, C)` to the same (section 3.3, figure 2b)."""

    def __init__(self, generation: SemanticTokens, layers: Sequence[nn.Module], recovery: CrossLayer):
        super().__init__()
        self.generation = generation
        self.layers = nn.Sequential(*layers)
        self.recovery = recovery

    def forward(self, x: Tensor) -> Tensor:
        s = self.layers(self.generation(x))
        return self.recovery(x.flatten(1, 2), s.flatten(1, 2)).view(x.shape)


# --- the network ------------------------------------------------------------------------------------------------------

ROUND = 6  # layers of one round of STViT-R: Swin's block, two of generation, two on semantic tokens, recovery


class STViTSwin(StagedBackbone):
    """STViT and STViT-R on Swin, for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: size of the output; 0 for pooled features.
        global_pool: `avg`, `max`, `avgmax`, `catavgmax`, `fast`, or empty for the map itself.
        img_size: pixels, or (height, width), that tables of positions and centres are made for. Any size runs; such
            tables are resampled then.
        patch_size: stride of the stem; 2 or 4 with `conv_stem`.
        embed_dim: width of the first stage; doubles with each.
        depths: layers of each stage. With `recover`, the semantic stage has a multiple of 6.
        num_heads: heads of each stage.
        window_size: tokens per side of an image window; at most those of the map, as `img_size` makes it.
        sample_window_size: semantic tokens per side of a window.
        semantic_stage: index of the stage with semantic tokens.
        recover: STViT-R: semantic tokens give back what they have learned, and the full map goes on.
        image_blocks: without `recover`, Swin's blocks before the semantic tokens.
        conv_stem: two 3 x 3 convolutions instead of Swin's patch embedding.
        mlp_ratio: MLP expansion.
        qkv_bias: biases of the projections to queries, keys and values.
        qk_scale: factor of the scores in Swin's blocks outside the semantic stage; default: head width ** -0.5.
        use_global: learned global centres in the (first) generation.
        use_conv_pos: position convolution of the pooled centres.
        shortcut: residual around the first generation layer.
        relative_pos: relative position bias between semantic tokens.
        init_values: initial layer scale of the layers of semantic tokens; None for none.
        use_layer_scale: layer scale in Swin's blocks outside the semantic stage, too (from 1e-5).
        ape: a table of absolute positions after the stem.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the stem.
        proj_drop_rate: dropout after projections.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        sample_window_size: int = 3,
        semantic_stage: int = 2,
        recover: bool = True,
        image_blocks: int = 4,
        conv_stem: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: Optional[float] = None,
        use_global: bool = False,
        use_conv_pos: bool = False,
        shortcut: bool = False,
        relative_pos: bool = False,
        init_values: Optional[float] = 1e-5,
        use_layer_scale: bool = False,
        ape: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if len(num_heads) != len(depths):
            raise ValueError(
                f"num_heads must have one entry per stage ({len(depths)}, as depths), got {tuple(num_heads)}"
            )
        if not 0 <= semantic_stage < len(depths):
            raise ValueError(f"semantic_stage must be from 0 to {len(depths) - 1}, got {semantic_stage}")
        if window_size < 1 or sample_window_size < 1:
            raise ValueError(
                f"window_size and sample_window_size must be positive, got {window_size} and {sample_window_size}"
            )
        depth = depths[semantic_stage]
        if recover and (depth < ROUND or depth % ROUND):
            raise ValueError(
                f"with recover the semantic stage is made of rounds of {ROUND} layers, so its depth must be a "
                f"multiple of {ROUND}, got {depth} (the published code leaves layers beyond that without effect)"
            )
        if not recover and not 0 <= image_blocks <= depth - 2:
            raise ValueError(
                f"image_blocks must leave room for the two layers of generation: 0 to {depth - 2} of the "
                f"{depth} layers of the semantic stage, got {image_blocks}"
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.semantic_stage = semantic_stage
        check_image(torch.empty(0, in_chans, *to_2tuple(img_size), device="meta"), in_chans, 1, 1)

        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        # the map that enters each stage, and the semantic tokens that are made of it
        size = to_2tuple(img_size)
        grids = [(ceil_div(size[0], patch_size), ceil_div(size[1], patch_size))]
        windows = [window_size]
        for i in range(1, len(depths)):
            made = not recover and i - 1 == semantic_stage
            last = tuple(window_count(x, window_size) * sample_window_size if made else x for x in grids[-1])
            grids.append((ceil_div(last[0], 2), ceil_div(last[1], 2)))
            windows.append(sample_window_size if made else windows[-1])
        tokens = tuple(window_count(x, window_size) * sample_window_size for x in grids[semantic_stage])

        at = semantic_stage

        def attention(cls: Callable[..., Any], i: int, **options: Any) -> Any:
            return cls(dims[i], num_heads[i], qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **options, **dd)

        def layer(cls: Callable[..., Any], i: int, j: int, attn: nn.Module, **options: Any) -> Any:
            common = {"mlp_ratio": mlp_ratio, "init_values": init_values, "proj_drop": proj_drop_rate, **dd}
            return cls(dims[i], attn, drop_path=rates[i][j], **{**common, **options})

        def swin_block(i: int, j: int, shifted: bool) -> nn.Module:
            # in the semantic stage the published code passes on neither scale nor layer scale
            scale, init = (None, None) if i == at else (qk_scale, 1e-5 if use_layer_scale else None)
            options = {"window_size": min(windows[i], *grids[i]), "shifted": shifted, "qk_scale": scale}
            return layer(SelfLayer, i, j, attention(WindowAttention, i, **options), init_values=init)

        def cross_layer(j: int) -> CrossLayer:
            return layer(CrossLayer, at, j, attention(CrossAttention, at))

        def semantic_tokens(j: int, with_centers: bool) -> SemanticTokens:
            patch = ceil_div(10 * window_size, 7)  # 10 for windows of 7, as published
            attn = attention(PatchAttention, at, window_size=sample_window_size, patch_size=patch)
            options = {"image_window": window_size, "use_conv_pos": use_conv_pos, "shortcut": shortcut}
            centers = nn.Parameter(torch.empty(1, *tokens, dims[at], **dd)) if with_centers else None
            return SemanticTokens(layer(CenterLayer, at, j, attn, **options), cross_layer(j + 1), centers)

        def semantic_layer(j: int, local: bool) -> nn.Module:
            options = {"window_size": sample_window_size} if local else {"grid_size": tokens}
            cls = LocalAttention if local else GlobalAttention
            return layer(SelfLayer, at, j, attention(cls, at, relative_pos=relative_pos, **options))

        def semantic_blocks() -> list[nn.Module]:
            if not recover:
                blocks = [swin_block(at, j, j % 2 == 1) for j in range(image_blocks)]
                blocks.append(semantic_tokens(image_blocks, use_global))
                after = range(image_blocks + 2, depth)
                return blocks + [semantic_layer(j, (j - image_blocks) % 2 == 0) for j in after]
            blocks = []
            for j in range(0, depth, ROUND):
                layers = [semantic_layer(j + 3, local=True), semantic_layer(j + 4, local=False)]
                generation = semantic_tokens(j + 1, use_global and j == 0)
                unit = DumbbellUnit(generation, layers, cross_layer(j + 5))
                blocks += [swin_block(at, j, shifted=False), unit]
            return blocks

        # where the layers of Swin's stage are in ours
        if recover:
            unit = ("generation.layer1", "generation.layer2", "layers.0", "layers.1", "recovery")
            rounds = ((f"{2 * r}", *(f"{2 * r + 1}.{x}" for x in unit)) for r in range(depth // ROUND))
            self.places = [place for layers in rounds for place in layers]
        else:
            places = range(depth - 1)
            generation = (f"{image_blocks}.layer1", f"{image_blocks}.layer2")
            self.places = [
                *map(str, places[:image_blocks]),
                *generation,
                *map(str, places[image_blocks + 1 :]),
            ]

        self.stem = Stem(in_chans, embed_dim, patch_size, grids[0], conv_stem, ape, pos_drop_rate, **dd)
        stages = []
        self.feature_info = []
        for i in range(len(depths)):
            downsample = PatchMerging(dims[i - 1], **dd) if i else nn.Identity()
            blocks = (
                semantic_blocks() if i == at else [swin_block(i, j, j % 2 == 1) for j in range(depths[i])]
            )
            stages.append(Stage(downsample, blocks))
            reduction = patch_size * 2**i
            if not recover and i >= at:
                reduction = reduction * window_size // sample_window_size
            self.feature_info.append({"num_chs": dims[i], "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-5, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: the tables of positions, as in the published code."""
        tables = ("relative_position_bias_table", "stem.pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}


# --- variants ---------------------------------------------------------------------------------------------------------


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["depths"]))))
    return build_model(
        STViTSwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        advice=ADVICE.format(tag="stvit_swin_small.swin_in1k_init"),
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2303.08685",
        "paper_name": "Making Vision Transformers Efficient from A Token Sparsification View",
        "origin_url": "https://github.com/changsn/STViT-R",
        **kwargs,
    }


def _swin_cfg(size: str) -> dict[str, Any]:
    """Weights of Swin: where to start from."""
    return _cfg(
        hf_hub_id=f"timm/swin_{size}_patch4_window7_224.ms_in1k",
        pool_size=(4, 4),
        origin_url="https://github.com/microsoft/Swin-Transformer",
    )


def _released_cfg(file: str) -> dict[str, Any]:
    return _cfg(hf_hub_id="csncsn/STViT-R", hf_hub_filename=file)


_PICO = {"input_size": (3, 32, 32), "crop_pct": 1.0}
# the star makes a tag without weights the default: pretrained=True must not pass off Swin for STViT
default_cfgs = generate_default_cfgs(
    {
        "stvit_swin_pico": _cfg(pool_size=(2, 2), **_PICO),
        "stvit_swin_tiny.swin_in1k_init": _swin_cfg("tiny"),
        "stvit_swin_tiny.*": _cfg(pool_size=(4, 4)),
        "stvit_swin_small.swin_in1k_init": _swin_cfg("small"),
        "stvit_swin_small.*": _cfg(pool_size=(4, 4)),
        "stvit_swin_base.swin_in1k_init": _swin_cfg("base"),
        "stvit_swin_base.*": _cfg(pool_size=(4, 4)),
        "stvit_r_swin_pico": _cfg(pool_size=(4, 4), **_PICO),
        "stvit_r_swin_tiny": _cfg(),
        "stvit_r_swin_small.in1k": _released_cfg("STViT-R-Swin-S.pth"),
        "stvit_r_swin_base.in1k": _released_cfg("STViT-R-Swin-B.pth"),
    }
)

# section 3.2: Swin's stem and widths, 16 semantic tokens a window, everything else as the equations have it
_STVIT = {
    "recover": False,
    "conv_stem": False,
    "sample_window_size": 4,
    "shortcut": True,
    "init_values": None,
}
_PICO_ARGS = {
    "patch_size": 2,
    "embed_dim": 32,
    "num_heads": (1, 2, 4),
    "window_size": 4,
    "sample_window_size": 2,
    "semantic_stage": 1,
    "img_size": 32,
    "conv_stem": True,
}


@register_model
def stvit_swin_pico(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """Ours, for images of 32 x 32 pixels."""
    model_args = dict(_STVIT, depths=(1, 5, 1), image_blocks=1, **_PICO_ARGS)
    return _create("stvit_swin_pico", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_swin_tiny(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-Swin-T, after section 3.2 of the paper."""
    model_args = dict(_STVIT, depths=(2, 2, 6, 2), image_blocks=4)
    return _create("stvit_swin_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_swin_small(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-Swin-S, after section 3.2 of the paper."""
    model_args = dict(_STVIT, depths=(2, 2, 18, 2), image_blocks=12)
    return _create("stvit_swin_small", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_swin_base(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-Swin-B, after section 3.2 of the paper."""
    model_args = dict(_STVIT, depths=(2, 2, 18, 2), image_blocks=12, embed_dim=128, num_heads=(4, 8, 16, 32))
    return _create("stvit_swin_base", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_r_swin_pico(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """Ours, for images of 32 x 32 pixels."""
    model_args = dict(depths=(1, 6, 1), **_PICO_ARGS)
    return _create("stvit_r_swin_pico", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_r_swin_tiny(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-R-Swin-T: the recovering form with Swin-T's depths."""
    return _create("stvit_r_swin_tiny", pretrained, **dict({"depths": (2, 2, 6, 2)}, **kwargs))


@register_model
def stvit_r_swin_small(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-R-Swin-S: 49.6 M parameters, 5.8 GMAC, 82.7% top-1 (published)."""
    return _create("stvit_r_swin_small", pretrained, **dict({"depths": (2, 2, 18, 2)}, **kwargs))


@register_model
def stvit_r_swin_base(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-R-Swin-B: 87.8 M parameters, 10.3 GMAC, 83.2% top-1 (published)."""
    model_args = {"depths": (2, 2, 18, 2), "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
    return _create("stvit_r_swin_base", pretrained, **dict(model_args, **kwargs))
