"""What the tests of the kernels share."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vitrail.ops import library

# Of results, relative to the values that were averaged.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}
OTHER_CAPABILITIES = ("default", "avx2", "avx512")


def with_threads(call: Callable[[], Sequence[Tensor]]) -> None:
    """The same bits with one, two and three threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for x, first in zip(result, results[0], strict=True):
            assert torch.equal(x, first)


def check_with(capability: str, file: str) -> None:
    """The tests of a file again, in a process that may use no more than this instruction set."""
    if os.environ.get("ATEN_CPU_CAPABILITY") is not None:
        assert library.status().capability == os.environ["ATEN_CPU_CAPABILITY"]
        return
    order = (*OTHER_CAPABILITIES, "avx512_bf16")
    if order.index(capability) > order.index(library.status().capability or "default"):
        pytest.skip(f"this processor has no {capability}")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, file]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
