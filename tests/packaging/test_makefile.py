"""What `make` says before it installs anything; the rest of it runs whenever these tests do."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare(tmp_path):
    """A Python to be written by the test, in a directory with what `make env` reads."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.touch(mode=0o755)
    return python


def make(directory, *arguments):
    return subprocess.run(["make", *arguments], cwd=directory, capture_output=True, text=True)


def test_make_alone_lists_every_target(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    listed = make(tmp_path).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert re.findall(r"^make (\S+) +\S", listed, flags=re.MULTILINE) == phony.split()


def test_make_asks_for_a_python_where_there_is_none(bare):
    result = make(bare.parent, "env", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "no no-such-python here: install Python 3.10 or newer" in result.stderr


def test_make_refuses_an_old_python(bare):
    bare.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    result = make(bare.parent, "env", f"PYTHON={bare}")
    assert result.returncode != 0
    assert "Python 3.9.1, 3.10 or newer is needed" in result.stderr


def test_make_names_the_package_that_brings_a_missing_venv_module(bare):
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    result = make(bare.parent, "env", f"PYTHON={bare}")
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr


def test_an_interrupted_installation_starts_again(bare):
    bare.write_text(
        '#!/bin/sh\n[ "$1" = -m ] && { mkdir -p .venv/bin && cp "$0" .venv/bin/; exit 130; }\nexit 0\n'
    )
    assert make(bare.parent, "env", f"PYTHON={bare}").returncode != 0
    again = make(bare.parent, "--dry-run", "env", f"PYTHON={bare}")
    assert "-m venv" in again.stdout
