"""The programs of docs/EXPORT.md that serve a file run and agree with the model."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch

from vitrail.export import to_onnx
from vitrail.export.images import sample_photos
from vitrail.ops.library import find_compiler
from vitrail.zoo.inference import standard_form

from ..csrc.runtime_kernels import portable_kernels

PAGE = Path(__file__).parents[2] / "docs" / "EXPORT.md"
INCLUDE = "ONNXRUNTIME_INCLUDE"
"""Names the folder of ONNX Runtime's C++ headers, which its Python package lacks."""


def snippet(language, mark):
    """The first piece of code on the page with a word in it."""
    found = re.findall(rf"```{language}\n(.+?)```", PAGE.read_text(), re.DOTALL)
    return next(code for code in found if mark in code)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a model's file `model.onnx`, its `fused.onnx`, a photo and the kernels; and the model."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    model = timm.create_model("biformer_pico", num_classes=10).eval()
    for name, operators in (("model", "standard"), ("fused", "fused")):
        to_onnx(model, folder / f"{name}.onnx", operators=operators, rewrite=standard_form, verify=False)
    shutil.copy(sample_photos()[0], folder / "photo.jpg")
    shutil.copy(portable_kernels(), folder / "libvitrail_onnxruntime.so")
    return model, folder


@pytest.fixture
def python(served, monkeypatch, capsys):
    """What the page's programs in Python leave behind: names by the word that picks the program."""
    monkeypatch.chdir(served[1])
    names = {}
    for mark in ("InferenceSession", "register_custom_ops_library"):
        exec(snippet("python", mark), names)
    return names | {"printed": capsys.readouterr().out}


def test_the_program_in_python_prepares_a_photo_and_finds_what_the_model_finds(served, python):
    with torch.no_grad():
        expected = served[0](torch.from_numpy(python["batch"]))
    assert python["logits"] == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
    assert python["printed"] == f"[{expected.argmax().item()}]\n"


def test_the_lines_that_register_the_kernels_open_the_fused_file(python):
    (logits,) = python["session"].run(["logits"], {"input": python["batch"]})
    assert logits == pytest.approx(python["logits"], rel=1e-4, abs=1e-5)


def test_the_program_in_cpp_finds_the_same_with_the_kernels_and_without(served, python, tmp_path):
    if INCLUDE not in os.environ:
        pytest.skip(f"ONNX Runtime's C++ headers are needed: {INCLUDE} names no folder")
    source, program = tmp_path / "serve.cpp", tmp_path / "serve"
    source.write_text(snippet("cpp", "int main"))
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    command = [*find_compiler().command, "-std=c++17", "-Wall", "-Werror", "-isystem", os.environ[INCLUDE]]
    # the package's library says that it is called libonnxruntime.so.1
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    command += [str(source), str(library), f"-Wl,-rpath,{tmp_path}", "-o", str(program)]
    subprocess.run(command, check=True)
    batch = tmp_path / "batch.f32"
    python["batch"].tofile(batch)
    for arguments in (["model.onnx", batch], ["fused.onnx", batch, "./libvitrail_onnxruntime.so"]):
        found = subprocess.run([program, *arguments], cwd=served[1], capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, "")
        assert f"[{found.stdout.strip()}]\n" == python["printed"]
