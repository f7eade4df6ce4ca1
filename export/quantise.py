"""INT8 files: from a float32 file and photos to one whose layers multiply in 8 bits, where that pays and stays exact.

What is quantised is decided by measurement, layer by layer. A layer that is no faster in 8 bits stays in float32. The
others are put into 8 bits alone, one after the other, which shows the error that each brings to the outputs; then all
together, and those that bring most go back to float32 until what they do together is within the tolerance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .calibration import (
    METHODS,
    Count,
    ImageInput,
    Photos,
    batches,
    find_photos,
    find_ranges,
    image_input,
    load,
    preprocessing_of,
)
from .capture import Outputs, evaluation, form_of, prepared
from .clock import Clock
from .compare import open_sizes
from .errors import ExportError, QuantizationError
from .files import check_target, write_atomically
from .graph import GraphSummary, check, opset_of, summarize
from .images import Preprocessing
from .qdq import Layer, Quantiser, find_layers
from .sensitivity import BATCH, Agreement, compare, outputs, own_errors, speedups
from .subjects import OnnxSubject
from .verify import BATCHES

if TYPE_CHECKING:
    import numpy as np
    import onnx

    Array = np.ndarray[Any, Any]

MAX_ERROR = 0.1
"""Of the outputs: norm of the difference over the norm of what is expected. A cosine of 0.995."""
_AIM = 0.8
"""Share of the allowed error that layers may bring over the calibration images: others will show a little more."""
_LEAST_GAIN = 1.1
"""How many times as fast a layer must be, to be worth its error."""


@dataclass(frozen=True)
class LayerResult:
    """What became of a layer, and why.

    `error` is that of the outputs when this layer alone is in 8 bits, `together` what all layers up to this one, from
    the least sensitive on, should make (the root of the sum of squares), `after` what was measured of the file when
    this layer went back to float32. `speedup` is float32 time over 8-bit time. None where it was not measured.
    """

    name: str
    module: str
    operator: str
    error: float | None
    together: float | None
    after: float | None
    speedup: float | None
    verdict: str

    @property
    def quantised(self) -> bool:
        """Whether it is in 8 bits."""
        return self.verdict == "int8"


@dataclass(frozen=True)
class QuantizationCheck:
    """The file compared on images of a size (height, width), so many at a time.

    `against` is "torch" or "float32 file"; `failure` says what is wrong, "" if nothing.
    """

    against: str
    images: int
    size: tuple[int, int]
    batch: int
    held_out: bool
    agreement: Agreement
    failure: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        names = ("against", "images", "batch", "held_out", "failure")
        named = {name: getattr(self, name) for name in names}
        return {**named, "size": list(self.size), **self.agreement.to_dict()}


@dataclass(frozen=True)
class QuantizationReport:
    """What is in 8 bits, what is not and why, and how far the file is from the model. `table()` renders it."""

    path: str
    model: str
    size_bytes: int
    float_bytes: int
    graph: GraphSummary
    layers: tuple[LayerResult, ...]
    everything: Agreement
    result: Agreement
    checks: tuple[QuantizationCheck, ...]
    settings: dict[str, Any]
    metadata: dict[str, str]
    seconds: dict[str, float]

    @property
    def excluded(self) -> tuple[LayerResult, ...]:
        """The layers that stay in float32, the most sensitive first."""
        return tuple(layer for layer in self.layers if not layer.quantised)

    @property
    def passed(self) -> bool:
        """Whether the file was compared and every comparison was good."""
        return bool(self.checks) and not any(check.failure for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        names = ("path", "model", "size_bytes", "float_bytes", "settings", "metadata", "seconds")
        return {
            **{name: getattr(self, name) for name in names},
            "graph": json.loads(json.dumps(asdict(self.graph))),
            "layers": [{**asdict(layer), "quantised": layer.quantised} for layer in self.layers],
            "everything": self.everything.to_dict(),
            "result": self.result.to_dict(),
            "checks": [check.to_dict() for check in self.checks],
        }

    def table(self) -> Any:
        """Rich tables of the file, its layers and its checks."""
        from .render import quantization_table

        return quantization_table(self)


def quantize_onnx(
    source: str | os.PathLike[str] | bytes,
    path: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    limit: int = 128,
    method: str = "minmax",
    max_error: float = MAX_ERROR,
    min_top1: float = 0.0,
    faster_only: bool = True,
    weight_bits: int = 8,
    probes: int = 8,
    model: nn.Module | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    verify: bool = True,
    progress: Count | None = None,
) -> QuantizationReport:
    """Write an ONNX file with layers in 8 bits from one in float32, for ONNX Runtime on CPUs.

    Standard QuantizeLinear and DequantizeLinear nodes around Conv, MatMul and Gemm with constant weights: weights int8
    with a scale for each output channel, activations uint8 with one scale, from their ranges over photos. The file
    keeps its interface, its operator set and its metadata, and gets an entry `quantization`. On any failure there is
    no file, and one that was there before is as it was.

    Args:
        source: the float32 file, or its content, with one input of images: float32 `(B, C, H, W)`, or uint8
            `(B, H, W, C)` where the file normalises them itself.
        path: where to; ends with `.onnx`. An existing file is replaced, atomically.
        calibration: a folder of images (those in its folders, too), or files. They are prepared as the file's metadata
            says.
        limit: the most images to calibrate with; up to 32 of the others are for verification.
        method: how ranges follow from values: 'minmax', 'entropy' or 'percentile'.
        max_error: tolerance: norm of the outputs' error over the norm of the outputs.
        min_top1: tolerance: the least share of images that keep their first class; 0 leaves it to `max_error`.
        faster_only: leave layers in float32 that 8 bits do not make faster, as timed on this machine with torch's
            number of threads. Off, the same images give the same file on every machine.
        weight_bits: 8, or 7 for x86 processors without VNNI, whose 8-bit products saturate.
        probes: calibration images that each layer's own error is measured on.
        model: the module that the file is verified against; default: the float32 file itself.
        preprocessing: overrides of what the file's metadata says; see `Preprocessing`.
        verify: compare the finished file on images at two batch sizes, and at a second size where that is open.
        progress: called with steps done, their number and a line of text.

    Raises:
        ExportError: the file can't be quantised: other inputs, no layer that can be or is faster, already quantised.
        QuantizationError: an ExportError; the tolerance can't be met. Its `report` has the figures.
        ValueError: wrong arguments; too few images, or one that can't be read.
        OSError: a file or folder is not there, or can't be written.
    """
    count = progress or (lambda done, total, text: None)
    target = check_target(path, ".onnx")
    _check_arguments(method, max_error, min_top1, weight_bits, probes)
    photos = find_photos(calibration, limit)
    import onnx

    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        plain = onnx.load_from_string(content)
    except Exception as error:  # protobuf's errors have no public base
        raise ExportError(f"{source!r} is no ONNX file: {error}") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in plain.graph.initializer):
        raise ExportError(
            "the file's weights lie in a second file, and quantisation takes one: where they are less than 2 GiB, "
            "onnx.save(onnx.load('model.onnx'), 'one.onnx') writes it"
        )
    meta = {entry.key: entry.value for entry in plain.metadata_props}
    found, layers = _layers(plain)
    wanted = image_input(_only_input(plain), meta)
    prepare = preprocessing_of(meta, preprocessing)
    _check_preprocessing(prepare, preprocessing_of(meta), wanted)
    clock = Clock()
    images = load(photos.calibration, prepare, wanted, count)
    expected = outputs(plain, images)
    tensors = {layer.input for layer in layers} | {x.output for x in layers if x.op_type == "Conv"}
    ranges = find_ranges(plain, tensors, images, method, count)
    clock.lap("calibrate")
    gains: dict[str, float] = {}
    if faster_only:
        gains = speedups(plain, layers, ranges, images[:1], count, weight_bits)
    candidates = [layer for layer in layers if gains.get(layer.name, _LEAST_GAIN) >= _LEAST_GAIN]
    if not candidates:
        raise ExportError(
            f"8 bits make none of the {len(layers)} layers faster on this machine (the best by "
            f"{max(gains.values()):.2f}x); stay with float32, or set faster_only to False"
        )
    clock.lap("time layers")
    quantiser = Quantiser(plain, candidates, ranges, weight_bits)
    few = images[:: max(1, len(images) // probes)][:probes]
    errors = own_errors(quantiser, candidates, few, outputs(plain, few), count)
    clock.lap("measure layers")
    settings = {
        "weights": f"int8, {weight_bits} bits, per channel",
        "activations": "uint8, per tensor",
        "format": "QDQ",
        "calibration": method,
        "images": len(images),
        "max_error": max_error,
        "min_top1": min_top1,
        "faster_only": faster_only,
        "least_speedup": _LEAST_GAIN if faster_only else None,
    }
    search = _Search(quantiser, candidates, errors, images, expected)
    met = search.run(_AIM * max_error, min_top1, count)
    clock.lap("choose layers")
    results = _results(found, gains, errors, search.after)
    made = quantiser.apply(search.chosen)
    _describe(made, settings, results, search.result)
    content_made = made.SerializeToString(deterministic=True)
    report = QuantizationReport(
        path=os.fspath(path),
        model=meta.get("model", plain.graph.name),
        size_bytes=len(content_made),
        float_bytes=len(content),
        graph=summarize(made),
        layers=results,
        everything=search.everything,
        result=search.result,
        checks=(),
        settings=settings,
        metadata={entry.key: entry.value for entry in made.metadata_props},
        seconds=clock.laps,
    )
    if not met:
        raise QuantizationError(_unmet(report), report)
    check(made, opset_of(plain))
    if verify:
        checks = _verify(content_made, content, model, photos, prepare, wanted, max_error, min_top1, count)
        clock.lap("verify")
        report = replace(report, checks=checks)
        if not report.passed:
            failed = next(c for c in checks if c.failure)
            raise QuantizationError(_failed(failed), report)
    write_atomically(target, content_made)
    return report


def _check_arguments(method: str, max_error: float, min_top1: float, weight_bits: int, probes: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < max_error < 1:
        raise ValueError(f"max_error must lie between 0 and 1, got {max_error}")
    if not 0 <= min_top1 <= 1:
        raise ValueError(f"min_top1 is a share and must lie between 0 and 1, got {min_top1}")
    if weight_bits not in (7, 8):
        raise ValueError(f"weight_bits must be 8 or 7, got {weight_bits}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")


def _check_preprocessing(given: Preprocessing, stated: Preprocessing, wanted: ImageInput) -> None:
    """Refuse a normalisation that is not the one in the file."""
    for name in ("mean", "std"):
        if wanted.pixels and getattr(given, name) != getattr(stated, name):
            raise ValueError(
                f"the file takes pixels and normalises them with a {name} of {getattr(stated, name)}, so preprocessing "
                f"can't make it {getattr(given, name)}: leave {name} out, or export the file with it"
            )


def _only_input(model: onnx.ModelProto) -> Any:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in summarize(model).inputs if info.name not in constants]
    if len(inputs) != 1:
        raise ExportError(f"expected a file with one input, got {', '.join(map(str, inputs)) or 'none'}")
    return inputs[0]


def _layers(model: onnx.ModelProto) -> tuple[list[Layer], list[Layer]]:
    """All layers, and those that can be in 8 bits."""
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise ExportError("the file is quantised already; start from the float32 file")
    found = find_layers(model)
    layers = [layer for layer in found if not layer.obstacle]
    if not layers:
        others = ", ".join(dict.fromkeys(layer.obstacle for layer in found))
        raise ExportError(
            f"the file has nothing to quantise: no Conv, MatMul or Gemm that multiplies by constant float32 weights"
            f"{f' of its own ({others})' if others else ''}; stay with float32"
        )
    return found, layers


class _Search:
    """Layers go back to float32, the most sensitive first, until the tolerance is met."""

    def __init__(
        self,
        quantiser: Quantiser,
        layers: Sequence[Layer],
        errors: Mapping[str, float],
        images: Array,
        expected: Mapping[str, Array],
    ) -> None:
        self._quantiser, self._images, self._expected = quantiser, images, expected
        self._ranked = sorted(layers, key=lambda layer: errors[layer.name], reverse=True)
        self.chosen = list(layers)
        self.after: dict[str, float] = {}
        """Measured errors, by the layer that had just gone back."""

    def run(self, max_error: float, min_top1: float, count: Count) -> bool:
        """Whether there are layers that can stay in 8 bits."""
        total = len(self._ranked)
        count(0, total, "measuring the error of all layers together")
        self.everything = self.result = self._measure()
        for i, layer in enumerate(self._ranked[:-1]):
            if self.result.within(max_error, min_top1):
                break
            count(i + 1, total, f"back to float32: {layer.module or layer.name}")
            self.chosen.remove(layer)
            self.result = self._measure()
            self.after[layer.name] = self.result.error
        return self.result.within(max_error, min_top1)

    def _measure(self) -> Agreement:
        return compare(self._expected, outputs(self._quantiser.apply(self.chosen), self._images))


def _results(
    layers: Sequence[Layer],
    gains: Mapping[str, float],
    errors: Mapping[str, float],
    after: Mapping[str, float],
) -> tuple[LayerResult, ...]:
    """All layers, the most sensitive first; those that are no faster, or can't be in 8 bits, come last."""
    together, squares = {}, 0.0
    for name in sorted(errors, key=lambda name: errors[name]):
        squares += errors[name] ** 2
        together[name] = squares**0.5
    made = [
        LayerResult(
            name=layer.name,
            module=layer.module,
            operator=layer.op_type,
            error=errors.get(layer.name),
            together=together.get(layer.name),
            after=after.get(layer.name),
            speedup=gains.get(layer.name),
            verdict=_verdict(layer, errors, after),
        )
        for layer in layers
    ]
    return tuple(
        sorted(made, key=lambda result: -1.0 if result.error is None else result.error, reverse=True)
    )


