"""Errors of real toolchains as edits of an ONNX graph.

Each takes a `ModelProto`, edits it in place, and returns the name of the first value that is wrong by then.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper


def nodes_of(model, op_type):
    found = [node for node in model.graph.node if node.op_type == op_type]
    assert found, f"no {op_type} in the graph"
    return found


def middle(nodes):
    return nodes[len(nodes) // 2]


def weight_of(model, name):
    """A constant of the graph as an array, None for what the graph computes."""
    return next((numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name), None)


def set_weight(model, name, values):
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))


def constant(model, values):
    name = f"mutation_{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return name


def attribute(node, name, default=None):
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def set_attribute(node, name, value):
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def after(model, value, *steps):
    """Put nodes behind a value, so that its readers read the last one's output: steps of (op_type, inputs, attributes).

    `...` among the inputs stands for what the step before puts out.
    """
    at, node = next((i, n) for i, n in enumerate(model.graph.node) if value in n.output)
    node.output[list(node.output).index(value)] = f"{value}_right"
    last = f"{value}_right"
    for i, (op_type, inputs, attributes) in enumerate(steps):
        output = value if i == len(steps) - 1 else f"{value}_step{i}"
        names = [last if name is ... else name for name in inputs]
        model.graph.node.insert(at + 1 + i, helper.make_node(op_type, names, [output], **attributes))
        last = output
    return value


def on_input(model, *steps):
    """Put nodes behind the graph's input."""
    source = model.graph.input[0].name
    model.graph.node.insert(0, helper.make_node("Identity", [source], ["image"]))
    for node in list(model.graph.node)[1:]:
        node.input[:] = ["image" if name == source else name for name in node.input]
    return after(model, "image", *steps)


def shape_of(model, value):
    """The static part of a value's shape, 0 where it is open."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    infos = (*inferred.graph.value_info, *inferred.graph.output)
    info = next(i for i in infos if i.name == value)
    return [d.dim_value for d in info.type.tensor_type.shape.dim]


def square_maps(model):
    """Outputs of rank 4 whose two middle axes are equally long: maps (B, H, W, C), but for means, which serve choices."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    means = {name for node in nodes_of(model, "ReduceMean") for name in node.output}
    for info in inferred.graph.value_info:
        dims = [d.dim_value for d in info.type.tensor_type.shape.dim]
        if len(dims) == 4 and dims[1] == dims[2] > 1 and dims[3] != dims[1] and info.name not in means:
            yield info.name


# --- weights ----------------------------------------------------------------------------------------------------------


def weights_perturbed(model):
    node = next(n for n in nodes_of(model, "MatMul") if weight_of(model, n.input[1]) is not None)
    set_weight(model, node.input[1], weight_of(model, node.input[1]) * np.float32(1.01))
    return node.output[0]


def weights_transposed(model):
    for node in nodes_of(model, "MatMul"):
        weight = weight_of(model, node.input[1])
        if weight is not None and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
            set_weight(model, node.input[1], weight.T)
            return node.output[0]
    raise AssertionError("no square weight")


def bias_missing(model):
    for node in nodes_of(model, "Add"):
        bias = weight_of(model, node.input[1])
        if bias is not None and bias.ndim == 1 and np.abs(bias).max() > 0:
            set_weight(model, node.input[1], np.zeros_like(bias))
            return node.output[0]
    raise AssertionError("no bias")


def batch_norm_folded_with_wrong_variance(model):
    """As if every running variance had been 1, which is how a fresh BatchNorm has it."""
    node = nodes_of(model, "Conv")[0]
    weight = weight_of(model, node.input[1])
    variance = np.linspace(0.5, 2, len(weight), dtype=np.float32)
    set_weight(model, node.input[1], weight * np.sqrt(variance).reshape(-1, *[1] * (weight.ndim - 1)))
    return node.output[0]


# --- axes -------------------------------------------------------------------------------------------------------------


def height_and_width_swapped(model):
    return after(model, middle(list(square_maps(model))), ("Transpose", [...], {"perm": [0, 2, 1, 3]}))


def softmax_along_the_wrong_axis(model):
    node = middle(nodes_of(model, "Softmax"))
    set_attribute(node, "axis", -2)
    return node.output[0]


def classes_permuted(model):
    name = model.graph.output[0].name
    order = np.arange(shape_of(model, name)[1])
    return after(model, name, ("Gather", [..., constant(model, np.roll(order, 1))], {"axis": 1}))


