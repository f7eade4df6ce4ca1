"""The ONNX file that an engine is built from: read, judged, and given the shapes that the engine is to take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ExportError
from .external import is_large, write_pair
from .graph import TensorInfo, summarize

if TYPE_CHECKING:
    import onnx

BATCH = (1, 8, 32)
"""Least, best and largest batch of an engine whose batch is open."""
Triple = tuple[int, int, int]
Shape = tuple[int, ...]
Size = int | tuple[int, int]

_PLACES = {
    "float": {"batch": 0, "height": 2, "width": 3},
    "float16": {"batch": 0, "height": 2, "width": 3},
    "uint8": {"batch": 0, "height": 1, "width": 2},
}
"""Places of the axes by the input's type: images (B, C, H, W), or pixels (B, H, W, C)."""


def triple(batch: int | Sequence[int]) -> Triple:
    """Least, best and largest batch; one number stands for all three.

    Raises:
        ValueError: not one or three whole numbers from 1 that ascend.
    """
    numbers = (batch,) * 3 if isinstance(batch, int) else tuple(batch)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if len(numbers) != 3 or not whole or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise ValueError(
            f"batch must be one number from 1, or MIN, OPT, MAX with MIN <= OPT <= MAX; got {batch!r}"
        )
    return numbers[0], numbers[1], numbers[2]


def size_triple(sizes: Sequence[Size]) -> tuple[tuple[int, int], ...]:
    """Least, best and largest (height, width).

    Raises:
        ValueError: not three sizes that ascend in both directions.
    """
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    whole = all(len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) for pair in pairs)
    ascending = whole and all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(pairs))
    if len(pairs) != 3 or not ascending:
        raise ValueError(
            f"sizes must be MIN, OPT, MAX, pixels or (height, width) each, ascending; got {sizes!r}"
        )
    return tuple((int(pair[0]), int(pair[1])) for pair in pairs)


def read_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model in a file, with the weights that lie beside it.

    Raises:
        FileNotFoundError, IsADirectoryError, ...: it can't be read.
        ExportError: it is no ONNX file, or not a valid one.
    """
    import onnx

    with open(path, "rb"):
        pass  # says by itself what is wrong with the path
    try:
        model = onnx.load(path)
        onnx.checker.check_model(os.fspath(path))
    except FileNotFoundError as error:
        raise ExportError(
            f"weights of {path} lie in a file of their own, which is missing: {error}"
        ) from error
    except Exception as error:  # protobuf's and onnx's errors have no common base
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"{path} is not a valid ONNX file: {first}") from error
    return model


def image_input(model: onnx.ModelProto) -> TensorInfo:
    """The one input, a batch of images.

    Raises:
        ExportError: there are others, or it is no image.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in summarize(model).inputs if info.name not in weights]
    if len(inputs) != 1 or inputs[0].dtype not in _PLACES or len(inputs[0].shape) != 4:
        raise ExportError(
            f"expected a file with one input of images, float (B, C, H, W) or uint8 (B, H, W, C), got "
            f"{', '.join(map(str, inputs)) or 'none'}"
        )
    info = inputs[0]
    channels = next(i for i in range(4) if i not in _PLACES[info.dtype].values())
    if not isinstance(info.shape[channels], int):
        raise ExportError(
            f"the file's input {info} has an open number of channels; export it with a fixed one"
        )
    return info


def profile_of(
    model: onnx.ModelProto,
    info: TensorInfo,
    batch: Triple | None,
    sizes: Sequence[tuple[int, int]] | None,
) -> tuple[Shape, Shape, Shape]:
    """Least, best and largest shape of the input `info`, from the file's own where that is fixed.

    Raises:
        ValueError: what is asked for is not what the file leaves open.
    """
    meta = {entry.key: entry.value for entry in model.metadata_props}
    places = _PLACES[info.dtype]
    wanted: dict[str, Sequence[int] | None] = {
        "batch": batch,
        "height": None if sizes is None else [size[0] for size in sizes],
        "width": None if sizes is None else [size[1] for size in sizes],
    }
    if isinstance(info.shape[0], str) and batch is None:
        wanted["batch"] = BATCH
    shapes = [list(info.shape) for _ in range(3)]
    for axis, place in places.items():
        own, values = info.shape[place], wanted[axis]
        if isinstance(own, str):
            if values is None:
                raise ValueError(
                    f"the file leaves its {axis} open: give sizes, MIN, OPT, MAX, such as 112, 224, 448"
                )
            _check_multiple(axis, values, meta)
            for shape, value in zip(shapes, values, strict=True):
                shape[place] = value
        elif values is not None and set(values) != {own}:
            option = "batch" if axis == "batch" else "sizes"
            raise ValueError(
                f"the {axis} of the file is fixed at {own}, and {option} asks for {', '.join(map(str, values))}: "
                f"export the file with its {axis} open, or leave {option} out"
            )
    least, best, largest = (tuple(int(n) for n in shape) for shape in shapes)
    return least, best, largest


def _check_multiple(axis: str, values: Sequence[int], meta: Mapping[str, str]) -> None:
    step = int(meta.get(f"vitrail.{axis}_multiple", 1))
    if wrong := [value for value in values if value % step]:
        raise ValueError(
            f"the file takes multiples of {step} as its {axis}, got {', '.join(map(str, wrong))}"
        )


def fix_shape(model: onnx.ModelProto, info: TensorInfo, profile: Sequence[Shape]) -> None:
    """Write sizes that do not vary into the file's input, in place, so that TensorRT can count on them."""
    value = next(value for value in model.graph.input if value.name == info.name)
    for dim, least, largest in zip(value.type.tensor_type.shape.dim, profile[0], profile[-1], strict=True):
        if least == largest:
            dim.dim_value = least


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write the model, with its weights beside it where one file doesn't hold them."""
    import onnx

    if is_large(model):
        write_pair(model, path)
    else:
        onnx.save(model, path)
    return path
