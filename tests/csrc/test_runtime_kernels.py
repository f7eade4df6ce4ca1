"""Kernels for ONNX Runtime against the definitions; the files hold no functions, so that nothing else can run."""

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from onnx import TensorProto
from torch import Tensor

from vitrail.export.functions import CHOOSERS, DOMAIN, NODES
from vitrail.ops import library

from ..export.node_calls import NodeCall, calls
from .runtime_kernels import PORTABLE_KERNELS, portable_kernels, session

# Of results, relative to the largest, against definitions in float64.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_HALVES = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """The library for the CPU has no part in this."""


@pytest.fixture(scope="module")
def kernels():
    return portable_kernels()


def bare_model(
    call: NodeCall, dtype: torch.dtype = torch.float32, attributes: dict[str, Any] | None = None
) -> onnx.ModelProto:
    """A file of one node without its function, under the last of its names; numbers come and go in float32."""
    helper, graph = onnx.helper, onnx.GraphProto(name="call")
    given, chooses = [], call.operator in CHOOSERS
    for name, x in zip(call.inputs, call.tensors(dtype), strict=True):
        number = TensorProto.FLOAT if x.is_floating_point() else TensorProto.INT64
        graph.input.append(helper.make_tensor_value_info(name, number, [None] * x.dim()))
        given.append(name)
        if x.dtype in _HALVES:
            given[-1] = f"{name}_half"
            graph.node.append(helper.make_node("Cast", [name], [given[-1]], to=_HALVES[x.dtype]))
    node = helper.make_node(f"{call.operator}_32", given, ["result"], domain=DOMAIN)
    node.attribute.extend(
        helper.make_attribute(name, value)
        for name, value in (attributes or call.attributes()).items()
        if value is not None
    )
    graph.node.append(node)
    out = "result" if chooses else "out"
    if not chooses:
        graph.node.append(helper.make_node("Cast", ["result"], [out], to=TensorProto.FLOAT))
    graph.output.append(
        helper.make_tensor_value_info(out, TensorProto.INT64 if chooses else TensorProto.FLOAT, None)
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto, tensors: list[Tensor], kernels: Any, threads: int = 1) -> Tensor:
    opened = session(model.SerializeToString(), kernels, threads)
    arrays = [np.asarray(x.float() if x.is_floating_point() else x) for x in tensors]
    names = [value.name for value in opened.get_inputs()]
    return torch.from_numpy(opened.run(None, dict(zip(names, arrays, strict=True)))[0])


def assert_same(
    out: Tensor, call: NodeCall, tensors: list[Tensor], dtype: torch.dtype, times: float = 1
) -> None:
    expected = call.expected([x.double() if x.is_floating_point() else x for x in tensors])
    assert out.shape == expected.shape
    if not expected.is_floating_point():
        if call.operator == "connectivity_topk":  # in no particular order
            out, expected = out.sort(-1).values, expected.sort(-1).values
        assert torch.equal(out, expected)
        return
    scale = expected.abs().max().clamp(min=1)
    assert (out.double() - expected).abs().max() <= times * TOLERANCE[dtype] * scale


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("operator", NODES)
def test_kernels_compute_what_definitions_do(kernels, operator, dtype):
    @settings(max_examples=5)
    @given(calls(operator))
    def check(call: NodeCall) -> None:
        tensors = call.tensors(dtype)
        assert_same(run(bare_model(call, dtype), tensors, kernels), call, tensors, dtype)

    check()


@pytest.mark.parametrize("operator", NODES)
def test_the_number_of_threads_and_the_batch_change_nothing(kernels, operator):
    call = NodeCall(operator, (4, 24, 24), heads=4, width=16, regions=(6, 6), topk=4)
    tensors = call.tensors(torch.float32)
    model = bare_model(call)
    one = run(model, tensors, kernels)
    assert_same(one, call, tensors, torch.float32, times=4)  # scores are sums over hundreds of tokens
    assert torch.equal(one, run(model, tensors, kernels, threads=2))
    first = [x[:1] if batched else x for x, batched in zip(tensors, call.batched, strict=True)]
    assert torch.equal(one[:1], run(model, first, kernels))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (16, 13)])
