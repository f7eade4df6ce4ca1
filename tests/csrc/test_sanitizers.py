"""The kernel's own tests once more, with AddressSanitizer and UndefinedBehaviorSanitizer compiled in."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vitrail.ops import library

KERNEL_TESTS = sorted({*Path(__file__).parent.glob("test_*.py")} - {Path(__file__)})


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a Python that loads the instrumented library; fails where that cannot be built."""
    path = library.build(sanitize=("address", "undefined"))
    compiler = library.find_compiler()
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*compiler.command, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert os.path.isabs(found), f"{compiler.version} has no {name}; install its sanitizer runtime"
        runtimes.append(found)
    return {
        **os.environ,
        "VITRAIL_LIBRARY": str(path),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("capability", ["default", "avx512"])
def test_the_kernel_touches_no_memory_but_its_own_and_is_well_defined(environment, capability):
    # The sanitizer ends the process where an allocation fails, rather than let it be reported.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not instruction_set and not too_large_for_memory"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, KERNEL_TESTS)],
        env={**environment, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout


def test_the_sanitizer_is_awake(environment):
    """A grid that claims more memory than it has must be noticed, or the test above says nothing."""
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
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
    assert "routed_attention" in run.stderr
