"""Sparsifiner on LV-ViT's trunk; see `sparsifiner.py`.

LV-ViT: "All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., NeurIPS 2021, arXiv
2104.10858, https://github.com/zihangJiang/TokenLabeling (Apache 2.0).

    image -> convolutions /2, patches /16, class token, position -> 16 or 20 blocks -> LayerNorm -> two classifiers

Against DeiT: three convolutions before the patches, an MLP ratio of 3, no bias in the projection to queries, keys and
values, the blocks' branches divided by `skip_lam`, and a second classifier on every image token. The logits are those
of the class token, plus half of the largest of the image tokens', class by class.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional, Tuple, Union

import torch
from timm.layers import PatchEmbed, get_device_dtype, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .sparsifiner import Sparsifiner
from .sparsifiner_weights import ADVICE, cfg, checkpoint_filter_fn
from .weights import build_model


class ConvPatchEmbed(PatchEmbed):
    """Three convolutions at half the resolution, then patches; `(B, C, H, W)` to `(B, N, embed_dim)`."""

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        width: int = 64,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ):
        dd = {"device": device, "dtype": dtype}
        if patch_size % 2:
            raise ValueError(f"patch_size must be even, as the stem halves the image, got {patch_size}")
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs, **dd)
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2, **dd)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size; the patch stays."""
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(
                f"the patch of a convolutional stem is fixed, {self.patch_size}, got {patch_size}"
            )
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)


class SparsifinerLVViT(Sparsifiner):
    """Sparsifiner on LV-ViT's trunk.

    Args:
        stem: `4_2` for three convolutions of 64 channels before the patches, `4_2_128` for 128, `naive` for none.
        skip_lam: the blocks' branches are divided by it.
        kwargs: see `Sparsifiner`.
    """

    def __init__(
        self,
        stem: str = "4_2",
        skip_lam: float = 2.0,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ):
        if stem not in _STEMS:
            raise ValueError(f"stem must be one of {', '.join(_STEMS)}, got {stem!r}")
        if not skip_lam > 0:
            raise ValueError(f"skip_lam must be positive, got {skip_lam}")
        super().__init__(
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_eps=norm_eps,
            residual_scale=1 / skip_lam,
            embed_layer=_STEMS[stem],
            **kwargs,
        )
        _check_pool(self.global_pool)
        self._traits = {"first_conv": "patch_embed.proj" if stem == "naive" else "patch_embed.conv1"}
        self.aux_head = self._classifier(self.num_classes)
        self.distilled_training = False

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        layer = nn.Linear(self.embed_dim, num_classes, **get_device_dtype(self))
        trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer.train(self.training)

    @torch.jit.ignore
    def get_classifier(self) -> Tuple[nn.Module, nn.Module]:
        """The classifiers of the class token and of the image tokens."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace both classifiers."""
        _check_pool(global_pool or "token")
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._classifier(num_classes)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the logits of the class token and of every image token, `(B, N, num_classes)`."""
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens to logits, or to the classifier's input."""
        if not self.global_pool:
            return x
        token = self.head_drop(x[:, 0])
        if pre_logits or self.num_classes == 0:
            return token
        logits, auxiliary = self.head(token), self.aux_head(x[:, 1:])
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return logits, auxiliary  # type: ignore[return-value]
        return logits + 0.5 * auxiliary.amax(1)


_STEMS: dict[str, Callable[..., nn.Module]] = {
    "4_2": ConvPatchEmbed,
    "4_2_128": partial(ConvPatchEmbed, width=128),
    "naive": PatchEmbed,
}


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("token", ""):
        raise ValueError(
            f"LV-ViT's classifiers read the tokens themselves: global_pool must be 'token', got {global_pool!r}"
        )


# --- registration -----------------------------------------------------------------------------------------------------


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> SparsifinerLVViT:
    return build_model(
        SparsifinerLVViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        advice=ADVICE.format(tag="sparsifiner_lvvit_small.lvvit_in1k_init"),
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def _lvvit_cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    address = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/"
    stem = {"first_conv": "patch_embed.conv1", "classifier": ("head", "aux_head")}
    return cfg(address + file if file else "", **stem, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "sparsifiner_lvvit_small.lvvit_in1k_init": _lvvit_cfg(
            "lvvit_s-26M-224-83.3.pth.tar", license="apache-2.0"
        ),
        "sparsifiner_lvvit_small.*": _lvvit_cfg(),
        "sparsifiner_lvvit_medium.lvvit_in1k_init": _lvvit_cfg(
            "lvvit_m-56M-224-84.0.pth.tar", license="apache-2.0", crop_pct=1.0
        ),
        "sparsifiner_lvvit_medium.*": _lvvit_cfg(crop_pct=1.0),
    }
)


@register_model
def sparsifiner_lvvit_small(pretrained: bool = False, **kwargs: Any) -> SparsifinerLVViT:
    """Sparsifiner on LV-ViT-S: 26.4 M parameters."""
    model_args = {"embed_dim": 384, "depth": 16, "num_heads": 6}
    return _create("sparsifiner_lvvit_small", pretrained, **dict(model_args, **kwargs))


@register_model
def sparsifiner_lvvit_medium(pretrained: bool = False, **kwargs: Any) -> SparsifinerLVViT:
    """Sparsifiner on LV-ViT-M: 56.2 M parameters."""
    model_args = {"embed_dim": 512, "depth": 20, "num_heads": 8}
    return _create("sparsifiner_lvvit_medium", pretrained, **dict(model_args, **kwargs))
