"""Operators as nodes: their functions compute what definitions do, in any type and at any batch, in every family."""

import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from hypothesis import given, settings
from onnx import numpy_helper

from vitrail.export import ExportError, to_onnx
from vitrail.export.functions import DOMAIN, NODES, has_nodes
from vitrail.ops import sparse_attention

from .node_calls import NodeCall, calls, function_model


def create(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def run(model, *arrays):
    content = model if isinstance(model, (str, bytes)) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


# --- whole models -----------------------------------------------------------------------------------------------------


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        to_onnx(create("biformer_pico"), tmp_path / name, operators="fused", verify=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_inlined_file_is_the_file_of_standard_operators(tmp_path, make):
    """ONNX Runtime makes the same nodes of both, so that neither is faster."""
    model, kept = make("Routed", topk=2), {}
    for operators in ("standard", "fused"):
        path = tmp_path / f"{operators}.onnx"
        to_onnx(model, path, img_size=32, operators=operators, verify=False, dynamic=())
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / f"{operators}_optimised.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        kept[operators] = onnx.load(options.optimized_model_filepath)
    standard, inlined = (sorted(node.op_type for node in m.graph.node) for m in kept.values())
    assert inlined == standard


def test_sizes_may_be_open(make, tmp_path):
    """Of regions the file then says how many there are, and of choices how many there are at most."""
    report = to_onnx(
        make("Routed", topk=2), tmp_path / "m.onnx", img_size=64, dynamic=("batch", "height", "width"),
        operators="fused",
    )  # fmt: skip
    assert report.verification.passed
    assert len({check.shape[2:] for check in report.verification.checks}) > 1
    proto = onnx.load(tmp_path / "m.onnx")
    attributes = {
        node.op_type: {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in proto.graph.node
        if node.domain == DOMAIN
    }
    assert set(attributes) == {"region_route", "routed_attention"}
    for values in attributes.values():
        assert (values["region_size"], values["kv_region_size"]) == ([-4, -4], [-4, -4])


def test_calls_that_differ_in_a_size_or_setting_have_functions_of_their_own(tmp_path):
    to_onnx(create("biformer_pico"), tmp_path / "m.onnx", operators="fused", verify=False)
    functions = {function.name for function in onnx.load(tmp_path / "m.onnx").functions}
    assert functions == {"region_route", "region_route_2", "routed_attention", "routed_attention_2"}


def test_more_functions_than_plugins_have_names_are_refused(tmp_path):
    class Many(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 8, 8)

        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2).contiguous()
            keys = torch.zeros(x.shape[0], 2, 16, 1, dtype=torch.int64)
            for i in range(33):
                x = x + sparse_attention(x, x, x, keys, 2, scale=0.1 + i)
            return x

    with pytest.raises(ExportError, match=r"sparse_attention is called with more than 32 combinations"):
        to_onnx(Many(), tmp_path / "m.onnx", img_size=32, operators="fused", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_of_operators_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match="operators must be one of standard, fused, got 'plugin'"):
        to_onnx(make("Routed", topk=1), tmp_path / "m.onnx", operators="plugin")


def test_a_file_says_whether_it_has_nodes_for_plugins(make, tmp_path):
    for operators, expected in (("standard", False), ("fused", True)):
        to_onnx(make("Routed", topk=1), tmp_path / "m.onnx", img_size=32, operators=operators, verify=False)
        assert has_nodes(tmp_path / "m.onnx") is expected
    (tmp_path / "no.onnx").write_bytes(b"no ONNX file")
    assert has_nodes(tmp_path / "no.onnx") is False


# --- single functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", NODES)
def test_a_function_computes_what_its_definition_does_for_any_sizes(operator):
    @settings(max_examples=3)
    @given(calls(operator))
    def check(call):
        single = function_model(call)
        half = function_model(call, torch.float16)
        for batch in (1, 3):
            tensors = call.tensors(torch.float32, batch)
            expected = call.expected(tensors)
            assert_close(run(single, *map(np.asarray, tensors)), expected, 1e-5)
            if operator in ("region_route", "connectivity_topk"):
                continue  # rounded inputs choose otherwise; in float32 all is said
            tensors = call.tensors(torch.float16, batch)
            assert_close(run(half, *map(np.asarray, tensors)), call.expected(tensors), 1e-2)

    def assert_close(out, expected, tolerance):
        out = torch.from_numpy(out)
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        if operator == "connectivity_topk":
            out, expected = out.sort(-1).values, expected.sort(-1).values
        scale = expected.double().abs().max().clamp(min=1)
        assert (out.double() - expected.double()).abs().max() <= tolerance * scale

    check()


@pytest.mark.parametrize("opset", [18, 21, 23])
@pytest.mark.parametrize("operator", NODES)
def test_a_function_is_valid_for_every_type_at_every_opset(operator, opset):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        function_model(NodeCall.example(operator), dtype, opset)


@pytest.mark.parametrize("operator", ["region_route", "connectivity_topk"])
def test_choices_are_made_in_float32(operator):
    """With half-type inputs the same keys are chosen as from these numbers in float32."""
    call = NodeCall.example(operator)
    tensors = [x.float() if x.is_floating_point() else x for x in call.tensors(torch.float16)]
    single = run(function_model(call), *map(np.asarray, tensors))
    halves = (
        [x.half() for x in tensors[:2]] if operator == "region_route" else [tensors[0].half(), tensors[1]]
    )
    half = run(function_model(call, torch.float16), *map(np.asarray, halves))
    assert np.array_equal(np.sort(half, -1), np.sort(single, -1))


def test_scales_keep_their_digits():
    """No constant of a function is rounded to a half type before it is known which one it is for."""
    proto = function_model(NodeCall.example("routed_attention"))
    floats = [
        numpy_helper.to_array(node.attribute[0].t)
        for node in proto.functions[0].node
        if node.op_type == "Constant" and node.attribute[0].t.data_type == onnx.TensorProto.FLOAT
    ]
    assert [x.item() for x in floats] == [np.float32(0.3)]


def test_nothing_is_said_on_the_way(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function_model(NodeCall.example("strip_mix"))
    assert capfd.readouterr() == ("", "")
