"""Photos that show a file what it will see, and the ranges of its tensors over them."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import ExportError
from .files import temporary_folder
from .graph import TensorInfo
from .images import Preprocessing, find_images, load_image
from .metadata import entry_of
from .qdq import Range

if TYPE_CHECKING:
    import numpy as np
    import onnx

    Array = np.ndarray[Any, Any]

METHODS = ("minmax", "entropy", "percentile")
"""How the range of a tensor follows from its values: all of them, the part that keeps most information, or all but the
outermost hundred-thousandth."""
FEWEST = 8
"""Images; of fewer the ranges would be those of single photos."""

Count = Callable[[int, int, str], None]
"""Called with how many are done, of how many, and what is being done."""


@dataclass(frozen=True)
class Photos:
    """Images of a folder: those to calibrate with, and others to verify with (the same, where there are no others)."""

    calibration: tuple[Path, ...]
    verification: tuple[Path, ...]

    @property
    def held_out(self) -> bool:
        """Whether the file is verified on images that it was not calibrated with."""
        return not set(self.calibration) & set(self.verification)


def find_photos(
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], limit: int, verify: int = 32
) -> Photos:
    """Images of a folder and of all folders in it, spread evenly over their sorted names.

    Args:
        folder: a folder, or files and folders.
        limit: the most to calibrate with.
        verify: the most to verify with.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: too few images, or too low a limit.
    """
    if limit < FEWEST:
        raise ValueError(f"at least {FEWEST} images are needed to calibrate with, got a limit of {limit}")
    found = find_images(folder, deep=True)
    if len(found) < FEWEST:
        raise ValueError(
            f"{len(found)} image{'s' * (len(found) != 1)} {'are' if len(found) != 1 else 'is'} too few to calibrate "
            f"with: give at least {FEWEST} photos like those that the model will see, better a hundred"
        )
    chosen = _spread(found, limit)
    rest = sorted(set(found) - set(chosen))
    return Photos(tuple(chosen), tuple(_spread(rest if len(rest) >= FEWEST else chosen, verify)))


def _spread(items: Sequence[Path], count: int) -> list[Path]:
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def preprocessing_of(
    meta: Mapping[str, str], overrides: Preprocessing | Mapping[str, Any] | None = None
) -> Preprocessing:
    """How a file wants its images, by its metadata; ImageNet's habits where it says nothing.

    Raises:
        ValueError: an unknown field, or an impossible value.
    """
    if isinstance(overrides, Preprocessing):
        return overrides
    stated = {name: entry_of(meta, name) for name in Preprocessing.__dataclass_fields__ if name in meta}
    return Preprocessing.of(nn.Identity(), {**stated, **(overrides or {})})


@dataclass(frozen=True)
class ImageInput:
    """What a file takes: images of so many channels, height and width; `pixels`: uint8 (B, H, W, C), which it
    normalises itself, else float32 (B, C, H, W)."""

    channels: int
    height: int
    width: int
    pixels: bool


def image_input(info: TensorInfo, meta: Mapping[str, str]) -> ImageInput:
    """What images to feed: of the file's own size, of that in its metadata where it is open.

    Raises:
        ExportError: the input is no batch of images.
    """
    pixels = info.dtype == "uint8"
    if len(info.shape) == 4:
        channels, *sides = (info.shape[i] for i in ((3, 1, 2) if pixels else (1, 2, 3)))
    if len(info.shape) != 4 or info.dtype not in ("float", "uint8") or not isinstance(channels, int):
        raise ExportError(
            f"the file's input is {info}; quantisation feeds images: float (batch, channels, height, width), or uint8 "
            f"(batch, height, width, channels)"
        )
    stated = json.loads(meta["input_size"]) if "input_size" in meta else [channels, 224, 224]
    height, width = (n if isinstance(n, int) else int(s) for n, s in zip(sides, stated[1:], strict=True))
    return ImageInput(channels, height, width, pixels)


def load(paths: Collection[Path], prepare: Preprocessing, wanted: ImageInput, count: Count) -> Array:
    """The images as the file wants them, in one array.

    Raises:
        ValueError: an image can't be read; the message names it.
    """
    images = []
    for i, path in enumerate(paths):
        count(i, len(paths), f"reading {path.name}")
        images.append(prepare.pixels(load_image(path), (wanted.height, wanted.width), wanted.channels))
    stack = torch.stack(images)
    if wanted.pixels:
        return stack.permute(0, 2, 3, 1).contiguous().numpy()
    return prepare.normalise(stack).numpy()


def batches(images: Array, size: int) -> Iterator[tuple[Array, int]]:
    """The images in batches of one size, and how many of each count: the last is filled up with its first image."""
    import numpy as np

    for start in range(0, len(images), size):
        batch = images[start : start + size]
        missing = size - len(batch)
        yield np.concatenate([batch, np.repeat(batch[:1], missing, 0)]) if missing else batch, len(batch)


def find_ranges(
    model: onnx.ModelProto, tensors: Collection[str], images: Array, method: str, count: Count
) -> dict[str, Range]:
    """Ranges of tensors over images, by ONNX Runtime's calibraters.

    Args:
        model: the float32 graph.
        tensors: names of float32 tensors in it.
        images: as the graph takes them.
        method: one of `METHODS`.
        count: called before each image.

    Raises:
        ExportError: a tensor holds NaN or infinity.
        ValueError: an unknown method.
    """
    import onnx
    from onnxruntime.quantization import calibrate

    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    kinds = {
        "minmax": calibrate.MinMaxCalibrater,
        "entropy": calibrate.EntropyCalibrater,
        "percentile": calibrate.PercentileCalibrater,
    }
    source = model.graph.input[0]
    fixed = source.type.tensor_type.shape.dim[0].dim_value or 1
    with temporary_folder() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = folder / "model.onnx"
        onnx.save(model, file)
        # it would watch every tensor of every layer and its neighbours
        # 128 bins, its default, are as many as there are steps, and then there is nothing to choose
        more = {"num_bins": 512} if method == "entropy" else {}
        calibrater = kinds[method](file, augmented_model_path=str(folder / "watched.onnx"), **more)
        infos = {
            v.name: v for v in (*calibrater.model.graph.value_info, *calibrater.model.graph.output, source)
        }
        if unknown := sorted(set(tensors) - set(infos)):
            raise ExportError(
                f"the shape of {', '.join(unknown[:3])} can't be inferred; is the file damaged?"
            )
        # by itself it would watch what every node of a type reads and writes
        calibrater.select_tensors_to_calibrate = lambda _: (set(tensors), infos)
        calibrater.augment_graph()
        calibrater.create_inference_session()
        for i, (batch, _) in enumerate(batches(images, fixed)):
            count(i * fixed, len(images), f"calibrating ({method})")
            calibrater.collect_data(_Reader({source.name: batch}))
        count(len(images), len(images), f"calibrating ({method})")
        found = calibrater.compute_data()
    ranges = {name: Range(*(end.item() for end in found[name].range_value)) for name in tensors}
    if broken := [n for n, r in ranges.items() if not abs(r.low) + abs(r.high) < float("inf")]:
        raise ExportError(f"the calibration images make NaN or infinity in {', '.join(broken[:3])}")
    return ranges


class _Reader:
    """One batch, in the form that ONNX Runtime's calibraters read."""

    def __init__(self, feed: dict[str, Array]) -> None:
        self._feeds = iter([feed])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)
