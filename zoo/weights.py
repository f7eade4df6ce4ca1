"""Reading checkpoints: safely, whole, or not at all.

Only tensors are ever read from a file (`weights_only=True` or safetensors), and nothing is loaded into a model before
every name and shape has been compared.
"""

import argparse
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._input import get_pretrained_grid_size
from torch import Tensor, nn

_LISTED = 8  # mismatches that an error message spells out


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class CheckpointError(ValueError):
    """A file that is no checkpoint of the model it was meant for."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or torch checkpoint file; an `argparse.Namespace` beside it is allowed.

    Training checkpoints are unwrapped (`model_ema`, `model`, `state_dict`, ...), a `module.` prefix is removed.

    Raises:
        CheckpointError: no such file, truncated, not a checkpoint, or one that would run code when read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            pickled = zipfile.is_zipfile(path) or file.read(1) == b"\x80"
        if pickled:
            reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
            raise CheckpointError(
                f"{path} holds more than tensors and was refused, as reading it could run code ({reason}); "
                "save it again as a plain state dict or as safetensors where you trust it"
            ) from error
        raise CheckpointError(f"{path} is no torch checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # what damaged bytes make of the reader has no common type
        raise CheckpointError(f"{path} is truncated or no torch checkpoint ({_first_line(error)})") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state dict, but {type(content).__name__}")
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{path} holds entries that are no tensors: {', '.join(odd[:_LISTED])}")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def check_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Compare names, shapes and values with the model's and return the state dict, or raise with all mismatches.

    The classifier and the first convolution may differ in size (timm adapts both); everything else must fit.
    """
    wanted = model.state_dict()
    name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    common = wanted.keys() & state_dict.keys()
    if len(common) < len(wanted) // 2:
        raise CheckpointError(
            f"this is no checkpoint of {name}: {len(common)} of its {len(wanted)} parameter names are in the file"
            f" (which has {', '.join(sorted(state_dict)[:3])}, ...)"
        )
    cfg = getattr(model, "pretrained_cfg", {})
    layers = (cfg.get("classifier"), cfg.get("first_conv"))
    adapted = tuple(f"{y}." for x in layers if x for y in ((x,) if isinstance(x, str) else x))
    problems = [f"missing {key}" for key in wanted if key not in state_dict and not key.startswith(adapted)]
    problems += [f"unknown {key}" for key in state_dict if key not in wanted and not key.startswith(adapted)]
    problems += [
        f"{key} has shape {tuple(state_dict[key].shape)}, {name} needs {tuple(wanted[key].shape)}"
        for key in wanted
        if key in common and not key.startswith(adapted) and state_dict[key].shape != wanted[key].shape
    ]
    problems += [
        f"{key} holds NaN or infinity"
        for key, value in state_dict.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"the checkpoint does not fit {name} ({len(problems)} mismatches): {'; '.join(problems[:_LISTED])}{more}"
        )
    return state_dict


def resize_grid(x: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """A matrix of one row per token, `(1 + H * W, n)` with the class token in front, for another grid of tokens."""
    return resample_abs_pos_embed(x[None], list(new), list(old), num_prefix_tokens=1)[0]


def resample_tokens(state_dict: dict[str, Tensor], model: Any, endings: Sequence[str] = ()) -> None:
    """Resample a vision transformer's weights of another image size, in place, and warn: position and other tables.

    Args:
        state_dict: in the model's layout.
        model: has `patch_embed.grid_size` and a class token.
        endings: of the names of tables with one row per token, besides `pos_embed`.
    """
    position, new = state_dict.get("pos_embed"), tuple(model.patch_embed.grid_size)
    if position is None or position.dim() != 3:
        return
    count = position.shape[1] - 1
    known = get_pretrained_grid_size(model, state_dict.get("patch_embed.proj.weight"), count)
    old = known or (isqrt(count), isqrt(count))
    if old == new or old[0] * old[1] != count:
        return  # what does not fit now is no matter of size
    warnings.warn(
        f"the checkpoint is for images of {old[0]} x {old[1]} patches, the model for {new[0]} x {new[1]}: "
        "what belongs to the tokens is resampled",
        stacklevel=3,
    )
    state_dict["pos_embed"] = resize_grid(position[0], old, new)[None]
    for key, value in state_dict.items():
        if key.endswith(tuple(endings)) and value.shape[0] == count + 1:
            state_dict[key] = resize_grid(value, old, new)


def _download(url: str, variant: str) -> dict[str, Tensor]:
    """The weights at a URL, kept in torch's hub cache under the model's own name (some hosts name every file alike)."""
    name = f"vitrail_{variant}.pth"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=True)
        except OSError as error:
            raise CheckpointError(
                f"could not download the weights of {variant} from {url} ({error}); fetch the file by hand and pass "
                f"pretrained_cfg_overlay=dict(file=...)"
            ) from error
    return read_checkpoint(path)


def build_model(
    model_cls: Callable[..., Any],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    advice: str = "",
    **kwargs: Any,
) -> Any:
    """timm's `build_model_with_cfg`, with checkpoints read by `read_checkpoint` wherever they come from.

    `advice` is what to do where `pretrained` is asked for and no weights are known.
    """
    if pretrained:
        overlay = dict(pretrained_cfg_overlay or {})
        source = {**resolve_pretrained_cfg(variant, pretrained_cfg).to_dict(), **overlay}
        if not any(source.get(key) for key in ("state_dict", "file", "url", "hf_hub_id")):
            raise CheckpointError(f"there are no weights for {variant} to load" + (advice and f": {advice}"))
        if not source.get("state_dict") and source.get("source") not in ("hf-hub", "local-dir"):
            if source.get("file"):
                overlay["state_dict"] = read_checkpoint(source["file"])
            elif source.get("url") and not source.get("hf_hub_id"):
                overlay["state_dict"] = _download(source["url"], variant)
        pretrained_cfg_overlay = overlay
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        **kwargs,
    )
    model.pretrained_cfg.pop("state_dict", None)  # the model holds the weights now
    return model


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_checkpoint` did."""

    model: str
    source: str
    target: str
    tensors: int
    parameters: int
    num_classes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def convert_checkpoint(
    model_name: str, source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> ConversionReport:
    """Turn a checkpoint in the authors' (or our) layout into a safetensors file that `timm` loads into `model_name`.

    Args:
        model_name: a model of this package, e.g. `biformer_small`.
        source: `.pth`, `.pt`, `.bin`, `.tar` or `.safetensors` file.
        target: `.safetensors` file to write; its folder must exist. Written whole or not at all.

    Raises:
        CheckpointError: the source cannot be read safely, or does not fit the model.
        ValueError: the target is not named `.safetensors`, or its folder does not exist.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"the target must end in .safetensors, got {target.name}")
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist; create it first")
    state_dict = read_checkpoint(source)
    # the head's size is the file's own
    heads = [v for k, v in state_dict.items() if k in ("head.weight", "head.fc.weight") and v.dim() == 2]
    num_classes = heads[0].shape[0] if heads else 0
    model = timm.create_model(
        model_name,
        pretrained=True,
        num_classes=num_classes,
        pretrained_cfg_overlay={"state_dict": state_dict, "num_classes": num_classes},
    )
    state_dict = {key: value.contiguous() for key, value in model.state_dict().items()}
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(
            state_dict,
            scratch,
            metadata={"format": "pt", "model": model_name, "num_classes": str(num_classes)},
        )
        os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return ConversionReport(
        model=model_name,
        source=str(source),
        target=str(target),
        tensors=len(state_dict),
        parameters=sum(p.numel() for p in model.parameters()),
        num_classes=num_classes,
    )
