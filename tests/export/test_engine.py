"""Running engines. No GPU is needed: a stand-in takes the calls, and is held against the real interface."""

import inspect
import json
import re
from pathlib import Path

import pytest
import tensorrt_rtx
import torch

from vitrail.export import Engine, ExportError, NoGPUError
from vitrail.export.engine import choose_library, verify_engine

from . import gpu_stand_in
from .gpu_stand_in import gpu


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "m.engine"
    path.write_bytes(b"an engine")
    return path


@pytest.mark.parametrize(
    ("stand_in", "real"),
    [
        (gpu_stand_in.Runtime, tensorrt_rtx.Runtime),
        (gpu_stand_in.CudaEngine, tensorrt_rtx.ICudaEngine),
        (gpu_stand_in.Context, tensorrt_rtx.IExecutionContext),
    ],
)
def test_the_stand_in_has_the_interface_of_the_real_runtime(stand_in, real):
    for name, function in inspect.getmembers(stand_in, inspect.isfunction):
        if name.startswith("_"):
            continue
        signature = re.search(rf"\b{name}\((self: .*)\) ->", getattr(real, name).__doc__)[1]
        required = [part for part in re.split(r", (?=\w+: )", signature) if " = " not in part]
        assert len(inspect.signature(function).parameters) == len(required), signature
    assert hasattr(tensorrt_rtx.Runtime, "engine_host_code_allowed")
    assert hasattr(tensorrt_rtx.ICudaEngine, "num_io_tensors")
    assert {member.name for member in gpu_stand_in.DataType} <= set(tensorrt_rtx.DataType.__members__)
    assert {member.name for member in gpu_stand_in.TensorIOMode} <= set(tensorrt_rtx.TensorIOMode.__members__)


def test_an_engine_without_a_gpu_is_one_clear_error(plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGPUError, match=r"m\.engine runs on an NVIDIA GPU and torch sees none here"):
        Engine(plan)


def test_an_engine_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Engine(tmp_path / "absent.engine")


def test_outputs_come_by_name_and_are_those_of_the_model(exported, plan, monkeypatch):
    model, onnx, _ = exported
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with gpu(monkeypatch, onnx):
        engine = Engine(plan, library="tensorrt_rtx")
        found = engine.run(images)
        # memory that is not contiguous is read as what it holds
        turned = engine.run(images.transpose(2, 3).contiguous().transpose(2, 3))
    with torch.no_grad():
        expected = model(images)
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned["logits"], expected, rtol=1e-4, atol=1e-5)
    assert str(engine.input) == "input float32 (-1, 3, 32, 32)"
    assert engine.profile == ((1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))


def test_inputs_outside_the_profile_are_refused(exported, plan, monkeypatch):
    with gpu(monkeypatch, exported[1]):
        engine = Engine(plan, library="tensorrt_rtx")
        with pytest.raises(ValueError, match="takes shapes from 1x3x32x32 to 4x3x32x32, got 5x3x32x32"):
            engine.run(torch.zeros(5, 3, 32, 32))
        with pytest.raises(ValueError, match="got 3x32x32"):
            engine.run(torch.zeros(3, 32, 32))
        with pytest.raises(TypeError, match=r"takes float32 images, got torch\.float16"):
            engine.run(torch.zeros(1, 3, 32, 32, dtype=torch.float16))


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        (
            {"refuses": True},
            r"can't load .*m\.engine on stand-in: an engine runs in the version that built it",
        ),
        ({"kind": gpu_stand_in.DataType.FP8}, "a tensor input of FP8, which torch has no type for"),
    ],
)
def test_an_engine_that_does_not_fit_the_machine_says_so(exported, plan, monkeypatch, flaw, message):
    with gpu(monkeypatch, exported[1], **flaw), pytest.raises(ExportError, match=message):
        Engine(plan, library="tensorrt_rtx")


