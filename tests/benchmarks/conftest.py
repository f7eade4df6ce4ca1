"""The benchmarks run in this process, so that a test costs no import; their folder is no package."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from vitrail.ops import library

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import models  # noqa: E402
import operators  # noqa: E402
import runtimes  # noqa: E402


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self):
        return json.loads(self.out)


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Result]:
    """Runs a benchmark's command line, quickly: `run(operators, "--batch", 1)`."""
    # both hold for the rest of the process, whose other tests should not know of them
    monkeypatch.setattr("harness.options.limit_to_free_memory", lambda: None)
    monkeypatch.setattr(operators, "return_memory_at_once", lambda: None)
    before = library._mode, torch.get_num_threads()

    def call(module: ModuleType, *argv: object) -> Result:
        capsys.readouterr()
        try:
            code = module.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    yield call
    library.set_mode(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(name="operators")
def _operators() -> ModuleType:
    return operators


@pytest.fixture(name="models")
def _models() -> ModuleType:
    return models


@pytest.fixture(name="runtimes")
def _runtimes() -> ModuleType:
    return runtimes
