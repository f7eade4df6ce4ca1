"""Engines are really built here, by TensorRT-RTX, which needs no GPU; what is in them is read from log and bytes."""

import json
import os
import shutil
import signal

import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper

from vitrail.export import ExportError, VerificationError, build_process, to_onnx, to_tensorrt
from vitrail.export.engine_shapes import read_onnx
from vitrail.zoo.inference import standard_form

from .gpu_stand_in import gpu
from .support import share_of_weights


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`files(name)`: a model's ONNX file and the modules that its nodes come from, made once."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=10).eval()
            path = tmp_path_factory.mktemp(name) / "m.onnx"
            to_onnx(model, path, verify=False, rewrite=standard_form)
            made[name] = path, {path for path, _ in standard_form(model).named_modules()}
        return made[name]

    return make


@pytest.fixture
def small(exported, tmp_path):
    """A small file with a free batch, of a model with attention."""
    return shutil.copy(exported[1], tmp_path / "small.onnx")


def one_node(
    tmp_path, *nodes, shape=("batch", 3, 8, 8), dtype=TensorProto.FLOAT, constants=(), inputs=(), rank=4
):
    """A file of these nodes from x to y."""
    x = helper.make_tensor_value_info("x", dtype, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    tensors = [helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in constants]
    graph = helper.make_graph(list(nodes), "g", [x, *inputs], [y], tensors)
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    path = tmp_path / "made.onnx"
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), path)
    return path


