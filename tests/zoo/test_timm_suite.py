"""Our models under timm's own test suite, taken from the source package of the very timm that is installed."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
import timm
from filelock import FileLock

import vitrail.zoo

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".timm"

# Tests that timm leaves out for a model whose weights nobody has put online.
NEED_WEIGHTS = {"test_model_load_pretrained", "test_model_features_pretrained"}
# How many of timm 1.0.31's tests apply to any model without weights, and how many with --extended.
STANDARD, EXTENDED = 11, 25
# What timm passes over in silence. A model that takes every size has no set_input_size().
TOLERATED = "absent, so silently not checked: set_input_size (resize keeps frozen weights frozen)"


def download(version: str, directory: Path) -> Path:
    """The sdist of timm, by pip (which checks the index's hash); tries three times."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"timm=={version}",
        "--no-deps",
        "--no-binary",
        "timm",
    ]
    for attempt in range(3):
        time.sleep(5 * attempt)
        result = subprocess.run([*command, "--dest", directory], capture_output=True, text=True)
        if result.returncode == 0:
            return next(directory.glob("timm-*.tar.gz"))
    pytest.fail(
        f"cannot fetch the source package of timm {version}, which carries its tests:\n{result.stderr}"
    )


@pytest.fixture(scope="session")
def timm_sources() -> Path:
    """The unpacked sdist of the installed timm; kept in .timm/ from one run to the next."""
    target = CACHE / f"timm-{timm.__version__}"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "lock"), tempfile.TemporaryDirectory(dir=CACHE) as directory:
        if not target.is_dir():
            with tarfile.open(download(timm.__version__, Path(directory))) as archive:
                archive.extractall(directory, filter="data")
            (Path(directory) / target.name).rename(target)
    return target


def run_suite(model: str, sources: Path, directory: Path, *options: str) -> dict:
    """The suite's findings for one model; fails, with the end of its output, unless all is well."""
    findings = directory / "findings.json"
    script = ROOT / "tests" / "tools" / "timm_suite.py"
    command = [sys.executable, script, "--timm-checkout", sources, "--import-module", "vitrail"]
    result = subprocess.run(
        [*map(str, command), "--filter", model, "--json", str(findings), *options],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    tail = "\n".join((result.stdout + result.stderr).splitlines()[-80:])
    assert result.returncode == 0, tail
    found = json.loads(findings.read_text())
    assert (found["failed"], found["errors"]) == (0, []), tail
    return found


def skipped(found: dict) -> set[str]:
    return {cell["test"] for cell in found["results"] if cell["outcome"] == "skip"}


MODELS = [name for names in vitrail.zoo.list_families().values() for name in names]


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_timm_finds_no_fault_with(model: str, timm_sources: Path, tmp_path: Path) -> None:
    found = run_suite(model, timm_sources, tmp_path)
    assert found["passed"] >= STANDARD
    assert skipped(found) <= NEED_WEIGHTS
    assert set(found["notes"][model]) <= {TOLERATED}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_timm_finds_no_fault_in_extended_tests_with(model: str, timm_sources: Path, tmp_path: Path) -> None:
    found = run_suite(model, timm_sources, tmp_path, "--extended")
    assert found["passed"] >= EXTENDED
