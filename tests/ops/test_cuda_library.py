"""Finding nvcc, what it is told, and the library for GPUs; with a stand-in for nvcc, which compiles nothing."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from vitrail.ops import library
from vitrail.ops.library import CUDA, BuildError, Compiler

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is without CUDA")


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in of the right version, named in the environment."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    _write(path, f"release {torch.version.cuda}, V{torch.version.cuda}.88")
    monkeypatch.setenv("CUDACXX", str(path))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return path


def _write(path: Path, version: str) -> None:
    path.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        if [ "$1" = --version ]; then echo "Cuda compilation tools, {version}"; exit; fi
        for argument in "$@"; do
            [ "$previous" = -o ] && : > "$argument"
            previous=$argument
        done
        """)
    )
    path.chmod(0o755)


# --- the compiler -----------------------------------------------------------------------------------------------------


def test_the_compiler_that_cudacxx_names_is_taken(nvcc):
    compiler = library.find_cuda_compiler()
    assert compiler.command[0] == str(nvcc)
    assert compiler.version == f"nvcc {torch.version.cuda}"
    assert "-ccbin" in compiler.command


def test_without_cudacxx_cuda_home_comes_before_the_path(nvcc, monkeypatch):
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    assert library.find_cuda_compiler().command[0] == str(nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    assert library.find_cuda_compiler().command[0] == str(nvcc)


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(BuildError, match="'no-such-nvcc', named by CUDACXX, was not found"):
        library.find_cuda_compiler()


def test_another_major_version_is_refused_with_both(nvcc):
    _write(nvcc, "release 9.2, V9.2.88")
    with pytest.raises(
        BuildError, match=rf"of CUDA 9\.2, torch of {torch.version.cuda}: their major versions"
    ):
        library.find_cuda_compiler()


def test_what_is_no_nvcc_is_refused(nvcc):
    _write(nvcc, "something else")
    with pytest.raises(BuildError, match="does not say which release of CUDA it is"):
        library.find_cuda_compiler()


def test_a_torch_without_cuda_needs_no_compiler(nvcc, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BuildError, match="this torch is without CUDA"):
        library.find_cuda_compiler()


# --- architectures ----------------------------------------------------------------------------------------------------


def codes() -> list[str]:
    compiles, _ = library.cuda_commands(Compiler(("nvcc",), ""), Path("libvitrail_cuda.so"))
    return [part.removeprefix("-gencode=") for part in compiles[0] if part.startswith("-gencode")]


def test_without_a_gpu_everything_is_compiled_and_the_newest_as_ptx_too(nvcc, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert codes() == [
        "arch=compute_80,code=[sm_80,sm_86,sm_89,sm_90,sm_100,sm_120]",
        "arch=compute_120,code=compute_120",
    ]


def test_with_gpus_theirs_are_compiled(nvcc, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 6), (9, 0))[i])
    assert codes() == ["arch=compute_80,code=[sm_86,sm_90]"]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("8.0;9.0+PTX", ["arch=compute_80,code=[sm_80,sm_90]", "arch=compute_90,code=compute_90"]),
        ("8.9", ["arch=compute_80,code=[sm_89]"]),
    ],
)
def test_the_list_in_the_environment_is_followed(nvcc, monkeypatch, named, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    assert codes() == expected


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("Ampere", "must hold versions such as 8.0;9.0.PTX, got 'Ampere'"),
        ("7.5", "compute capability 8.0 .* got 7.5"),
    ],
)
def test_an_architecture_that_is_none_or_too_old_is_refused(nvcc, monkeypatch, named, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    with pytest.raises(BuildError, match=message):
        codes()


# --- the library ------------------------------------------------------------------------------------------------------


def test_every_source_is_compiled_once_and_all_are_linked(nvcc):
    compiles, link = library.cuda_commands(library.find_cuda_compiler(), Path("libvitrail_cuda.so"))
    sources = {path.stem for path in library._SOURCES.rglob("*.cu") if path.parent.name != "tensorrt"}
    assert len(compiles) == len(sources)
    assert {Path(part).stem for part in link if part.endswith(".o")} == sources


def test_it_is_built_into_the_cache_and_found_there(nvcc, tmp_path):
    assert not library.status("cuda").cached
    path = library.build(part=CUDA, progress=lambda *_: None)
    assert path.is_file()
    assert path.is_relative_to(tmp_path / "cache")
    status = library.status("cuda")
    assert (status.cached, status.path, status.loaded) == (True, path, False)


def test_another_list_of_architectures_is_another_library(nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    first = library.build(part=CUDA, progress=lambda *_: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert library.build(part=CUDA, progress=lambda *_: None) != first


def test_a_library_for_gpus_that_does_not_load_gives_way_to_the_definitions_with_one_warning(nvcc, tmp_path):
    code = """
    from vitrail.ops import library
    print(library.load("cuda"), library.load("cuda"), library.status("cuda").loaded, library.load("mps"))
    """
    (tmp_path / "broken.so").write_bytes(b"not a library")
    environment = {**os.environ, "VITRAIL_CUDA_LIBRARY": str(tmp_path / "broken.so"), "VITRAIL_OPS": "auto"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "False False False False\n", run.stderr
    assert run.stderr.count("RuntimeWarning: vitrail runs without its compiled operators on the GPU") == 1


# --- plugins for TensorRT ---------------------------------------------------------------------------------------------


def test_plugins_are_made_of_forward_kernels_and_know_nothing_of_torch(nvcc):
    compiles, link = library.plugin_commands(library.find_nvcc(), Path("libvitrail_tensorrt.so"))
    sources = {Path(command[command.index("-c") + 1]).stem for command in compiles}
    assert sources == {*library.PLUGINS, "attention", "node", "operators", "plugin", "results", "widen"}
    assert not [part for command in [*compiles, link] for part in command if "torch" in part]
    assert all("-DVITRAIL_STANDALONE" in command for command in compiles)


def test_plugins_are_built_for_the_architectures_asked_for_and_kept(nvcc, tmp_path):
    first = library.plugin_library(["sm_89"], lambda *_: None)
    assert first.is_relative_to(tmp_path / "cache")
    assert library.plugin_library(["sm_89"], lambda *_: None) == first
    assert library.plugin_library(["sm_80", "sm_120"], lambda *_: None) != first
    codes = library._cuda_codes(["sm_80", "sm_120"])
    assert codes == ["-gencode=arch=compute_80,code=[sm_80,sm_120]"]


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        (["sm_8x"], "architectures must be such as sm_89, got 'sm_8x'"),
        (["sm_75"], "need compute capability 8.0 .Ampere. or newer, got 7.5"),
    ],
)
def test_an_architecture_that_plugins_are_not_made_for_is_refused(nvcc, archs, message):
    with pytest.raises(BuildError, match=message):
        library.plugin_library(archs, lambda *_: None)


def test_a_plugin_library_that_the_environment_names_is_taken_or_missed_by_name(nvcc, tmp_path, monkeypatch):
    path = tmp_path / "plugins.so"
    monkeypatch.setenv("VITRAIL_PLUGIN_LIBRARY", str(path))
    with pytest.raises(BuildError, match=r"no library at .*plugins\.so, which VITRAIL_PLUGIN_LIBRARY names"):
        library.plugin_library()
    path.write_bytes(b"")
    assert library.plugin_library() == path


def test_plugins_need_no_torch_for_gpus(nvcc, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library.find_nvcc().command[0] == str(nvcc)
    with pytest.raises(BuildError, match="this torch is without CUDA"):
        library.find_cuda_compiler()


@pytest.mark.parametrize(
    ("changed", "concerned"),
    [
        ("tensorrt/plugin.cpp", {"tensorrt"}),
        ("onnxruntime/library.cpp", {"onnxruntime"}),
        ("standalone/node.cpp", {"tensorrt", "onnxruntime"}),
        ("ops/host.h", {"cpu", "cuda", "tensorrt", "onnxruntime"}),
    ],
)
def test_a_library_is_made_anew_by_what_it_is_made_of_alone(nvcc, tmp_path, monkeypatch, changed, concerned):
    copy = tmp_path / "csrc"
    shutil.copytree(library._SOURCES, copy)
    monkeypatch.setattr(library, "_SOURCES", copy)
    before = {part.device: library._source_key(part=part) for part in library.PARTS.values()}
    with (copy / changed).open("a") as file:
        file.write("// changed")
    after = {part.device: library._source_key(part=part) for part in library.PARTS.values()}
    assert {device for device in before if before[device] != after[device]} == concerned
