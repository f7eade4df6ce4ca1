"""From opset 18, where torch's translations start, to opset 17.

Only what the two sets spell differently is changed; a node that opset 17 can't say is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import ExportError
from .graph import STANDARD_DOMAINS, walk

if TYPE_CHECKING:
    import onnx

TRANSLATED = 18
"""The least operator set that torch translates to."""

_REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
               "ReduceLogSumExp", "ReduceSumSquare")  # fmt: skip


def to_opset_17(model: onnx.ModelProto) -> None:
    """Rewrite a model of opset 18 in opset 17, in place.

    Raises:
        ExportError: it holds a node that has no form in opset 17; says which.
    """
    import onnx

    from .precision import skeleton

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(skeleton(model)).graph
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*inferred.value_info, *inferred.input)}
    for node in walk(model.graph):
        if node.domain not in STANDARD_DOMAINS:
            continue
        if onnx.defs.get_schema(node.op_type, 18, "").since_version == 18:
            rewrite = _RULES.get(node.op_type)
            reason = "is new there" if rewrite is None else rewrite(node, constants, shapes)
            if reason:
                raise ExportError(
                    f"{node.op_type} (node {node.name!r}) can't be written at opset 17: it {reason}; "
                    f"use opset 18 or later"
                )
    for entry in model.opset_import:
        if entry.domain in STANDARD_DOMAINS:
            entry.version = 17
    model.ir_version = 8
    read = {name for node in walk(model.graph) for name in node.input} | {v.name for v in model.graph.output}
    unread = [tensor for tensor in model.graph.initializer if tensor.name not in read]
    for tensor in unread:
        model.graph.initializer.remove(tensor)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _drop(node: onnx.NodeProto, *names: str) -> None:
    kept = [a for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _reduction(node: onnx.NodeProto, constants: Any, shapes: Any) -> str:
    """Axes move from an input to an attribute."""
    import onnx
    from onnx import numpy_helper

    given = len(node.input) > 1 and node.input[1] != ""
    if given and node.input[1] not in constants:
        return "reduces over axes that are computed"
    axes = numpy_helper.to_array(constants[node.input[1]]).tolist() if given else []
    if not axes and _attributes(node).get("noop_with_empty_axes"):
        return "reduces over no axis"
    _drop(node, "noop_with_empty_axes")
    del node.input[1:]
    if axes:
        node.attribute.append(onnx.helper.make_attribute("axes", axes))
    return ""


def _split(node: onnx.NodeProto, constants: Any, shapes: Any) -> str:
    """`num_outputs` goes where the parts are equal."""
    given = _attributes(node)
    if "num_outputs" not in given:
        return ""
    shape = shapes.get(node.input[0], ())
    axis = given.get("axis", 0)
    size = shape[axis].dim_value if -len(shape) <= axis < len(shape) else 0
    if size == 0 or size % given["num_outputs"]:
        return "splits an axis into parts that are not known to be equal"
    _drop(node, "num_outputs")
    return ""


def _pad(node: onnx.NodeProto, constants: Any, shapes: Any) -> str:
    return "pads some axes only" if len(node.input) > 3 and node.input[3] else ""


def _resize(node: onnx.NodeProto, constants: Any, shapes: Any) -> str:
    given = _attributes(node)
    if (
        given.get("antialias")
        or given.get("axes")
        or given.get("keep_aspect_ratio_policy", b"stretch") != b"stretch"
    ):
        return "resizes with antialias, axes or an aspect ratio"
    _drop(node, "antialias", "axes", "keep_aspect_ratio_policy")
    return ""


def _scatter(node: onnx.NodeProto, constants: Any, shapes: Any) -> str:
    return "scatters by min or max" if _attributes(node).get("reduction") in (b"min", b"max") else ""


_RULES: dict[str, Callable[[onnx.NodeProto, Any, Any], str]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "Split": _split,
    "Pad": _pad,
    "Resize": _resize,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
}