def colours_swapped(model):
    return on_input(model, ("Gather", [..., constant(model, np.array([2, 1, 0]))], {"axis": 1}))


def size_frozen(model, size):
    """The image's height and width folded into constants, by whoever trusts the traced shape."""
    for node in nodes_of(model, "Shape"):
        if node.input[0] == model.graph.input[0].name and attribute(node, "start", 0) >= 2:
            node.op_type = "Identity"
            node.input[:] = [constant(model, np.array([size]))]
            del node.attribute[:]


# --- batches ----------------------------------------------------------------------------------------------------------


def batch_frozen_at_the_traced_one(model):
    """A window reversal whose batch of 2 is a constant and whose -1 swallows the rest."""
    value = middle([name for name in square_maps(model) if shape_of(model, name)[1] % 2 == 0])
    _, h, w, c = shape_of(model, value)
    windows = constant(model, np.array([0, h // 2, 2, w // 2, 2, c]))
    frozen = constant(model, np.array([2, h // 2, w // 2, 2, 2, -1]))
    back = constant(model, np.array([-1, h, w, c]))
    swap = {"perm": [0, 1, 3, 2, 4, 5]}
    return after(
        model,
        value,
        ("Reshape", [..., windows], {}),
        ("Transpose", [...], swap),
        ("Reshape", [..., frozen], {}),
        ("Transpose", [...], swap),
        ("Reshape", [..., back], {}),
    )


def _choice(model):
    """The indices that a TopK or ArgMax puts out."""
    for op_type in ("TopK", "ArgMax"):
        for node in model.graph.node:
            if node.op_type == op_type:
                return node.output[-1]
    raise AssertionError("nothing is chosen")


def choices_of_the_first_image_for_all(model):
    value = _choice(model)
    node = next(n for n in model.graph.node if value in n.output)
    shape = "mutation_shape"
    at = list(model.graph.node).index(node)
    model.graph.node.insert(at + 1, helper.make_node("Shape", [f"{value}_right"], [shape]))
    after(
        model,
        value,
        ("Gather", [..., constant(model, np.array([0]))], {"axis": 0}),
        ("Expand", [..., shape], {}),
    )
    shape_node = next(n for n in model.graph.node if n.output[0] == shape)
    model.graph.node.remove(shape_node)
    model.graph.node.insert(at + 1, shape_node)
    return value


# --- choices ----------------------------------------------------------------------------------------------------------


def choices_off_by_one(model):
    """Each index one too high, as from a toolchain that counts from one."""
    value = _choice(model)
    node = next(n for n in model.graph.node if value in n.output)
    count = shape_of(model, node.input[0])[attribute(node, "axis", -1)]
    one, many = constant(model, np.array(1)), constant(model, np.array(count))
    return after(model, value, ("Add", [..., one], {}), ("Mod", [..., many], {}))


def one_choice_too_few(model):
    """k - 1 of k: the last is the first once more."""
    for node in nodes_of(model, "TopK"):
        k = int(weight_of(model, node.input[1]).item())
        if k > 1:
            order = constant(model, np.array([*range(k - 1), 0]))
            return after(model, node.output[1], ("Gather", [..., order], {"axis": -1}))
    raise AssertionError("no TopK of more than one")


# --- functions --------------------------------------------------------------------------------------------------------


def gelu_by_tanh(model):
    node = nodes_of(model, "Gelu")[0]
    set_attribute(node, "approximate", "tanh")
    return node.output[0]


def epsilon_dropped(model):
    node = nodes_of(model, "LayerNormalization")[0]
    set_attribute(node, "epsilon", 0.0)
    return node.output[0]


def input_normalised_twice(model, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    mean, std = (constant(model, np.float32(v).reshape(1, 3, 1, 1)) for v in (mean, std))
    return on_input(model, ("Sub", [..., mean], {}), ("Div", [..., std], {}))


def input_not_normalised(model, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    mean, std = (constant(model, np.float32(v).reshape(1, 3, 1, 1)) for v in (mean, std))
    return on_input(model, ("Mul", [..., std], {}), ("Add", [..., mean], {}))


def overflow_in_float16(model):
    value = middle(list(square_maps(model)))
    large = constant(model, np.float32(1e5))
    return after(
        model,
        value,
        ("Mul", [..., large], {}),
        ("Cast", [...], {"to": onnx.TensorProto.FLOAT16}),
        ("Cast", [...], {"to": onnx.TensorProto.FLOAT}),
        ("Div", [..., large], {}),
    )
