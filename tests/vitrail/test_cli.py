import json
import os
import re
import subprocess
import sys

import pytest
import torch

import vitrail
from vitrail import profiling
from vitrail.catalog import create_model, model_names
from vitrail.cli import models

COMMANDS = [
    "models",
    "profile",
    "convert",
    "export",
    "export onnx",
    "export tensorrt",
    "verify",
    "build",
    "doctor",
    "demo",
]


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(cli, command):
    result = cli(*command.split(), "--help")
    assert result.code == 0
    assert f"\n  vitrail {command}" in result.out.split("example")[1]
    assert result.err == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "export"])
def test_every_command_speaks_json(cli, command):
    assert "--json" in cli(*command.split(), "--help").out


def test_the_overview_lists_the_commands_and_the_exit_codes(cli):
    out = cli("--help").out
    assert all(f"    {command} " in out for command in COMMANDS if " " not in command)
    assert "exit codes: 0 done, 1 the job failed, 2 wrong use" in out


def test_the_version_is_the_packages(cli):
    assert cli("--version") == (0, f"vitrail {vitrail.__version__}\n", "")


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["modles"], "invalid choice: 'modles'"),
        (["profile"], "required: MODEL"),
        (["profile", "biformer_tinny"], "did you mean biformer_tiny?"),
        (["profile", "biformer"], "is a family, not a model; choose one of"),
        (["profile", "biformer_tiny", "--img-size", "22x"], "'22x' is no image size; write N or HxW"),
        (["profile", "biformer_tiny", "--img-size", "0"], "'0' is no image size"),
        (["profile", "biformer_tiny", "--img-size", "1x2x3"], "'1x2x3' is no image size"),
        (["profile", "biformer_tiny", "--batch", "0"], "'0' is no whole number of at least 1"),
        (
            ["profile", "biformer_stl", "--img-size", "8"],
            "biformer_stl does not run at 8x8: images must be at least",
        ),
        (["models", "nothing-like-it"], "no model matches 'nothing-like-it'"),
        (["convert", "biformer_tiny", "absent.pth", "out.safetensors"], "there is no file 'absent.pth'"),
        (["convert", "biformer_tiny", __file__, "out.pth"], "'out.pth' must end in .safetensors"),
        (
            ["convert", "biformer_tiny", __file__, "no/such/out.safetensors"],
            "no folder 'no/such'; create it first",
        ),
        (["export", "onnx", "biformer_tinny", "out.onnx"], "did you mean biformer_tiny?"),
        (["export", "onnx", "biformer_tiny", "out.pt"], "'out.pt' must end in .onnx"),
        (
            ["export", "onnx", "biformer_tiny", "out.onnx", "--dynamic", "depth"],
            "'depth' must be none, or some of",
        ),
        (["export", "onnx", "biformer_tiny", "out.onnx", "--opset", "3"], "--opset must lie between"),
        (["export", "onnx", "biformer_tiny", "out.onnx", "--images", "absent"], "no file or folder 'absent'"),
        (
            ["export", "onnx", "biformer_tiny", "out.onnx", "--tolerance", "-1"],
            "'-1' is no number above zero",
        ),
        (
            ["export", "onnx", "biformer_tiny", "out.onnx", "--images", __file__],
            "is not an image that can be read",
        ),
        (
            ["export", "onnx", "biformer_stl", "out.onnx", "--img-size", "8"],
            "does not run at 8x8: images must be",
        ),
        (
            ["export", "onnx", "biformer_tiny", "out.onnx", "--quantize", "int8"],
            "--quantize needs photos to find the ranges of tensors with: add --calibration FOLDER",
        ),
        (
            ["export", "onnx", "biformer_tiny", "out.onnx", "--calibration-limit", "64"],
            "--calibration-limit is for files in 8 bits: add --quantize int8",
        ),
        (
            ["export", "onnx", "biformer_tiny", "out.onnx", "--quantize", "int8", "--calibration", "."],
            "the folder . holds no image",
        ),
        (
            ["export", "onnx", "biformer_tiny", "out.onnx", "--quantize", "int8", "--dtype", "float16"],
            "--quantize starts from a file in float32: leave out --dtype float16",
        ),
        (
            ["export", "onnx", "biformer_tiny", "out.onnx", "--quantize", "int4"],
            "argument --quantize: invalid choice: 'int4'",
        ),
        (["export", "onnx", "biformer_tiny", "out.onnx", "--int8-error", "2"], "'2' is no share"),
        (["demo", "--model", "resnet18"], "resnet18 is timm's; choose a model of vitrail's"),
        (["demo", "--image", "absent.jpg"], "there is no file 'absent.jpg'"),
        (["demo", "--image", __file__], "is not an image that can be read"),
        (["demo", "--output", __file__], "is a file; name a folder"),
    ],
)
def test_wrong_use_is_one_line_that_says_what_to_do(cli, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    result = cli(*argv)
    assert result.code == 2
    assert result.out == ""
    *progress, error = result.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert not any(line.startswith(("error", "Traceback")) for line in progress)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_process_of_its_own_ends_without_traceback(shell):
    result = shell("profile", "biformer_tinny")
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1


def test_with_json_an_error_is_a_document_too(cli):
    result = cli("profile", "biformer_tinny", "--json")
    assert result.code == 2
    assert result.document["ok"] is False
    assert "did you mean" in result.document["error"]


def test_a_wrong_environment_variable_is_wrong_use(shell):
    result = shell("doctor", VITRAIL_OPS="quick")
    assert result.code == 2
    assert result.err == "error: VITRAIL_OPS must be one of auto, fused, reference, got 'quick'\n"


# --- trouble ----------------------------------------------------------------------------------------------------------


def _raise(error):
    def run(*_):
        raise error

    return run


def test_an_unforeseen_error_is_one_line_and_shows_its_origin_on_request(cli, monkeypatch):
    monkeypatch.setattr(models, "run", _raise(KeyError("lost")))
    result = cli("models")
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: KeyError: 'lost' (--debug shows where)\n"
    assert "Traceback" in cli("models", "--debug").err


def test_an_interrupt_ends_quietly_with_130(cli, monkeypatch):
    monkeypatch.setattr(models, "run", _raise(KeyboardInterrupt()))
    assert cli("models") == (130, "", "interrupted\n")


def test_a_reader_who_leaves_early_causes_no_traceback(tmp_path):
    command = [sys.executable, "-m", "vitrail", "models", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_libraries_print_and_warn_does_not_reach_the_result(cli, monkeypatch):
    import warnings

    def run(args, terminal):
        print("chatter")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        warnings.warn("vitrail runs slower", RuntimeWarning, stacklevel=1)
        terminal.result({"ok": True})
        return 0

    monkeypatch.setattr(models, "run", run)
    result = cli("models", "--json")
    assert result.document == {"ok": True}
    assert result.err == "chatter\nwarning: vitrail runs slower\n"


# --- models, profile --------------------------------------------------------------------------------------------------


def test_the_table_of_models_has_no_colours_in_a_pipe_and_every_name(shell):
    result = shell("models")
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    for name in model_names():
        assert f" {name} " in result.out
    assert max(map(len, result.out.splitlines())) < 120


def test_a_narrow_terminal_gets_the_same_facts_below_each_other(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = cli("models").out.splitlines()
    assert "biformer_tiny" in lines
    assert "  params (M)  13.14" in lines
    assert all(len(line) <= 40 for line in lines)


def test_models_as_json(cli):
    result = cli("models", "biformer_tiny", "--json")
    (row,) = result.document["models"]
    assert row["name"] == "biformer_tiny"
    assert row["parameters"] == 13142760
    assert row["macs"] == pytest.approx(2.2e9, rel=0.02)
    assert row["top1"] == 81.4
    assert row["weights"]
    assert row["img_size"] == [224, 224]


def test_a_profile_as_json(cli):
    result = cli("profile", "test_vit", "--img-size", "64x96", "--json")
    assert result.code == 0
    assert result.document["img_size"] == [64, 96]
    assert result.document["paths"][0]["fvcore"] == result.document["paths"][0]["torch"]
    assert result.err == ""


def test_a_profile_for_reading_names_the_paper_and_the_stages(cli):
    result = cli("profile", "biformer_tiny")
    assert result.code == 0
    for words in ("paper 13.14", "paper 2.2", "CVPR 2023", "fused", "reference", "stages.3", "7x7"):
        assert words in result.out


def test_a_profile_that_misses_the_paper_is_a_failed_job(cli, monkeypatch):
    monkeypatch.setattr(profiling, "PAPER_TOLERANCE", 0.001)
    result = cli("profile", "biformer_tiny", "--json")
    assert result.code == 1
    assert result.document["ok"] is False
    assert "from the paper's 2.2" in result.err


def test_an_error_at_the_models_own_size_is_no_wrong_use(cli, monkeypatch):
    monkeypatch.setattr(profiling, "profile", _raise(RuntimeError("out of memory")))
    assert cli("profile", "test_vit").code == 1


# --- convert, build, doctor -------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = create_model("biformer_tiny")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth", model


def test_converted_weights_load_again(cli, weights, tmp_path):
    source, model = weights
    result = cli("convert", "biformer_tiny", source, tmp_path / "out.safetensors", "--json")
    assert result.code == 0, result.err
    assert result.document["parameters"] == 13142760
    again = create_model("biformer_tiny", checkpoint=str(tmp_path / "out.safetensors"))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_truncated_checkpoint_is_a_failed_job_and_leaves_nothing(cli, weights, tmp_path):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(weights[0].read_bytes()[:100_000])
    result = cli("convert", "biformer_tiny", broken, tmp_path / "out.safetensors")
    assert result.code == 1
    assert "truncated" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_build_says_where_the_library_is(cli):
    result = cli("build", "--json")
    assert result.code == 0, result.err
    cpu = result.document["libraries"][0]
    assert cpu["device"] == "cpu"
    assert os.path.getsize(cpu["path"]) == cpu["size_bytes"]


def test_build_without_a_compiler_is_a_failed_job_that_says_so(shell, tmp_path):
    result = shell("build", CXX="no-such-compiler", VITRAIL_CACHE=str(tmp_path / "cache"))
    assert result.code == 1
    assert result.err.startswith("error: the C++ compiler 'no-such-compiler', named by CXX, was not found")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is without CUDA")
def test_build_for_gpus_without_their_compiler_is_a_failed_job_that_says_so(shell, tmp_path):
    environment = {"CUDACXX": "no-such-nvcc", "VITRAIL_CACHE": str(tmp_path / "cache")}
    result = shell("build", "--device", "cuda", **environment)
    assert result.code == 1
    assert result.err.startswith("error: the CUDA compiler 'no-such-nvcc', named by CUDACXX, was not found")
    assert not (tmp_path / "cache").exists()


def test_build_for_onnx_runtime_without_a_compiler_is_a_failed_job_that_says_so(cli, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = cli("build", "--device", "onnxruntime")
    assert result.code == 1
    assert result.err.startswith("error: the C++ compiler 'no-such-compiler', named by CXX, was not found")


def test_doctor_tells_versions_machine_and_the_path_of_every_operator(cli):
    result = cli("doctor", "--json")
    assert result.code == 0
    document = result.document
    assert document["versions"]["torch"] == torch.__version__.split("+")[0]
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert {op["name"] for op in document["operators"]} >= {"routed_attention", "region_route"}
    assert document["onnxruntime_library"]["loaded"] is False
    for words in ("routed_attention", "VITRAIL_OPS", "CPU"):
        assert words in cli("doctor").out


def test_doctor_explains_a_missing_compiler_and_compiles_nothing(shell, tmp_path):
    environment = {"CXX": "no-such-compiler", "VITRAIL_CACHE": str(tmp_path / "cache")}
    result = shell("doctor", "--json", **environment)
    assert result.code == 0
    attention = next(op for op in result.document["operators"] if op["name"] == "routed_attention")
    assert attention["compiled"] is False
    assert "no-such-compiler" in attention["reason"]
    assert any("no-such-compiler" in line for line in result.document["advice"])
    assert not (tmp_path / "cache").exists()


def test_doctor_says_when_the_environment_forbids_the_compiled_path(shell):
    result = shell("doctor", "--json", VITRAIL_OPS="reference", OMP_NUM_THREADS="1")
    assert all(
        not op["compiled"] and op["reason"] == "VITRAIL_OPS=reference" for op in result.document["operators"]
    )
    assert any("unset it" in line for line in result.document["advice"])


# --- export -----------------------------------------------------------------------------------------------------------


def test_an_export_is_verified_and_reported(cli, tmp_path):
    import onnx

    file = tmp_path / "model.onnx"
    result = cli("export", "onnx", "test_resnet", file, "--img-size", "64x96", "--num-classes", 7, "--json")
    assert result.code == 0, result.err
    document = result.document
    assert document["ok"] is True
    assert {check["shape"][0] for check in document["verification"]["checks"]} == {1, 3}
    graph = onnx.load(file).graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        64,
        96,
    ]
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_value == 7
    assert "the weights are random" in result.err


def test_an_export_can_be_fixed_in_size_and_left_unverified(cli, tmp_path):
    import onnx

    file = tmp_path / "model.onnx"
    result = cli(
        "export", "onnx", "test_resnet", file, "--dynamic", "none", "--no-verify", "--form", "features"
    )
    assert result.code == 0, result.err
    graph = onnx.load(file).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert [output.name for output in graph.output] == [f"stage{i}" for i in range(5)]
    assert "not verified" in result.out


def test_an_export_in_half_precision_takes_pixels_and_knows_its_classes(cli, tmp_path):
    import onnx

    file, classes = tmp_path / "model.onnx", tmp_path / "classes.txt"
    classes.write_text("cat\ndog\n  fox \n\n")
    argv = ["export", "onnx", "test_resnet", file, "--num-classes", 3, "--dtype", "float16", "--preprocess"]
    result = cli(*argv, "--classes", classes, "--form", "pre_logits", "--img-size", 64, "--json")
    assert result.code == 0, result.err
    model = onnx.load(file)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [output.name for output in model.graph.output] == ["pre_logits"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["cat", "dog", "fox"]
    assert (metadata["dtype"], metadata["form"], metadata["family"]) == ("float16", "pre_logits", "timm")
    assert metadata["weights"] == "random, seed 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "half"], "invalid choice: 'half'"),
        (["--form", "logits"], "invalid choice: 'logits'"),
        (["--classes", "nowhere.txt"], "the names of classes in 'nowhere.txt' can't be read"),
        (["--classes", "{classes}"], "classes has 3 names, and the model has 1000 classes"),
        (["--classes", "{gap}"], "line 2 of .* is empty; write one class a line"),
        (["--opset", "16"], "--opset must lie between 17 and 23, got 16"),
    ],
)
def test_wrong_use_of_an_export_is_refused_with_the_reason(cli, tmp_path, options, message):
    (tmp_path / "classes.txt").write_text("cat\ndog\nfox\n")
    (tmp_path / "gap.txt").write_text("cat\n\nfox\n")
    paths = {name: tmp_path / f"{name}.txt" for name in ("classes", "gap")}
    options = [option.format(**paths) for option in options]
    result = cli("export", "onnx", "test_resnet", tmp_path / "m.onnx", *options)
    assert result.code == 2
    assert re.search(message, result.err)
    assert not (tmp_path / "m.onnx").exists()


def test_an_export_that_fails_its_verification_is_a_failed_job_without_a_file(cli, tmp_path):
    file = tmp_path / "model.onnx"
    result = cli("export", "onnx", "test_vit", file, "--tolerance", "1e-12", "--json")
    assert result.code == 1
    assert result.document["ok"] is False
    assert not file.exists()


@pytest.fixture
def photos(tmp_path):
    """A folder of ten cuttings of photos."""
    from vitrail.export.images import load_image, sample_photos

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        photo = load_image(sample_photos()[i % 2])
        photo.crop((20 * i, 20 * i, 20 * i + 200, 20 * i + 200)).save(folder / f"{i}.png")
    return folder


def test_an_export_in_8_bits_is_verified_and_says_where_its_error_comes_from(cli, tmp_path, photos):
    import onnx

    file = tmp_path / "int8.onnx"
    argv = ["export", "onnx", "test_vit", file, "--quantize", "int8", "--calibration", photos, "--int8-all"]
    result = cli(*argv, "--preprocess", "--json")
    assert result.code == 0, result.err
    document = result.document
    assert document["ok"] is True
    assert document["graph"]["inputs"][0]["dtype"] == "uint8"
    assert [check["batch"] for check in document["checks"]] == [1, 3]
    assert {check["against"] for check in document["checks"]} == {"torch"}
    assert document["float32"]["verification"]["passed"] is True
    assert document["settings"]["images"] == 10
    quantised = [layer["name"] for layer in document["layers"] if layer["quantised"]]
    errors = [layer["error"] for layer in document["layers"]]
    assert errors == sorted(errors, reverse=True)
    operators = {node.name: node.op_type for node in onnx.load(file).graph.node}
    assert "head" in {layer["module"] for layer in document["layers"]}
    assert {operators[name] for name in quantised} == {"Conv", "MatMul", "Gemm"}
    assert sorted(tmp_path.iterdir()) == [file, photos]


def test_an_export_in_8_bits_that_cannot_be_exact_enough_is_a_failed_job_without_a_file(
    cli, tmp_path, photos
):
    file = tmp_path / "x.onnx"
    argv = ["export", "onnx", "test_vit", file, "--quantize", "int8", "--calibration", photos, "--int8-all"]
    result = cli(*argv, "--int8-error", "1e-5", "--no-verify", "--json")
    assert result.code == 1
    assert "with one layer left in 8 bits the outputs still have" in result.document["error"]
    layers = result.document["quantization"]["layers"]
    assert [layer["quantised"] for layer in layers].count(True) == 1
    assert not file.exists()


def test_an_export_uses_the_checkpoint(cli, tmp_path):
    import numpy as np
    import onnxruntime

    torch.manual_seed(3)
    model = create_model("test_resnet", num_classes=4)
    torch.save(model.state_dict(), tmp_path / "four.pth")
    file = tmp_path / "model.onnx"
    argv = ["export", "onnx", "test_resnet", file, "--checkpoint", tmp_path / "four.pth", "--no-verify"]
    result = cli(*argv)
    assert result.code == 1
    assert "has 4 classes where 1000 are asked for" in result.err
    result = cli(*argv, "--num-classes", 4)
    assert result.code == 0, result.err
    assert "random" not in result.err
    image = torch.randn(2, 3, 160, 160)
    (scores,) = onnxruntime.InferenceSession(file).run(None, {"input": image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(scores, model(image).numpy(), rtol=1e-3, atol=1e-5)
