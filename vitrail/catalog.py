"""Models by name: what there is, how large it is, and how to make one at the size that is asked for."""

import difflib
import fnmatch
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from torch import nn

from .export.images import pretrained_cfg
from .published import Published, published_figures
from .zoo import list_families
from .zoo.weights import CheckpointError


class UnknownModelError(ValueError):
    """No model has this name."""


class SizeError(ValueError):
    """A model does not take images of this size."""


def family_of(name: str) -> str | None:
    """The vitrail family that a model name belongs to, None for timm's own models."""
    name = name.split(".")[0]
    return next((family for family, names in list_families().items() if name in names), None)


def check_model_name(name: str) -> str:
    """Return `name` if timm or vitrail has a model of that name.

    Raises:
        UnknownModelError: there is none; the message proposes the nearest names.
    """
    if timm.is_model(name):
        return name
    families = list_families()
    if name in families:
        raise UnknownModelError(
            f"'{name}' is a family, not a model; choose one of {', '.join(families[name])}"
        )
    ours = [model for names in families.values() for model in names]
    near: list[str] = []
    for names, cutoff in ((ours, 0.85), (timm.list_models(), 0.85), (ours, 0.5)):
        near = near or difflib.get_close_matches(name.lower(), names, n=3, cutoff=cutoff)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownModelError(f"no model is called '{name}'; {hint}`vitrail models` lists them all")


def default_size(name: str) -> tuple[int, int]:
    """Input height and width that a model is meant for."""
    cfg = timm.get_pretrained_cfg(check_model_name(name), allow_unregistered=True)
    return (cfg.input_size[-2], cfg.input_size[-1]) if cfg else (224, 224)


def create_model(
    name: str,
    img_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    checkpoint: str | None = None,
) -> nn.Module:
    """`timm.create_model` in eval mode, for an input size and with weights from a file.

    Args:
        name: any model name of timm's, vitrail's among them.
        img_size: input (height, width), given to models whose weights depend on it; the others need not know.
        num_classes: width of the classifier, default the model's own.
        checkpoint: file with weights in our layout or the authors'. Its classifier must have `num_classes` classes,
            unless `num_classes` is 0 (no classifier).

    Raises:
        UnknownModelError: no model has this name.
        SizeError: the model does not take images of `img_size`; tried with one.
        CheckpointError: the file is no checkpoint of this model, or of one with another number of classes.
    """
    cfg = timm.get_pretrained_cfg(check_model_name(name), allow_unregistered=True)
    arguments: dict[str, Any] = {}
    if img_size is not None and img_size != default_size(name) and cfg and cfg.fixed_input_size:
        arguments["img_size"] = img_size
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if img_size is None:
        return _load(name, checkpoint, arguments)
    try:
        model = _load(name, checkpoint, arguments)
        with torch.inference_mode():
            model(torch.zeros(1, 3, *img_size))
    except CheckpointError:
        raise
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SizeError(f"{name} does not run at {img_size[0]}x{img_size[1]}: {reason}") from error
    return model


def _load(name: str, checkpoint: str | None, arguments: dict[str, Any]) -> nn.Module:
    if checkpoint is None:
        return timm.create_model(name, **arguments).eval()
    overlay: dict[str, Any] = {"file": checkpoint}
    if arguments.get("num_classes"):
        # else timm takes the file for one of 1000 classes and silently leaves the classifier random
        overlay["num_classes"] = arguments["num_classes"]
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    except CheckpointError:
        raise
    except Exception as error:  # timm lets through whatever its reader of files raises
        text = " ".join(str(error).split()) or type(error).__name__
        classes = re.search(r"size mismatch for \S*\.weight: .*?\[(\d+), (\d+)\].*?\[(\d+), \2\]", text)
        if classes and text.count("size mismatch") <= 2:
            text = (
                f"its classifier has {classes[1]} classes where {classes[3]} are asked for (see num_classes)"
            )
        raise CheckpointError(f"{checkpoint} does not fit {name}: {text[:300]}") from error


@dataclass(frozen=True)
class ModelRow:
    """One line of `vitrail models`."""

    name: str
    family: str
    parameters: int
    macs: int
    """Multiply-accumulates of one image at the default size."""
    img_size: tuple[int, int]
    weights: str
    """Where they come from, or how to get them."""
    weights_url: str | None
    published: Published | None


def _weights(name: str) -> tuple[str, str | None]:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is not None and cfg.hf_hub_id:
        return f"pretrained=True, hub {cfg.hf_hub_id}", f"https://huggingface.co/{cfg.hf_hub_id}"
    if cfg is not None and isinstance(cfg.url, str) and cfg.url:
        return f"pretrained=True, from {urlsplit(cfg.url).hostname}", cfg.url
    published = published_figures(name)
    if published:
        return published.weights, published.code
    trunks = [tagged.partition(".")[2] for tagged in timm.list_models(f"{name}.*_init", pretrained=True)]
    return (f"none published; start from the trunk's (tag {trunks[0]})" if trunks else "none published"), None


def describe(name: str) -> ModelRow:
    """Size and cost of a model, found without allocating any weights."""
    from .profiling import count_with_torch

    family = family_of(name)
    weights, url = _weights(name)
    with torch.device("meta"):
        model = timm.create_model(check_model_name(name)).eval()
        size = default_size(name)
        macs = count_with_torch(model, torch.empty(1, 3, *size))
    return ModelRow(
        name=name,
        family=family or "timm",
        parameters=sum(p.numel() for p in model.parameters()),
        macs=macs,
        img_size=size,
        weights=weights,
        weights_url=url,
        published=published_figures(name),
    )


def size_rule(model: Any) -> str:
    """Which image sizes a model takes, in words."""
    cfg = pretrained_cfg(model)
    height, width = default_size(cfg["architecture"])
    if cfg.get("fixed_input_size"):
        return f"{height} x {width}, others by `img_size` and `set_input_size()`"
    smallest = getattr(model, "smallest_image", 1)
    return "any" if smallest <= 1 else f"any from {smallest} x {smallest}"


def model_names(pattern: str | None = None) -> list[str]:
    """Names of vitrail's models, family by family; only those that contain `pattern` (or match it, with wildcards)."""
    names = [name for models in list_families().values() for name in models]
    if not pattern:
        return names
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in names if fnmatch.fnmatch(name, wild)]
