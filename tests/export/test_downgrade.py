"""Opset 17, made from the 18 of torch's translations."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitrail.export import ExportError
from vitrail.export.downgrade import to_opset_17

node = helper.make_node


def model_of(*nodes, outputs=("y",), weights=None, shape=(2, 4)):
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    )


def run(model):
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(
        [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)], {"axes": np.array([1])}),
        ([node("ReduceL2", ["x", "axes"], ["y"], noop_with_empty_axes=0)], {"axes": np.array([-1])}),
        ([node("ReduceMax", ["x"], ["y"], keepdims=0)], {}),
        ([node("ReduceSum", ["x", "axes"], ["y"])], {"axes": np.array([0])}),
        ([node("Pad", ["x", "pads"], ["y"])], {"pads": np.array([0, 1, 0, 1])}),
        (
            [node("Resize", ["x", "", "scales"], ["y"], mode="linear", antialias=0)],
            {"scales": np.array([1, 2], np.float32)},
        ),
        (
            [node("ScatterElements", ["x", "i", "u"], ["y"], axis=1, reduction="add")],
            {"i": np.array([[1], [2]]), "u": np.ones((2, 1), np.float32)},
        ),
    ],
)
def test_what_is_spelled_otherwise_computes_the_same(nodes, weights):
    model = model_of(*nodes, weights=weights)
    expected = run(model)
    to_opset_17(model)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 17
    for a, b in zip(expected, run(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_equal_split_needs_no_number_of_parts():
    model = model_of(node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2), outputs=("y", "z"))
    expected = run(model)
    to_opset_17(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(run(model), expected)


@pytest.mark.parametrize(
    ("nodes", "weights", "message"),
    [
        ([node("Mish", ["x"], ["y"])], {}, "Mish .* is new there; use opset 18"),
        (
            [node("Split", ["x"], ["y", "z"], axis=1, num_outputs=3)],
            {},
            "parts that are not known to be equal",
        ),
        (
            [node("Pad", ["x", "pads", "", "axes"], ["y"])],
            {"pads": np.array([1, 1]), "axes": np.array([1])},
            "pads some axes only",
        ),
        (
            [node("Resize", ["x", "", "scales"], ["y"], mode="linear", antialias=1)],
            {"scales": np.array([1, 2], np.float32)},
            "antialias",
        ),
        (
            [node("ScatterElements", ["x", "i", "u"], ["y"], reduction="max")],
            {"i": np.array([[1]]), "u": np.ones((1, 1), np.float32)},
            "scatters by min or max",
        ),
        ([node("Shape", ["x"], ["s"]), node("ReduceMax", ["x", "s"], ["y"])], {}, "axes that are computed"),
        ([node("ReduceMax", ["x"], ["y"], noop_with_empty_axes=1)], {}, "reduces over no axis"),
    ],
)
def test_what_opset_17_cannot_say_is_refused_by_name(nodes, weights, message):
    outputs = tuple(nodes[-1].output)
    with pytest.raises(ExportError, match=message):
        to_opset_17(model_of(*nodes, weights=weights, outputs=outputs))
