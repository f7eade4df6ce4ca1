"""What a graph chooses: top-k routes, arg max, thresholds. To look at the choices, and to run a graph with given ones.

Rounding can flip a choice between two candidates that tie to within rounding, and everything after a flip differs by
more than rounding. Whether a file is right is then seen when it runs with the choices of the float32 graph: all that
is left must agree, the scores by which it would have chosen included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .precision import FLOATS, chooses, element_types, without_weights

if TYPE_CHECKING:
    import onnx

HELD = "/held"
"""What is appended to a choice's name where it is read in a graph that runs with given choices."""


@dataclass(frozen=True)
class Choice:
    """One node that chooses: its result, the numbers it chooses by, and for TopK and ArgMax the axis."""

    name: str
    op_type: str
    scores: tuple[str, ...]
    axis: int


def choices_of(model: onnx.ModelProto) -> list[Choice]:
    """The nodes of the main graph that make indices or truth values of numbers, in order."""
    types = element_types(model)
    computed = {name for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if not chooses(node, types):
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), -1 if node.op_type == "TopK" else 0)
        result = next(name for name in node.output if name and types.get(name) not in FLOATS)
        scores = [name for name in node.input if types.get(name) in FLOATS and name in computed]
        found.append(Choice(result, node.op_type, tuple(scores), axis))
    return found


def showing(model: onnx.ModelProto, choices: Sequence[Choice]) -> onnx.ModelProto:
    """`model` with the results and the scores of its choices as further outputs, in that order."""
    copy = without_weights(model)
    copy.graph.initializer.extend(model.graph.initializer)
    _show(copy, choices, element_types(model))
    return copy


def _show(model: onnx.ModelProto, choices: Sequence[Choice], types: dict[str, int]) -> None:
    import onnx

    present = {value.name for value in model.graph.output}
    for name in dict.fromkeys(name for choice in choices for name in (choice.name, *choice.scores)):
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, types[name], None))


def holding(model: onnx.ModelProto, choices: Sequence[Choice]) -> onnx.ModelProto:
    """`model` that takes its choices from inputs `NAME/held`, and still shows those that it would have made.

    The values that a TopK gives beside its indices are read from its scores at the given indices.
    """
    import onnx

    types = element_types(model)
    copy = without_weights(model)
    copy.graph.initializer.extend(model.graph.initializer)
    held = {choice.name: choice.name + HELD for choice in choices}
    del copy.graph.node[:]
    for node in model.graph.node:
        new = copy.graph.node.add()
        new.CopyFrom(node)
        new.input[:] = [held.get(name, name) for name in node.input]
        if node.op_type == "TopK" and node.output[1] in held and node.output[0]:
            axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
            new.output[0] = f"{node.output[0]}/own"
            copy.graph.node.append(
                onnx.helper.make_node(
                    "GatherElements", [node.input[0], held[node.output[1]]], [node.output[0]], axis=axis
                )
            )
    for choice in choices:
        copy.graph.input.append(
            onnx.helper.make_tensor_value_info(held[choice.name], types[choice.name], None)
        )
    _show(copy, choices, types)
    return copy


def flipped(choice: Choice, held: Any, own: Any, size: int) -> tuple[int, int]:
    """How many of a choice's results are other ones, and of how many.

    Args:
        choice: the node.
        held, own: its results in the one graph and in the other, arrays of one shape.
        size: number of candidates along the axis.
    """
    import numpy as np

    if choice.op_type != "TopK":
        return int((held != own).sum()), int(held.size)

    def members(indices: Any) -> Any:
        shape = list(indices.shape)
        shape[choice.axis] = size
        mask = np.zeros(shape, bool)
        np.put_along_axis(mask, indices, True, choice.axis)
        return mask

    return int((members(held) & ~members(own)).sum()), int(held.size)
