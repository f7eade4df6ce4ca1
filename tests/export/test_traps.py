import onnx
import pytest
from onnx import TensorProto, helper

from vitrail.export.traps import attentions, traps

node = helper.make_node


def model_of(*nodes, constants=(), dtype=TensorProto.FLOAT, gives=TensorProto.FLOAT):
    tensors = [helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in constants]
    scale = helper.make_tensor("scale", dtype, [8], [1.0] * 8)
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", dtype, ("batch", 16, 8))],
        [helper.make_tensor_value_info("y", gives, None)],
        [*tensors, scale],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


ROUTED = (
    node("TopK", ["x", "k"], ["v", "i"], name="attn.router/TopK"),
    node("Add", ["i", "offset"], ["shifted"], name="attn/Add"),
    node("Reshape", ["shifted", "flat"], ["index"], name="attn/Reshape"),
    node("Gather", ["x", "index"], ["y"], name="attn/Gather"),
)
CONSTANTS = (("k", [4]), ("offset", [1]), ("flat", [-1]))


def test_rows_that_are_chosen_and_gathered_with_an_open_batch_are_a_trap():
    (found,) = traps(model_of(*ROUTED, constants=CONSTANTS), open_batch=True)
    assert found.startswith("rows that TopK chose are gathered with the batch open (attn)")
    assert "2299" in found


def test_they_are_none_with_a_fixed_batch():
    assert traps(model_of(*ROUTED, constants=CONSTANTS), open_batch=False) == []


def test_gathers_that_follow_from_no_choice_are_none():
    values = (
        node("TopK", ["x", "k"], ["v", "i"]),
        node("Cast", ["v"], ["numbers"], to=TensorProto.INT64),
        node("Gather", ["x", "offset"], ["y"]),
    )
    assert traps(model_of(*values, constants=CONSTANTS), open_batch=True) == []


@pytest.mark.parametrize(("k", "trap"), [(3840, False), (3841, True)])
def test_topk_of_too_many_is_a_trap(k, trap):
    found = traps(model_of(node("TopK", ["x", "k"], ["y", "i"]), constants=[("k", [k])]), open_batch=True)
    assert bool(found) == trap
    assert not trap or "TopK takes more than 3840 elements" in found[0]


def test_topk_of_a_number_that_is_computed_is_a_trap():
    (found,) = traps(
        model_of(node("Shape", ["x"], ["k"]), node("TopK", ["x", "k"], ["y", "i"])), open_batch=True
    )
    assert "not constant" in found


@pytest.mark.parametrize(("dtype", "trap"), [(TensorProto.FLOAT16, True), (TensorProto.FLOAT, False)])
def test_norms_in_float16_are_a_trap(dtype, trap):
    norm = node("LayerNormalization", ["x", "scale"], ["y"], name="blocks.0.norm/LayerNormalization")
    found = traps(model_of(norm, dtype=dtype, gives=dtype), open_batch=True)
    assert bool(found) == trap
    assert not trap or "norms compute in float16 (blocks.0.norm)" in found[0]


def test_attentions_are_softmaxes_that_products_read_and_attention_nodes():
    graph = model_of(
        node("Softmax", ["x"], ["a"]),
        node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        node("MatMul", ["b", "x"], ["c"]),
        node("Attention", ["c", "c", "c"], ["d"]),
        node("Softmax", ["d"], ["y"]),
    ).graph
    assert attentions(graph) == 2
    assert attentions(onnx.GraphProto()) == 0