def _verdict(layer: Layer, errors: Mapping[str, float], after: Mapping[str, float]) -> str:
    if layer.obstacle:
        return f"float32: {layer.obstacle}"
    if layer.name not in errors:
        return "float32: no faster"
    return "float32: sensitive" if layer.name in after else "int8"


def _describe(
    model: onnx.ModelProto, settings: Mapping[str, Any], results: Sequence[LayerResult], result: Agreement
) -> None:
    """Note in the file what was done to it."""
    kept = {r.name: r.verdict.removeprefix("float32: ") for r in results if not r.quantised}
    errors = {r.name: float(f"{r.error:.3g}") for r in results if r.error is not None}
    entry = {**settings, "layers": len(results), "float32": kept, "errors": errors, **result.to_dict()}
    model.metadata_props.add(key="quantization", value=json.dumps(entry))


def _unmet(report: QuantizationReport) -> str:
    worst = report.layers[0]
    found = f"an error of {report.result.error:.3g}"
    if report.result.top1 is not None:
        found += f" and {report.result.top1:.1%} of the first classes"
    return (
        f"with one layer left in 8 bits the outputs still have {found} on the calibration images, where at most "
        f"{_AIM * report.settings['max_error']:.3g} and at least {report.settings['min_top1']:.1%} are wanted (most "
        f"sensitive: {worst.module or worst.name}, {worst.error:.3g}); allow more, or try another calibration method"
    )


