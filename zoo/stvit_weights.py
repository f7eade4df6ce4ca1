"""Checkpoints for STViT: the authors' layout, and those of Swin and DeiT, which STViT starts from.

A network with semantic tokens lists in `places` which of its layers stands where its trunk has layer 0, 1, 2, ...
"""

import math
import re
import warnings
from typing import Any, Optional, Tuple

from timm.layers import RelPosBias, resample_abs_pos_embed
from torch import Tensor

from .stvit import resize_grid, resize_relative_table
from .weights import check_state_dict

ADVICE = (
    "the authors released stvit_r_swin_small and stvit_r_swin_base alone. Start from the trunk's weights where a tag "
    "names them, e.g. timm.create_model('{tag}', pretrained=True), and train; or pass a file of your own: "
    "pretrained_cfg_overlay=dict(file=...)"
)


def _take_apart(state_dict: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections of the trunk's layers, `attn.qkv`, as `attn.q` and `attn.kv` where a layer of ours has these."""
    out = {}
    for key, value in state_dict.items():
        layer, _, part = key.rpartition(".attn.qkv.")
        if layer and key not in own and f"{layer}.attn.q.{part}" in own:
            dim = value.shape[0] // 3
            out[f"{layer}.attn.q.{part}"], out[f"{layer}.attn.kv.{part}"] = value[:dim], value[dim:]
        else:
            out[key] = value
    return out


def _start(
    trunk: str, state_dict: dict[str, Tensor], own: dict[str, Tensor], unused: list[str]
) -> dict[str, Tensor]:
    """The trunk's weights without those that have no use here; what only STViT has stays as it was initialised."""
    state_dict = {key: value for key, value in state_dict.items() if key not in unused}
    new = [
        key for key in own if key not in state_dict and re.search(r"\.centers$|\.gamma$|\.conv_pos\.", key)
    ]
    warnings.warn(
        f"weights of {trunk} are where STViT starts from, not those of a trained STViT: train it further; left out: "
        f"{', '.join(unused) or 'nothing'}; still as initialised: {', '.join(new) or 'nothing'}",
        stacklevel=4,
    )
    return state_dict | {key: own[key] for key in new}


# --- on Swin ----------------------------------------------------------------------------------------------------------

# names in Swin's checkpoints and in those of STViT-R, by pattern; order matters
_RENAMES = (
    (r"^patch_embed\.proj\.0\.c\.", "stem.proj.0."),
    (r"^patch_embed\.proj\.0\.bn\.", "stem.proj.1."),
    (r"^patch_embed\.proj\.2\.c\.", "stem.proj.3."),
    (r"^patch_embed\.proj\.2\.bn\.", "stem.proj.4."),
    (r"^patch_embed\.proj\.", "stem.proj.0."),
    (r"^patch_embed\.norm\.", "stem.proj.1."),
    (r"^absolute_pos_embed$", "stem.pos_embed"),
    (r"^layers\.", "stages."),
    (r"\.semantic_token2$", ".blocks.1.generation.centers"),
    (r"\.conv_pos\.proj\.0\.", ".conv_pos.proj."),
    (r"\.relative_position_bias_table$", ".rel_pos.relative_position_bias_table"),
    (r"\.layer_scale_([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def from_swin_names(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Names of the authors, and Swin's as published or as timm has them, to ours."""
    # Swin as published counts a merging to the stage before it; timm, and we, to the stage that it leads into
    before = "layers.0.downsample.norm.weight" in state_dict
    stage = rf"^stages\.{model.semantic_stage}\.blocks\.(\d+)\.(?!generation\.centers)"
    out = {}
    for key, value in state_dict.items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        merging = re.match(r"^stages\.(\d+)(\.downsample.*)", key)
        if before and merging:
            key = f"stages.{int(merging[1]) + 1}{merging[2]}"
        layer = re.match(stage, key)
        if layer and int(layer[1]) < len(model.places):
            key = f"stages.{model.semantic_stage}.blocks.{model.places[int(layer[1])]}.{key[layer.end() :]}"
        out[key] = value
    return out


def _fit_table(key: str, table: Tensor, wanted: Tensor, window: Optional[Tuple[int, int]]) -> Tensor:
    """A table of positions at the size that the model was built for; what cannot be one is left to the check.

    Ours keep the size of their map. The authors' and Swin's are lists, and belong to square maps and windows.
    """
    if table.shape == wanted.shape or table.shape[-1] != wanted.shape[-1] or table.dim() < 2:
        return table
    side = math.isqrt(table.shape[-2])
    if window is not None:
        old, new = ((side + 1) // 2, (side + 1) // 2), window
        if table.dim() != 2 or side * side != table.shape[0]:
            return table
        fitted = resize_relative_table(table, old, new)
    else:
        if table.dim() == 3 and side * side == table.shape[1]:
            table = table.reshape(1, side, side, -1)
        if table.dim() != 4:
            return table
        old, new = (table.shape[1], table.shape[2]), (wanted.shape[1], wanted.shape[2])
        fitted = resize_grid(table, *new)
    if old != new:
        text = f"{key} is resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]}"
        warnings.warn(text, stacklevel=4)
    return fitted


def swin_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Turn the authors' layout, or Swin's to start from, into ours; ours passes through. Refuses what does not fit.

    Tables of positions and centres that belong to another image or window size are resampled.
    """
    own = model.state_dict()
    if not any(key.startswith("stages.") for key in state_dict):
        named = from_swin_names(state_dict, model)
        state_dict = _take_apart(named, own)
        if len(state_dict) > len(named):
            unused = [key for key in state_dict if key.endswith("bias_table") and key not in own]
            state_dict = _start("Swin", state_dict, own, unused)
    windows = {
        f"{name}.relative_position_bias_table": module.window_size
        for name, module in model.named_modules()
        if isinstance(module, RelPosBias)
    }
    tables = windows.keys() | {key for key in own if key == "stem.pos_embed" or key.endswith(".centers")}
    fitted = {
        key: _fit_table(key, value, own[key], windows.get(key)) if key in tables else value
        for key, value in state_dict.items()
    }
    return check_state_dict(fitted, model)


# --- on DeiT ----------------------------------------------------------------------------------------------------------


def deit_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Turn DeiT's layout (timm's and the authors' of DeiT) into ours, to start from; ours passes through.

    Position tables of another image size are resampled. Refuses what does not fit.
    """
    own = model.state_dict()
    state_dict = dict(state_dict)
    prefix = 1 if "cls_token" in state_dict else 0
    if (
        f"blocks.{len(model.places) - 1}.norm1.weight" in state_dict
    ):  # ours counts the two of generation as one

        def place(key: str) -> str:
            layer = re.match(r"^blocks\.(\d+)\.", key)
            if layer is None or int(layer[1]) >= len(model.places):
                return key
            return f"blocks.{model.places[int(layer[1])]}.{key[layer.end() :]}"

        state_dict = _take_apart({place(key): value for key, value in state_dict.items()}, own)
        unused = [key for key in ("cls_token",) if key in state_dict and key not in own]
        if unused and "pos_embed" in state_dict:
            state_dict["pos_embed"], prefix = state_dict["pos_embed"][:, 1:], 0
        state_dict = _start("DeiT", state_dict, own, unused)
    table = state_dict.get("pos_embed")
    if table is not None and table.dim() == 3 and table.shape[2] == own["pos_embed"].shape[2]:
        side = math.isqrt(table.shape[1] - prefix)
        if table.shape != own["pos_embed"].shape and side * side == table.shape[1] - prefix:
            grid = list(model.patch_embed.grid_size)
            state_dict["pos_embed"] = resample_abs_pos_embed(table, grid, [side, side], prefix)
            warnings.warn(
                f"pos_embed is resampled from {side} x {side} to {grid[0]} x {grid[1]}", stacklevel=3
            )
    return check_state_dict(state_dict, model)
