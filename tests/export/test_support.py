"""Every combination of model, open axes, target and precision, as docs/EXPORT.md says it; and what all files must be."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from vitrail.export import to_tensorrt
from vitrail.export.functions import DOMAIN
from vitrail.export.runs import open_session
from vitrail.ops import library
from vitrail.zoo.inference import standard_form

from ..csrc.plugins import EMULATED_PLUGINS
from ..csrc.runtime_kernels import portable_kernels, session
from .cuttings import write_cuttings
from .support import (
    AXES,
    COUNTS,
    DTYPES,
    FULL,
    MODELS,
    SLACK,
    Cell,
    Outcome,
    Trials,
    cells_of,
    read_record,
    share_of_weights,
    takes_minutes,
)  # fmt: skip

pytestmark = pytest.mark.long

OPERATORS = {
    "biformer_pico": {"region_route", "routed_attention"},
    "davit_fused_pico": {"window_attention", "channel_attention"},
    "sparsifiner_pico": {"connectivity_topk", "sparse_attention"},
    "stripmlp_pico": {"strip_mix"},
    "stvit_deit_pico": set(),
    "stvit_swin_pico": {"window_attention", "semantic_attention"},
    "stvit_r_swin_pico": {"window_attention", "semantic_attention"},
}
"""Those that are nodes of the fused file."""
ATTENTIONS = {
    "biformer_pico": (4, 2),
    "davit_fused_pico": (6, 5),
    "sparsifiner_pico": (8, 0),
    "stripmlp_pico": (0, 0),
    "stvit_deit_pico": (7, 7),
    "stvit_swin_pico": (7, 7),
    "stvit_r_swin_pico": (8, 8),
}
"""Attentions in the file, and how many of them TensorRT-RTX computes in one kernel in float16."""


def each_model(*axes):
    """Every model with this left open; those of full size take minutes."""
    cases = [
        pytest.param(name, part, marks=pytest.mark.slow if name in FULL else (), id=f"{name}-{part}")
        for name in MODELS
        for part in axes
        if any(cell.axes == part for cell in cells_of(name))
    ]
    return pytest.mark.parametrize(("trials", "axes"), cases, indirect=["trials"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with photos, and what was tried with which model."""
    folder = tmp_path_factory.mktemp("support")
    write_cuttings(folder / "photos")
    yield folder, {}
    shutil.rmtree(folder)


@pytest.fixture
def trials(request, made):
    """All files and engines of the model of a name, each made when it is first asked for."""
    (folder, known), name = made, request.param
    if name not in known:
        (folder / name).mkdir()
        known[name] = Trials(name, folder / name, folder / "photos", plugins)
    return known[name]


def plugins():
    """The library over emulated kernels: what an engine is built from, the interface, is the same."""
    return library.build(part=EMULATED_PLUGINS, progress=lambda *_: None)


def need_tensorrt(target):
    if target in ("engine", "plugins"):
        pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("trials", "cell"),
    [
        pytest.param(
            name, cell, marks=pytest.mark.slow if takes_minutes(name, cell) else (), id=f"{name}-{cell}"
        )
        for name in MODELS
        for cell in cells_of(name)
    ],
    indirect=["trials"],
)
def test_each_combination_comes_out_as_it_is_on_record(trials, cell):
    need_tensorrt(cell.target)
    found, recorded = trials.outcome(cell), read_record()[trials.name][str(cell)]
    assert found.agrees(recorded), (
        f"{found}; on record: {recorded} (scripts/support_matrix.py tries it again)"
    )


def test_the_record_has_every_combination_of_every_model_and_no_other():
    record = read_record()
    assert set(record) == set(MODELS)
    for name, cells in record.items():
        assert set(cells) == {str(cell) for cell in cells_of(name)}
        assert all(Outcome.of(str(outcome)) == outcome for outcome in cells.values())


