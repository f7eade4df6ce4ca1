import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import vitrail.cli

from ..translations import remember_translations

remember_translations()


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self):
        """The one JSON document on stdout."""
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command line in this process."""

    def run(*argv: object) -> Result:
        capsys.readouterr()
        try:
            code = vitrail.cli.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Result]:
    """Runs a command line in a process of its own, away from the checkout."""

    def run(*argv: object, **environment: str) -> Result:
        command = [sys.executable, "-m", "vitrail", *map(str, argv)]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=300
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run
