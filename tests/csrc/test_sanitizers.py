"""The kernels' own tests and the fuzzer once more, with the sanitizers compiled in (`make sanitize`)."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from vitrail.ops import library

from .emulation import EMULATED
from .runtime_kernels import PORTABLE_KERNELS
from .test_emulated_kernels import CHOSEN, OPERATORS

HERE = Path(__file__).parent
KERNEL_TESTS = [
    *sorted(
        path
        for path in HERE.glob("test_*.py")
        if path.stem not in ("test_fuzz", "test_runtime_kernels", Path(__file__).stem)
    ),
    # where operators of the inference form have all their tests
    *(HERE.parent / "ops" / f"test_{name}.py" for name in ("packed_linear", "packed_conv", "depthwise_conv")),
]
FUZZER = HERE.parents[1] / "scripts" / "fuzz_operators.py"
MEMORY, THREADS = ("address", "undefined"), ("thread",)

pytestmark = pytest.mark.slow


def _environment(*sanitizers: str, part: library.Part = library.CPU) -> dict[str, str]:
    """Of a Python that loads the instrumented library; fails where that cannot be built."""
    path = library.build(sanitize=sanitizers, part=part)
    compiler = library.find_compiler()
    runtimes = []
    for name in {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}.items():
        if name[0] in sanitizers:
            command = [*compiler.command, f"-print-file-name={name[1]}"]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            assert os.path.isabs(found), f"{compiler.version} has no {name[1]}; install its sanitizer runtime"
            runtimes.append(found)
    return {
        **os.environ,
        "VITRAIL_LIBRARY": str(path),
        "LD_PRELOAD": " ".join(runtimes),
        # an allocation that fails is to be reported, not to end the process
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python and torch are not instrumented
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:allocator_may_return_null=1",
        "OMP_NUM_THREADS": "3" if "thread" in sanitizers else "1",
    }


@pytest.fixture(scope="module")
def environments() -> Callable[..., dict[str, str]]:
    made: dict[tuple[str, ...], dict[str, str]] = {}

    def environment(*sanitizers: str) -> dict[str, str]:
        if sanitizers not in made:
            made[sanitizers] = _environment(*sanitizers)
        return made[sanitizers]

    return environment


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    if "libtsan" in environment["LD_PRELOAD"]:  # it wants memory where it expects it
        setarch = shutil.which("setarch")
        assert setarch, "ThreadSanitizer needs setarch (util-linux), to run without address randomisation"
        command = [setarch, "-R", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.parametrize("sanitizers", [MEMORY, THREADS], ids="+".join)
def test_kernels_for_onnx_runtime_pass_their_tests(sanitizers):
    environment = _environment(*sanitizers, part=PORTABLE_KERNELS)
    environment[PORTABLE_KERNELS.variable] = environment.pop("VITRAIL_LIBRARY")
    tests = str(HERE / "test_runtime_kernels.py")
    run = _run(environment, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", tests)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


@pytest.mark.parametrize("sanitizers", [MEMORY, THREADS], ids="+".join)
@pytest.mark.parametrize("capability", ["default", "avx512_bf16"])
@pytest.mark.parametrize("tests", KERNEL_TESTS, ids=lambda path: path.stem)
def test_a_kernels_own_tests_pass(environments, tests, capability, sanitizers):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    chosen = "not instruction_set and not too_large_for_memory"
    environment = {**environments(*sanitizers), "ATEN_CPU_CAPABILITY": capability}
    run = _run(environment, "-m", "pytest", *options, "-k", chosen, str(tests))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("sanitizers", [MEMORY, THREADS], ids="+".join)
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16"])
def test_random_arguments_do_no_harm(environments, capability, sanitizers):
    environment = {**environments(*sanitizers), "ATEN_CPU_CAPABILITY": capability}
    run = _run(environment, str(FUZZER), "--calls", "20000", "--seed", "1")
    assert run.returncode == 0, run.stderr[-4000:]
    assert "no crash" in run.stdout


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gpu_kernel_on_the_host_passes_its_operators_tests(operator):
    environment = {**_environment(*MEMORY, part=EMULATED), "VITRAIL_EMULATED": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = _run(environment, "-m", "pytest", *options, "-k", CHOSEN, str(HERE / f"test_{operator}.py"))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout


def test_the_address_sanitizer_is_awake(environments):
    """A grid that claims more memory than it has must be noticed, or the tests above say nothing."""
    code = """
    import ctypes, torch
    from vitrail.ops import library
    assert library.load()
    short = torch.zeros(4 * 4 * 8)
    larger = ctypes.c_float * (5 * 4 * 8)
    q = torch.frombuffer(larger.from_address(short.data_ptr()), dtype=torch.float32).reshape(1, 5, 4, 8)
    routes = torch.zeros(1, 2, 1, dtype=torch.int64)
    torch.ops.vitrail.routed_attention(q, q, q, routes, None, (4, 4), (4, 4), 1, 1.0)
    """
    run = _run(environments(*MEMORY), "-c", textwrap.dedent(code))
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
    assert "routed_attention" in run.stderr
