"""`vitrail export tensorrt`, with engines that TensorRT-RTX really builds."""

import json
import shutil

import pytest

from vitrail.export import build_process


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small ONNX file."""
    import vitrail.cli

    path = tmp_path_factory.mktemp("file") / "m.onnx"
    options = ["--img-size", "32", "--num-classes", "7", "--no-verify"]
    assert vitrail.cli.main(["export", "onnx", "test_vit", str(path), *options]) == 0
    return path


def test_a_model_becomes_an_engine_with_a_report_beside_it(cli, tmp_path):
    target = tmp_path / "m.engine"
    options = [
        "--img-size",
        32,
        "--num-classes",
        7,
        "--dtype",
        "fp16",
        "--batch",
        "1,2,4",
        "--arch",
        "sm_89",
        "sm_120",
    ]
    result = cli("export", "tensorrt", "test_vit", target, *options, "--json")
    assert result.code == 0, result.err
    document = result.document
    assert document["ok"] is True
    assert document["ran"] is False
    assert document["archs"] == ["sm_89", "sm_120"]
    assert document["dtype"] == "float16"
    assert document["profile"] == {"input": [[n, 3, 32, 32] for n in (1, 2, 4)]}
    assert document["metadata"]["weights"] == "random, seed 0"
    assert json.loads((tmp_path / "m.engine.json").read_text()) == {
        key: value for key, value in document.items() if key != "ok"
    }
    assert target.stat().st_size == document["size_bytes"]
    assert "warning: torch sees no GPU here: the engine is built, and has not run" in result.err
    assert "the weights are random" in result.err


def test_a_file_becomes_an_engine_and_the_terminal_says_what_is_in_it(cli, file, tmp_path):
    result = cli("export", "tensorrt", file, tmp_path / "m.engine", "--batch", 3)
    assert result.code == 0, result.err
    assert "3x3x32x32" in result.out
    assert "kernels" in result.out
    assert "fused into one kernel" in result.out
    assert "has not run" in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.engine.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "8,4,2"], "'8,4,2' is no batch: write N, or MIN,OPT,MAX"),
        (["--batch", "some"], "'some' is no batch"),
        (["--size", "64,32,96"], "'64,32,96' is no range of sizes"),
        (["--size", "64"], "the height of the file is fixed at 32"),
        (["--arch", "sm_90"], "does not build for sm_90; it offers sm_75"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--timing-cache", "c"], "has no timing cache"),
        (["--img-size", "64"], "so --img-size is for models only"),
        (["--form", "features", "--seed", "1"], "so --form is for models only"),
    ],
)
def test_wrong_use_is_one_line_that_says_what_to_do(cli, file, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = cli("export", "tensorrt", file, "m.engine", *options)
    assert result.code == 2
    assert result.out == ""
    assert result.err.splitlines()[-1].startswith("error: ")
    assert message in result.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("absent.onnx", "m.engine", "there is no file 'absent.onnx'"),
        ("notes.txt", "m.engine", "'notes.txt' is neither a model nor an ONNX file"),
        ("test_vitt", "m.engine", "did you mean test_vit"),
        ("test_vit", "m.plan", "'m.plan' must end in .engine"),
        ("test_vit", "no/such/m.engine", "no folder 'no/such'; create it first"),
    ],
)
def test_wrong_names_are_said_to_be_wrong(cli, tmp_path, monkeypatch, source, target, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    result = cli("export", "tensorrt", source, target)
    assert result.code == 2
    assert message in result.err


def test_a_build_that_fails_is_a_failed_job_without_files(cli, file, tmp_path):
    result = cli("export", "tensorrt", file, tmp_path / "m.engine", "--workspace", "0.0001", "--json")
    assert result.code == 1
    assert result.document["ok"] is False
    assert "TensorRT-RTX can't build the engine" in result.document["error"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_onnx_is_a_failed_job(cli, tmp_path):
    bad = tmp_path / "bad.onnx"
    shutil.copy(__file__, bad)
    result = cli("export", "tensorrt", bad, tmp_path / "m.engine")
    assert result.code == 1
    assert "bad.onnx is not a valid ONNX file" in result.err


def test_without_the_library_the_remedy_is_named(cli, file, tmp_path, monkeypatch):
    monkeypatch.setattr("vitrail.export.engine.find_spec", lambda name: None)
    result = cli("export", "tensorrt", file, tmp_path / "m.engine")
    assert result.code == 1
    assert result.err.splitlines() == [
        "error: TensorRT engines need a library that is not installed: pip install 'vitrail[tensorrt]' "
        "(TensorRT-RTX, which builds without a GPU), or NVIDIA's tensorrt"
    ]


def test_an_interrupt_leaves_nothing(cli, file, tmp_path, monkeypatch):
    def interrupted(self, *args, **request):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_process.Builder, "build", interrupted)
    result = cli("export", "tensorrt", file, tmp_path / "m.engine")
    assert result.code == 130
    assert result.err.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []
