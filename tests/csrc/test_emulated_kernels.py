"""The GPU kernels on the host: the operators' own tests once more, over the kernels as csrc/cuda/emulation.h runs them.

What runs here is the source that nvcc compiles, host side and all. What does not, is PTX, and a GPU's own order.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitrail.ops import library

from .emulation import EMULATED
from .kernels import GPU_COMPOSED, GPU_FORWARD_ONLY, GPU_OPERATORS

HERE = Path(__file__).parent
OPERATORS = (*GPU_OPERATORS, *GPU_FORWARD_ONLY, *GPU_COMPOSED)
# Of the CPU only: its threads and instruction sets, its allocations, the rounding of its vectors, indices that are
# looked at before a kernel runs, and all 24 bits of a float (three products in TF32 keep 22).
NOT_HERE = (
    "threads",
    "instruction_set",
    "too_large_for_memory",
    "halves_of_every_kind",
    "out_of_range",
    "backward_gets_is_checked",
    "wins_exactly",
    "elsewhere",
)


CHOSEN = " and ".join(f"not {name}" for name in NOT_HERE)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {
        **os.environ,
        "VITRAIL_LIBRARY": str(library.build(part=EMULATED)),
        "VITRAIL_EMULATED": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operators_own_tests_pass(environment, operator):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, "-k", CHOSEN, str(HERE / f"test_{operator}.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout
