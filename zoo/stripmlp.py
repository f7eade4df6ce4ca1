"""Strip-MLP: a backbone of multilayer perceptrons that mix along strips.

Paper: "Strip-MLP: Efficient Token Interaction for Vision MLP", Cao et al., ICCV 2023, arXiv 2307.11458.
Published code: https://github.com/Med-Process/Strip_MLP (MIT).

    image -> stem /4 -> stage 1 -> merge /8 -> stage 2 -> merge /16 -> stage 3 -> merge /32 -> stage 4 -> BatchNorm
                                     |                    ^  |                     ^  ^    -> pool -> classifier
                                     +------ halved ------+--|------ halved -------+  |
                                                             +------ halved ----------+

A block (figure 2) is token mixing and channel mixing, each with a residual. Token mixing splits the channels in two
halves. The first goes through cascade group strip mixing (CGSMM): every token receives a weighted sum of the
tokens of its row and of the two rows beside it, then the same along columns; channels share a weight in groups. The
second goes through local strip mixing (LSMM): 3 x 7 and 7 x 3 depthwise convolutions, blended with the identity.
Channel mixing is a 7 x 7 depthwise convolution and an MLP with global response normalisation.

Strip weights join every position of a row to every other, so a network is made for one image size. `set_input_size`
makes it one for another, and a checkpoint of another size is resampled as it is loaded; see `stripmlp_weights.py`.

Inside a stage maps are channels last, `(B, H, W, C)`; between stages they are `(B, C, H, W)`, as timm wants them.
"""

import warnings
from collections.abc import Sequence
from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    GlobalResponseNormMlp,
    Mlp,
    calculate_drop_path_rates,
    to_2tuple,
    trunc_normal_,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models import checkpoint_seq, generate_default_cfgs, register_model, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ..ops import strip_mix
from .layers import StagedBackbone, check_img_size
from .stripmlp_weights import from_authors, resample_strips, resample_table
from .weights import build_model, check_state_dict

register_notrace_function(strip_mix)  # it branches on sizes, which torch.fx cannot follow
# likewise; it is called before any module of this file, which is when timm's registration takes hold
torch.fx.wrap("check_img_size")


