"""Strip-MLP's weights in other forms: the authors' layout, and other image sizes."""

import re
from collections.abc import Callable
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

# --- the authors' layout ----------------------------------------------------------------------------------------------

# the authors' names, by pattern; order matters
_RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^patch_embed\.", "stem."),
    (r"^blocks(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^merging(\d)\.", r"stages.\1.downsample."),
    (r"^conv_s1_28\.", "stages.2.skips.0."),
    (r"^conv_s1_14\.", "stages.3.skips.0."),
    (r"^conv_s2_14\.", "stages.3.skips.1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"\.dwsc\.conv_merge\.BN\.", ".norm1."),
    (r"\.dwsc\.conv_merge\.Conv\.", ".dwconv."),
    (r"\.smlp_block\.mlp\.0\.", ".proj."),
    (r"\.smlp_block\.mlp\.1\.", ".norm2."),
    (r"\.smlp_block\.fuse\.", ".fuse."),
    (r"\.smlp_block\.fc_h\.", ".local.row_conv."),
    (r"\.smlp_block\.fc_w\.", ".local.col_conv."),
    (r"\.smlp_block\.reweight\.", ".local.reweight."),
    (r"\.smlp_block\.BN\.", ".strips.norm."),
    (r"\.smlp_block\.(relate_pos|proj|fuse)_h\.", r".strips.row_\1."),
    (r"\.smlp_block\.(relate_pos|proj|fuse)_w\.", r".strips.col_\1."),
    (r"_relate_pos\.embeddings_table$", "_pos.table"),
    (r"_proj\.", "_mix."),
    (r"\.channel_mixing\.conv_77\.", ".channel_mixing.dwconv."),
    (r"\.channel_mixing\.layer_norm\.", ".channel_mixing.norm."),
    (r"\.channel_mixing\.grn\.gamma$", ".channel_mixing.mlp.grn.weight"),
    (r"\.channel_mixing\.grn\.beta$", ".channel_mixing.mlp.grn.bias"),
    (r"\.channel_mixing\.fc(\d)\.", r".channel_mixing.mlp.fc\1."),
)


def from_authors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, and their convolutions over groups x positions as strip weights."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value.flatten() if ".grn." in key else value
    for key, weight in renamed.items():
        bias = key.removesuffix("weight") + "bias"
        if key.endswith("_mix.weight") and weight.dim() == 4 and len(weight) % weight.shape[1] == 0:
            renamed[key] = weight.unflatten(0, (-1, weight.shape[1])).squeeze(3).permute(3, 1, 2, 0)
            if bias in renamed and renamed[bias].shape == weight.shape[:1]:
                renamed[bias] = renamed[bias].unflatten(0, (-1, weight.shape[1])).t()
    return renamed


# --- other sizes ------------------------------------------------------------------------------------------------------


def _resize(old: int, new: int, like: Tensor) -> Tensor:
    """`(new, old)` matrix that resizes a strip linearly, with antialiasing; its rows sum to one."""
    eye = torch.eye(old, device=like.device, dtype=like.dtype)
    return F.interpolate(eye[None, :, None], size=(1, new), mode="bilinear", antialias=True)[0, :, 0].t()


def resample_strips(weight: Tensor, bias: Tensor, length: int) -> Tuple[Tensor, Tensor]:
    """Strip weights `(3, L, L, groups)` and biases `(L, groups)` for strips of another length.

    The layer that results resizes a strip to L positions, mixes it as before, and resizes what comes out: over more
    positions a weight is spread thinner, and what becomes of a constant strip stays the same. The three taps are
    neighbours, not positions, and stay as those of a convolution do.
    """
    if weight.shape[1] == length:
        return weight, bias
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    up, down = _resize(weight.shape[1], length, wide), _resize(length, weight.shape[1], wide)
    resampled = torch.einsum("mi,tijg,jn->tmng", up, wide, down).contiguous()
    return resampled.to(weight.dtype), (up @ bias.to(wide.dtype)).to(bias.dtype)


def resample_table(table: Tensor, extent: int) -> Tensor:
    """A table over relative distances -M to M, `(2M + 1, C)`, for distances up to `extent`.

    A distance keeps its meaning as a share of the map; between two old distances lies their linear interpolation. The
    two ends of a table are never used, hence never learned, so nothing is taken from them.
    """
    old = table.shape[0] // 2
    if old == extent:
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    distance = torch.arange(-extent, extent + 1, device=table.device, dtype=wide.dtype) * (old / extent)
    place = distance.clamp(1 - old, old - 1) + old
    below = place.floor().long()
    above = (below + 1).clamp(max=2 * old - 1)
    return torch.lerp(wide[below], wide[above], (place - below)[:, None]).to(table.dtype)
