"""What a file says of itself: what it is, how to feed it, where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from .images import Preprocessing, pretrained_cfg

_PACKAGES = ("vitrail", "onnx", "timm")


def describe(
    model: nn.Module, input_size: tuple[int, int, int], prepare: Preprocessing, classes: Sequence[str] | None
) -> dict[str, str]:
    """Entries of the metadata that the model itself answers for; values that aren't text are JSON.

    Args:
        model: any module; timm's `pretrained_cfg` is read where it has one.
        input_size: channels, height, width.
        prepare: how photos become inputs.
        classes: their names.
    """
    config = pretrained_cfg(model)
    name = ".".join(str(config[key]) for key in ("architecture", "tag") if config.get(key))
    entries: dict[str, object] = {
        "model": name or type(model).__name__,
        "config": _constructor(model, input_size, config),
        "input_size": list(input_size),
        **prepare.to_dict(),
        "crop_mode": "center",
        "num_classes": getattr(model, "num_classes", None),
        "classes": None if classes is None else list(classes),
        "license": config.get("license"),
        **{package: installed(package) for package in _PACKAGES},
        "torch": torch.__version__,
    }
    return {key: text(value) for key, value in entries.items() if value is not None}


def _constructor(
    model: nn.Module, input_size: tuple[int, int, int], config: dict[str, Any]
) -> dict[str, Any]:
    """What one would make the model with again."""
    channels, *size = input_size
    known = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "architecture": config.get("architecture"),
        "tag": config.get("tag"),
        "img_size": size,
        "in_chans": channels,
        "num_classes": getattr(model, "num_classes", None),
        "num_features": getattr(model, "num_features", None),
        "global_pool": getattr(model, "global_pool", None),
    }
    return {key: value for key, value in known.items() if isinstance(value, (str, int, list)) and value != ""}


def check_classes(model: nn.Module, classes: Sequence[str] | None) -> None:
    """Raise ValueError unless there are as many names as the model has classes, each its own."""
    if classes is None:
        return
    count = getattr(model, "num_classes", None)
    if isinstance(classes, str) or not all(isinstance(name, str) and name for name in classes):
        raise ValueError("classes must be a list of names, none of them empty")
    if count is not None and len(classes) != count:
        raise ValueError(f"classes has {len(classes)} names, and the model has {count} classes")


def text(value: object) -> str:
    """A value as an entry: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def installed(package: str) -> str:
    """Version of a package, 'unknown' if it is not installed as one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def entry_of(meta: Mapping[str, str], key: str) -> Any:
    """An entry of the metadata; values that aren't text are JSON."""
    try:
        return json.loads(meta.get(key, "null"))
    except ValueError:
        return meta[key]
