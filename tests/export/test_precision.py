"""Graphs in float16 and bfloat16: which nodes stay in float32, how few casts there are, what is refused."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vitrail.export import ExportError, VerificationError, convert_precision, to_onnx, verify_onnx
from vitrail.export.emulate import emulated
from vitrail.export.precision import element_types
from vitrail.export.runs import open_session

HALF = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
node = helper.make_node


def model_of(*nodes, weights=None, opset=22, inputs=(("x", (2, 4)),), result=TensorProto.FLOAT, functions=()):
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("vitrail", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def converted(model, dtype="float16"):
    """The converted model, checked, and its nodes as `Type(type of the result)`."""
    half = convert_precision(model, dtype)
    onnx.checker.check_model(half, full_check=True)
    types = element_types(half)
    words = {TensorProto.FLOAT: "32", TensorProto.FLOAT16: "16", TensorProto.BFLOAT16: "b16"}
    return half, [f"{n.op_type} {words.get(types[n.output[0]], '-')}" for n in half.graph.node]


def run(model, **feeds):
    return open_session(model.SerializeToString()).run(None, feeds)


WEIGHT = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_run_in_the_half_type_between_float32_inputs_and_outputs(dtype):
    model = model_of(
        node("MatMul", ["x", "w"], ["a"]),
        node("Gelu", ["a"], ["b"]),
        node("MatMul", ["b", "w"], ["y"]),
        weights={"w": WEIGHT},
    )
    half, nodes = converted(model, dtype)
    short = "16" if dtype == "float16" else "b16"
    assert nodes == [f"Cast {short}", f"MatMul {short}", f"Gelu {short}", f"MatMul {short}", "Cast 32"]
    assert [v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)] == [
        TensorProto.FLOAT
    ] * 2
    assert [(t.name, t.data_type) for t in half.graph.initializer] == [("w", HALF[dtype])]
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT


def test_float32_is_a_plain_copy():
    model = model_of(node("MatMul", ["x", "w"], ["y"]), weights={"w": WEIGHT})
    copy = convert_precision(model, "float32")
    assert copy == model
    assert copy is not model


@pytest.mark.parametrize("dtype", ["half", "float64", "fp16"])
def test_unknown_precisions_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype must be one of float32, float16, bfloat16, got '{dtype}'"):
        convert_precision(model_of(node("Relu", ["x"], ["y"])), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_rounded_to_the_nearest(dtype):
    values = np.array([[1 + 2**-11, 1 + 2**-9 + 2**-12, -3.14159, 1e-3]], np.float32).repeat(4, 0)
    half, _ = converted(model_of(node("MatMul", ["x", "w"], ["y"]), weights={"w": values}), dtype)
    found = numpy_helper.to_array(half.graph.initializer[0]).astype(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("op_type", ["Softmax", "LayerNormalization", "ReduceMean", "Exp"])
def test_norms_softmax_and_sums_stay_in_float32(op_type):
    more = ["w4"] if op_type == "LayerNormalization" else []
    model = model_of(
        node("MatMul", ["x", "w"], ["a"]),
        node(op_type, ["a", *more], ["b"]),
        node("Mul", ["b", "a"], ["y"]),
        weights={"w": WEIGHT, "w4": np.ones(4, np.float32)},
    )
    _, nodes = converted(model)
    assert nodes == ["Cast 16", "MatMul 16", "Cast 32", f"{op_type} 32", "Cast 16", "Mul 16", "Cast 32"]


def test_scaling_and_masks_before_a_softmax_stay_in_float32_and_may_be_huge():
    mask = np.where(np.arange(4) < 2, 0, np.finfo(np.float32).min).astype(np.float32)
    model = model_of(
        node("MatMul", ["x", "w"], ["a"]),
        node("Mul", ["a", "s"], ["b"]),
        node("Add", ["b", "mask"], ["c"]),
        node("Softmax", ["c"], ["d"]),
        node("MatMul", ["d", "w"], ["y"]),
        weights={"w": WEIGHT, "s": np.float32(0.125), "mask": mask},
    )
    half, nodes = converted(model)
    assert nodes == [
        "Cast 16",
        "MatMul 16",
        "Cast 32",
        "Mul 32",
        "Add 32",
        "Softmax 32",
        "Cast 16",
        "MatMul 16",
        "Cast 32",
    ]
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(run(half, x=x)[0], run(model, x=x)[0], rtol=2e-3)


def test_a_value_is_cast_once_to_a_type_and_never_there_and_back():
    model = model_of(
        node("MatMul", ["x", "w"], ["a"]),
        node("Softmax", ["a"], ["b"], axis=0),
        node("Softmax", ["a"], ["c"], axis=1),
        node("Add", ["b", "c"], ["d"]),
        node("MatMul", ["d", "w"], ["e"]),
        node("MatMul", ["e", "w"], ["f"]),
        node("Add", ["e", "f"], ["y"]),
        weights={"w": WEIGHT},
    )
    half, nodes = converted(model)
    assert nodes.count("Cast 32") == 2
    assert nodes.count("Cast 16") == 2
    assert_no_chains(half)


def assert_no_chains(model):
    casts = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast"}
    assert not any(n.input[0] in casts for n in casts.values())
    assert max(Counter((n.input[0], n.attribute[0].i) for n in casts.values()).values()) == 1


def test_what_is_computed_for_a_choice_alone_is_in_float32():
    model = model_of(
        node("MatMul", ["x", "w"], ["q"]),
        node("MatMul", ["q", "v"], ["r"]),  # read by the choice alone
        node("Reshape", ["r", "shape"], ["s"]),
        node("TopK", ["s", "two"], ["t", "i"]),
        node("GatherElements", ["q", "i"], ["y"], axis=1),
        weights={"w": WEIGHT, "v": WEIGHT.T.copy(), "shape": np.array([2, 4]), "two": np.array([2])},
    )
    half, nodes = converted(model)
    assert nodes == [
        "Cast 16",
        "MatMul 16",
        "Cast 32",
        "MatMul 32",
        "Reshape 32",
        "TopK 32",
        "GatherElements 16",
        "Cast 32",
    ]
    assert {t.name: t.data_type for t in half.graph.initializer if t.name in "wv"} == {"w": 10, "v": 1}


def test_a_choice_that_is_the_result_does_not_keep_the_network_in_float32():
    model = model_of(
        node("MatMul", ["x", "w"], ["a"]),
        node("ArgMax", ["a"], ["y"], axis=1),
        weights={"w": WEIGHT},
        result=TensorProto.INT64,
    )
    _, nodes = converted(model)
    assert nodes == ["Cast 16", "MatMul 16", "Cast 32", "ArgMax -"]


def test_sizes_stay_exact():
    """70000 / 7 in float16 would be infinity."""
    model = model_of(
        node("Shape", ["x"], ["shape"]),
        node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
        node("ReduceProd", ["sizes"], ["n"], keepdims=0),
        node("Relu", ["x"], ["r"]),
        node("Div", ["r", "n"], ["y"]),
        inputs=(("x", (70000, 1)),),
    )
    half, nodes = converted(model)
    assert "Div 32" in nodes
    x = np.ones((70000, 1), np.float32)
    np.testing.assert_allclose(run(emulated(half), x=x)[0], x / 70000, rtol=1e-3)


@pytest.mark.parametrize("value", [1e-9, 1e5])
def test_nodes_with_numbers_that_float16_does_not_have_stay_in_float32(value):
    model = model_of(
        node("Relu", ["x"], ["a"]), node("Add", ["a", "c"], ["y"]), weights={"c": np.float32(value)}
    )
    assert "Add 32" in converted(model)[1]
    assert "Add b16" in converted(model, "bfloat16")[1]


def test_weights_beyond_float16_are_refused_with_the_remedy():
    model = model_of(node("MatMul", ["x", "w"], ["y"]), weights={"w": WEIGHT * 1e5})
    with pytest.raises(
        ExportError, match=r"'w' holds 1e\+05, and float16 ends at 65504; MatMul .* Use bfloat16"
    ):
        convert_precision(model, "float16")
    assert "MatMul b16" in converted(model, "bfloat16")[1]


def test_masks_beyond_float16_are_clamped_where_they_are_added():
    mask = np.full((2, 4), -1e9, np.float32)
    half, nodes = converted(
        model_of(node("Add", ["x", "mask"], ["a"]), node("Relu", ["a"], ["y"]), weights={"mask": mask})
    )
    assert "Add 16" in nodes
    assert numpy_helper.to_array(half.graph.initializer[0]).min() == -65504


def test_operators_that_onnx_has_not_in_bfloat16_stay_in_float32():
    weight = np.ones((4, 3, 1, 1), np.float32)
    for opset, word in ((20, "Conv 32"), (22, "Conv b16")):
        model = model_of(
            node("Conv", ["x", "w"], ["y"]), weights={"w": weight}, inputs=(("x", (1, 3, 4, 4)),), opset=opset
        )
        assert word in converted(model, "bfloat16")[1]


def test_hard_swish_which_tensorrt_has_not_in_bfloat16_stays_in_float32():
    model = model_of(node("HardSwish", ["x"], ["y"]))
    assert converted(model)[1] == ["Cast 16", "HardSwish 16", "Cast 32"]
    assert converted(model, "bfloat16")[1] == ["HardSwish 32"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_choice_that_a_function_makes_in_float32_reads_half_values_as_they_are(dtype):
    body = helper.make_function(
        "vitrail", "Choose", ["a"], ["i"],
        [node("Cast", ["a"], ["w"], to=TensorProto.FLOAT), node("ArgMax", ["w"], ["i"], axis=1)],
        [helper.make_opsetid("", 22)],
    )  # fmt: skip
    choose = node("Choose", ["a"], ["i"], domain="vitrail")
    pick = node("GatherElements", ["a", "i"], ["y"], axis=1)
    product = node("MatMul", ["x", "w"], ["a"])
    short = "16" if dtype == "float16" else "b16"
    half, nodes = converted(model_of(product, choose, pick, weights={"w": WEIGHT}, functions=[body]), dtype)
    assert nodes == [f"Cast {short}", f"MatMul {short}", "Choose -", f"GatherElements {short}", "Cast 32"]
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(run(emulated(half), x=x)[0], (x @ WEIGHT).max(1, keepdims=True), rtol=1e-2)
    # scores that are there for the choice alone are not rounded, and neither is the model's input
    alone = (product, node("MatMul", ["a", "w"], ["s"]), node("Choose", ["s"], ["i"], domain="vitrail"), pick)
    _, nodes = converted(model_of(*alone, weights={"w": WEIGHT}, functions=[body]), dtype)
    assert nodes[2:5] == ["Cast 32", "MatMul 32", "Choose -"]
    bare = model_of(
        node("Choose", ["x"], ["y"], domain="vitrail"), result=TensorProto.INT64, functions=[body]
    )
    assert converted(bare, dtype)[1] == ["Choose -"]


def test_functions_of_other_domains_are_converted_and_bare_nodes_are_not():
    body = helper.make_function(
        "vitrail", "Double", ["a", "i"], ["b"],
        [node("Gather", ["a", "i"], ["g"], axis=1), node("Add", ["g", "g"], ["b"])], [helper.make_opsetid("", 22)],
    )  # fmt: skip
    call = node("Double", ["x", "index"], ["y"], domain="vitrail")
    model = model_of(call, weights={"index": np.array([2, 0])}, functions=[body])
    half, nodes = converted(model)
    assert nodes == ["Cast 16", "Double 16", "Cast 32"]
    assert half.functions[0] == body
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(run(half, x=x)[0], 2 * x[:, [2, 0]])
    np.testing.assert_array_equal(run(emulated(half), x=x)[0], 2 * x[:, [2, 0]])
    del model.functions[:]
    with pytest.raises(ExportError, match="vitrail::Double puts out 'z' of unknown type"):
        convert_precision(
            model_of(node("Double", ["x"], ["z"], domain="vitrail"), node("Relu", ["z"], ["y"])), "float16"
        )


def test_branches_read_what_they_capture_in_float32():
    def branch(op_type):
        return helper.make_graph(
            [node(op_type, ["a"], ["r"])],
            "branch",
            [],
            [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
        )

    model = model_of(
        node("MatMul", ["x", "w"], ["a"]),
        node("ReduceMax", ["a"], ["m"], keepdims=0),
        node("Less", ["m", "zero"], ["c"]),
        node("If", ["c"], ["y"], then_branch=branch("Neg"), else_branch=branch("Relu")),
        weights={"w": WEIGHT, "zero": np.float32(0)},
    )
    half, nodes = converted(model)
    assert "MatMul 16" in nodes
    assert "If 32" in nodes
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(run(half, x=x)[0], run(model, x=x)[0], atol=1e-3)


def test_the_copy_that_rounds_shows_what_the_cpu_provider_hides():
    """The square overflows in float16; the CPU provider keeps it in float32 until the square root."""
    model = model_of(node("Mul", ["x", "x"], ["a"]), node("Sqrt", ["a"], ["y"]))
    half, _ = converted(model)
    x = np.full((2, 4), 300, np.float32)
    assert np.isinf(run(emulated(half), x=x)[0]).all()
    assert element_types(emulated(half))["a"] == TensorProto.FLOAT


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_verified_file_in_half_precision(make, tmp_path, dtype):
    report = to_onnx(make("Attentive"), tmp_path / "m.onnx", img_size=32, dtype=dtype)
    assert report.metadata["dtype"] == dtype
    assert report.opset == (20 if dtype == "float16" else 22)
    assert [str(value) for value in (*report.inputs, *report.outputs)] == [
        "input float (batch, 3, 32, 32)",
        "logits float (batch, 10)",
    ]
    sources = {check.source for check in report.verification.checks}
    assert sources == {"photos, rounded", "noise, rounded"} | (
        {"photos", "noise"} if dtype == "float16" else set()
    )
    assert 1e-6 < max(check.max_relative for check in report.verification.checks) < report.verification.rtol
    model = onnx.load(tmp_path / "m.onnx")
    assert_no_chains(model)
    assert {HALF[dtype]} < {t.data_type for t in model.graph.initializer}
    assert (tmp_path / "m.onnx").stat().st_size < 0.75 * 4 * sum(
        p.numel() for p in make("Attentive").parameters()
    ) + 9000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_wrong_weight_in_half_precision_is_caught(make, tmp_path, dtype):
    model = make("Attentive")
    to_onnx(model, tmp_path / "m.onnx", img_size=32, dtype=dtype)
    proto = onnx.load(tmp_path / "m.onnx")
    assert verify_onnx(tmp_path / "m.onnx", model).passed
    tensor = next(t for t in proto.graph.initializer if t.name == "head.bias")
    values = numpy_helper.to_array(tensor)[::-1]
    tensor.CopyFrom(numpy_helper.from_array(values.copy(), tensor.name))
    assert tensor.data_type == HALF[dtype]
    assert not any(check.passed for check in verify_onnx(proto.SerializeToString(), model).checks)


class Overflowing(nn.Module):
    """Right in float32 and in bfloat16; in float16 a square is infinite."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)

    def forward(self, x):
        x = self.stem(x) * 300
        return F.relu(x * x).sqrt()


