"""`vitrail verify`: what A and B may be, exit codes, and what a failure says."""

import os
import signal
import subprocess
import sys
import time

import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from ..csrc.runtime_kernels import portable_kernels

MODEL = "test_resnet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of random weights, the same with one weight changed, and checkpoints."""
    import vitrail.cli

    folder = tmp_path_factory.mktemp("sides")
    argv = ["export", "onnx", MODEL, str(folder / "right.onnx"), "--num-classes", "7", "--img-size", "64"]
    assert vitrail.cli.main([*argv, "--no-verify", "--json"]) == 0
    model = onnx.load(folder / "right.onnx")
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, folder / "wrong.onnx")
    torch.manual_seed(0)
    state = timm.create_model(MODEL, num_classes=7).state_dict()
    torch.save(state, folder / "weights.pth")
    save_file(state, folder / "named.safetensors", metadata={"model": MODEL, "num_classes": "7"})
    return folder


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (MODEL, "right.onnx"),
        ("right.onnx", MODEL),
        (f"{MODEL}@weights.pth", "right.onnx"),
        ("weights.pth", "right.onnx"),
        ("named.safetensors", f"{MODEL}@weights.pth"),
        ("right.onnx", "right.onnx"),
    ],
)
def test_sides_that_compute_the_same_exit_with_0(cli, folder, monkeypatch, a, b):
    monkeypatch.chdir(folder)
    extra = [] if "right.onnx" in (a, b) else ["--num-classes", 7]
    result = cli("verify", a, b, "--json", "--img-size", 64, "--batch", "1,3", *extra)
    assert result.code == 0, result.err
    document = result.document
    assert (document["ok"], document["passed"]) == (True, True)
    assert {check["shape"][0] for check in document["checks"]} == {1, 3}
    assert set(document["checks"][0]["percentiles"]) == {"p50", "p90", "p99", "p99.9"}
    assert {side["kind"] for side in document["sides"]} <= {"model", "file"}


def test_a_difference_exits_with_1_and_names_the_first_place(cli, folder):
    result = cli("verify", MODEL, folder / "wrong.onnx", "--batch", 2)
    assert result.code == 1
    assert "first diverging: " in result.out
    assert "error on the way" in result.out
    assert result.err.splitlines()[-1].startswith(
        "warning: the file does not compute what the model computes"
    )
    document = cli("verify", MODEL, folder / "wrong.onnx", "--batch", 2, "--json").document
    assert document["ok"] is False
    assert document["trace"]["first"]["agrees"] is False
    assert cli("verify", MODEL, folder / "wrong.onnx", "--batch", 2, "--json", "--tolerance", 100).code == 0


def test_a_trace_on_request_shows_the_growth_where_all_agrees(cli, folder):
    result = cli("verify", folder / "right.onnx", folder / "right.onnx", "--batch", 1, "--trace")
    assert result.code == 0
    assert "error on the way" in result.out
    assert "first diverging" not in result.out


def test_other_weights_than_the_files_are_hinted_at(cli, folder):
    result = cli("verify", MODEL, folder / "right.onnx", "--seed", 5, "--batch", 1, "--no-trace")
    assert result.code == 1
    assert "was exported with weights 'random, seed 0': give that --seed" in result.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify", MODEL], "required: B"),
        (["verify", "test_resnot", MODEL], "no model is called 'test_resnot'"),
        (["verify", f"{MODEL}@absent.pth", MODEL], "there is no file 'absent.pth'"),
        (["verify", "absent.onnx", MODEL], "there is no file 'absent.onnx'"),
        (["verify", "weights.pth", "weights.pth"], "write NAME@weights.pth, or add --model NAME"),
        (["verify", MODEL, MODEL, "--batch", "0"], "'0' is no whole number of at least 1"),
        (["verify", MODEL, "right.onnx", "--img-size", "96"], "is fixed at 64, so img_size can't make it 96"),
        (["verify", MODEL, MODEL, "--images", "absent"], "no file or folder 'absent'"),
        (["verify", MODEL, MODEL, "--images", __file__], "is not an image that can be read"),
    ],
)
def test_wrong_use_is_one_line_that_says_what_to_do(cli, folder, monkeypatch, argv, message):
    monkeypatch.chdir(folder)
    result = cli(*argv)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith("error: ")
    assert message in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.onnx", b"no graph", "ONNX Runtime can't load the file"),
        ("broken.safetensors", b"no tensors", "truncated or no safetensors file"),
        ("m.engine", b"", "runs on an NVIDIA GPU and torch sees none here"),
    ],
)
def test_a_side_that_cannot_be_loaded_is_a_failed_job_of_one_line(
    cli, tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / name).write_bytes(content)
    result = cli("verify", tmp_path / name, "biformer_pico")
    assert (result.code, result.out) == (1, "")
    assert message in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