def test_the_report_beside_an_engine_names_what_built_it(exported, plan, monkeypatch):
    report = {"library": "tensorrt_rtx 1.7", "archs": ["sm_89"], "plugins": ["p"]}
    plan.with_name("m.engine.json").write_text(json.dumps(report))
    with gpu(monkeypatch, exported[1]):
        engine = Engine(plan)
        assert engine.library == "tensorrt_rtx"
        assert engine._runtime.engine_host_code_allowed
    with (
        gpu(monkeypatch, exported[1], refuses=True),
        pytest.raises(ExportError, match=r"built for \(sm_89\)"),
    ):
        Engine(plan)


def test_a_run_that_fails_is_an_error(exported, plan, monkeypatch):
    with gpu(monkeypatch, exported[1], fails=True):
        engine = Engine(plan, library="tensorrt_rtx")
        with pytest.raises(ExportError, match="failed on a 1x3x32x32 input"):
            engine.run(torch.zeros(1, 3, 32, 32))


def test_an_engine_is_verified_over_its_profile(exported, plan, monkeypatch):
    model, onnx, _ = exported
    with gpu(monkeypatch, onnx):
        report = verify_engine(
            Engine(plan, library="tensorrt_rtx"), model, precision="float16", rtol=1e-4, atol=1e-6
        )
    assert report.passed
    assert {check.shape[0] for check in report.checks} == {1, 2, 4}
    assert {check.source for check in report.checks} == {"photos", "noise"}
    assert (report.runtime, report.precision) == ("tensorrt_rtx on stand-in", "float16")


def test_an_engine_that_computes_something_else_fails_verification(exported, plan, monkeypatch):
    model, onnx, _ = exported
    with gpu(monkeypatch, onnx, error=1.001):
        report = verify_engine(
            Engine(plan, library="tensorrt_rtx"), model, precision="float16", rtol=1e-4, atol=1e-6
        )
    assert not report.passed
    assert all("max error" in check.failure for check in report.checks)


def test_time_is_the_median_of_many_runs(exported, plan, monkeypatch):
    with gpu(monkeypatch, exported[1]):
        timing = Engine(plan, library="tensorrt_rtx").time((4, 3, 32, 32), runs=20, seconds=0)
    assert (timing.median_ms, timing.runs) == (2.0, 20)
    assert timing.images_per_second == pytest.approx(2000)


def test_the_library_is_chosen_by_what_is_there(monkeypatch):
    def having(*names, cuda):
        monkeypatch.setattr("vitrail.export.engine.find_spec", lambda name: name in names or None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

    having("tensorrt", "tensorrt_rtx", cuda=True)
    assert choose_library() == "tensorrt"
    assert choose_library(built_by="tensorrt_rtx") == "tensorrt_rtx"
    assert choose_library("tensorrt_rtx", built_by="tensorrt") == "tensorrt_rtx"
    having("tensorrt", "tensorrt_rtx", cuda=False)
    assert choose_library() == "tensorrt_rtx"
    having("tensorrt", cuda=False)
    assert choose_library() == "tensorrt"
    with pytest.raises(ImportError, match="tensorrt_rtx is not installed: pip install tensorrt-rtx"):
        choose_library("tensorrt_rtx")
    having(cuda=True)
    with pytest.raises(ImportError, match=r"pip install 'vitrail\[tensorrt\]'"):
        choose_library()
    with pytest.raises(ValueError, match="library must be one of tensorrt, tensorrt_rtx, got 'onnx'"):
        choose_library("onnx")


def test_the_serving_snippet_of_the_documentation_runs(exported, tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs" / "EXPORT.md"
    snippets = re.findall(r"```python\n(.+?)```", page.read_text(), re.DOTALL)
    snippet = next(code for code in snippets if "Engine(" in code)
    (tmp_path / "model.engine").write_bytes(b"an engine")
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.zeros(2, 3, 32, 32)}
    with gpu(monkeypatch, exported[1]):
        exec(snippet, names)
    assert names["scores"].shape == (2, 10)
    assert "median_ms=2.0" in capsys.readouterr().out