def test_overflow_is_caught_though_the_cpu_provider_hides_it(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(VerificationError, match=r"rounded .*: the file's output holds NaN or infinity"):
        to_onnx(Overflowing(), tmp_path / "m.onnx", img_size=16, dtype="float16")
    assert not list(tmp_path.iterdir())
    assert to_onnx(Overflowing(), tmp_path / "m.onnx", img_size=16, dtype="bfloat16").verification.passed


class Choosy(nn.Module):
    """Keeps the two of eight channels with the largest mean, of which several all but tie."""

    def __init__(self, gap=1e-6):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.gap = gap
        with torch.no_grad():
            self.stem.weight.copy_(self.stem.weight[:1].expand(8, -1, -1, -1))
            self.stem.bias.copy_(torch.linspace(1, 1 + 7 * gap, 8))
        self.values = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x):
        x = self.stem(x)
        return self.values[x.mean((2, 3)).topk(2, -1).indices] * x.amax((2, 3))[:, :2]


def test_choices_that_tie_may_flip_and_are_counted(tmp_path):
    torch.manual_seed(0)
    report = to_onnx(Choosy(), tmp_path / "m.onnx", img_size=16, dtype="bfloat16", dynamic=())
    flipped = [check for check in report.verification.checks if check.flipped]
    assert flipped
    assert all(check.source.endswith("choices of float32") for check in flipped)
    assert any(
        "choices" in note and "other ones in this precision" in note for note in report.verification.notes
    )
    # alone, without the float32 file, the same file fails
    assert not verify_onnx(tmp_path / "m.onnx", Choosy()).passed


def test_a_choice_by_wrong_scores_fails_though_the_rest_agrees(tmp_path):
    torch.manual_seed(0)
    model = Choosy()
    to_onnx(model, tmp_path / "m.onnx", img_size=16, dynamic=())
    proto = onnx.load(tmp_path / "m.onnx")
    half = convert_precision(proto, "bfloat16")
    (choice,) = [n for n in half.graph.node if n.op_type == "TopK"]
    half.graph.node.insert(list(half.graph.node).index(choice), node("Neg", [choice.input[0]], ["turned"]))
    choice.input[0] = "turned"
    report = verify_onnx(half.SerializeToString(), model, original=tmp_path / "m.onnx")
    assert not report.passed
    assert any("the scores it would choose by differ" in check.failure for check in report.checks)
