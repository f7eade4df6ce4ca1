"""STViT on DeiT: after a few layers, sixteen semantic tokens instead of the image's.

Paper: "Making Vision Transformers Efficient from A Token Sparsification View", Chang et al., CVPR 2023,
arXiv 2303.08685, sections 3.1 and 3.3. The authors never published the code of this form; what the paper leaves open
(attention of the centres to one another, pooling by the maximum) follows their code for Swin.

    image -> patches of 16 -> 4 layers -> generation (2 layers) -> 6 layers -> LayerNorm -> mean -> classifier
             196 tokens       196         16                       16

- STViT (`stvit_deit_*`, section 3.1): the 14 x 14 map is pooled to 4 x 4 centres, which gather from all image tokens
  (eq. 1), then, with a learned global centre added to each, from one another and all image tokens (eq. 2). The layers
  after that are DeiT's, on the semantic tokens alone.
- STViT-R (`stvit_r_deit_*`, section 3.3): a *dumbbell unit* of two generation layers, layers on the semantic tokens,
  and a recovery layer in which the image tokens gather from the semantic ones, so that the full map goes on.

As in the paper there is no class token: the mean of the last tokens is classified. With `class_token=True` there is
one, which in generation and recovery queries like the tokens that go on, and is a key for all of them.
"""

from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, PatchEmbed, calculate_drop_path_rates
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..ops.regions import ceil_div
from .layers import check_img_size, check_patches
from .stvit import CrossAttention, CrossLayer, max_pool_bins
from .stvit_weights import ADVICE
from .stvit_weights import deit_filter_fn as checkpoint_filter_fn
from .weights import build_model


class FixedPatchEmbed(PatchEmbed):
    """timm's patch embedding with an error that says what to do about images of another size."""

    def forward(self, x: Tensor) -> Tensor:
        check_img_size(x, self.proj.in_channels, self.img_size[0], self.img_size[1])
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


# --- semantic tokens (sections 3.1 and 3.3) ---------------------------------------------------------------------------


class SemanticTokens(nn.Module):
    """The semantic token generation module: `(B, N, C)` to `(B, s * s, C)`; a class token in front stays there."""

    def __init__(
        self,
        layer1: CrossLayer,
        layer2: CrossLayer,
        grid_size: Tuple[int, int],
        sample_window_size: int,
        class_token: bool,
        centers: Optional[nn.Parameter],
    ):
        super().__init__()
        self.layer1 = layer1
        self.layer2 = layer2
        self.grid_size = grid_size
        self.sample_window_size = sample_window_size
        self.first = 1 if class_token else 0
        self.centers = centers

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, self.first :]
        grid = image.unflatten(1, [self.grid_size[0], self.grid_size[1]])
        s = max_pool_bins(grid, self.sample_window_size, self.sample_window_size).flatten(1, 2)
        if self.first:
            s = torch.cat([x[:, : self.first], s], 1)
        s = self.layer1(s, torch.cat([s, image], 1))
        queries = s
        if self.centers is not None:
            queries = s + F.pad(self.centers, (0, 0, self.first, 0))
        return self.layer2(queries, torch.cat([s, image], 1))


class DumbbellUnit(nn.Module):
    """Generation, layers on the semantic tokens, recovery, `(B, N, C)` to the same (section 3.3)."""

    def __init__(self, generation: SemanticTokens, layers: List[nn.Module], recovery: CrossLayer):
        super().__init__()
        self.generation = generation
        self.layers = nn.Sequential(*layers)
        self.recovery = recovery

    def forward(self, x: Tensor) -> Tensor:
        return self.recovery(x, self.layers(self.generation(x)))


# --- the network ------------------------------------------------------------------------------------------------------


