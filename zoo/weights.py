"""Reading checkpoints: safely, whole, or not at all.

Only tensors are ever read from a file (`weights_only=True` or safetensors), and nothing is loaded into a model before
every name and shape has been compared.
"""

import argparse
import os
import pickle
import re
import tempfile
import warnings
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

_LISTED = 8  # odd entries that an error message spells out


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
        with path.open("rb") as file:  # by its first bytes: zipfile raises for some damaged files
            pickled = file.read(2).startswith((b"PK", b"\x80"))
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

    The number of classes may differ, and images may have had three channels (timm adapts both); all else must fit.
    """
    wanted = model.state_dict()
    cfg = getattr(model, "pretrained_cfg", {})
    name = cfg.get("architecture", type(model).__name__)
    common = wanted.keys() & state_dict.keys()
    if len(common) < len(wanted) // 2:
        raise CheckpointError(
            f"this is no checkpoint of {name}: {len(common)} of its {len(wanted)} parameter names are in the file"
            f" (which has {', '.join(sorted(state_dict)[:3])}, ...)"
        )
    classifiers, first = _layers(cfg.get("classifier")), _layers(cfg.get("first_conv"))
    adapted = (*classifiers, *first)
    problems = {
        "missing": [key for key in wanted if key not in state_dict and not key.startswith(adapted)],
        "unknown": [key for key in state_dict if key not in wanted and not key.startswith(adapted)],
        "of another shape": [
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted
            if key in common
            and not _same_shape(key, state_dict[key].shape, wanted[key].shape, classifiers, first)
        ],
        "of another kind": [
            f"{key} {state_dict[key].dtype} instead of {wanted[key].dtype}"
            for key in wanted
            if key in common and state_dict[key].is_floating_point() != wanted[key].is_floating_point()
        ],
        "with NaN or infinity": [
            key
            for key, value in state_dict.items()
            if value.is_floating_point() and not value.isfinite().all()
        ],
    }
    count = sum(map(len, problems.values()))
    if count:
        listed = "; ".join(
            f"{kind} ({len(keys)}): {', '.join(keys)}" for kind, keys in problems.items() if keys
        )
        raise CheckpointError(f"the checkpoint does not fit {name}, {count} mismatches: {listed}")
    return state_dict


def _layers(names: Any) -> tuple[str, ...]:
    """Prefixes of the parameters of a layer, or of several."""
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names or ()))


def _same_shape(
    key: str, given: torch.Size, wanted: torch.Size, classifiers: tuple[str, ...], first: tuple[str, ...]
) -> bool:
    """Whether a tensor fits, or timm makes it fit: other numbers of classes, images of three channels."""
    if key.startswith(classifiers):
        return given[1:] == wanted[1:]
    if key.startswith(first) and len(given) == len(wanted) == 4:
        return given[0] == wanted[0] and given[2:] == wanted[2:] and given[1] in (3, wanted[1])
    return given == wanted


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


# --- where weights come from ------------------------------------------------------------------------------------------

_BY_HAND = "fetch the file by hand and pass pretrained_cfg_overlay=dict(file=...)"


def _download(url: str, variant: str, cache_dir: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    """The weights at a URL, kept in torch's hub cache under the model's own name (some hosts name every file alike)."""
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"vitrail_{variant}.pth"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=True)
        except OSError as error:
            raise CheckpointError(
                f"could not download the weights of {variant} from {url} ({_first_line(error)}); {_BY_HAND}"
            ) from error
    return read_checkpoint(path)


def _from_hub(
    hub_id: str, filename: str | None, cache_dir: str | os.PathLike[str] | None
) -> dict[str, Tensor]:
    """The weights in a repository of the Hugging Face hub: the file named, else the first of the usual names.

    A revision may follow the repository, behind an @. Files are kept in the hub's own cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    folder = None if cache_dir is None else Path(cache_dir)
    for name in (filename,) if filename else _HUB_NAMES:
        try:
            path = hf_hub_download(repository, name, revision=revision or None, cache_dir=folder)
        except (EntryNotFoundError, OSError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            # offline, no such repository, no right to read it, ...
            raise CheckpointError(
                f"could not fetch {name} of {repository} from the Hugging Face hub ({_first_line(error)}); {_BY_HAND}"
            ) from error
        return read_checkpoint(path)
    raise CheckpointError(
        f"{repository} on the Hugging Face hub has no {' and no '.join((filename,) if filename else _HUB_NAMES)}; "
        f"{_BY_HAND}"
    )


_HUB_NAMES = ("model.safetensors", "pytorch_model.bin")


def _from_folder(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a local copy of such a repository."""
    found = [Path(folder) / name for name in _HUB_NAMES if (Path(folder) / name).is_file()]
    if not found:
        raise CheckpointError(f"the folder {folder} holds no {' and no '.join(_HUB_NAMES)}")
    return read_checkpoint(found[0])


def _weights(
    source: Mapping[str, Any], variant: str, cache_dir: str | os.PathLike[str] | None, advice: str
) -> dict[str, Tensor]:
    """The weights that a pretrained cfg stands for, in timm's order: given, a file, the hub, an address."""
    if source.get("source") == "local-dir":
        return _from_folder(source["file"])
    if source.get("source") != "hf-hub":
        if source.get("state_dict"):
            return dict(source["state_dict"])
        if source.get("file"):
            return read_checkpoint(source["file"])
    if source.get("hf_hub_id"):
        return _from_hub(source["hf_hub_id"], source.get("hf_hub_filename"), cache_dir)
    if source.get("url"):
        return _download(source["url"], variant, cache_dir)
    advice = advice or (
        "none were published. Build it with pretrained=False and train, or pass a file of your own: "
        "pretrained_cfg_overlay=dict(file=...)"
    )
    raise CheckpointError(f"there are no weights for {variant} to load: {advice}")


def build_model(
    model_cls: Callable[..., Any],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    advice: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Any:
    """timm's `build_model_with_cfg`, with checkpoints read by `read_checkpoint` wherever they come from.

    `advice` is what to do where `pretrained` is asked for and no weights are known.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if pretrained:
        source = {**resolve_pretrained_cfg(variant, pretrained_cfg).to_dict(), **overlay}
        overlay |= {"state_dict": _weights(source, variant, cache_dir, advice), "source": "timm"}
    try:
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        raise CheckpointError(_misfit(str(error), variant)) from error
    if pretrained:  # the model holds the weights now, and remembers where they came from
        model.pretrained_cfg.pop("state_dict", None)
        model.pretrained_cfg["source"] = source.get("source", "")
    return model


def _misfit(text: str, variant: str) -> str:
    """torch's report on weights that do not fit, in one line. What is left for it is the classifier."""
    found = re.search(r"size mismatch for \S+: .*?\[(\d+)[^]]*\].*?\[(\d+)", text)
    if found:
        return (
            f"the classifier of the file has {found[1]} classes where {variant} has {found[2]}: say so with "
            f"pretrained_cfg_overlay=dict(num_classes={found[1]}), and with num_classes how many it shall have"
        )
    return f"the checkpoint does not fit {variant}: {' '.join(text.split())}"


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