def _failed(failed: QuantizationCheck) -> str:
    seen = "images that it was not calibrated with" if failed.held_out else "the calibration images"
    size = " x ".join(map(str, failed.size))
    return (
        f"on {failed.images} {seen}, {size}, {failed.batch} at a time, the file is too far from the {failed.against} "
        f"model: {failed.failure}; calibrate with more images of the kind that the model sees, or allow more"
    )


def _verify(
    content: bytes,
    plain: bytes,
    model: nn.Module | None,
    photos: Photos,
    prepare: Preprocessing,
    wanted: ImageInput,
    max_error: float,
    min_top1: float,
    count: Count,
) -> tuple[QuantizationCheck, ...]:
    """Compare the finished file on photos: at two batch sizes where its batch is open, at two sizes where these are."""
    axes = OnnxSubject(content).axes
    fixed = axes["batch"].fixed
    tried = BATCHES if fixed is None else (fixed,)
    against = "float32 file" if model is None else "torch"
    checks: list[QuantizationCheck] = []
    for size in open_sizes((axes["height"], axes["width"]), (wanted.height, wanted.width)):
        images = load(photos.verification, prepare, replace(wanted, height=size[0], width=size[1]), count)
        count(0, 1, "running the model in float32")
        expected = outputs(plain, images) if model is None else _torch_outputs(model, images, plain, prepare)
        for i, batch in enumerate(tried if not checks else tried[-1:]):
            count(i, len(tried), f"comparing the file in 8 bits, {batch} at a time")
            found = compare(expected, outputs(content, images, batch))
            failure = ""
            if not found.error <= max_error:
                failure = f"error {found.error:.3g} exceeds {max_error:g}"
            elif not found.within(max_error, min_top1):
                failure = f"{found.top1:.1%} keep their first class, fewer than {min_top1:.1%}"
            held_out = photos.held_out
            checks.append(QuantizationCheck(against, len(images), size, batch, held_out, found, failure))
    return tuple(checks)


def _torch_outputs(model: nn.Module, images: Array, plain: bytes, prepare: Preprocessing) -> dict[str, Array]:
    """What the module computes, under the file's names; of pixels after it has normalised them."""
    import numpy as np
    import onnx

    def normalised(batch: torch.Tensor) -> torch.Tensor:
        return prepare.normalise(batch.permute(0, 3, 1, 2)) if batch.dtype == torch.uint8 else batch

    names = [output.name for output in onnx.load_from_string(plain).graph.output]
    module = Outputs(prepared(model), form_of(names))
    with evaluation(module):
        found = [
            [value.numpy()[:real] for value in module(normalised(torch.from_numpy(batch)))]
            for batch, real in batches(images, BATCH)
        ]
    if module.names != names:
        raise ExportError(f"the file's outputs are {', '.join(names)}, the model's {', '.join(module.names)}")
    return {name: np.concatenate(values) for name, *values in zip(names, *found, strict=True)}
