"""What each layer costs in 8 bits, measured: the error that it brings to the outputs, and the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .calibration import Count, batches
from .errors import ExportError
from .measure import best_classes, measure
from .qdq import Layer, Quantiser, Range
from .runs import open_session

if TYPE_CHECKING:
    import numpy as np
    import onnx

    Array = np.ndarray[Any, Any]

BATCH = 8
"""Images at a time, where the file's batch is open."""
_SECONDS, _ROUNDS = 0.2, 10
"""How long a layer is timed at least, and how often."""


@dataclass(frozen=True)
class Agreement:
    """How far outputs are from those expected, over some images.

    `error` is the norm of the difference over the norm of what was expected, `cosine` that between the two, both of the
    output where they are worst; `top1` is the share of images with the same first class, None where no output is class
    scores.
    """

    error: float
    cosine: float
    top1: float | None

    def within(self, error: float, top1: float) -> bool:
        """Whether both are kept: at most so large an error, and at least such a share of first classes."""
        return self.error <= error and (self.top1 is None or self.top1 >= top1)

    def to_dict(self) -> dict[str, float | None]:
        """The figures, ready for JSON."""
        finite = self.error < float("inf")
        return {"error": self.error if finite else None, "cosine": self.cosine, "top1": self.top1}


def compare(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> Agreement:
    """Compare outputs `(N, ...)` by name."""
    errors, cosines, top1 = [0.0], [1.0], None
    for name, value in expected.items():
        e, a = torch.from_numpy(value), torch.from_numpy(actual[name])
        if not a.isfinite().all():
            return Agreement(float("inf"), 0.0, None if top1 is None else 0.0)
        figures = measure(e, a)
        errors.append(figures.norm_error)
        cosines.append(figures.cosine)
        if name == "logits" and e.ndim == 2:
            top1 = best_classes([e], [a])[0] / len(e)
    return Agreement(max(errors), min(cosines), top1)


def outputs(model: onnx.ModelProto | bytes, images: Array, size: int | None = None) -> dict[str, Array]:
    """What a file makes of images, on ONNX Runtime's CPU provider.

    Args:
        model: the file's content.
        images: what it takes, `(N, C, H, W)` or pixels `(N, H, W, C)`.
        size: images at a time; default: as many as it takes, `BATCH` where that is open.

    Raises:
        ExportError: it can't be loaded or run.
    """
    import numpy as np

    session = open_session(model if isinstance(model, bytes) else model.SerializeToString())
    source = session.get_inputs()[0]
    fixed = source.shape[0] if isinstance(source.shape[0], int) else None
    found: list[list[Array]] = []
    for batch, count in batches(images, fixed or size or BATCH):
        try:
            values = session.run(None, {source.name: batch})
        except Exception as error:  # the runtime's exceptions have no common base
            raise ExportError(f"ONNX Runtime fails on {len(batch)} images: {error}") from error
        found.append([value[:count] for value in values])
    names = [output.name for output in session.get_outputs()]
    return {name: np.concatenate(values) for name, *values in zip(names, *found, strict=True)}


def activations(model: onnx.ModelProto, names: Collection[str], image: Array) -> dict[str, Array]:
    """Values of tensors of a graph for images."""
    import onnx

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    source = model.graph.input[0].name
    present = {output.name for output in model.graph.output} | {source}
    for name in names:
        if name not in present:
            watched.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = open_session(watched.SerializeToString())
    found = dict(
        zip((o.name for o in session.get_outputs()), session.run(None, {source: image}), strict=True)
    )
    return {name: image if name == source else found[name] for name in names}


def speedups(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    ranges: Mapping[str, Range],
    image: Array,
    count: Count,
    weight_bits: int = 8,
) -> dict[str, float]:
    """By layer, how many times as fast it is in 8 bits, the change to them and back included.

    Each layer runs alone, on its own input, in float32 and in 8 bits in turn; layers of the same shapes are timed once.
    """
    values = activations(model, {layer.input for layer in layers}, image)
    nodes = {node.name: node for node in model.graph.node}
    constants = {t.name: t for t in model.graph.initializer}
    known: dict[object, float] = {}
    found = {}
    for i, layer in enumerate(layers):
        count(i, len(layers), f"timing {layer.op_type} {layer.name}")
        node = nodes[layer.name]
        settings = tuple(sorted(a.SerializeToString() for a in node.attribute))
        shapes = tuple(constants[layer.weight].dims), values[layer.input].shape, bool(layer.bias)
        key = (layer.op_type, settings, shapes)
        if key not in known:
            parts = [constants[name] for name in (layer.weight, layer.bias) if name]
            alone = _alone(model, node, parts, values[layer.input])
            quantised = Quantiser(alone, [layer], ranges, weight_bits).apply([layer])
            known[key] = _ratio(alone, quantised, layer.input, values[layer.input])
        found[layer.name] = known[key]
    return found


def _alone(model: onnx.ModelProto, node: onnx.NodeProto, constants: Sequence[Any], value: Array) -> Any:
    """A graph of one node."""
    import onnx
    from onnx import TensorProto, helper

    made = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, value.shape)],
        [onnx.helper.make_empty_tensor_value_info(node.output[0])],
        constants,
    )
    made.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


def _ratio(plain: onnx.ModelProto, quantised: onnx.ModelProto, source: str, value: Array) -> float:
    """How many times as long the first takes, both run in turn; the quickest runs, which nothing else interrupted."""
    sessions = [open_session(made.SerializeToString()) for made in (plain, quantised)]
    times: list[list[float]] = [[], []]
    for session in sessions:
        session.run(None, {source: value})
    end = time.perf_counter() + _SECONDS
    while len(times[0]) < _ROUNDS or time.perf_counter() < end:
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, {source: value})
            taken.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])


def own_errors(
    quantiser: Quantiser, layers: Sequence[Layer], images: Array, expected: Mapping[str, Array], count: Count
) -> dict[str, float]:
    """By layer, the error of the outputs when it alone is in 8 bits."""
    found = {}
    for i, layer in enumerate(layers):
        count(i, len(layers), f"measuring the error of {layer.module or layer.name}")
        found[layer.name] = compare(expected, outputs(quantiser.apply([layer]), images)).error
    count(len(layers), len(layers), "measured the error of every layer")
    return found
