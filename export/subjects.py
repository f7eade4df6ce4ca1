"""What can be compared: a module, an ONNX file, an engine, behind one interface."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .capture import PLACES, Outputs, evaluation, form_of, prepared
from .errors import ExportError
from .graph import precision_of, walk
from .images import Preprocessing, pretrained_cfg
from .metadata import entry_of
from .runs import Run, interface, kernels_for, load, open_runs, runtime_name

if TYPE_CHECKING:
    import onnx
    import onnxruntime

    from .engine import Engine

ENGINES = (".engine", ".plan")
"""Suffixes of files that TensorRT loads."""


@dataclass(frozen=True)
class Axis:
    """Sizes that a side takes along an axis: one (`fixed`), or the multiples of a number from `least` to `most`.

    From `proven_from` on they are proven, below it is for the verification to try.
    """

    fixed: int | None = None
    multiple: int = 1
    proven_from: int = 1
    least: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Way:
    """A way to run a side: what its rows in reports are marked with, and for ONNX files the `Run` behind it."""

    label: str
    run: Callable[[Tensor], dict[str, Tensor]]
    source: Run | None = None


class Subject(ABC):
    """One side of a comparison.

    Attributes:
        noun: "model", "file" or "engine".
        runs: what runs it, in a word.
        output_names: as far as they are known without running it.
        name: what the user would recognise it by.
        precision: float32, float16, bfloat16 or int8.
        runtime: the same with its version.
        preprocessing: how it says that photographs are to be prepared, None if it says nothing.
        channels: of its input.
        axes: batch, height, width.
        size: the height and width it is meant for, None if it doesn't say.
        pictures: whether its input is uint8 (B, H, W, C) pictures, which it normalises itself.
        classes: number of classes, None where unknown.
        remarks: what the reader of the figures should know.
        loose: whether it runs at sizes by habit and not by a claim (modules; files claim their open axes).
    """

    noun = "file"
    runs = ""
    name = ""
    output_names: Sequence[str] = ()
    precision = "float32"
    runtime = ""
    preprocessing: Preprocessing | None = None
    channels: int | None = 3
    axes: Mapping[str, Axis] = {}
    size: tuple[int, int] | None = None
    pictures = False
    classes: int | None = None
    loose = False
    remarks: Sequence[str] = ()

    @abstractmethod
    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs by name, on the CPU, for images as the side takes them."""

    def ways(self) -> list[Way]:
        """The ways to run it that are to be compared; the first is `run`."""
        return [Way("", self.run)]


