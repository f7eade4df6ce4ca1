"""Rewrites of finished graphs: fewer nodes, the same values."""

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitrail.export.tidy import tidy

node = helper.make_node
X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def model_of(*nodes, outputs=("y",), **constants):
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


def tidied(model):
    """The types of the nodes after tidying; what they compute is compared with before."""

    def run(proto):
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": X})

    after = ir.serde.deserialize_model(model)
    tidy(after.graph)
    passes.RemoveUnusedNodesPass()(after)
    proto = ir.serde.serialize_model(after)
    onnx.checker.check_model(proto, full_check=True)
    assert [v.name for v in proto.graph.output] == [v.name for v in model.graph.output]
    for a, b in zip(run(model), run(proto), strict=True):
        np.testing.assert_array_equal(a, b)
    return [n.op_type for n in proto.graph.node]


ONE, TWO, LAST = np.array([1]), np.array([2]), np.array([-1])


@pytest.mark.parametrize(
    ("nodes", "constants", "left"),
    [
        ([node("Mul", ["one", "x"], ["a"]), node("Neg", ["a"], ["y"])], {"one": np.float32(1)}, ["Neg"]),
        ([node("Mul", ["x", "one"], ["a"]), node("Neg", ["a"], ["y"])], {"one": np.float32(1)}, ["Neg"]),
        (
            [node("Slice", ["x", "one", "two", "last"], ["a"]), node("Squeeze", ["a", "last"], ["y"])],
            {"one": ONE, "two": TWO, "last": LAST},
            ["Gather"],
        ),
        (
            [node("Reshape", ["x", "s"], ["a"]), node("Reshape", ["a", "t"], ["y"])],
            {"s": np.array([-1, 12]), "t": np.array([-1, 2, 6])},
            ["Reshape"],
        ),
        (  # sizes that are computed, where 0 is a size like others
            [
                node("Reshape", ["x", "s"], ["a"]),
                node("Shape", ["x"], ["sizes"]),
                node("Reshape", ["a", "sizes"], ["y"], allowzero=1),
            ],
            {"s": np.array([-1, 12])},
            ["Shape", "Reshape"],
        ),
        (
            [node("Reshape", ["x", "s"], ["a"]), node("Neg", ["a"], ["y"])],
            {"s": np.array([0, 3, 4])},
            ["Neg"],
        ),
    ],
)
def test_waste_goes(nodes, constants, left):
    assert tidied(model_of(*nodes, **constants)) == left


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([node("Mul", ["x", "two"], ["y"])], {"two": np.float32(2)}),
        ([node("Mul", ["x", "ones"], ["y"])], {"ones": np.ones((5, 1, 1, 1), np.float32)}),  # makes it larger
        ([node("Mul", ["x", "one"], ["y"])], {"one": np.ones((1, 1, 1, 1), np.float32)}),  # gives it an axis
        (
            [node("Slice", ["x", "one", "two", "axis"], ["a"]), node("Squeeze", ["a", "axis"], ["y"])],
            {
                "one": ONE,
                "two": TWO,
                "axis": np.array([0]),
            },  # a batch of one has no second row, which Gather minds
        ),
        (
            [node("Reshape", ["x", "s"], ["a"]), node("Reshape", ["a", "t"], ["y"])],
            {"s": np.array([-1, 12]), "t": np.array([0, 2, 6])},  # 0 is a size of the first
        ),
        (
            [
                node("Reshape", ["x", "s"], ["a"]),
                node("Shape", ["x"], ["sizes"]),
                node("Reshape", ["a", "sizes"], ["y"]),
            ],
            {"s": np.array([-1, 12])},
        ),
    ],
)
def test_what_has_a_purpose_stays(nodes, constants):
    assert tidied(model_of(*nodes, **constants)) == [n.op_type for n in nodes]


def test_what_others_read_stays():
    nodes = [
        node("Slice", ["x", "one", "two", "last"], ["a"]),
        node("Squeeze", ["a", "last"], ["y"]),
        node("Neg", ["a"], ["z"]),
    ]
    model = model_of(*nodes, outputs=("y", "z"), one=ONE, two=TWO, last=LAST)
    assert tidied(model) == ["Slice", "Squeeze", "Neg"]
