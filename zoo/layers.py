"""What several families share: the frame of a network of stages, and small helpers on channels-last maps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, List, Optional, Tuple, Union

import torch
from timm.layers import ClassifierHead, get_device_dtype, to_2tuple
from timm.models import checkpoint_seq, register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..ops.regions import ceil_div, pad_grid


@register_notrace_function  # it branches on sizes, which torch.fx cannot follow
def pad_to_multiple(x: Tensor, n: int) -> Tensor:
    """Pad a `(B, H, W, C)` map with zeros at the bottom and right so that `n` divides its height and width."""
    return pad_grid(x, ceil_div(x.shape[1], n) * n, ceil_div(x.shape[2], n) * n)


@register_notrace_function
def check_image(x: Tensor, in_chans: int, smallest: int, multiple: int) -> None:
    """Refuse images that the network cannot take, and name the nearest sizes that it can."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"expected images of shape (batch, {in_chans}, height, width), got {list(x.shape)}")
    h, w = x.shape[2], x.shape[3]
    if h < smallest or w < smallest:
        raise ValueError(f"images must be at least {smallest} x {smallest} pixels, got {h} x {w}")
    if multiple > 1 and (h % multiple != 0 or w % multiple != 0):
        near_h = max((h + multiple // 2) // multiple, 1) * multiple
        near_w = max((w + multiple // 2) // multiple, 1) * multiple
        raise ValueError(
            f"without auto_pad height and width must be multiples of {multiple}, got {h} x {w}; "
            f"resize to {near_h} x {near_w}, or build the model with auto_pad=True"
        )


def check_patches(img_size: Any, patch_size: Any) -> None:
    """Refuse image sizes that patches do not divide, with the nearest size that they do; numbers or pairs."""
    image, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if any(i < p or i % p for i, p in zip(image, patch, strict=True)):
        near = [max((i + p // 2) // p, 1) * p for i, p in zip(image, patch, strict=True)]
        raise ValueError(
            f"img_size must be a multiple of the patch, {patch[0]} x {patch[1]}, got {image[0]} x {image[1]}; "
            f"nearest: {near[0]} x {near[1]}"
        )


@register_notrace_function
def check_img_size(x: Tensor, in_chans: int, height: int, width: int) -> None:
    """Refuse images of another size than the one that a network was built for."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"expected images of shape (batch, {in_chans}, {height}, {width}), got {list(x.shape)}"
        )
    if x.shape[2] != height or x.shape[3] != width:
        raise ValueError(
            f"this model takes images of {height} x {width}, got {x.shape[2]} x {x.shape[3]}; resize them, "
            "build the model with img_size=(height, width), or call set_input_size()"
        )


def depthwise_conv(dim: int, kernel_size: int, device: Any = None, dtype: Any = None) -> nn.Module:
    """Depthwise convolution that keeps the map's size."""
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)


class Stage(nn.Module):
    """Downsampling (but for the first stage) and the blocks of one resolution, `(B, C, H, W)` to the same."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class StagedBackbone(nn.Module):
    """Stem, stages, norm, head: all of timm's model interface that follows from this order.

    A subclass sets `stem`, `stages` (an `nn.Sequential`), `norm`, `head` (with timm's `ClassifierHead` interface),
    `feature_info`, `in_chans`, `num_classes`, `num_features`, `head_hidden_size`, and the limits of the image's size.
    Where stages do not simply follow each other, it overrides `forward_stages` and `forward_features`.
    """

    if TYPE_CHECKING:  # TorchScript would hold the modules to these very types
        stem: nn.Module
        stages: Any
        norm: nn.Module
        head: ClassifierHead
        feature_info: List[dict[str, Any]]
        in_chans: int
        num_classes: int
        num_features: int
        head_hidden_size: int

    def __init__(self) -> None:
        super().__init__()
        self.smallest_image = 1
        self.image_multiple = 1

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: none beyond biases and norms, which timm finds by itself."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters into layers, for layer-wise learning rates."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute the blocks' activations in the backward pass."""
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(
        self, num_classes: int, global_pool: Optional[str] = None, reset_other: bool = False
    ) -> None:
        """Replace the classifier; the pooling stays unless `global_pool` says otherwise.

        `reset_other` removes what else the head holds, such as a norm.
        """
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, reset_other, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Feature maps of the stages, `(B, C, H, W)`.

        Args:
            x: images `(B, C, H, W)`.
            indices: which stages: the last n if an integer, all if None.
            norm: apply the final norm to the last stage's map.
            stop_early: skip the stages after the last one wanted.
            output_fmt: `NCHW` only.
            intermediates_only: leave the final features out.
        """
        assert output_fmt == "NCHW", "output_fmt must be NCHW"
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        maps = self.forward_stages(self.forward_stem(x), max_index + 1 if stop_early else last + 1)
        intermediates = []
        for i, x in enumerate(maps):
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if len(maps) == last + 1:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Drop what `forward_intermediates` does not need for these stages; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()  # it belongs to the last stage
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "", reset_other=True)
        return take_indices

    def forward_stem(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to the map that enters stage 1."""
        check_image(x, self.in_chans, self.smallest_image, self.image_multiple)
        return self.stem(x)

    def forward_stages(self, x: Tensor, count: int) -> List[Tensor]:
        """The map that enters stage 1 to the maps of the first `count` stages."""
        maps = []
        for i, stage in enumerate(self.stages):
            if i < count:
                x = stage(x)
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to the last, normalised map."""
        return self.norm(self.stages(self.forward_stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or to the classifier's input."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))
