"""Models of more than one file holds: a `.onnx` and, beside it, its weights.

The weights' file is named after what is in it, `model.1f2e3d4c5b6a7988.onnx.data`, so that writing a new one never
touches the one that an older `model.onnx` reads. The pair is made in a hidden folder beside the target; then the
weights are moved into place, and last, in one step, the `.onnx` that names them. Whoever opens that finds the old
pair or the new one, also when the process is killed in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .files import explaining, keep_permissions, scratch_folder

if TYPE_CHECKING:
    import onnx

ONE_FILE = 2**31 - 2**24
"""Bytes of weights that fit in one file: protobuf ends at 2 GiB, less some room for the graph."""

_SMALL = 1024  # bytes; shapes and scalars stay in the graph, where shape inference reads them
_ALIGNED = 4096  # runtimes map aligned weights into memory in place of reading them
DATA = ".onnx.data"


def is_large(model: onnx.ModelProto) -> bool:
    """Whether the weights of a model need a file of their own."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > ONE_FILE


@contextmanager
def scratch_pair(model: onnx.ModelProto, target: Path) -> Iterator[Path]:
    """The pair that `model` becomes, in a `scratch_folder` of `target`.

    `model` has its weights outside from then on.

    Yields:
        the path of the `.onnx` in that folder.
    """
    with contextlib.ExitStack() as stack:
        with explaining(target, sum(len(tensor.raw_data) for tensor in model.graph.initializer)):
            folder = stack.enter_context(scratch_folder(target))
            write_pair(model, folder / target.name)
        yield folder / target.name


def write_pair(model: onnx.ModelProto, path: Path) -> Path:
    """Write `model` to `path` and its weights beside it; returns the path of the weights.

    Not atomic; `publish` is. `model` has its weights outside from then on.
    """
    digest = hashlib.sha256()
    scratch = path.with_name(path.stem + DATA)
    moved = []
    with open(scratch, "xb") as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < _SMALL:
                continue
            gap = bytes(-file.tell() % _ALIGNED)
            file.write(gap)
            offset, raw = file.tell(), tensor.raw_data
            file.write(raw)
            digest.update(gap)
            digest.update(raw)
            moved.append(tensor)
            _refer(tensor, offset, len(raw))
        file.flush()
        os.fsync(file.fileno())
    data = path.with_name(f"{path.stem}.{digest.hexdigest()[:16]}{DATA}")
    scratch.replace(data)
    for tensor in moved:
        tensor.external_data.add(key="location", value=data.name)
    with open(path, "xb") as file:
        file.write(model.SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())
    return data


def _refer(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    import onnx

    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value=str(offset))
    tensor.external_data.add(key="length", value=str(length))


def publish(pair: Path, target: Path) -> int:
    """Move a scratch pair to where it belongs; returns the bytes of both files.

    On any failure `target` is as it was and no new file is beside it. What is left over from a process that was
    killed between the two moves, and the weights of the `.onnx` that is replaced, are removed at the end.
    """
    (source,) = pair.parent.glob(f"*{DATA}")
    data = target.with_name(source.name)
    new = not data.exists()
    size = pair.stat().st_size + source.stat().st_size
    try:
        with explaining(target, size):
            keep_permissions(target, pair)
            source.replace(data)
            os.replace(pair, target)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                data.unlink(missing_ok=True)
        raise
    remove_weights(target, keep=data.name)
    return size


def remove_weights(target: Path, keep: str = "") -> None:
    """Remove files of weights that were written for `target`, other than `keep`."""
    ours = re.compile(re.escape(target.stem) + r"\.[0-9a-f]{16}" + re.escape(DATA))
    for path in target.parent.iterdir():
        if ours.fullmatch(path.name) and path.name != keep:
            with contextlib.suppress(OSError):
                path.unlink()
