"""Rewrites of finished graphs that onnxscript's rules don't know.

- Two Reshapes in a row are the second; one to the shape that is there is nothing.
- A product with one is the other factor (`addcmul` writes one).
- Slice of one row and Squeeze is Gather of that row.

Two Transposes around a Reshape could be one of more axes, and are not: ONNX Runtime moves single axes in blocks and
took up to 7 % longer for models whose pairs were merged.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

Dim = int | str


def tidy(graph: ir.Graph) -> None:
    """Apply the rewrites to `graph` in place, until none applies."""
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            rewrite = _REWRITES.get(node.op_type)
            if node.graph is graph and rewrite is not None and rewrite(graph, node):
                changed = True


def _sole_user(value: Any) -> Any:
    """The node that alone reads a value, None if there are others or it leaves the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _replace(graph: Any, node: Any, value: Any) -> None:
    from onnx_ir import convenience

    convenience.replace_all_uses_with(node.outputs[0], value)
    graph.remove(node, safe=True)


def _one(value: Any) -> bool:
    """Whether a value is the constant 1, of one element."""
    constant = None if value is None else value.const_value
    return constant is not None and math.prod(constant.shape) == 1 and constant.numpy().item() == 1


def _drop_factor_one(graph: Any, node: Any) -> bool:
    first, second = node.inputs
    for one, other in ((first, second), (second, first)):
        same = other.shape is not None and one.shape is not None and len(one.shape) <= len(other.shape)
        if _one(one) and same and not node.outputs[0].is_graph_output():
            _replace(graph, node, other)
            return True
    return False


def _reshape_at_once(graph: Any, node: Any) -> bool:
    """Reshape of what only a Reshape read before it, and Reshape to the shape that is there."""
    if _dims(node.inputs[0]) is not None and _dims(node.inputs[0]) == _dims(node.outputs[0]):
        if not node.outputs[0].is_graph_output():
            _replace(graph, node, node.inputs[0])
            return True
        return False
    above, sizes = node.inputs[0].producer(), _integers(node.inputs[1])
    if above is None or above.op_type != "Reshape" or _sole_user(above.outputs[0]) is not node:
        return False
    copies = node.attributes.get_int("allowzero", 0) == 0  # then 0 stands for a size of the input
    if copies and (sizes is None or 0 in sizes):
        return False
    node.replace_input_with(0, above.inputs[0])
    graph.remove(above, safe=True)
    return True


def _row_by_gather(graph: Any, squeeze: Any) -> bool:
    """Slice of one row along one axis, then Squeeze of that axis."""
    import numpy as np

    cut = squeeze.inputs[0].producer()
    if cut is None or cut.op_type != "Slice" or _sole_user(cut.outputs[0]) is not squeeze:
        return False
    constants = [_integers(value) for value in (*cut.inputs[1:4], *squeeze.inputs[1:2])]
    if len(constants) != 4 or any(c is None or len(c) != 1 for c in constants):
        return False
    start, end, axis, squeezed = (c[0] for c in constants)  # type: ignore[index]
    steps = _integers(cut.inputs[4]) if len(cut.inputs) > 4 else [1]
    shape = cut.inputs[0].shape
    if shape is None or steps != [1]:
        return False
    rank = len(shape)
    if squeezed % rank != axis % rank or end != start + 1 or not isinstance(shape[axis], int):
        return False
    if not -shape[axis] <= start < shape[axis]:
        return False
    index = _constant(graph, f"{squeeze.outputs[0].name}/index", np.array(start, np.int64))
    new = _insert(
        graph, squeeze, "Gather", [cut.inputs[0], index], {"axis": int(axis)}, squeeze.outputs[0].shape
    )
    _take_over(graph, squeeze, new)
    graph.remove(cut, safe=True)
    return True


def _integers(value: Any) -> list[int] | None:
    constant = None if value is None else value.const_value
    return None if constant is None else [int(n) for n in constant.numpy().reshape(-1)]


def _dims(value: Any) -> list[Dim] | None:
    """The shape of a value, with names for open sizes; None if an open size has no name."""
    if value.shape is None:
        return None
    dims = [n if isinstance(n, int) else n.value for n in value.shape]
    return None if any(n is None for n in dims) else dims


def _constant(graph: Any, name: str, values: Any) -> Any:
    import onnx_ir as ir

    while name in graph.initializers:
        name += "_"
    value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
    value.shape, value.dtype = ir.Shape(values.shape), ir.DataType.INT64
    graph.register_initializer(value)
    return value


def _insert(graph: Any, before: Any, op_type: str, inputs: Any, attributes: Any, shape: Any) -> Any:
    """A new node in front of another; returns its result."""
    import onnx_ir as ir

    new = ir.node(op_type, inputs, attributes=attributes)
    (result,) = new.outputs
    result.dtype = inputs[0].dtype
    result.shape = shape if shape is None or isinstance(shape, ir.Shape) else ir.Shape(shape)
    graph.insert_before(before, new)
    result.name = f"{before.outputs[0].name}/{op_type.lower()}"
    return result


def _take_over(graph: Any, node: Any, value: Any) -> None:
    """Let `value` stand for what `node` puts out, under its name, and remove the node."""
    from onnx_ir import convenience

    name, result = node.outputs[0].name, node.outputs[0]
    convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name = name


_REWRITES = {
    "Mul": _drop_factor_one,
    "Reshape": _reshape_at_once,
    "Squeeze": _row_by_gather,
}
