"""What sparse attention saves: the multiply-accumulates of self-attention beside those of the dense trunk.

Sparsifiner states its gain as a reduction of the cost of multi-head self-attention (MHSA): scores and values, with the
predictor that chooses the keys, without the projections that both have.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .zoo.sparsifiner import SparseAttention, Sparsifiner


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
