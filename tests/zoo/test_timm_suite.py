"""Our models under timm's own test suite, taken from the source package of the very timm that is installed."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import nullcontext
from fnmatch import fnmatch
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
# How many of the latter feed an image of 64 pixels or so, which a model of one size does not take.
FEED_SMALL_IMAGES = 6
# Tests that do not apply to a model, by what the model is: patterns of tests and models, and the reason.
_RESTING = (
    "the choice of keys carries no gradient (as published), so the connectivity predictor has none when the "
    "network learns; it has a phase of its own, see tests/zoo/test_sparsifiner.py"
)
_TOKENS = "its features are tokens: timm has this test for maps alone"
EXCEPTIONS = (
    ("test_model_backward", "sparsifiner*", _RESTING),
    ("test_model_backward_fx", "sparsifiner*", _RESTING),
    ("test_prune_intermediate_layers_contract", "sparsifiner*", _RESTING),
    ("test_prune_intermediate_layers_params_used", "sparsifiner*", _RESTING),
    ("test_model_forward_features", "sparsifiner*", _TOKENS),
    ("test_model_forward_features", "stvit*_deit_*", _TOKENS),
)
# Models whose features are tokens ("non standard" in timm's words).
TOKENS = ("sparsifiner*", "stvit*_deit_*")
# What timm passes over in silence, and may: a model that takes every size has no set_input_size(), one whose weights
# belong to a size is fed no other, and an image tower without a classifier has none to be named.
TOLERATED = (
    "absent, so silently not checked: set_input_size (resize keeps frozen weights frozen)",
    "cfg says fixed_input_size: no test feeds any size but *",
    "cfg num_classes is 0/None: classifier name silently not checked",
    "input_size > 448: shapes silently not checked in test_model_default_cfgs",
)
# With gradients, two of these at a time do not fit into 24 GiB.
LARGE = re.compile("_(huge|giant)")


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


def exceptions(model: str) -> dict[str, str]:
    """Patterns of the tests that do not apply to a model, and why."""
    return {test: reason for test, models, reason in EXCEPTIONS if fnmatch(model, models)}


def run_suite(model: str, sources: Path, directory: Path, *options: str) -> dict:
    """The suite's findings for one model; fails, with the end of its output, unless all is well."""
    findings = directory / "findings.json"
    script = ROOT / "tests" / "tools" / "timm_suite.py"
    command = [sys.executable, script, "--timm-checkout", sources, "--import-module", "vitrail"]
    for test, reason in exceptions(model).items():
        command += ["--skip", f"{test}:{model}:{reason}"]
    if any(fnmatch(model, pattern) for pattern in TOKENS):
        command += ["--non-std", model]
    with FileLock(CACHE / "large") if LARGE.search(model) else nullcontext():
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


def left_out(found: dict, model: str) -> set[str]:
    """Tests that were skipped and neither need weights nor are an exception."""
    skipped = {cell["test"] for cell in found["results"] if cell["outcome"] == "skip"} - NEED_WEIGHTS
    return {test for test in skipped if not any(fnmatch(test, pattern) for pattern in exceptions(model))}


MODELS = [name for names in vitrail.zoo.list_families().values() for name in names]
# Every run takes these; the others, alike but for their sizes, are left to `make test-all`.
CHOSEN = [name for name in MODELS if name.endswith(("_tiny", "_small"))]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in CHOSEN]


@pytest.mark.long
@pytest.mark.parametrize("model", [*CHOSEN, *OTHERS])
def test_timm_finds_no_fault_with(model: str, timm_sources: Path, tmp_path: Path) -> None:
    found = run_suite(model, timm_sources, tmp_path)
    assert found["passed"] >= STANDARD - len(exceptions(model))
    assert left_out(found, model) == set()
    assert [x for x in found["notes"][model] if not any(fnmatch(x, known) for known in TOLERATED)] == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_timm_finds_no_fault_in_extended_tests_with(model: str, timm_sources: Path, tmp_path: Path) -> None:
    found = run_suite(model, timm_sources, tmp_path, "--extended")
    one_size = any(note.startswith("cfg says fixed_input_size") for note in found["notes"][model])
    assert found["passed"] >= EXTENDED - len(exceptions(model)) - FEED_SMALL_IMAGES * one_size


def test_exceptions_name_models_that_exist_and_the_rest_covers_every_family() -> None:
    for _, models, reason in EXCEPTIONS:
        assert reason
        assert any(fnmatch(name, models) for name in MODELS), models
    for family in vitrail.zoo.list_families():
        assert {f"{family}_tiny", f"{family}_small"} <= set(CHOSEN) or family == "stvit"
