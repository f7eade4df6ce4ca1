import pytest
from onnx import TensorProto, helper, load

from vitrail.export.graph import advice, clean, module_of, opset_of, summarize, walk


def model_of(*nodes, opset=20, constants=(), shape=("s0", 4, 8)):
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor(name, TensorProto.INT64, [len(values)], values) for name, values in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


node = helper.make_node


def test_a_constant_that_is_written_as_its_shape_is_left_alone():
    fill = node("ConstantOfShape", ["shape"], ["zeros"])
    assert advice(model_of(fill, node("Add", ["x", "zeros"], ["y"]), constants=[("shape", [4, 8])])) == []


@pytest.mark.parametrize(
    ("nodes", "constants", "word"),
    [
        (
            [node("Expand", ["i", "s"], ["e"]), node("GatherElements", ["x", "e"], ["y"])],
            [],
            "blown up by Expand",
        ),
        ([node("TopK", ["x", "one"], ["v", "y"])], [("one", [1])], "ArgMax is cheaper"),
        ([node("Erf", ["x"], ["y"])], [], "Gelu is spelled out"),
        (
            [node("ReduceMean", ["x"], ["v"]), node("Add", ["v", "eps"], ["w"]), node("Sqrt", ["w"], ["y"])],
            [],
            "normalisation is spelled out",
        ),
        (
            [
                node("Transpose", ["x"], ["t"], perm=[1, 2, 0]),
                node("Transpose", ["t"], ["y"], perm=[2, 0, 1]),
            ],
            [],
            "cancel out",
        ),
        ([node("Identity", ["x"], ["y"])], [], "Identity does nothing"),
        ([node("Neg", ["c"], ["y"])], [("c", [3])], "constant inputs alone"),
        (
            [node("Reshape", ["x", "i"], ["r"]), node("Reshape", ["r", "i"], ["y"])],
            [],
            "two Reshapes in a row",
        ),
        (
            [node("Slice", ["x", "i", "j"], ["r"]), node("Squeeze", ["r"], ["y"])],
            [],
            "one Gather, or one Split",
        ),
        ([node("Cast", ["x"], ["r"], to=10), node("Cast", ["r"], ["y"], to=1)], [], "two Casts in a row"),
    ],
)
def test_wasteful_patterns_are_named(nodes, constants, word):
    found = advice(model_of(*nodes, constants=constants))
    assert len(found) == 1
    assert word in found[0]


@pytest.mark.parametrize(
    ("nodes", "constants", "opset"),
    [
        ([node("TopK", ["x", "four"], ["v", "y"])], [("four", [4])], 20),
        ([node("Erf", ["x"], ["y"])], [], 19),
        (
            [
                node("Transpose", ["x"], ["t"], perm=[1, 2, 0]),
                node("Transpose", ["t"], ["y"], perm=[1, 2, 0]),
            ],
            [],
            20,
        ),
        ([node("Sqrt", ["x"], ["y"])], [], 20),
    ],
)
def test_patterns_with_a_purpose_are_left_alone(nodes, constants, opset):
    assert advice(model_of(*nodes, constants=constants, opset=opset)) == []


def test_a_product_with_one_is_named():
    model = model_of(node("Mul", ["x", "one"], ["y"]))
    model.graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]))
    assert advice(model) == ["Mul multiplies by one"]
    model.graph.initializer[0].float_data[0] = 2.0
    assert advice(model) == []


def test_repeated_findings_are_counted():
    found = advice(model_of(node("Identity", ["x"], ["z"]), node("Identity", ["z"], ["y"])))
    assert found == ["Identity does nothing (2 times)"]


def test_nodes_inside_branches_are_seen():
    branch = helper.make_graph([node("Identity", ["x"], ["b"])], "branch", [], [])
    model = model_of(node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))
    assert [n.op_type for n in walk(model.graph)] == ["If", "Identity", "Identity"]
    assert summarize(model).operators == {"Identity": 2, "If": 1}


def test_cleaning_renames_dimensions_and_weights_and_drops_traces():
    model = model_of(
        node("Add", ["x", "model.w"], ["y"]), constants=[("model.w", [1])], shape=("s0", "28*s1", "4*s1")
    )
    model.graph.node[0].metadata_props.add(key="stack", value="/home/someone/secret.py")
    model.graph.node[0].doc_string = "/home/someone"
    model.opset_import.append(helper.make_opsetid("pkg.unused", 1))
    clean(model, {"s0": "batch", "28*s1": "height", "s1": "(height//28)"})
    assert summarize(model).inputs[0].shape == ("batch", "height", "4*(height//28)")
    assert list(model.graph.node[0].input) == ["x", "w"]
    assert b"someone" not in model.SerializeToString()
    assert [entry.domain for entry in model.opset_import] == [""]
    assert opset_of(model) == 20


def scoped(op_type, inputs, outputs, *scopes):
    made = node(op_type, inputs, outputs)
    made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str([*scopes, outputs[0]]))
    return made


def test_nodes_are_named_after_their_modules():
    model = model_of(
        scoped("Shape", ["x"], ["s"], "_a_hook_of_torch"),
        scoped("MatMul", ["x", "w"], ["a"], "", "model", "model.stages.0", "model.stages.0.attn"),
        scoped("MatMul", ["a", "w"], ["b"], "", "model", "model.stages.0", "model.stages.0.attn"),
        node("Split", ["b"], ["c", "d"]),
        scoped("Relu", ["c"], ["y"], "", "model"),
    )
    clean(model, {})
    assert [n.name for n in model.graph.node] == [
        "Shape",
        "stages.0.attn/MatMul",
        "stages.0.attn/MatMul_1",
        "stages.0.attn/Split",
        "Relu",
    ]
    assert [module_of(n.name) for n in model.graph.node] == ["", *["stages.0.attn"] * 3, ""]


def test_the_nodes_of_a_file_lead_to_the_modules_of_the_model(exported):
    model, path, _ = exported
    names = [n.name for n in load(path).graph.node]
    assert len(set(names)) == len(names)
    assert {"stem/Conv", "norm/LayerNormalization", "act/Gelu"} <= set(names)
    modules = dict(model.named_modules())
    assert {module_of(name) for name in names} <= set(modules)