@pytest.mark.parametrize(
    ("found", "agrees"),
    [
        ("verified 2e-03", True),
        ("verified 2.9e-03", True),
        ("verified 3.1e-03", False),
        ("built", False),
        ("refused too large", False),
    ],
)
def test_another_outcome_or_a_larger_error_does_not_agree(found, agrees):
    assert Outcome.of(found).agrees(Outcome("verified", 1e-3)) is agrees


# --- ONNX files -------------------------------------------------------------------------------------------------------


@each_model("fixed", "batch")
def test_a_float32_file_computes_the_same_to_rounding_at_sizes_that_were_not_traced(trials, axes):
    trials.file(axes, "standard")
    report = trials.exports[axes, "standard"]
    assert {check.shape[0] for check in report.verification.checks} == ({1, 3} if AXES[axes] else {1})
    assert max(c.max_relative for c in report.verification.checks) < 1e-5
    assert report.notes == ()
    assert report.graph.nodes <= SLACK * COUNTS[trials.name]


@pytest.mark.parametrize("size", [(1, 33, 32), (3, 100, 131), (2, 224, 96)])
@pytest.mark.parametrize(
    ("trials", "operators"),
    [("biformer_pico", "standard"), ("biformer_pico", "fused"), ("davit_fused_pico", "standard")],
    indirect=["trials"],
)
def test_where_sides_are_open_any_size_is_right(trials, operators, size):
    path = trials.file("sides", operators)
    assert [text.split()[0] for text in trials.exports["sides", operators].dynamic.values()] == ["any"] * 3
    images = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = trials.model(images)
    found = open_session(path.read_bytes()).run(None, {"input": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@each_model("fixed", "batch")
def test_a_standard_file_holds_standard_operators_alone_and_half_of_it_half_as_much(trials, axes):
    path = trials.file(axes, "standard")
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    for dtype in ("float16", "bfloat16"):
        assert len(trials.half(axes, "standard", dtype)) < 0.6 * path.stat().st_size


@each_model("batch")
def test_each_call_of_an_operator_is_one_node_with_a_function(trials, axes):
    proto = onnx.load(trials.file(axes, "fused"))
    checks = trials.exports[axes, "fused"].verification.checks
    assert {check.shape[0] for check in checks} == {1, 3}
    assert max(check.max_relative for check in checks) < 1e-5
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    if trials.name in OPERATORS:
        found = {node.op_type.rstrip("0123456789").rstrip("_") for node in nodes}
        assert found == OPERATORS[trials.name]
    functions = {function.name: function for function in proto.functions}
    assert {node.op_type for node in nodes} == set(functions)
    for function in functions.values():
        assert function.domain == DOMAIN
        assert {node.domain for node in function.node} == {""}
    known = {value.name: value.type.tensor_type for value in proto.graph.value_info}
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"vitrail", b"1")
        assert len(attributes["inputs"].decode().split(",")) == len(node.input)
        assert set(functions[node.op_type].attribute) == set(attributes)
        assert len(known[node.output[0]].shape.dim) >= 3


@each_model("batch")
def test_kernels_in_onnx_runtime_take_the_place_of_the_functions(trials, axes, tmp_path):
    """The functions are still there; the profile says what ran. Threads and batches change nothing."""
    proto = onnx.load(trials.file(axes, "fused"))
    content, path = proto.SerializeToString(), portable_kernels()
    plain = session(content, None)
    kernels = [session(content, path, threads, str(tmp_path / "run")) for threads in (1, 2)]
    size = trials.model.pretrained_cfg["input_size"]
    for batch in (1, 3):
        image = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch)).numpy()
        expected = plain.run(None, {"input": image})[0]
        one, two = (opened.run(None, {"input": image})[0] for opened in kernels)
        assert np.array_equal(one, two)
        assert np.abs(one - expected).max() <= 1e-5 * np.abs(expected).max()
    events = json.loads(Path(kernels[0].end_profiling()).read_text())
    ran = {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    assert {node.op_type for node in proto.graph.node if node.domain == DOMAIN} <= ran
    assert "TopK" not in ran


@each_model("batch")
def test_kernels_in_onnx_runtime_take_half_types(trials, axes):
    size = trials.model.pretrained_cfg["input_size"]
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = trials.model(image)
    opened = session(trials.half(axes, "fused", "float16"), portable_kernels())
    (found,) = opened.run(None, {"input": image.numpy()})
    assert np.abs(found - exact.numpy()).max() / exact.abs().max() < 2e-2


# --- engines ----------------------------------------------------------------------------------------------------------


@each_model("fixed", "batch")
def test_engines_hold_the_models_kernels_and_weights_and_what_half_precision_saves(trials, axes):
    need_tensorrt("engine")
    file = trials.file(axes, "standard")
    size = trials.model.pretrained_cfg["input_size"][1:]
    modules = {path for path, _ in standard_form(trials.model).named_modules()}
    reports = {}
    for dtype in DTYPES:
        cell = Cell(axes, "engine", dtype)
        trials.outcome(cell)
        report, target = trials.engines[cell], trials.folder / f"{cell}.engine"
        reports[dtype], engine = report, target.read_bytes()
        assert json.loads(target.with_suffix(".engine.json").read_text()) == json.loads(
            json.dumps(report.to_dict())
        )
        assert (report.size_bytes, report.dtype, report.ran) == (len(engine), dtype, False)
        batches = (1, 8, 32) if AXES[axes] else (1, 1, 1)
        assert report.profile == {"input": tuple((batch, 3, *size) for batch in batches)}
        assert report.archs == ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
        assert sum(report.kernel_types.values()) > 10
        computed = {path for kernel in report.kernels for path in kernel.modules}
        assert computed
        assert computed <= modules
        if dtype != "bfloat16":  # which numpy does not have
            assert share_of_weights(engine, file, dtype) > 0.7  # some are merged, or folded into others
    assert len(reports["float32"].fused_attentions) == 0
    for dtype in ("float16", "bfloat16"):
        assert reports[dtype].weights_bytes < 0.75 * reports["float32"].weights_bytes
        assert reports[dtype].activation_bytes < reports["float32"].activation_bytes
    if trials.name in ATTENTIONS and AXES[axes]:
        half = reports["float16"]
        assert (half.attentions, len(half.fused_attentions)) == ATTENTIONS[trials.name]


@each_model("batch")
def test_every_node_is_a_plugin_in_the_engine(trials, axes):
    need_tensorrt("plugins")
    for dtype in DTYPES:
        cell = Cell(axes, "plugins", dtype)
        assert trials.outcome(cell).state == "built"
        report = trials.engines[cell]
        assert len(report.plugins) == of_plugins(report) == trials.nodes(axes)
        # the engine carries the library, and so runs where there is none
        assert report.size_bytes > bool(trials.nodes(axes)) * plugins().stat().st_size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trials", ["biformer_pico"], indirect=True)
def test_plugins_take_images_of_any_size(trials, dtype):
    need_tensorrt("plugins")
    cell = Cell("sides", "plugins", dtype)
    assert trials.outcome(cell).state == "built"
    assert of_plugins(trials.engines[cell]) == trials.nodes("sides") > 0
    assert trials.engines[cell].profile["input"][-1] == (32, 3, 96, 96)


def of_plugins(report):
    """Layers of the engine that are a plugin's."""
    return sum(kernel.type == "custom_layer" for kernel in report.kernels)


@pytest.mark.parametrize("trials", ["biformer_pico", "sparsifiner_pico"], indirect=True)
def test_without_plugins_the_functions_are_built(trials, tmp_path):
    need_tensorrt("engine")
    report = to_tensorrt(
        trials.file("batch", "fused"), tmp_path / "m.engine", batch=(1, 2, 8), archs=["sm_89"], plugins=[]
    )
    assert len(report.plugins) == of_plugins(report) == 0
