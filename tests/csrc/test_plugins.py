"""Plugins of TensorRT, run on the host by a stand-in for it, against the definitions and the functions of files."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.export.functions import MOST_VARIANTS, NODES
from vitrail.ops import library

from ..export.node_calls import NodeCall, calls, function_model
from .plugins import EMULATED_PLUGINS, PluginError, Plugins

pytestmark = pytest.mark.long

# Of results, relative to the largest; definitions compute half types in float32, as kernels do.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """The library for the CPU has no part in this."""


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins(library.build(part=EMULATED_PLUGINS, progress=lambda *_: None))


def assert_same(out: Tensor, expected: Tensor, operator: str) -> None:
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    if operator == "connectivity_topk":  # in no particular order
        out, expected = out.sort(-1).values, expected.sort(-1).values
    if not out.is_floating_point():
        assert torch.equal(out, expected)
        return
    scale = expected.float().abs().max().clamp(min=1)
    assert (out.float() - expected.float()).abs().max() <= TOLERANCE[out.dtype] * scale


def test_there_is_a_plugin_for_every_node_under_each_of_its_names(plugins):
    wanted = {f"{name}_{i}" if i > 1 else name for name in NODES for i in range(1, MOST_VARIANTS + 1)}
    assert set(plugins.names()) == wanted
    assert set(library.PLUGINS) == set(NODES)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("operator", NODES)
def test_a_plugin_computes_what_its_definition_does(plugins, operator, dtype):
    @settings(max_examples=8)
    @given(calls(operator), st.integers(0, 2))
    def check(call: NodeCall, larger: int) -> None:
        tensors = call.tensors(dtype)
        most = [(x.shape[0] + larger, *x.shape[1:]) if batched else x.shape
                for x, batched in zip(tensors, call.batched, strict=True)]  # fmt: skip
        out = plugins.run(f"{operator}_3", call.attributes(), tensors, most)
        assert_same(out, call.expected(tensors), operator)

    check()


@pytest.mark.parametrize("operator", ["window_attention", "routed_attention"])
def test_parameters_may_be_wider_or_narrower_than_the_rest(plugins, operator):
    """Biases and weights are read as float32, whatever a converted file has made of them."""
    options = {"bias": True} if operator == "window_attention" else {"weights": True}
    call = replace(NodeCall.example(operator), options=options)
    tensors = call.tensors(torch.float16)
    place = call.inputs.index(next(iter(options)))
    exact = call.expected(tensors)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        given = [x.half().to(dtype) if i == place else x for i, x in enumerate(tensors)]
        out = plugins.run(operator, call.attributes(), given)
        assert (out.float() - exact.float()).abs().max() < (2e-2 if dtype == torch.bfloat16 else 2e-3) * 4


def test_routes_and_keys_may_be_of_either_integer_type(plugins):
    for operator, name in (("routed_attention", "routes"), ("sparse_attention", "keys")):
        call = NodeCall.example(operator)
        tensors = call.tensors(torch.float32)
        place = call.inputs.index(name)
        narrow = [x.int() if i == place else x for i, x in enumerate(tensors)]
        attributes = call.attributes()
        assert torch.equal(
            plugins.run(operator, attributes, tensors), plugins.run(operator, attributes, narrow)
        )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (7, 7), (9, 6), (16, 13), (20, 20)])
@pytest.mark.parametrize("operator", ["routed_attention", "region_route"])
def test_regions_may_be_given_by_their_number_and_memory_is_enough_for_every_size(
    plugins, operator, height, width
):
    """As files with open sizes state them; the engine was built for images of up to 20 x 20."""
    size = [-(-height // 4), -(-width // 4)]
    call = NodeCall(operator, (2, height, width), regions=tuple(size), topk=3)
    tensors = call.tensors(torch.float32)
    attributes = {**call.attributes(), "region_size": [-4, -4], "kv_region_size": [-4, -4]}
    if operator == "region_route":
        attributes["topk"] = -3
    most = [(2, 20, 20, x.shape[3]) if x.dim() == 4 else (2, 16, x.shape[2]) for x in tensors]
    assert_same(plugins.run(operator, attributes, tensors, most), call.expected(tensors), operator)


@pytest.mark.parametrize("size", [(1, 1), (30, 30), (50, 41), (128, 128), (129, 128)])
def test_memory_of_channel_attention_is_enough_for_every_size(plugins, size):
    """Of its chunks there can be more for a smaller image."""
    call = NodeCall("channel_attention", (1, *size), heads=1, width=1)
    tensors = call.tensors(torch.float32)
    most = [(1, 129, 128, x.shape[3]) for x in tensors]
    assert_same(
        plugins.run("channel_attention", call.attributes(), tensors, most),
        call.expected(tensors),
        "channel_attention",
    )


@pytest.mark.parametrize("operator", NODES)
def test_the_function_in_a_file_computes_the_same(plugins, operator):
    import onnxruntime

    call = NodeCall.example(operator)
    tensors = call.tensors(torch.float32)
    session = onnxruntime.InferenceSession(
        function_model(call).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = {name: np.asarray(x) for name, x in zip(call.inputs, tensors, strict=True)}
    (out,) = session.run(None, feed)
    assert_same(plugins.run(operator, call.attributes(), tensors), torch.from_numpy(out), operator)


# --- wrong nodes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": "q,k,v"}, "creation: vitrail::routed_attention: attribute inputs must name routes"),
        ({"inputs": "q,k,v,routes,u"}, "attribute inputs names 'u', which is no tensor of routed_attention"),
        ({"inputs": "q,k,v,routes,weights"}, "attribute inputs names 5 tensors, and the node has 4"),
        ({"scale": None}, "the node has no attribute scale"),
        ({"scale": "x"}, "attribute scale must be one number|attribute scale must hold numbers"),
        ({"num_heads": [1, 2]}, "attribute num_heads must be one number"),
        ({"num_heads": 3}, "configuration: .* q must have a positive multiple of num_heads = 3 channels"),
        ({"region_size": [0, 1]}, "region_size must be two numbers other than 0"),
        ({"kv_region_size": [1, 1, 1]}, "kv_region_size must be two positive numbers"),
        ({"region_size": [1, 1]}, r"routes must have shape \(B, regions of q, topk\)"),
    ],
)  # fmt: skip
def test_a_node_that_fits_no_operator_is_refused_when_an_engine_is_built(plugins, change, message):
    call = NodeCall.example("routed_attention")
    attributes = {key: value for key, value in {**call.attributes(), **change}.items() if value is not None}
    with pytest.raises(PluginError, match=message):
        plugins.run("routed_attention", attributes, call.tensors(torch.float32))


def test_types_that_kernels_do_not_know_are_not_supported(plugins):
    call = NodeCall.example("strip_mix")
    x, weight, *rest = call.tensors(torch.float32)
    with pytest.raises(PluginError, match="type of tensor 1"):
        plugins.run("strip_mix", call.attributes(), [x, weight.half(), *rest])
    with pytest.raises(PluginError, match="type of tensor 0"):
        plugins.run("strip_mix", call.attributes(), [x.int(), weight.int(), *(b.int() for b in rest)])


def test_the_interface_is_declared_without_headers_of_tensorrt():
    text = (library._SOURCES / "tensorrt" / "abi.h").read_text()
    assert set(re.findall(r"#include (\S+)", text)) == {"<cstddef>", "<cstdint>"}
