"""The GPU kernels through nvcc, without a GPU, for every architecture: they compile, link, load and are registered."""

import ctypes
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vitrail.export.functions import MOST_VARIANTS
from vitrail.ops import library

from .kernels import GPU_FORWARD_ONLY, GPU_OPERATORS

# Minutes, so that they begin before the others.
pytestmark = pytest.mark.long
# Bytes of registers that a kernel may keep in memory instead.
SPILLED = 128


def _compiler(find: Callable[[], library.Compiler]) -> library.Compiler:
    """The compiler; without the CUDA toolkit there is nothing to test."""
    try:
        return find()
    except library.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, and what the compiler says of the kernels."""
    compiler = _compiler(library.find_cuda_compiler)
    path = tmp_path_factory.mktemp("cuda") / library.CUDA_LIBRARY_NAME
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", " ".join(library.CUDA_ARCHITECTURES))
        compiles, link = library.cuda_commands(compiler, path)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = "".join(pool.map(_run, compiles))
    _run(link)
    return path, said


def _run(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stderr


def kernels(said: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Registers and spilled bytes of each kernel, by its name and architecture."""
    table = {}
    for part in said.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\S+)' for '(\S+)'", part).groups()
        spilled = re.search(r"(\d+) bytes spill stores", part)
        table[name, architecture] = (int(re.search(r"Used (\d+) registers", part)[1]), int(spilled[1]))
    return table


def test_it_compiles_without_a_warning(compiled):
    _, said = compiled
    assert "warning" not in said.lower(), said[-4000:]


def test_no_kernel_spills_badly(compiled):
    table = kernels(compiled[1])
    for (name, architecture), (registers, spilled) in sorted(table.items()):
        print(f"{architecture:8}{registers:4} registers{spilled:5} bytes spilled  {name}")
    names = {name for name, _ in table}
    for architecture in library.CUDA_ARCHITECTURES:
        code = "sm_" + architecture.removesuffix("+PTX").replace(".", "")
        assert {name for name, for_ in table if for_ == code} == names
    assert any("attend" in name for name in names)
    bad = {kernel: spilled for kernel, (_, spilled) in table.items() if spilled > SPILLED}
    assert not bad


def test_it_loads_where_there_is_no_gpu_and_registers_its_kernels(compiled):
    code = f"""
    import torch
    import vitrail.ops
    from vitrail.ops.library import has_kernel
    torch.ops.load_library({str(compiled[0])!r})
    for name in {GPU_OPERATORS + GPU_FORWARD_ONLY}:
        assert has_kernel(f"vitrail::{{name}}", "CUDA"), name
    for name in {GPU_OPERATORS}:
        assert has_kernel(f"vitrail::{{name}}_backward", "CUDA"), name
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_plugins_compile_without_a_warning_and_load_where_there_is_no_gpu(tmp_path):
    compiler = _compiler(library.find_nvcc)
    path = tmp_path / library.PLUGIN_LIBRARY_NAME
    compiles, link = library.plugin_commands(compiler, path, archs=["sm_89"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = "".join(pool.map(_run, compiles))
    assert "warning" not in said.lower(), said[-4000:]
    _run(link)
    count = ctypes.c_int32()
    assert ctypes.CDLL(str(path)).getCreators(ctypes.byref(count))
    assert count.value == len(library.PLUGINS) * MOST_VARIANTS
