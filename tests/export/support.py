"""What can be exported to what: every combination is tried for real, and what came of it is on record.

`scripts/support_matrix.py` writes the record, docs/support.json, from which docs/EXPORT.md has its tables;
tests/export/test_support.py tries the same again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper

from vitrail.export import (
    EngineReport,
    ExportError,
    ExportReport,
    QuantizationError,
    VerificationError,
    VerificationReport,
    convert_precision,
    quantize_onnx,
    to_onnx,
    to_tensorrt,
    verify_onnx,
)
from vitrail.export.functions import DOMAIN
from vitrail.zoo import list_families
from vitrail.zoo.inference import standard_form

RECORD = Path(__file__).resolve().parents[2] / "docs" / "support.json"
# Nodes of the file that `vitrail export onnx` writes, as scripts/count_nodes.py counted them
COUNTS = json.loads((Path(__file__).parent / "node_counts.json").read_text())
SLACK = 1.05  # other releases of torch write a few nodes more

PICOS = tuple(name for names in list_families().values() for name in names if name.endswith("_pico"))
FULL = ("biformer_tiny", "sparsifiner_tiny", "stripmlp_tiny_light")
MODELS = (*PICOS, *FULL)

AXES = {"fixed": (), "batch": ("batch",), "sides": ("batch", "height", "width")}
"""What stays open: nothing, the batch, or height and width as well."""
DTYPES = ("float32", "float16", "bfloat16")
TARGETS = ("onnx", "fused", "int8", "engine", "plugins")
"""ONNX of standard operators, of fused operators, in 8 bits; engines of the first, and of the second with plugins."""
OPEN_SIDES = ("biformer_pico", "davit_fused_pico")
SLOW_SIDES = ("stvit_swin_pico", "stvit_r_swin_pico")
"""The smallest models that are traced with open height and width; those of the second take minutes (and one is refused
after that)."""
OPSET = 22  # one float32 file for all precisions: convolutions exist in bfloat16 from here on
BATCH = (1, 8, 32)


class Cell(NamedTuple):
    """A combination, of one model."""

    axes: str
    target: str
    dtype: str

    def __str__(self) -> str:
        return "-".join(self)


CELLS = tuple(
    Cell(axes, target, dtype)
    for axes in AXES
    for target in TARGETS
    for dtype in (("int8",) if target == "int8" else DTYPES)
)


def cells_of(name: str) -> tuple[Cell, ...]:
    """What is tried with a model: all with the smallest, but where a trace takes minutes what one trace gives."""
    if name in FULL:
        return tuple(cell for cell in CELLS if cell.axes == "batch" and cell.target != "int8")
    if name in SLOW_SIDES:
        return tuple(cell for cell in CELLS if cell.axes != "sides" or cell.target == "onnx")
    return CELLS


def takes_minutes(name: str, cell: Cell) -> bool:
    """Whether a combination is left to `make test-all`: full size, slow traces, and what adds little to others."""
    fused = cell.target in ("fused", "plugins")
    slow_trace = cell.axes == "sides" and (name in SLOW_SIDES or (fused and name != "biformer_pico"))
    refused_at_once = cell.axes == "sides" and name not in (*OPEN_SIDES, *SLOW_SIDES)
    return name in FULL or (fused and cell.axes == "fixed") or (slow_trace and not refused_at_once)


@dataclass(frozen=True)
class Outcome:
    """What came of a combination.

    `state` is `verified` (it ran in ONNX Runtime, and `error` is its largest distance from torch: relative to the
    largest value; in 8 bits that of the norms), `built` (an engine whose kernels were read back; nothing has run it) or
    `refused`, with what the user is told as `reason`.
    """

    state: str
    error: float | None = None
    reason: str = ""

    @classmethod
    def of(cls, text: str) -> Outcome:
        """From the record."""
        state, _, rest = text.partition(" ")
        return cls(state, float(rest)) if state == "verified" else cls(state, reason=rest)

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.1e}"
        return f"{self.state} {error}{self.reason}".rstrip()

    def agrees(self, recorded: Outcome) -> bool:
        """Whether the record says the same; errors may be less, or on another processor up to three times as large (of
        float32, whose errors are its rounding, up to a tenth of what verification allows)."""
        if (self.state, self.reason) != (recorded.state, recorded.reason):
            return False
        return self.error is None or self.error <= max(3 * (recorded.error or 0.0), 1e-5)


def read_record() -> dict[str, dict[str, Outcome]]:
    """Outcomes by the name of the model and the combination, as text."""
    found = json.loads(RECORD.read_text(encoding="utf-8"))["models"]
    return {name: {cell: Outcome.of(x) for cell, x in cells.items()} for name, cells in found.items()}


class Trials:
    """All combinations of one model, which share its files; each is tried once.

    Args:
        name: of the model, with random weights.
        folder: an empty one, for files.
        photos: a folder of photos to calibrate with.
        plugins: makes the library of plugins, or says where it is.
    """

    def __init__(self, name: str, folder: Path, photos: Path, plugins: Callable[[], Path]):
        torch.manual_seed(0)
        self.name = name
        self.model = timm.create_model(name, num_classes=10).eval()
        self.folder, self.photos, self.plugins = folder, photos, plugins
        self.outcomes: dict[Cell, Outcome] = {}
        self.exports: dict[tuple[str, str], ExportReport] = {}
        self.checks: dict[Cell, VerificationReport] = {}
        self.engines: dict[Cell, EngineReport] = {}
        self._refused: dict[tuple[str, str], ExportError] = {}

    def outcome(self, cell: Cell) -> Outcome:
        """What comes of a combination."""
        if cell not in self.outcomes:
            try:
                error = getattr(self, f"_{cell.target}")(cell)
                self.outcomes[cell] = Outcome("built" if error is None else "verified", error)
            except (VerificationError, QuantizationError):
                raise  # a wrong file is no refusal
            except ExportError as refusal:
                self.outcomes[cell] = Outcome("refused", reason=str(refusal))
        return self.outcomes[cell]

    def all(self, axes: str) -> Iterator[tuple[Cell, Outcome]]:
        """Every combination with these open axes."""
        for cell in cells_of(self.name):
            if cell.axes == axes:
                yield cell, self.outcome(cell)

    def file(self, axes: str, operators: str) -> Path:
        """The float32 file, written and verified once."""
        path = self.folder / f"{axes}-{operators}.onnx"
        if refusal := self._refused.get((axes, operators)):
            raise refusal
        if (axes, operators) not in self.exports:
            try:
                self.exports[axes, operators] = to_onnx(
                    self.model, path, opset=OPSET, dynamic=AXES[axes], rewrite=standard_form, operators=operators,
                )  # fmt: skip
            except ExportError as refusal:
                self._refused[axes, operators] = refusal
                raise
        return path

    def nodes(self, axes: str) -> int:
        """Nodes of the fused file that plugins can take."""
        model = onnx.load(self.file(axes, "fused"))
        return sum(node.domain == DOMAIN for node in model.graph.node)

    def half(self, axes: str, operators: str, dtype: str) -> bytes:
        """The file in half precision."""
        content: bytes = convert_precision(onnx.load(self.file(axes, operators)), dtype).SerializeToString()
        return content

    def _onnx(self, cell: Cell, operators: str = "standard") -> float:
        path = self.file(cell.axes, operators)
        report = self.exports[cell.axes, operators].verification
        if cell.dtype != "float32":
            report = verify_onnx(self.half(cell.axes, operators, cell.dtype), self.model, original=path)
        assert report is not None
        report.raise_on_failure()
        self.checks[cell] = report
        return max(check.max_relative for check in report.checks)

    def _fused(self, cell: Cell) -> float:
        return self._onnx(cell, "fused")

    def _int8(self, cell: Cell) -> float:
        report = quantize_onnx(
            self.file(cell.axes, "standard"),
            self.folder / f"{cell}.onnx",
            calibration=self.photos,
            limit=12,
            probes=2,
            model=self.model,
            faster_only=False,
        )
        return max(check.agreement.error for check in report.checks)

    def _engine(self, cell: Cell, operators: str = "standard", plugins: tuple[Path, ...] = ()) -> None:
        size = self.model.pretrained_cfg["input_size"][1]
        report = to_tensorrt(
            self.file(cell.axes, operators),
            self.folder / f"{cell}.engine",
            dtype=cell.dtype,
            batch=BATCH if "batch" in AXES[cell.axes] else None,
            sizes=(size, 2 * size, 3 * size) if "height" in AXES[cell.axes] else None,
            threads=1,
            plugins=plugins,
        )
        assert report.kernel_types, f"no kernel of {cell} could be read back from the builder's log"
        self.engines[cell] = report

    def _plugins(self, cell: Cell) -> None:
        self.file(cell.axes, "fused")  # where there is none, no library is needed
        self._engine(cell, "fused", (self.plugins(),))


def share_of_weights(engine: bytes, file: Path, dtype: str) -> float:
    """Which part of the file's weights stands in the engine, number for number, in one of the layouts it may have."""
    found = total = 0
    for tensor in onnx.load(file).graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 32:
            continue
        total += values.size
        layouts = [values, values.T, values.transpose(0, 2, 3, 1)] if values.ndim == 4 else [values, values.T]
        kinds = {dtype, "float32"}  # norms stay in float32
        texts = (np.ascontiguousarray(layout.astype(kind)).tobytes() for layout in layouts for kind in kinds)
        found += values.size * any(text in engine for text in texts)
    return found / total
