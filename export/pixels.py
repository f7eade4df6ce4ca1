"""Normalisation as part of the graph: the file then takes images as decoders give them, uint8 and channels last."""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from .capture import INPUT
from .graph import walk
from .images import Preprocessing

if TYPE_CHECKING:
    import onnx


def take_pixels(model: onnx.ModelProto, prepare: Preprocessing) -> str:
    """Let the model take uint8 (B, H, W, C) in place of float32 (B, C, H, W), in place.

    Where the first layer is a convolution without padding, mean and standard deviation go into its weights;
    a padded one sees zeros at the rim that are not normalised, so there they are one Mul and one Add.

    Args:
        model: a float32 graph with the image as its only input.
        prepare: its `mean` and `std` are used; resizing stays with the caller.

    Returns:
        'folded' or 'nodes': where the normalisation went.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    (image,) = graph.input
    dims = image.type.tensor_type.shape.dim
    channels = dims[1].dim_value
    mean, std = (np.array(list(islice(cycle(v), channels)), np.float64) for v in (prepare.mean, prepare.std))
    scale, shift = 1 / (255 * std), -mean / std
    readers = [node for node in walk(graph) if INPUT in node.input]
    first = [node for node in readers if node.op_type != "Shape"]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    names = {name for node in walk(graph) for name in node.output} | set(weights)

    def fresh(name: str) -> str:
        while name in names:
            name += "_"
        names.add(name)
        return name

    nhwc, nchw = fresh("pixels"), fresh("image")
    folded = len(first) == 1 and _fold(first[0], graph, weights, scale, shift, fresh)
    new = [helper.make_node("Cast", [INPUT], [nhwc], name="pixels/cast", to=onnx.TensorProto.FLOAT)]
    if not folded:
        for op_type, values in (("Mul", scale), ("Add", shift)):
            constant, result = fresh(f"pixels/{op_type.lower()}"), fresh(f"pixels/{op_type.lower()}ed")
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), constant))
            new.append(helper.make_node(op_type, [nhwc, constant], [result], name=constant))
            nhwc = result
    new.append(helper.make_node("Transpose", [nhwc], [nchw], name="pixels/transpose", perm=[0, 3, 1, 2]))
    for node in readers:
        node.input[:] = [nchw if name == INPUT else name for name in node.input]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*new, *rest])
    order = [_copy(dims[i]) for i in (0, 2, 3, 1)]
    del dims[:]
    dims.extend(order)
    image.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return "folded" if folded else "nodes"


def pixels_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Tensors that hold the pixels of a uint8 input as they are, of whatever type, and how their axes are permuted."""
    import onnx

    image = model.graph.input[0]
    if image.type.tensor_type.elem_type != onnx.TensorProto.UINT8:
        return {}
    found = {image.name: tuple(range(len(image.type.tensor_type.shape.dim)))}
    for node in model.graph.node:
        axes = found.get(node.input[0]) if node.input else None
        if axes is None:
            continue
        given = {a.name: a for a in node.attribute}
        if node.op_type == "Cast" and given["to"].i == onnx.TensorProto.FLOAT:
            found[node.output[0]] = axes
        elif node.op_type == "Transpose":
            order = given["perm"].ints if "perm" in given else reversed(range(len(axes)))
            found[node.output[0]] = tuple(axes[i] for i in order)
    return found


def _copy(dim: Any) -> Any:
    new = type(dim)()
    new.CopyFrom(dim)
    return new


def _fold(conv: Any, graph: Any, weights: Any, scale: Any, shift: Any, fresh: Any) -> bool:
    """Put scale and shift of the input's channels into a convolution, if that is exact."""
    import numpy as np
    from onnx import numpy_helper

    given = {a.name: a for a in conv.attribute}
    padded = any(given["pads"].ints) if "pads" in given else False
    automatic = "auto_pad" in given and given["auto_pad"].s not in (b"NOTSET", b"VALID")
    grouped = "group" in given and given["group"].i != 1
    if conv.op_type != "Conv" or padded or automatic or grouped or conv.input[1] not in weights:
        return False
    if len(conv.input) > 2 and conv.input[2] not in weights:
        return False
    if any(conv is not node and set(conv.input[1:]) & set(node.input) for node in walk(graph)):
        return False
    weight = weights[conv.input[1]]
    kernel = numpy_helper.to_array(weight).astype(np.float64)
    added = np.einsum("oihw,i->o", kernel, shift)
    kernel = kernel * scale[:, None, None]
    weight.CopyFrom(numpy_helper.from_array(kernel.astype(np.float32), weight.name))
    if len(conv.input) > 2:
        bias = weights[conv.input[2]]
        value = numpy_helper.to_array(bias).astype(np.float64) + added
        bias.CopyFrom(numpy_helper.from_array(value.astype(np.float32), bias.name))
    else:
        name = fresh(f"{weight.name}/bias")
        graph.initializer.append(numpy_helper.from_array(added.astype(np.float32), name))
        conv.input.append(name)
    return True
