"""What can be compared: a module, an ONNX file, an engine, behind one interface."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .capture import PLACES, Outputs, evaluation, prepared
from .errors import ExportError
from .graph import summarize, walk
from .images import Preprocessing, pretrained_cfg

if TYPE_CHECKING:
    import onnx
    import onnxruntime

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


class Subject:
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

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs by name, on the CPU, for images as the side takes them."""
        raise NotImplementedError


class ModuleSubject(Subject):
    """A module in eager mode, on the CPU.

    Args:
        model: any module of one image tensor, any mode; it is left as it was.
        features: its feature pyramid in place of its output.
        name: default: its class, or its architecture by timm's name.
    """

    noun = "model"
    runs = "torch"
    loose = True

    def __init__(self, model: nn.Module, features: bool = False, name: str = ""):
        self.model = prepared(model)
        self.module = Outputs(self.model, features)
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

    Raises:
        ExportError: it can't be loaded, or takes something else than one batch of images.
    """

    runs = "ONNX Runtime"

    def __init__(self, source: str | os.PathLike[str] | bytes):
        import onnx

        self.folder = "" if isinstance(source, bytes) else os.path.dirname(os.path.abspath(source))
        self.content = source if isinstance(source, bytes) else Path(source).read_bytes()
        self.session = open_session(self.content, self.folder)
        self.proto = onnx.load_from_string(self.content)
        self.meta = {entry.key: entry.value for entry in self.proto.metadata_props}
        self.name = "the file" if isinstance(source, bytes) else os.fspath(source)
        self.precision = precision_of(self.proto)
        self.runtime = runtime_name()
        summary = summarize(self.proto)
        if len(summary.inputs) != 1 or len(summary.inputs[0].shape) != 4:
            raise ExportError(
                f"expected a file with one (B, C, H, W) input, got {', '.join(map(str, summary.inputs))}"
            )
        self.input, self.outputs = summary.inputs[0], summary.outputs
        self.output_names = [output.name for output in self.outputs]
        self.pictures = self.input.dtype == "uint8"
        batch, *rest = self.input.shape
        channels, height, width = (rest[2], rest[0], rest[1]) if self.pictures else rest
        if not isinstance(channels, int):
            raise ExportError(f"the file's input {self.input} has an open number of channels")
        self.channels = channels
        sides = zip(("batch", "height", "width"), (batch, height, width), strict=True)
        self.axes = {axis: self._axis(axis, size) for axis, size in sides}
        self.preprocessing = _preprocessing(self.meta)
        size = _entry(self.meta, "input_size")
        self.size = (int(size[-2]), int(size[-1])) if isinstance(size, list) and len(size) > 1 else None
        classes = _entry(self.meta, "num_classes")
        self.classes = classes if isinstance(classes, int) and classes else None

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Run the file."""
        values = self.run_session(self.session, self.output_names, images)
        return dict(zip(self.output_names, values, strict=True))

    def run_session(
        self, session: onnxruntime.InferenceSession, names: Sequence[str], images: Tensor
    ) -> list[Tensor]:
        """Outputs of a session made of this file, or of a variation of it."""
        values = images.to(_DTYPES.get(self.input.dtype, images.dtype))
        if self.input.dtype == "bfloat16":
            raise ExportError(
                "the file's input is bfloat16, which has no numpy type; write it with float32 inputs"
            )
        return [as_tensor(v) for v in session.run(list(names), {self.input.name: values.numpy()})]

    @property
    def features(self) -> bool:
        """Whether it holds a feature pyramid in place of class scores."""
        return self.outputs[0].name == "stage0"

    def _axis(self, axis: str, size: int | str) -> Axis:
        if isinstance(size, int):
            return Axis(size)
        multiple, lowest = (
            _entry(self.meta, f"vitrail.{axis}_{what}") for what in ("multiple", "proven_from")
        )
        return Axis(None, int(multiple or 1), int(lowest or 1))


class EngineSubject(Subject):
    """A TensorRT engine on the GPU.

    Raises:
        ExportError: there is no GPU, or the engine can't be loaded.
    """

    noun = "engine"
    runs = "TensorRT"

    def __init__(self, path: str | os.PathLike[str]):
        if not torch.cuda.is_available():
            raise ExportError(
                f"{os.fspath(path)} is an engine, which runs on a GPU only, and torch sees none here; compare the ONNX "
                f"file that it was built from, or run this where the GPU is"
            )
        engine = import_module(".engine", __package__)
        self._engine = engine.Engine(path)
        self.name = os.fspath(path)
        self.runtime = f"{self._engine.library} on {torch.cuda.get_device_name()}"
        self.precision = {"fp16": "float16", "bf16": "bfloat16"}.get(
            str(self._engine.report.get("dtype", "")), "float32"
        )
        self.output_names = [output.name for output in self._engine.outputs]
        self.meta: dict[str, str] = self._engine.report.get("metadata", {})
        self.preprocessing = _preprocessing(self.meta)
        self.pictures = self._engine.input.dtype == "uint8"
        order = (0, 3, 1, 2) if self.pictures else (0, 1, 2, 3)
        least, best, most = ([shape[i] for i in order] for shape in self._engine.profile)
        self.channels, self.size = best[1], (best[2], best[3])
        self.axes = {
            name: Axis(best[i] if least[i] == most[i] else None, least=least[i], most=most[i])
            for name, i in PLACES.items()
        }

    @property
    def features(self) -> bool:
        """Whether it holds a feature pyramid in place of class scores."""
        return self.output_names[0] == "stage0"

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Run the engine."""
        return {name: as_tensor(value) for name, value in self._engine.run(images).items()}


def _entry(meta: Mapping[str, str], key: str) -> Any:
    """An entry of the metadata; values that aren't text are JSON."""
    try:
        return json.loads(meta.get(key, "null"))
    except ValueError:
        return meta[key]


def _preprocessing(meta: Mapping[str, str]) -> Preprocessing | None:
    """How photos are to be prepared by the metadata, None where it says nothing.

    Raises:
        ExportError: it makes no sense.
    """
    found = {key: _entry(meta, key) for key in Preprocessing.__dataclass_fields__ if key in meta}
    if not {"mean", "std"} <= found.keys():
        return None
    try:
        return Preprocessing.of(nn.Identity(), found)
    except (TypeError, ValueError) as error:
        raise ExportError(f"the file's metadata on preprocessing makes no sense: {error}") from error


_DTYPES = {"uint8": torch.uint8, "float": torch.float32, "float16": torch.float16, "double": torch.float64}


def subject(side: nn.Module | str | os.PathLike[str] | bytes | Subject, features: bool = False) -> Subject:
    """The side of a comparison that `side` means: a module, or a file by its suffix, or an ONNX file's content.

    Raises:
        ValueError: a file of another kind.
        ExportError, OSError, TypeError: see the subjects.
    """
    if isinstance(side, Subject):
        return side
    if isinstance(side, nn.Module):
        return ModuleSubject(side, features)
    if isinstance(side, bytes):
        return OnnxSubject(side)
    suffix = Path(side).suffix.lower()
    if suffix == ".onnx":
        return OnnxSubject(side)
    if suffix in ENGINES:
        return EngineSubject(side)
    raise ValueError(
        f"{os.fspath(side)!r} is neither an ONNX file (.onnx) nor an engine ({', '.join(ENGINES)}); "
        f"for a checkpoint, load it into its model and give that"
    )


def open_session(content: bytes, folder: str = "", level: str = "all") -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU with torch's number of threads, which do not spin while they wait.

    Args:
        content: the file's.
        folder: of the file, where weights outside of it are looked for.
        level: of ONNX Runtime's optimisation: all, extended, basic, or none (the graph as it is written).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "none": levels.ORT_DISABLE_ALL,
    }[level]
    # Spinning workers would slow down torch, which runs in between.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common base
        raise ExportError(f"ONNX Runtime can't load the file: {error}") from error


def runtime_name() -> str:
    """ONNX Runtime, its version, and how it is used here."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} CPU, {torch.get_num_threads()} threads"


def precision_of(proto: onnx.ModelProto) -> str:
    """The least precise type that the graph computes in: int8, bfloat16, float16 or float32."""
    import onnx

    if any("QuantizeLinear" in n.op_type or n.op_type.startswith("QLinear") for n in walk(proto.graph)):
        return "int8"
    types = {tensor.data_type for tensor in proto.graph.initializer}
    types |= {a.i for n in walk(proto.graph) if n.op_type == "Cast" for a in n.attribute if a.name == "to"}
    for name, kind in (("bfloat16", onnx.TensorProto.BFLOAT16), ("float16", onnx.TensorProto.FLOAT16)):
        if kind in types:
            return name
    return "float32"


def as_tensor(value: Any) -> Tensor:
    """A tensor on the CPU of what a runtime returns."""
    return value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(value)
