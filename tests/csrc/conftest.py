"""What the tests of compiled kernels share: the library is there, and other instruction sets and threads are tried."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vitrail.ops import library

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> Iterator[None]:
    with library.use_ops("fused"):
        library.load()
        yield


@pytest.fixture(params=CAPABILITIES[:-1])
def lesser_instruction_set(request: pytest.FixtureRequest) -> None:
    """Runs the tests of the same file again, in a process that may use no more than this instruction set."""
    if os.environ.get("ATEN_CPU_CAPABILITY") is not None:
        assert library.status().capability == os.environ["ATEN_CPU_CAPABILITY"]
        return
    present = library.status().capability or "default"
    if CAPABILITIES.index(request.param) > CAPABILITIES.index(present):
        pytest.skip(f"this processor has no {request.param}")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(request.path)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": request.param},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@pytest.fixture
def assert_same_bits_on_any_number_of_threads() -> Iterator[
    Callable[[Callable[[], tuple[Tensor, ...]]], None]
]:
    """A check that a function gives the same bits with one, two and three threads."""
    before = torch.get_num_threads()

    def check(call: Callable[[], tuple[Tensor, ...]]) -> None:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
        for other in results[1:]:
            for x, y in zip(results[0], other, strict=True):
                assert torch.equal(x, y)

    yield check
    torch.set_num_threads(before)