# --- trouble with the system ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [28, 5, 13, 30])
def test_a_file_that_cannot_be_written_is_a_failed_job_of_one_line(cli, tmp_path, monkeypatch, number):
    from vitrail.export.files import write_atomically

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    target = tmp_path / "m.onnx"
    monkeypatch.setattr(os, "fsync", refuse)
    if number != 28:  # one real export is enough; of the others what it does at its end
        monkeypatch.setattr("vitrail.export.to_onnx", lambda *_, **__: write_atomically(target, bytes(1000)))
    result = cli("export", "onnx", MODEL, target, "--img-size", 32, "--no-verify")
    assert (result.code, result.out) == (1, "")
    error = result.err.splitlines()[-1]
    assert error.startswith(f"error: could not write {target}: {os.strerror(number)}; ")
    assert "write elsewhere" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_report_that_does_not_fit_on_the_disk_is_one_line_without_traceback(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vitrail", "models", "biformer_tiny", "--json"]
        done = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr == (
        "error: the result can't be written to stdout: No space left on device; make room where it goes, or send it "
        "elsewhere\n"
    )


def test_a_command_that_is_terminated_takes_back_what_is_half_done(tmp_path):
    command = [sys.executable, "-m", "vitrail", "export", "onnx", MODEL, "m.onnx", "--img-size", "32"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("tracing"):
                time.sleep(0.2)
                process.send_signal(signal.SIGTERM)
                break
        assert process.stderr.read().splitlines()[-1] == "terminated"
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(tmp_path):
    """A file with one fused operator, whose function computes something else than the operator does."""
    function = onnx.helper.make_function(
        "vitrail",
        "strip_mix",
        ["x", "weight"],
        ["out"],
        [onnx.helper.make_node("Identity", ["x"], ["out"])],
        [onnx.helper.make_opsetid("", 20)],
        ["inputs", "axis"],
    )
    image = onnx.helper.make_tensor_value_info("input", 1, ["batch", 3, 8, 8])
    out = onnx.helper.make_tensor_value_info("out", 1, ["batch", 3, 8, 8])
    doubling = torch.zeros(3, 8, 8, 1)
    doubling[1].diagonal()[:] = 2
    node = onnx.helper.make_node("strip_mix", ["input", "weight"], ["out"], domain="vitrail", axis=2)
    node.attribute.append(onnx.helper.make_attribute("inputs", "x,weight"))
    weight = numpy_helper.from_array(doubling.numpy(), "weight")
    graph = onnx.helper.make_graph([node], "graph", [image], [out], [weight])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("vitrail", 1)]
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "fused.onnx")
    return tmp_path / "fused.onnx"


def test_kernels_run_in_the_place_of_functions_and_the_report_says_so(cli, fused, monkeypatch):
    monkeypatch.setenv("VITRAIL_ONNXRUNTIME_LIBRARY", str(portable_kernels()))
    assert cli("verify", fused, fused, "--batch", 1).code == 0
    result = cli("verify", fused, fused, "--batch", 1, "--kernels", "--json")
    assert result.code == 1
    assert result.document["runtime"].endswith("nodes by vitrail's kernels")
    assert [check["max_relative"] for check in result.document["checks"]] == pytest.approx([1, 1])
    assert result.document["trace"]["first_key"] == "out"


def test_kernels_are_for_files_with_nodes_for_them(cli, folder):
    result = cli("verify", folder / "right.onnx", folder / "right.onnx", "--kernels")
    assert (result.code, "right.onnx has no nodes that vitrail's kernels run" in result.err) == (1, True)
    result = cli("verify", folder / "right.onnx", MODEL, "--kernels")
    assert (result.code, "--kernels is for an ONNX file with fused operators as B" in result.err) == (2, True)


def test_a_library_of_kernels_that_does_not_load_is_named(cli, fused, tmp_path, monkeypatch):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setenv("VITRAIL_ONNXRUNTIME_LIBRARY", str(tmp_path / "broken.so"))
    result = cli("verify", fused, fused, "--kernels")
    assert result.code == 1
    assert "ONNX Runtime can't load the kernels of" in result.err
    assert "broken.so" in result.err
