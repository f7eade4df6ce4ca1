"""Costs that papers state in terms of their own.

Sparsifiner states its gain as a reduction of the cost of multi-head self-attention (MHSA): scores and values, with the
predictor that chooses the keys, without the projections that both have.

STViT-R's count holds projections that ours does not make: its code copies overlapping patches out of the map and
projects the copies, ours projects each token once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .zoo.sparsifiner import SparseAttention, Sparsifiner
from .zoo.stvit import PatchAttention


@dataclass(frozen=True)
class AttentionCost:
    """Multiply-accumulates of all attention layers for the whole batch."""

    ours: int
    """Scores and values of the keys kept, the class token's row, and the choice of the keys."""
    dense: int
    """Scores and values of all pairs of tokens, as in the trunk (DeiT, LV-ViT)."""
    claimed: tuple[float, float] | None = None
    """The paper's range of reductions."""

    @property
    def reduction(self) -> float:
        """Share of the dense cost that is saved."""
        return 1 - self.ours / self.dense


def attention_cost(
    model: nn.Module, macs: Mapping[str, int], batch: int, claimed: tuple[float, float] | None = None
) -> AttentionCost | None:
    """The cost of a Sparsifiner's attention; None for other models.

    Args:
        model: the model that was counted.
        macs: multiply-accumulates by the name of the module (fvcore's `by_module()`).
        batch: images that were counted.
        claimed: the paper's range of reductions.
    """
    if not isinstance(model, Sparsifiner):
        return None
    ours = sum(
        int(macs[name] - macs[f"{name}.qkv"] - macs[f"{name}.proj"])
        for name, module in model.named_modules()
        if isinstance(module, SparseAttention)
    )
    tokens = model.patch_embed.num_patches + 1
    return AttentionCost(ours, 2 * batch * len(model.blocks) * tokens**2 * model.embed_dim, claimed)


def repeated_projections(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of keys and values that a copy of every patch would project again, for the whole batch.

    Args:
        model: in evaluation mode.
        images: `(B, C, H, W)` that the model takes.
    """
    layers = [module for module in model.modules() if isinstance(module, PatchAttention)]
    repeated = 0

    def count(layer: Any, args: tuple[Tensor, Tensor]) -> None:
        nonlocal repeated
        centres, image = args
        windows = (centres.shape[1] // layer.window_size) * (centres.shape[2] // layer.window_size)
        copied = windows * min(layer.patch_size, image.shape[1]) * min(layer.patch_size, image.shape[2])
        repeated += image.shape[0] * (copied - image.shape[1] * image.shape[2]) * layer.kv.weight.numel()

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        if layers:
            with torch.no_grad():
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return repeated