def left(folder):
    """Names of what is in a folder, but for the ONNX files that the tests put there."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".onnx")


def test_a_module_becomes_an_engine_and_a_report(exported, tmp_path):
    said = []
    report = to_tensorrt(
        exported[0], tmp_path / "m.engine", dtype="bfloat16", export={"img_size": 32}, progress=said.append
    )
    assert left(tmp_path) == ["m.engine", "m.engine.json"]
    assert report.dtype == "bfloat16"
    assert report.model == "Attentive"
    assert report.profile == {"input": ((1, 3, 32, 32), (8, 3, 32, 32), (32, 3, 32, 32))}
    assert "tracing the model" in said
    assert any(text.startswith("building the engine with tensorrt_rtx") for text in said)
    assert report.notes[-1] == "torch sees no GPU here: the engine is built, and has not run"
    modules = {path for kernel in report.kernels for path in kernel.modules}
    assert modules <= set(dict(exported[0].named_modules()))
    assert {"stem", "head"} <= modules


def test_one_number_fixes_the_batch(small, tmp_path):
    report = to_tensorrt(small, tmp_path / "m.engine", batch=4, archs=["sm_89"])
    assert report.profile == {"input": ((4, 3, 32, 32),) * 3}
    assert report.archs == ("sm_89",)
    assert report.inputs[0].shape == (4, 3, 32, 32)


def test_sizes_are_asked_for_where_the_file_leaves_them_open(tmp_path):
    file = one_node(tmp_path, helper.make_node("Relu", ["x"], ["y"]), shape=("b", 3, "h", "w"))
    with pytest.raises(ValueError, match="leaves its height open: give sizes, MIN, OPT, MAX"):
        to_tensorrt(file, tmp_path / "m.engine")
    report = to_tensorrt(file, tmp_path / "m.engine", batch=(1, 2, 2), sizes=(16, (24, 32), (64, 48)))
    assert report.profile == {"x": ((1, 3, 16, 16), (2, 3, 24, 32), (2, 3, 64, 48))}


def test_files_that_take_pixels_are_built_too(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["f"], ["y"]),
    ]
    file = one_node(tmp_path, *nodes, shape=("b", 8, 8, 3), dtype=TensorProto.UINT8)
    report = to_tensorrt(file, tmp_path / "m.engine", batch=(1, 2, 4))
    assert report.profile == {"x": ((1, 8, 8, 3), (2, 8, 8, 3), (4, 8, 8, 3))}
    assert report.inputs[0].dtype == "uint8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": (4, 2, 8)}, r"MIN <= OPT <= MAX; got \(4, 2, 8\)"),
        ({"batch": (1, 2)}, "batch must be one number from 1, or MIN, OPT, MAX"),
        ({"batch": 0}, "batch must be one number from 1"),
        ({"sizes": (64, 32, 96)}, "sizes must be MIN, OPT, MAX"),
        ({"sizes": (64, 64, 96)}, "the height of the file is fixed at 32, and sizes asks for 64, 64, 96"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, got 'float64'"),
        ({"archs": ["sm_90"]}, "does not build for sm_90; it offers sm_75, sm_80, .*library='tensorrt'"),
        ({"library": "tensorrt"}, "tensorrt is not installed: pip install tensorrt"),
        ({"timing_cache": "cache"}, "TensorRT-RTX times nothing when it builds"),
        ({"plugins": ["absent.so"]}, "absent.so"),
        ({"export": {"opset": 18}}, "the source is a file already"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(small, tmp_path, options, message):
    with pytest.raises((ValueError, ImportError, FileNotFoundError), match=message):
        to_tensorrt(small, tmp_path / "m.engine", **options)
    assert left(tmp_path) == []


def test_a_file_with_a_fixed_batch_takes_no_other(tmp_path):
    file = one_node(tmp_path, helper.make_node("Relu", ["x"], ["y"]), shape=(2, 3, 8, 8))
    with pytest.raises(ValueError, match="the batch of the file is fixed at 2, and batch asks for 1, 8, 32"):
        to_tensorrt(file, tmp_path / "m.engine", batch=(1, 8, 32))
    assert to_tensorrt(file, tmp_path / "m.engine").profile == {"x": ((2, 3, 8, 8),) * 3}


def test_a_half_precision_file_becomes_no_other(small, tmp_path):
    from vitrail.export import convert_precision

    onnx.save(convert_precision(read_onnx(small), "float16"), small)
    assert to_tensorrt(small, tmp_path / "m.engine").dtype == "float16"
    with pytest.raises(
        ValueError, match="the file is in float16, and only float32 files can become bfloat16"
    ):
        to_tensorrt(small, tmp_path / "n.engine", dtype="bfloat16")


def test_what_is_no_onnx_file_of_one_image_is_refused(tmp_path):
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"hello")
    with pytest.raises(ExportError, match=r"garbage\.onnx is not a valid ONNX file"):
        to_tensorrt(garbage, tmp_path / "m.engine")
    with pytest.raises(FileNotFoundError):
        to_tensorrt(tmp_path / "absent.onnx", tmp_path / "m.engine")
    relu = helper.make_node("Relu", ["x"], ["y"])
    second = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])
    with pytest.raises(
        ExportError, match=r"one input of images, .* got x float \(batch, 3, 8, 8\), z float \(1\)"
    ):
        to_tensorrt(one_node(tmp_path, relu, inputs=[second]), tmp_path / "m.engine")
    with pytest.raises(ExportError, match=r"got x float \(batch, 3\)"):
        to_tensorrt(one_node(tmp_path, relu, shape=("batch", 3), rank=2), tmp_path / "m.engine")
    with pytest.raises(ExportError, match="open number of channels"):
        to_tensorrt(one_node(tmp_path, relu, shape=("batch", "c", 8, 8)), tmp_path / "m.engine")


def test_nodes_that_tensorrt_does_not_take_are_named_with_their_modules(tmp_path):
    file = one_node(
        tmp_path,
        helper.make_node("Det", ["x"], ["d"], name="stages.0.attn/Det"),
        helper.make_node("Unknown", ["x"], ["u"], name="stages.1/Unknown", domain="elsewhere"),
        helper.make_node("Relu", ["x"], ["y"]),
    )
    with pytest.raises(ExportError) as refusal:
        to_tensorrt(file, tmp_path / "m.engine")
    text = str(refusal.value)
    assert "TensorRT-RTX does not take the file: " in text
    assert "Det 'stages.0.attn/Det' in module stages.0.attn: unsupported node" in text
    assert "Unknown 'stages.1/Unknown' in module stages.1: invalid node" in text
    assert "Plugin not found" in text
    assert left(tmp_path) == []


def test_nodes_that_the_parser_does_not_name_are_found_by_their_type(tmp_path):
    scatter = helper.make_node(
        "ScatterElements", ["x", "i", "x"], ["y"], reduction="add", name="blocks.0.attn/ScatterElements"
    )
    cast = helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64)
    with pytest.raises(
        ExportError, match=r"'blocks.0.attn/ScatterElements' in module blocks.0.attn: .*reduction"
    ):
        to_tensorrt(one_node(tmp_path, cast, scatter), tmp_path / "m.engine")


def test_a_build_that_fails_says_why(tmp_path, small):
    topk = helper.make_node("TopK", ["f", "k"], ["y", "i"], name="router/TopK")
    flat = helper.make_node("Flatten", ["x"], ["f"])
    file = one_node(tmp_path, flat, topk, shape=("batch", 3, 40, 40), constants=[("k", [4000])], rank=2)
    with pytest.raises(
        ExportError, match=r"router/TopK: K exceeds the maximum .*3840.*Choose fewer elements"
    ):
        to_tensorrt(file, tmp_path / "m.engine")
    with pytest.raises(ExportError, match=r"Turing \(SM75\): FP32 GEMM is not supported.*Leave sm_75 out"):
        to_tensorrt(small, tmp_path / "m.engine", archs=["sm_75", "sm_89"])
    with pytest.raises(ExportError, match=r"workspace limit.*Allow more workspace"):
        to_tensorrt(small, tmp_path / "m.engine", workspace=1)
    assert left(tmp_path) == []


def test_a_plugin_library_that_is_none_is_refused(tmp_path, small):
    (tmp_path / "no.so").write_bytes(b"no library")
    with pytest.raises(ExportError, match=r"can't load the plugin library .*no\.so"):
        to_tensorrt(small, tmp_path / "m.engine", plugins=[tmp_path / "no.so"])


def test_with_plugins_the_parser_finds_its_library_by_the_name_that_it_looks_for():
    with build_process._surroundings("tensorrt_rtx", ["a.so"]) as environment:
        folder = environment["LD_LIBRARY_PATH"].split(os.pathsep)[0]
        assert os.path.realpath(f"{folder}/libtensorrt_rtx.so").endswith("libtensorrt_rtx.so.1")
    assert not os.path.exists(folder)
    with build_process._surroundings("tensorrt_rtx", []) as environment:
        assert environment == dict(os.environ)


@pytest.mark.parametrize(
    ("code", "noise", "message"),
    [
        (-signal.SIGKILL, "", "was killed, most likely as memory ran out"),
        (
            -signal.SIGABRT,
            "terminate called after throwing an instance of 'std::bad_alloc'",
            "ran out of memory",
        ),
        (-signal.SIGABRT, "one\ntwo\nthree\nfour", r"\(signal SIGABRT\).* two | three | four"),
        (3, "", r"without an answer \(exit code 3\)"),
    ],
)
def test_a_process_that_dies_leaves_a_reason(small, tmp_path, monkeypatch, code, noise, message):
    script = tmp_path / "dies.py"
    script.write_text(
        f"import os, sys\nrequest = sys.stdin.readline()\n"
        f'if \'describe\' in request: print(\'{{"ok": {{"version": "1", "archs": ["SM89"]}}}}\'); sys.exit()\n'
        f"print({noise!r}, file=sys.stderr, flush=True)\n"
        f"os.kill(os.getpid(), {-code}) if {code} < 0 else sys.exit({code})\n"
    )
    monkeypatch.setattr(build_process, "_SCRIPT", script)
    with pytest.raises(ExportError, match=message):
        to_tensorrt(small, tmp_path / "m.engine")
    assert left(tmp_path) == ["dies.py"]


def test_memory_that_runs_out_inside_tensorrt_is_said_to_be_that(small, tmp_path, monkeypatch):
    builder = build_process.Builder("tensorrt_rtx")
    failed = {"kind": "build", "errors": ["Error Code 1: Myelin (Unexpected exception std::bad_alloc)"]}
    monkeypatch.setattr(
        build_process.Builder, "build", lambda *_, **__: (_ for _ in ()).throw(builder._reason(failed, {}))
    )
    with pytest.raises(ExportError, match=r"std::bad_alloc\).*Free some memory, or build for a smaller"):
        to_tensorrt(small, tmp_path / "m.engine")
    assert left(tmp_path) == []


def test_a_library_that_cannot_be_loaded_is_said_to_be_broken(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_rtx.py").write_text(
        "raise OSError('libtensorrt_rtx.so.1: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExportError, match=r"installed and can't be loaded .*--force-reinstall tensorrt-rtx"):
        build_process.Builder("tensorrt_rtx")


def test_the_full_tensorrt_builds_for_the_gpu_at_hand(monkeypatch):
    described = {"version": "11.4", "archs": []}
    monkeypatch.setattr(build_process.Builder, "_ask", lambda self, request, nodes=None: described)
    builder = build_process.Builder("tensorrt")
    with pytest.raises(
        ExportError, match="builds for the GPU at hand, and torch sees none; tensorrt_rtx builds"
    ):
        builder.architectures([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert builder.architectures([]) == builder.architectures(["sm_90"]) == ("SM90",)
    with pytest.raises(ValueError, match="the GPU at hand, sm_90, and not for sm_89"):
        builder.architectures(["sm_89"])


def test_the_full_tensorrt_is_driven_by_the_same_calls(exported, tmp_path, monkeypatch):
    # it can't be had without a GPU: its name, with the interface that it shares
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "tensorrt.py").write_text("from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n")
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    model, file, _ = exported
    with gpu(monkeypatch, file):
        report = to_tensorrt(file, tmp_path / "m.engine", model=model, timing_cache=tmp_path / "cache")
    assert report.library.startswith("tensorrt 1.")
    assert report.archs == ("sm_89",)
    assert report.ran
    assert (tmp_path / "cache").stat().st_size > 0
    assert left(tmp_path) == ["cache", "m.engine", "m.engine.json", "modules"]


# --- with a GPU, for which a stand-in serves --------------------------------------------------------------------------


def test_with_a_gpu_the_engine_is_verified_and_timed_before_it_is_written(exported, tmp_path, monkeypatch):
    model, file, _ = exported
    with gpu(monkeypatch, file):
        report = to_tensorrt(file, tmp_path / "m.engine", model=model, archs=["sm_89"])
    assert report.ran
    assert report.verification.passed
    assert [timing.shape[0] for timing in report.timings] == [1, 2, 4]
    written = json.loads((tmp_path / "m.engine.json").read_text())
    assert written["verification"]["passed"]
    assert written["timings"][0]["median_ms"] == 2.0
    assert not any("has not run" in note for note in report.notes)


@pytest.mark.parametrize("error", [VerificationError, ExportError])
def test_an_engine_that_fails_on_the_gpu_is_not_written(exported, tmp_path, monkeypatch, error):
    model, file, _ = exported
    flaw = {"error": 1.01} if error is VerificationError else {"fails": True}
    with gpu(monkeypatch, file, **flaw), pytest.raises(error):
        to_tensorrt(file, tmp_path / "m.engine", model=model, archs=["sm_89"])
    assert left(tmp_path) == []


# --- models of full size ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attentions", "fused"),
    [
        ("biformer_small", 30, 30),
        ("davit_fused_tiny", 12, 10),
        ("stripmlp_tiny_light", 0, 0),
        ("sparsifiner_small", 12, 0),
        ("stvit_deit_small", 12, 12),
        ("stvit_swin_small", 24, 9),
    ],
)
def test_engines_of_full_size_models_build_in_half_precision(name, attentions, fused, files, tmp_path):
    file, modules = files(name)
    for dtype in ("float16", "bfloat16"):
        report = to_tensorrt(file, tmp_path / "m.engine", dtype=dtype)
        assert (report.attentions, len(report.fused_attentions)) == (attentions, fused)
        assert {path for kernel in report.fused_attentions for path in kernel.modules} <= modules
        assert report.activation_bytes < 400e6
        if dtype == "float16":
            assert share_of_weights((tmp_path / "m.engine").read_bytes(), file, dtype) > 0.7