def _resampled(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    """A parameter with new values, of another shape unless they are the old ones; what was frozen stays so."""
    return old if new is old else nn.Parameter(new.detach(), requires_grad=old.requires_grad)


# --- cascade group strip mixing ---------------------------------------------------------------------------------------


class RelativePosition(nn.Module):
    """Adds to `(B, H, W, C)` a learned vector that depends on the token's distance from the diagonal, x - y."""

    def __init__(self, dim: int, size: Tuple[int, int], device: Any = None, dtype: Any = None):
        super().__init__()
        self.size = size
        self.table = nn.Parameter(torch.empty(2 * max(size) + 1, dim, device=device, dtype=dtype))
        self.index: Tensor
        self.register_buffer("index", torch.empty(size, device=device, dtype=torch.int64), persistent=False)
        trunc_normal_(self.table, std=0.02)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Rows of the table for each token: its distance, with -M at 0."""
        rows, cols = (torch.arange(n, device=self.table.device) for n in self.size)
        self.index = cols - rows[:, None] + max(self.size)

    @torch.jit.ignore
    def set_input_size(self, size: Tuple[int, int]) -> None:
        """Serve maps of another size."""
        self.size = size
        self.table = _resampled(self.table, resample_table(self.table, max(size)))
        self.init_non_persistent_buffers()

    def forward(self, x: Tensor) -> Tensor:
        return x + F.embedding(self.index, self.table)


class StripLayer(nn.Module):
    """Mixing along strips of one length, and across adjacent ones: rows for `axis` 2, columns for 1."""

    def __init__(self, length: int, groups: int, axis: int, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.axis = axis
        self.weight = nn.Parameter(torch.empty(3, length, length, groups, **dd))
        self.bias = nn.Parameter(torch.empty(length, groups, **dd))
        bound = (3 * length) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @torch.jit.ignore
    def set_input_size(self, length: int) -> None:
        """Serve strips of another length."""
        weight, bias = resample_strips(self.weight, self.bias, length)
        self.weight, self.bias = _resampled(self.weight, weight), _resampled(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return strip_mix(x, self.weight, self.bias, self.axis)


class CascadeGroupStripMixing(nn.Module):
    """Mixing along rows, then along columns, each fused with the input, `(B, H, W, C)` to the same.

    Channels are seen as patches of `groups` each; the channels at one place of all patches share a weight.
    """

    def __init__(self, dim: int, groups: int, size: Tuple[int, int], device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.row_pos = RelativePosition(dim, size, **dd)
        self.row_mix = StripLayer(size[1], groups, axis=2, **dd)
        self.row_fuse = nn.Linear(2 * dim, dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()
        self.col_pos = RelativePosition(dim, size, **dd)
        self.col_mix = StripLayer(size[0], groups, axis=1, **dd)
        self.col_fuse = nn.Linear(2 * dim, dim, bias=False, **dd)

    @torch.jit.ignore
    def set_input_size(self, size: Tuple[int, int]) -> None:
        """Serve maps of another size."""
        self.row_pos.set_input_size(size)
        self.row_mix.set_input_size(size[1])
        self.col_pos.set_input_size(size)
        self.col_mix.set_input_size(size[0])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.row_fuse(torch.cat([self.row_mix(self.row_pos(x)), x], dim=-1))
        rows = self.act(self.norm(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.col_fuse(torch.cat([x, self.col_mix(self.col_pos(rows))], dim=-1))


# --- local strip mixing -----------------------------------------------------------------------------------------------


class LocalStripMixing(nn.Module):
    """A 3 x 7, a 7 x 3 depthwise convolution and the identity, blended by three weights per channel and image."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.row_conv = nn.Conv2d(dim, dim, (3, 7), padding=(1, 3), groups=dim, bias=False, **dd)
        self.col_conv = nn.Conv2d(dim, dim, (7, 3), padding=(3, 1), groups=dim, bias=False, **dd)
        self.reweight = Mlp(dim, dim // 2, 3 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.row_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        cols = self.col_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        pooled = rows.mean((1, 2)) + cols.mean((1, 2)) + x.mean((1, 2))
        weights = self.reweight(pooled).reshape(x.shape[0], 1, 1, x.shape[3], 3).softmax(-1)
        of_cols, of_rows, of_x = weights.unbind(-1)
        return torch.addcmul(torch.addcmul(x * of_x, rows, of_rows), cols, of_cols)


# --- block, stage, network (figure 2) ---------------------------------------------------------------------------------


def strip_groups(dim: int) -> int:
    """How many groups the channels of half a block of width `dim` fall into.

    The published code cuts them into two patches where 80 divides the width, else into four.
    """
    groups = dim // 2 // (2 if dim % 80 == 0 else 4)
    if dim % 2 or groups == 0 or dim // 2 % groups:
        raise ValueError(
            f"a stage of width {dim} cannot be cut into two halves of patches of channels; "
            "make embed_dim a multiple of 8"
        )
    return groups


class TokenMixing(nn.Module):
    """Both mixings, each on half of the channels, `(B, H, W, C)` to the same."""

    def __init__(self, dim: int, size: Tuple[int, int], device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.strips = CascadeGroupStripMixing(dim // 2, strip_groups(dim), size, **dd)
        self.local = LocalStripMixing(dim // 2, **dd)
        self.fuse = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.act(self.norm1(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        x = self.norm2(self.proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        far, near = x.chunk(2, dim=-1)
        # activated apart, each half becomes a map of its own
        return self.fuse(torch.cat([self.strips(self.act(far)), self.local(self.act(near))], dim=-1))


class ResponseNorm(GlobalResponseNorm):
    """timm's global response normalisation, with one pass over the wide map where timm's takes three."""

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(p=2, dim=(1, 2), keepdim=True)
        return torch.addcmul(
            self.bias, x, 1 + self.weight * (norm / (norm.mean(-1, keepdim=True) + self.eps))
        )


class ChannelMixing(nn.Module):
    """Depthwise convolution and an MLP with global response normalisation, `(B, H, W, C)` to the same."""

    def __init__(self, dim: int, hidden: int, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, bias=False, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = GlobalResponseNormMlp(dim, hidden, **dd)
        self.mlp.grn = ResponseNorm(hidden, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


class StripMLPBlock(nn.Module):
    """Token mixing and channel mixing, each with a residual."""

    def __init__(
        self, dim: int, size: Tuple[int, int], mlp_ratio: float, drop_path: float, device: Any, dtype: Any
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.token_mixing = TokenMixing(dim, size, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.channel_mixing = ChannelMixing(dim, int(mlp_ratio * dim), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.token_mixing(x))
        return x + self.drop_path2(self.channel_mixing(x))


class StripMLPStage(nn.Module):
    """Merging (but for the first stage), skips from the stages before, and blocks, `(B, C, H, W)` to the same.

    A merged map also travels past the blocks that follow: at every later stage it is halved and added to that stage's
    own. `merged` holds these maps, each as large as the last stage's; the stage halves them in place and adds its own.
    """

    def __init__(
        self, in_dim: int, dim: int, index: int, blocks: Sequence[nn.Module], device: Any, dtype: Any
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.first = index == 0
        self.downsample = (
            nn.Identity() if self.first else nn.Conv2d(in_dim, dim, 2, stride=2, bias=False, **dd)
        )
        self.skips = nn.ModuleList(
            nn.Conv2d(in_dim, dim, 2, stride=2, groups=in_dim, bias=False, **dd) for _ in range(index - 1)
        )
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, merged: List[Tensor]) -> Tensor:
        x = self.downsample(x)
        own = x
        for i, skip in enumerate(self.skips):
            merged[i] = skip(merged[i])
            x = x + merged[i]
        if not self.first:
            merged.append(own)
        x = x.permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class StripMLP(StagedBackbone):
    """Strip-MLP for images of one size.

    Args:
        in_chans: channels of the image.
        num_classes: size of the output; 0 for pooled features.
        global_pool: `avg`, `max`, `avgmax`, `catavgmax`, `fast`, or empty for the map itself.
        img_size: pixels, or (height, width): multiples of 8 times the patch size.
        patch_size: pixels per side of a token of the first stage.
        depths: blocks of each of the four stages.
        embed_dim: width of the first stage; doubles from stage to stage.
        mlp_ratio: expansion of channel mixing.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        uniform_drop_path: the same rate in every block instead, as the authors trained (0.1).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 12, 2),
        embed_dim: int = 80,
        mlp_ratio: float = 3.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        uniform_drop_path: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size must be a positive integer, got {patch_size}")
        if len(depths) != 4:
            raise ValueError(f"depths must have four entries, one per stage, got {tuple(depths)}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = 8 * embed_dim
        self.patch_size = patch_size
        self.img_size = self._valid_size(img_size)

        self.stem = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=False, **dd)
        rates: Any = [[drop_path_rate] * depth for depth in depths]
        if not uniform_drop_path:
            rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        self.feature_info = []
        for i in range(4):
            dim = embed_dim * 2**i
            blocks = [StripMLPBlock(dim, self._map_size(i), mlp_ratio, rate, **dd) for rate in rates[i]]
            stages.append(StripMLPStage(dim // 2, dim, i, blocks, **dd))
            self.feature_info.append(
                {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"}
            )
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.head.num_features

    def _valid_size(self, img_size: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
        """Height and width, if the network can be made for them."""
        height, width = to_2tuple(img_size)
        step = 8 * self.patch_size
        if min(height, width) < 1 or height % step or width % step:
            below = [max(n // step, 1) * step for n in (height, width)]
            above = [max(-(-n // step), 1) * step for n in (height, width)]
            raise ValueError(
                f"img_size must be a multiple of {step} (8 times the patch size) in height and width, got {height} x "
                f"{width}; the nearest are {below[0]} x {below[1]} and {above[0]} x {above[1]}"
            )
        return height, width

    def _map_size(self, stage: int) -> Tuple[int, int]:
        reduction = self.patch_size * 2**stage
        return self.img_size[0] // reduction, self.img_size[1] // reduction

    @torch.jit.ignore
    def set_input_size(self, img_size: Optional[Union[int, Tuple[int, int]]] = None) -> None:
        """Make the network one for images of another size: strip weights and position tables are resampled.

        Raises:
            ValueError: the size is no multiple of 8 times the patch size; nothing has changed then.
        """
        if img_size is None:
            return
        self.img_size = self._valid_size(img_size)
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                block.token_mixing.strips.set_input_size(self._map_size(i))
        update_model_input_size(self, self.img_size)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters into layers, for layer-wise learning rates."""
        matcher = super().group_matcher(coarse)
        if not coarse:
            matcher["blocks"].insert(0, (r"^stages\.(\d+)\.skips", (0,)))
        return matcher

    def forward_stem(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to the map that enters stage 1."""
        check_img_size(x, self.in_chans, self.img_size[0], self.img_size[1])
        # channels last from here on: the blocks work on (B, H, W, C), and no map is ever laid out anew
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def forward_stages(self, x: Tensor, count: int) -> List[Tensor]:
        """The map that enters stage 1 to the maps of the first `count` stages."""
        maps: List[Tensor] = []
        merged: List[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i < count:
                x = stage(x, merged)
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to the last, normalised map."""
        return self.norm(self.forward_stages(self.forward_stem(x), len(self.stages))[-1])


# --- weights ----------------------------------------------------------------------------------------------------------


def _resample(state_dict: dict[str, Tensor], model: "StripMLP") -> bool:
    """Bring strip weights and position tables of another size to the model's, in place; whether there were any."""
    before = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, StripLayer):
            weight, bias = state_dict.get(f"{name}.weight"), state_dict.get(f"{name}.bias")
            length, groups = module.bias.shape
            if weight is None or bias is None or bias.shape != (len(bias), groups):
                continue
            if weight.shape == (3, len(bias), len(bias), groups):
                state_dict[f"{name}.weight"], state_dict[f"{name}.bias"] = resample_strips(
                    weight, bias, length
                )
        elif isinstance(module, RelativePosition):
            table = state_dict.get(f"{name}.table")
            if table is not None and len(table) % 2:
                state_dict[f"{name}.table"] = resample_table(table, max(module.size))
    return any(state_dict[key] is not value for key, value in before.items())


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: "StripMLP") -> dict[str, Tensor]:
    """Turn the authors' checkpoint layout into ours; ours passes through. Refuses what does not fit the model.

    Strip weights and position tables of another image size are resampled, with a warning.
    """
    state_dict = dict(state_dict)
    if any(key.startswith("patch_embed.") for key in state_dict):
        state_dict = from_authors(state_dict)
    # the authors have 1 x 1 convolutions where we have linear layers
    for key, value in model.state_dict().items():
        if value.dim() == 2 and key in state_dict and state_dict[key].shape[2:] == (1, 1):
            state_dict[key] = state_dict[key].flatten(1)
    first = "stages.0.blocks.0.token_mixing.strips."
    sides = [len(state_dict.get(f"{first}{x}_mix.bias", ())) * model.patch_size for x in ("col", "row")]
    resampled = _resample(state_dict, model)
    state_dict = check_state_dict(state_dict, model)
    if resampled:
        warnings.warn(
            f"the checkpoint is for images of {sides[0]} x {sides[1]} pixels, the model for {model.img_size[0]} x "
            f"{model.img_size[1]}: strip weights and position tables were resampled; fine-tune for best results",
            stacklevel=2,
        )
    return state_dict


_ADVICE = (
    "the authors' files are on pan.baidu.com, linked from github.com/Med-Process/Strip_MLP; download one by hand and "
    "pass pretrained_cfg_overlay=dict(file=...), or convert it to safetensors once with `vitrail convert`"
)


def _create_stripmlp(variant: str, pretrained: bool = False, **kwargs: Any) -> StripMLP:
    feature_cfg: dict[str, Any] = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3))}
    # timm's list and dict run stages one after the other, without the skips; these give the same list and dict
    form = kwargs.pop("feature_cls", "getter")
    if form == "dict":
        indices = feature_take_indices(4, feature_cfg["out_indices"])[0]
        feature_cfg.update(feature_cls="hook", return_dict=True, out_map=[str(i) for i in indices])
    else:
        feature_cfg["feature_cls"] = "getter" if form == "list" else form
    return build_model(
        StripMLP,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        advice="" if variant == "stripmlp_pico" else _ADVICE,
        **_VARIANTS[variant] | kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2307.11458",
        "paper_name": "Strip-MLP: Efficient Token Interaction for Vision MLP",
        "origin_url": "https://github.com/Med-Process/Strip_MLP",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "stripmlp_tiny_light": _cfg(),
        "stripmlp_tiny": _cfg(),
        "stripmlp_small": _cfg(),
        "stripmlp_base": _cfg(),
        "stripmlp_pico": _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0, paper_ids=None),
    }
)


_VARIANTS: dict[str, dict[str, Any]] = {
    "stripmlp_tiny_light": {"depths": (2, 2, 6, 2), "embed_dim": 80},
    "stripmlp_tiny": {"depths": (2, 2, 12, 2), "embed_dim": 80},
    "stripmlp_small": {"depths": (2, 2, 18, 2), "embed_dim": 96},
    "stripmlp_base": {"depths": (2, 2, 18, 2), "embed_dim": 112},
    "stripmlp_pico": {"depths": (1, 1, 2, 1), "embed_dim": 24, "patch_size": 2, "img_size": 32},
}


@register_model
def stripmlp_tiny_light(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Strip-MLP-T*: 18.2 M parameters, 2.5 GMAC, 81.2% top-1 (published)."""
    return _create_stripmlp("stripmlp_tiny_light", pretrained, **kwargs)


@register_model
def stripmlp_tiny(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Strip-MLP-T: 24.9 M parameters, 3.7 GMAC, 82.2% top-1 (published)."""
    return _create_stripmlp("stripmlp_tiny", pretrained, **kwargs)


@register_model
def stripmlp_small(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Strip-MLP-S: 42.6 M parameters, 6.8 GMAC, 83.3% top-1 (published)."""
    return _create_stripmlp("stripmlp_small", pretrained, **kwargs)


@register_model
def stripmlp_base(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Strip-MLP-B: 57.2 M parameters, 9.2 GMAC, 83.6% top-1 (published)."""
    return _create_stripmlp("stripmlp_base", pretrained, **kwargs)


@register_model
def stripmlp_pico(pretrained: bool = False, **kwargs: Any) -> StripMLP:
    """Ours, small enough to train on a laptop: 32 x 32 images, 0.9 M parameters, 9.4 MMAC."""
    return _create_stripmlp("stripmlp_pico", pretrained, **kwargs)
