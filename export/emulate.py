"""A half-precision graph as a float32 one that rounds wherever the original would.

ONNX Runtime's CPU provider has no arithmetic in bfloat16, and in float16 it computes chains of nodes in float32
without rounding between them, which hides overflow. In the copy made here kernels run in float32 and each result is
rounded to the half type by a Cast there and back, as a GPU would store it (its sums inside one node may round more).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .precision import BFLOAT16, FLOAT, FLOAT16, MOVES, element_types, without_weights

if TYPE_CHECKING:
    import onnx

_HALF = (FLOAT16, BFLOAT16)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with float32 in place of its half types, and a rounding after every node that computes in them.

    Names stay, and inputs and outputs are float32. What was float32 or no float is left alone.
    """
    import onnx
    from onnx import numpy_helper

    types = element_types(model)
    copy = without_weights(model)
    del copy.graph.node[:], copy.graph.value_info[:]
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type in _HALF:
            values = numpy_helper.to_array(tensor).astype("float32")
            copy.graph.initializer.append(numpy_helper.from_array(values, tensor.name))
        else:
            copy.graph.initializer.append(tensor)
    for node in model.graph.node:
        wide = copy.graph.node.add()
        wide.CopyFrom(node)
        for attribute in wide.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _HALF:
                attribute.i = FLOAT
            elif (
                node.op_type == "ConstantOfShape"
                and attribute.name == "value"
                and attribute.t.data_type in _HALF
            ):
                value = numpy_helper.to_array(attribute.t).astype("float32")
                attribute.t.CopyFrom(numpy_helper.from_array(value, attribute.t.name))
        if node.op_type in MOVES | {"ConstantOfShape"}:
            continue
        for j, name in enumerate(node.output):
            if types.get(name) in _HALF:
                wide.output[j] = f"{name}/exact"
                nodes = (
                    onnx.helper.make_node("Cast", [f"{name}/exact"], [f"{name}/rounded"], to=types[name]),
                    onnx.helper.make_node("Cast", [f"{name}/rounded"], [name], to=FLOAT),
                )
                copy.graph.node.extend(nodes)
    return copy