class ModuleSubject(Subject):
    """A module in eager mode, on the CPU.

    Args:
        model: any module of one image tensor, any mode; it is left as it was.
        form: what it is to put out; see `FORMS`.
        name: default: its class, or its architecture by timm's name.
    """

    noun = "model"
    runs = "torch"
    loose = True

    def __init__(self, model: nn.Module, form: str = "classifier", name: str = ""):
        self.model = prepared(model)
        self.module = Outputs(self.model, form)
        config = pretrained_cfg(model)
        self.name = name or str(config.get("architecture") or type(model).__name__)
        self.runtime = f"torch {torch.__version__} CPU"
        self.preprocessing = Preprocessing.of(model) if config else None
        size = config.get("input_size")
        self.size = (int(size[-2]), int(size[-1])) if size else None
        self.channels = None
        self.axes = {"batch": Axis(), "height": Axis(), "width": Axis()}
        self.classes = getattr(model, "num_classes", None) or None

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Run the module in evaluation mode."""
        with evaluation(self.module):
            values = self.module(images)
        return {n: v.detach() for n, v in zip(self.module.names, values, strict=True)}


class OnnxSubject(Subject):
    """An ONNX file in ONNX Runtime, on the CPU with as many threads as torch.

    Args:
        source: the file, or its content.
        kernels: run its nodes of domain `vitrail` by this project's kernels.

    Raises:
        ExportError: it can't be loaded, or takes something else than one batch of images; or it has no nodes for
            kernels.
    """

    runs = "ONNX Runtime"

    def __init__(self, source: str | os.PathLike[str] | bytes, kernels: bool = False):
        self.folder = "" if isinstance(source, bytes) else os.path.dirname(os.path.abspath(source))
        self.name = "the file" if isinstance(source, bytes) else os.fspath(source)
        source = source if isinstance(source, bytes) else Path(source)
        proto = load(source, weights=False)
        self.kernels = kernels_for(proto, self.name) if kernels else None
        self._ways, self.remarks = open_runs(source, self.kernels)
        self.precision = _precision(proto)
        self.proto = self._ways[0].model
        self.runtime = runtime_name(self.kernels)
        self.input, outputs, self.meta = interface(self.proto)
        self.output_names = [output.name for output in outputs]
        self.pictures = self.input.dtype == "uint8"
        batch, *rest = self.input.shape
        channels, height, width = (rest[2], rest[0], rest[1]) if self.pictures else rest
        if not isinstance(channels, int):
            raise ExportError(f"the file's input {self.input} has an open number of channels")
        self.channels = channels
        sides = zip(("batch", "height", "width"), (batch, height, width), strict=True)
        self.axes = {axis: self._axis(axis, size) for axis, size in sides}
        self.preprocessing = _preprocessing(self.meta)
        size = entry_of(self.meta, "input_size")
        self.size = (int(size[-2]), int(size[-1])) if isinstance(size, list) and len(size) > 1 else None
        classes = entry_of(self.meta, "num_classes")
        self.classes = classes if isinstance(classes, int) and classes else None

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Run the file."""
        return self.named(self._ways[0](self._fed(images)))

    def ways(self) -> list[Way]:
        """As it is, in half precision also as a copy that rounds; see `open_runs`."""
        return [Way(run.label, partial(self._by, run), run) for run in self._ways]

    def _by(self, run: Run, images: Tensor) -> dict[str, Tensor]:
        return self.named(run(self._fed(images)))

    def named(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """Outputs by name."""
        return dict(zip(self.output_names, map(as_tensor, values), strict=True))

    def run_session(
        self, session: onnxruntime.InferenceSession, names: Sequence[str], images: Tensor
    ) -> list[Tensor]:
        """Outputs of a session made of this file, or of a variation of it."""
        feeds = {self.input.name: self._fed(images).numpy()}
        return [as_tensor(value) for value in session.run(list(names), feeds)]

    def _fed(self, images: Tensor) -> Tensor:
        if self.input.dtype == "bfloat16":
            raise ExportError(
                "the file's input is bfloat16, which has no numpy type; write it with float32 inputs"
            )
        return images.to(_DTYPES.get(self.input.dtype, images.dtype)).contiguous()

    @property
    def form(self) -> str:
        """The form of the model that its outputs belong to."""
        return form_of(self.output_names)

    def _axis(self, axis: str, size: int | str) -> Axis:
        if isinstance(size, int):
            return Axis(size)
        multiple, lowest = (
            entry_of(self.meta, f"vitrail.{axis}_{what}") for what in ("multiple", "proven_from")
        )
        return Axis(None, int(multiple or 1), int(lowest or 1))


class EngineSubject(Subject):
    """A TensorRT engine on the GPU.

    Raises:
        ExportError: there is no GPU, or the engine can't be loaded.
    """

    noun = "engine"
    runs = "TensorRT"

    def __init__(self, engine: Engine):
        self._engine = engine
        self.name = os.fspath(self._engine.path)
        self.runtime = self._engine.runtime
        self.precision = str(self._engine.report.get("dtype", "float32"))
        self.output_names = [output.name for output in self._engine.outputs]
        self.meta: dict[str, str] = self._engine.report.get("metadata", {})
        self.preprocessing = _preprocessing(self.meta)
        self.pictures = self._engine.input.dtype == "uint8"
        least, best, most = (images_shape(shape, self.pictures) for shape in self._engine.profile)
        self.channels, self.size = best[1], (best[2], best[3])
        self.axes = {
            name: Axis(best[i] if least[i] == most[i] else None, least=least[i], most=most[i])
            for name, i in PLACES.items()
        }

    @property
    def form(self) -> str:
        """The form of the model that its outputs belong to."""
        return form_of(self.output_names)

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Run the engine."""
        return {name: as_tensor(value) for name, value in self._engine.run(images).items()}


def images_shape(shape: Sequence[int], pictures: bool) -> tuple[int, int, int, int]:
    """Batch, channels, height and width of an input's shape."""
    batch, channels, height, width = (shape[i] for i in ((0, 3, 1, 2) if pictures else range(4)))
    return batch, channels, height, width


def _preprocessing(meta: Mapping[str, str]) -> Preprocessing | None:
    """How photos are to be prepared by the metadata, None where it says nothing.

    Raises:
        ExportError: it makes no sense.
    """
    found = {key: entry_of(meta, key) for key in Preprocessing.__dataclass_fields__ if key in meta}
    if not {"mean", "std"} <= found.keys():
        return None
    try:
        return Preprocessing.of(nn.Identity(), found)
    except (TypeError, ValueError) as error:
        raise ExportError(f"the file's metadata on preprocessing makes no sense: {error}") from error


_DTYPES = {"uint8": torch.uint8, "float": torch.float32, "float16": torch.float16, "double": torch.float64}


def subject(
    side: nn.Module | str | os.PathLike[str] | bytes | Subject,
    form: str = "classifier",
    kernels: bool = False,
) -> Subject:
    """The side of a comparison that `side` means: a module, or a file by its suffix, or an ONNX file's content.

    Args:
        side: what is meant.
        form: of a module.
        kernels: of an ONNX file: run its nodes by this project's kernels; of no effect on a module or a subject.

    Raises:
        ValueError: a file of another kind; kernels for something else than an ONNX file.
        ExportError, OSError, TypeError: see the subjects.
    """
    if isinstance(side, Subject):
        return side
    if isinstance(side, nn.Module):
        return ModuleSubject(side, form)
    if isinstance(side, bytes):
        return OnnxSubject(side, kernels)
    suffix = Path(side).suffix.lower()
    if suffix == ".onnx":
        return OnnxSubject(side, kernels)
    if kernels:
        raise ValueError(f"kernels are for ONNX files (.onnx), got {os.fspath(side)!r}")
    if suffix in ENGINES:
        from .engine import Engine

        return EngineSubject(Engine(side))
    raise ValueError(
        f"{os.fspath(side)!r} is neither an ONNX file (.onnx) nor an engine ({', '.join(ENGINES)}); "
        f"for a checkpoint, load it into its model and give that"
    )


def _precision(proto: onnx.ModelProto) -> str:
    """The least precise type that the graph computes in: int8, bfloat16, float16 or float32."""
    if any("QuantizeLinear" in n.op_type or n.op_type.startswith("QLinear") for n in walk(proto.graph)):
        return "int8"
    return precision_of(proto)


def as_tensor(value: Any) -> Tensor:
    """A tensor on the CPU of what a runtime returns."""
    return value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(value)