class STViTDeiT(VisionTransformer):
    """STViT and STViT-R on DeiT, for images of one size (`img_size`, `set_input_size`).

    `blocks` has one entry for the generation module, or for the dumbbell unit, and one for each other layer. In
    `features_only` and `forward_intermediates` the maps are those of the entries: of the image before generation, of
    the s x s semantic tokens after it, of the image again after recovery.

    Args:
        img_size: pixels, or (height, width); multiples of `patch_size`.
        patch_size: pixels per side of a patch.
        in_chans: channels of the image.
        num_classes: size of the output; 0 for pooled features.
        global_pool: `avg`, `max`, `avgmax`, empty for the tokens themselves, or `token` with `class_token`.
        embed_dim: width.
        depth: layers, generation (2) and recovery (1) among them.
        num_heads: number of heads.
        mlp_ratio: MLP expansion.
        qkv_bias: biases of the projections to queries, keys and values.
        init_values: initial layer scale; None for none.
        class_token: a class token, as DeiT has it.
        fc_norm: the final norm after pooling instead of before it.
        sample_window_size: semantic tokens per side.
        image_blocks: layers before generation.
        recover: STViT-R: semantic tokens give back what they have learned.
        recovered_blocks: layers after recovery.
        use_global: learned global centres in the second generation layer.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position table.
        proj_drop_rate: dropout after projections.
        attn_drop_rate: dropout of attention in DeiT's layers.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0.
        weight_init: see timm's `VisionTransformer`.
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: Union[int, Tuple[int, int]] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Any = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: Optional[float] = None,
        class_token: bool = False,
        fc_norm: bool = False,
        sample_window_size: int = 4,
        image_blocks: int = 4,
        recover: bool = False,
        recovered_blocks: int = 1,
        use_global: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: Any = "",
        device: Any = None,
        dtype: Any = None,
    ):
        dd = {"device": device, "dtype": dtype}
        check_patches(img_size, patch_size)
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool 'token' needs class_token=True; the paper pools by 'avg'")
        if sample_window_size < 1:
            raise ValueError(f"sample_window_size must be positive, got {sample_window_size}")
        last = recovered_blocks + 1 if recover else 0
        if image_blocks < 0 or recovered_blocks < 0 or image_blocks + 2 + last > depth:
            raise ValueError(
                f"depth {depth} must hold image_blocks ({image_blocks}), the two layers of generation"
                + (f", recovery and recovered_blocks ({recovered_blocks})" if recover else "")
            )
        super().__init__(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, embed_dim=embed_dim, depth=0, num_heads=num_heads, mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias, init_values=init_values, class_token=class_token, fc_norm=fc_norm, drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate, embed_layer=FixedPatchEmbed, weight_init="skip", **dd,
        )  # fmt: skip
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        common = {"mlp_ratio": mlp_ratio, "init_values": init_values, "proj_drop": proj_drop_rate, **dd}

        def block(i: int) -> nn.Module:
            return Block(
                embed_dim,
                num_heads,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                drop_path=rates[i],
                **common,
            )

        def cross_layer(i: int) -> CrossLayer:
            attn = CrossAttention(embed_dim, num_heads, qkv_bias, proj_drop_rate, **dd)
            return CrossLayer(embed_dim, attn, drop_path=rates[i], norm_layer=LayerNorm, **common)

        centers = nn.Parameter(torch.empty(1, sample_window_size**2, embed_dim, **dd)) if use_global else None
        grid: Any = self.patch_embed.grid_size
        layers = (cross_layer(image_blocks), cross_layer(image_blocks + 1))
        generation = SemanticTokens(*layers, grid, sample_window_size, class_token, centers)
        before = [block(i) for i in range(image_blocks)]
        semantic = [block(i) for i in range(image_blocks + 2, depth - last)]
        after = [block(i) for i in range(depth - last + 1, depth)] if recover else []
        if recover:
            unit = DumbbellUnit(generation, semantic, cross_layer(depth - last))
            self.blocks = nn.Sequential(*before, unit, *after)
        else:
            self.blocks = nn.Sequential(*before, generation, *semantic)
        self.recover = recover
        self.image_blocks = image_blocks
        self.sample_window_size = sample_window_size

        # where DeiT's layers are in ours
        at = f"{image_blocks}.generation" if recover else f"{image_blocks}"
        self.places = [*map(str, range(image_blocks)), f"{at}.layer1", f"{at}.layer2"]
        if recover:
            self.places += [f"{image_blocks}.layers.{i}" for i in range(len(semantic))]
            self.places += [
                f"{image_blocks}.recovery",
                *(str(image_blocks + 1 + i) for i in range(len(after))),
            ]
        else:
            self.places += [str(image_blocks + 1 + i) for i in range(len(semantic))]

        self._describe_maps()
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation; the global centres are normal, too (section 3.1)."""
        super().init_weights(mode, needs_reset)
        for name, parameter in self.named_parameters():
            if name.endswith(".centers"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def _is_semantic(self, index: int) -> bool:
        """Whether entry `index` of `blocks` gives out semantic tokens."""
        return not self.recover and index >= self.image_blocks

    def _describe_maps(self) -> None:
        size, patch = self.patch_embed.img_size, max(self.patch_embed.patch_size)
        self.feature_info = [
            {
                "module": f"blocks.{i}",
                "num_chs": self.embed_dim,
                "reduction": ceil_div(max(size), self.sample_window_size) if self._is_semantic(i) else patch,
            }
            for i in range(len(self.blocks))
        ]

    def set_input_size(
        self, img_size: Optional[Tuple[int, int]] = None, patch_size: Optional[Tuple[int, int]] = None
    ) -> None:
        """Make the network fit images of another size, or patches; position table and patch weights are resampled."""
        check_patches(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size, patch_size)
        for module in self.modules():
            if isinstance(module, SemanticTokens):
                module.grid_size = self.patch_embed.grid_size
        self._describe_maps()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: tables of positions and centres, and the class token."""
        return super().no_weight_decay() | {n for n, _ in self.named_parameters() if n.endswith(".centers")}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's, but maps of semantic tokens are s x s; masks of attention are refused.

        Args:
            x: images `(B, C, H, W)`.
            indices: which entries of `blocks`: the last n if an integer, all if None.
            return_prefix_tokens: also return the class token of each.
            norm: apply the final norm to every map.
            stop_early: skip the entries after the last one wanted.
            output_fmt: `NCHW` maps or `NLC` tokens.
            intermediates_only: leave the final features out.
            output_dict: return a dictionary.
            attn_mask, is_causal: for timm's interface only.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("semantic tokens have no order or mask: attn_mask and is_causal cannot be used")
        assert output_fmt in ("NCHW", "NLC"), "Output format must be one of NCHW or NLC."
        found: Any = super().forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, "NLC", intermediates_only, output_dict
        )
        if output_fmt == "NLC":
            return found
        taken = sorted(feature_take_indices(len(self.blocks), indices)[0])

        def maps(tokens: List[Any]) -> List[Any]:
            return [
                (self._map(i, t[0]), t[1]) if isinstance(t, tuple) else self._map(i, t)
                for i, t in zip(taken, tokens, strict=True)
            ]

        if output_dict:
            return found | {"image_intermediates": maps(found["image_intermediates"])}
        return maps(found) if intermediates_only else (found[0], maps(found[1]))

    def _map(self, index: int, tokens: Tensor) -> Tensor:
        """Tokens `(B, N, C)` that entry `index` of `blocks` gives out, as a map `(B, C, H, W)`."""
        s = self.sample_window_size
        height, width = (s, s) if self._is_semantic(index) else self.patch_embed.grid_size
        return tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images `(B, C, H, W)` to the last, normalised tokens."""
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images `(B, C, H, W)` to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))