@pytest.mark.parametrize("operator", ["routed_attention", "region_route"])
def test_regions_may_be_given_by_their_number(kernels, operator, height, width):
    """As files with open sizes state them."""
    call = NodeCall(operator, (2, height, width), regions=(-(-height // 4), -(-width // 4)), topk=3)
    attributes = {**call.attributes(), "region_size": [-4, -4], "kv_region_size": [-4, -4]}
    if operator == "region_route":
        attributes["topk"] = -3
    tensors = call.tensors(torch.float32)
    out = run(bare_model(call, attributes=attributes), tensors, kernels)
    assert_same(out, call, tensors, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16"])
def test_the_library_as_it_is_shipped_passes_these_tests_with_every_instruction_set(capability):
    environment = {
        **os.environ,
        PORTABLE_KERNELS.variable: str(library.build(part=library.ONNXRUNTIME, progress=lambda *_: None)),
        "ATEN_CPU_CAPABILITY": capability,
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "kernels_compute or nothing"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_batches_may_be_empty(kernels):
    call = NodeCall.example("window_attention")
    assert run(bare_model(call), call.tensors(torch.float32, batch=0), kernels).shape == (0, 6, 5, 8)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": "q,k,v"}, "attribute inputs must name routes"),
        ({"inputs": "q,k,v,routes,u"}, "attribute inputs names 'u', which is no tensor of routed_attention"),
        ({"inputs": None}, "the node has no attribute inputs, or it is not text"),
        ({"scale": None}, "the node has no attribute scale, or it is not a number"),
        ({"num_heads": [1, 2]}, "the node has no attribute num_heads, or it is not an integer"),
        ({"region_size": [0, 1]}, "region_size must be two numbers other than 0"),
    ],
)
def test_a_node_that_fits_no_operator_is_refused_when_the_file_is_loaded(kernels, change, message):
    call = NodeCall.example("routed_attention")
    model = bare_model(call, attributes={**call.attributes(), **change})
    with pytest.raises(Exception, match="vitrail::routed_attention: " + re.escape(message)):
        session(model.SerializeToString(), kernels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "q must have a positive multiple of num_heads = 3 channels, got 8"),
        ({"inputs": "q,k,v,routes,weights"}, "attribute inputs names 5 tensors, and the node has 4"),
        ({"region_size": [-1, -1, -1, -1]}, "input 0 must have more than 4 dimensions"),
        ({"kv_region_size": [1, 1, 1]}, "kv_region_size must be two positive numbers"),
        ({"region_size": 3}, "region_size must be two positive numbers"),
        ({"region_size": [1, 1]}, "routes must have shape (B, regions of q, topk) = (2, 30, topk)"),
    ],
)
def test_a_call_that_a_kernel_cannot_take_is_an_error_with_a_message(kernels, change, message):
    call = NodeCall.example("routed_attention")
    model = bare_model(call, attributes={**call.attributes(), **change})
    with pytest.raises(Exception, match="vitrail::routed_attention: .*" + re.escape(message)):
        run(model, call.tensors(torch.float32), kernels)


@pytest.mark.parametrize(
    ("operator", "name", "message"),
    [
        ("routed_attention", "routes", "routes[0, 0, 0] is 999, but there are 6 key regions"),
        ("sparse_attention", "keys", "keys[0, 0, 0, 0] is 999, but there are 30 keys"),
        ("connectivity_topk", "candidates", "candidates[0, 0] is 999, but the basis has 30 tokens"),
    ],
)
def test_an_index_out_of_range_is_an_error_and_reads_no_memory(kernels, operator, name, message):
    call = replace(NodeCall.example(operator), options={"candidates": True})
    tensors = call.tensors(torch.float32)
    indices = tensors[call.inputs.index(name)]
    indices[(0,) * indices.dim()] = 999
    for threads in (1, 2):
        with pytest.raises(Exception, match=re.escape(message)):
            run(bare_model(call), tensors, kernels, threads)


def test_types_that_kernels_do_not_know_are_refused_when_the_file_is_loaded(kernels):
    model = bare_model(NodeCall.example("strip_mix"))
    for value in model.graph.input:
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(Exception, match="strip_mix_32"):
        session(model.SerializeToString(), kernels)


def test_a_runtime_that_is_too_old_is_refused_with_both_versions(kernels):
    """A stand-in for ONNX Runtime 1.16, whose first interface can say so."""
    said = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int32, ctypes.c_char_p)(
        lambda code, message: said.append(message.decode()) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version <= 16 else 0
    )
    number = ctypes.create_string_buffer(b"1.16.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_size_t)(lambda: ctypes.addressof(number))
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p)
    )
    register = ctypes.CDLL(str(kernels)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert said == [
        "vitrail's kernels need ONNX Runtime 1.17 or newer, this one is 1.16.3; without them the file runs on the "
        "functions that it holds"
    ]


def test_the_interface_is_declared_without_headers_of_onnx_runtime():
    text = (library._SOURCES / "onnxruntime" / "abi.h").read_text()
    assert set(re.findall(r"#include (\S+)", text)) == {"<cstddef>", "<cstdint>"}
