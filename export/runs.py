"""Running a file in ONNX Runtime on the CPU, in whatever precision it is, with its own choices or with given ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .choices import HELD, Choice, choices_of, flipped, holding, showing
from .emulate import emulated
from .errors import ExportError
from .external import is_large, write_pair
from .files import temporary_folder
from .functions import DOMAIN
from .graph import TensorInfo, precision_of, summarize

if TYPE_CHECKING:
    import onnx
    import onnxruntime

NO_KERNELS = (
    "ONNX Runtime's CPU provider does not compute in bfloat16: a copy ran that computes in float32 and rounds every "
    "result to bfloat16"
)
ROUNDED = (
    "rows marked 'rounded' ran a copy that computes in float32 and rounds every result to float16, as GPUs store them "
    "(the CPU provider skips roundings, and overflow with them)"
)


@dataclass(frozen=True)
class Held:
    """What came out with the choices of the float32 file: outputs, scores of both files, choices that differ."""

    outputs: list[Any]
    scores: list[tuple[Any, Any]]
    flipped: int
    choices: int


class Run:
    """One way to run a file.

    Args:
        model: the graph, with its weights.
        label: of its rows in reports.
        session: where there is one for it already.
        kernels: see `open_session`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        label: str,
        session: onnxruntime.InferenceSession | None = None,
        kernels: Path | None = None,
    ):
        self.model, self.label, self.kernels = model, label, kernels
        self.session = session or session_of(model, kernels)
        self.input = model.graph.input[0].name
        self.outputs = [value.name for value in model.graph.output]

    def __call__(self, images: Tensor) -> list[Any]:
        """The outputs for a batch, as arrays."""
        results: list[Any] = self.session.run(self.outputs, {self.input: images.numpy()})
        return results

    @cached_property
    def _held(self) -> tuple[list[Choice], onnxruntime.InferenceSession]:
        choices = choices_of(self.model)
        return choices, session_of(holding(self.model, choices), self.kernels)

    def held_to(self, reference: Reference, images: Tensor) -> Held:
        """Run with the choices that `reference` makes."""
        theirs = reference(images)
        choices, session = self._held
        feeds = {self.input: images.numpy(), **{c.name + HELD: theirs[c.name] for c in choices}}
        shown = list(dict.fromkeys(name for c in choices for name in (c.name, *c.scores)))
        names = list(dict.fromkeys([*self.outputs, *shown]))
        ours = dict(zip(names, session.run(names, feeds), strict=True))
        scores, changed, count = [], 0, 0
        for own, their in zip(choices, reference.choices, strict=True):
            scores += [(theirs[a], ours[b]) for a, b in zip(their.scores, own.scores, strict=True)]
            size = theirs[their.scores[0]].shape[their.axis] if own.op_type == "TopK" else 0
            differ, of = flipped(own, theirs[own.name], ours[own.name], size)
            changed, count = changed + differ, count + of
        return Held([ours[name] for name in self.outputs], scores, changed, count)


class Reference:
    """The float32 file that another was made from, for what it chooses; `choices` may be none."""

    def __init__(self, model: onnx.ModelProto):
        self.choices = choices_of(model)
        self.input = model.graph.input[0].name
        self._model = model

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        return session_of(showing(self._model, self.choices))

    def __call__(self, images: Tensor) -> dict[str, Any]:
        """The choices and their scores, by name."""
        names = list(dict.fromkeys(name for c in self.choices for name in (c.name, *c.scores)))
        return dict(zip(names, self._session.run(names, {self.input: images.numpy()}), strict=True))