# --- variants ---------------------------------------------------------------------------------------------------------


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> STViTDeiT:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model(
        STViTDeiT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        advice=ADVICE.format(tag="stvit_deit_small.deit_in1k_init"),
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2303.08685",
        "paper_name": "Making Vision Transformers Efficient from A Token Sparsification View",
        "origin_url": "https://github.com/changsn/STViT-R",
        **kwargs,
    }


def _deit_cfg(size: str) -> dict[str, Any]:
    """Weights of DeiT: where to start from."""
    return _cfg(
        hf_hub_id=f"timm/deit_{size}_patch16_224.fb_in1k",
        license="apache-2.0",
        origin_url="https://github.com/facebookresearch/deit",
    )


# the star makes a tag without weights the default: pretrained=True must not pass off DeiT for STViT
default_cfgs = generate_default_cfgs(
    {
        "stvit_deit_pico": _cfg(input_size=(3, 32, 32), crop_pct=1.0),
        "stvit_deit_tiny.deit_in1k_init": _deit_cfg("tiny"),
        "stvit_deit_tiny.*": _cfg(),
        "stvit_deit_small.deit_in1k_init": _deit_cfg("small"),
        "stvit_deit_small.*": _cfg(),
        "stvit_deit_base.deit_in1k_init": _deit_cfg("base"),
        "stvit_deit_base.*": _cfg(),
        "stvit_r_deit_small.deit_in1k_init": _deit_cfg("small"),
        "stvit_r_deit_small.*": _cfg(),
    }
)


@register_model
def stvit_deit_pico(pretrained: bool = False, **kwargs: Any) -> STViTDeiT:
    """Ours, for images of 32 x 32 pixels."""
    model_args = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 96,
        "depth": 7,
        "num_heads": 3,
        "image_blocks": 2,
    }
    return _create("stvit_deit_pico", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_deit_tiny(pretrained: bool = False, **kwargs: Any) -> STViTDeiT:
    """STViT-DeiT-T: 5.7 M parameters, 72.2% top-1 (published)."""
    return _create("stvit_deit_tiny", pretrained, **dict({"embed_dim": 192, "num_heads": 3}, **kwargs))


@register_model
def stvit_deit_small(pretrained: bool = False, **kwargs: Any) -> STViTDeiT:
    """STViT-DeiT-S: 22 M parameters, 1.91 GMAC, 79.8% top-1 (published)."""
    return _create("stvit_deit_small", pretrained, **dict({"embed_dim": 384, "num_heads": 6}, **kwargs))


@register_model
def stvit_deit_base(pretrained: bool = False, **kwargs: Any) -> STViTDeiT:
    """STViT-DeiT-B: 86 M parameters, 81.8% top-1 (published)."""
    return _create("stvit_deit_base", pretrained, **dict({"embed_dim": 768, "num_heads": 12}, **kwargs))


@register_model
def stvit_r_deit_small(pretrained: bool = False, **kwargs: Any) -> STViTDeiT:
    """STViT-R-DeiT-S: the recovering form; four layers, a dumbbell unit of seven, a last layer on the full map."""
    model_args = {"embed_dim": 384, "num_heads": 6, "recover": True}
    return _create("stvit_r_deit_small", pretrained, **dict(model_args, **kwargs))
