"""These tests over the GPU kernels as the host runs them (see `../csrc/emulation.py`), of operators that have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitrail.ops import library

from ..csrc.emulation import EMULATED
from ..csrc.test_emulated_kernels import OPERATORS
from .cases import CASES, ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="the kernels themselves run here")


@pytest.mark.long
def test_random_calls_of_the_emulated_kernels_match_the_definitions():
    names = [name for name in CASES if name in OPERATORS]
    assert names
    # layouts and repeated calls are tried by the operators' own tests
    chosen = "(tiny or many) and (" + " or ".join(f"{name}-" for name in names) + ")"
    environment = {
        **os.environ,
        "VITRAIL_LIBRARY": str(library.build(part=EMULATED)),
        "VITRAIL_EMULATED": "1",
        "OMP_NUM_THREADS": "1",
    }
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name("test_operators.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