def open_runs(
    source: Path | bytes | onnx.ModelProto, kernels: Path | None = None
) -> tuple[list[Run], list[str]]:
    """The ways to run a file, and what the reader of the figures should know of them.

    A float32 file runs as it is. A float16 file runs as it is and as a copy that rounds; a bfloat16 file as that copy
    alone (see `emulate`). With `kernels` all of them run by these, see `open_session`.

    Raises:
        ExportError: ONNX Runtime can't load the file, or the kernels.
    """
    precision = precision_of(load(source, weights=False))
    if precision == "bfloat16":
        return [Run(emulated(load(source)), ", rounded", kernels=kernels)], [NO_KERNELS]
    session = session_of(source, kernels)
    if precision == "float32":
        return [Run(load(source, weights=False), "", session, kernels)], []
    model = load(source)
    return [
        Run(model, "", session, kernels),
        Run(emulated(model), ", rounded", kernels=kernels),
    ], [ROUNDED]


def load(source: Path | bytes | onnx.ModelProto, weights: bool = True) -> onnx.ModelProto:
    """The model in a file, with its weights unless they are in a file of their own and not wanted.

    Raises:
        ExportError: it is no ONNX file, or its weights are not beside it.
    """
    import onnx

    if isinstance(source, onnx.ModelProto):
        return source
    try:
        if isinstance(source, bytes):
            return onnx.load_from_string(source)
        return onnx.load(source, load_external_data=weights)
    except Exception as error:  # of protobuf, of onnx, of the system
        raise ExportError(f"ONNX Runtime can't load the file: {error}") from error


def interface(model: onnx.ModelProto) -> tuple[TensorInfo, tuple[TensorInfo, ...], dict[str, str]]:
    """The file's image input, its outputs, and its metadata."""
    summary = summarize(model)
    if len(summary.inputs) != 1 or len(summary.inputs[0].shape) != 4:
        raise ExportError(
            f"expected a file with one image input of four dimensions, got {', '.join(map(str, summary.inputs))}"
        )
    meta = {entry.key: entry.value for entry in model.metadata_props}
    return summary.inputs[0], summary.outputs, meta


def session_of(
    source: Path | bytes | onnx.ModelProto, kernels: Path | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU with torch's number of threads, which do not spin while they wait."""
    import onnx

    if not isinstance(source, onnx.ModelProto):
        return open_session(source, kernels=kernels)
    if not is_large(source):
        return open_session(source.SerializeToString(), kernels=kernels)
    copy = onnx.ModelProto()
    copy.CopyFrom(source)  # its weights go out of it
    with temporary_folder() as folder:
        path = folder / "model.onnx"
        write_pair(copy, path)
        del copy
        return open_session(path, kernels=kernels)


def open_session(
    source: Path | bytes, folder: str = "", level: str = "all", kernels: Path | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU with torch's number of threads, which do not spin while they wait.

    Args:
        source: the file, or its content.
        folder: where weights in files of their own are, for a content.
        level: of ONNX Runtime's optimisation: all, extended, basic, or none (the graph as it is written).
        kernels: the library that nodes of domain `vitrail` run by, see `vitrail.ops.library.onnxruntime_library`;
            default: none, they run by the functions that the file holds.
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
    content = source if isinstance(source, bytes) else str(source)
    if kernels is not None:
        try:
            options.register_custom_ops_library(str(kernels))
        except Exception as error:  # the runtime's exceptions have no common base
            raise ExportError(f"ONNX Runtime can't load the kernels of {kernels}: {error}") from error
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common base
        raise ExportError(f"ONNX Runtime can't load the file: {error}") from error


def runtime_name(kernels: Path | None = None) -> str:
    """The runtime with its version and threads, for reports."""
    import onnxruntime

    own = ", nodes by vitrail's kernels" if kernels else ""
    return f"onnxruntime {onnxruntime.__version__} CPU, {torch.get_num_threads()} threads{own}"


def kernels_for(model: onnx.ModelProto, name: str) -> Path:
    """The library of kernels for a file with nodes for them.

    Raises:
        ExportError: the file has no such nodes, or the library can't be built.
    """
    from ..ops import library

    if not any(node.domain == DOMAIN for node in model.graph.node):
        raise ExportError(f"{name} has no nodes that vitrail's kernels run; export it with operators='fused'")
    try:
        return library.onnxruntime_library()
    except library.BuildError as error:
        raise ExportError(f"the kernels for ONNX Runtime could not be built: {error}") from error
