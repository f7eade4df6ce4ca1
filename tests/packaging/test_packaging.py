"""What pip builds and installs, held against the tree: each test works on a copy, in environments of its own."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]

pytestmark = pytest.mark.long

# What an installed vitrail says of itself, as JSON.
INQUIRY = """
import importlib.metadata, importlib.resources, json, sys
import vitrail
loaded = set(sys.modules)
import timm
def files(folder):
    for entry in folder.iterdir():
        yield from ((f"{entry.name}/{rest}" for rest in files(entry)) if entry.is_dir() else [entry.name])
print(json.dumps({
    "file": vitrail.__file__,
    "version": vitrail.__version__,
    "metadata": importlib.metadata.version("vitrail") if "--installed" in sys.argv else None,
    "models": timm.list_models("biformer*"),
    "csrc": sorted(files(importlib.resources.files("vitrail.csrc"))),
    "configs": sorted(files(importlib.resources.files("vitrail.configs"))),
    "heavy": sorted(loaded & {"fvcore", "matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "sklearn"}),
}))
"""


def run(*command, cwd, **environment):
    """Standard output of a command that must succeed, without this process's Python settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_", "PYTEST"))}
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command} in {cwd}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


def inquire(python, cwd, *arguments):
    said = run(python, "-c", INQUIRY, *arguments, cwd=cwd)
    assert said.stderr == "", "import vitrail must be silent"
    return json.loads(said.stdout)  # and nothing but the answer


def tree_files():
    """Every file that belongs into the package, as {installed path: path in the tree}."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree as a clone has it: building in the tree itself would leave files behind."""
    target = tmp_path_factory.mktemp("checkout") / "vitrail"
    hidden = shutil.ignore_patterns(".[!c]*", "__pycache__", "*.egg-info", "build", "dist", "out", "demo")
    return Path(shutil.copytree(ROOT, target, ignore=hidden))


@pytest.fixture(scope="module")
def artifacts(checkout, tmp_path_factory):
    """(sdist, wheel): the wheel is built from the sdist, both in an environment with nothing but the build backend."""
    out = tmp_path_factory.mktemp("dist")
    # A build that called a compiler would fail here.
    run(sys.executable, "-m", "build", "--outdir", out, cwd=checkout, CC="/bin/false", CXX="/bin/false")
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture
def environment(tmp_path):
    """The Python of a new virtual environment that has this one's packages (torch, timm), but no vitrail."""
    home = tmp_path / "environment"
    venv.EnvBuilder(with_pip=False).create(home)
    (site,) = home.glob("lib/python*/site-packages")
    # The directories only: the hooks of editable installs in them are not run.
    (site / "packages.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    return home / "bin" / "python"


def install(python, *what):
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *what, cwd=python.parent)


def test_the_wheel_holds_every_file_of_the_package_folders_and_nothing_else(artifacts):
    _, wheel = artifacts
    with zipfile.ZipFile(wheel) as archive:
        packed = {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n}
    assert packed == {name: path.read_bytes() for name, path in tree_files().items()}


def test_the_wheel_is_pure_and_says_what_it_needs(artifacts):
    _, wheel = artifacts
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode().splitlines()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    extras = {line.split(": ")[1] for line in metadata if line.startswith("Provides-Extra: ")}
    assert extras == {"dev", "plots", "tensorrt", "train"}
    required = {line.split(": ")[1] for line in metadata if line.startswith("Requires-Dist: ")}
    assert {"torch>=2.11", "timm>=1.0.31"} <= required


def test_the_sdist_holds_sources_tests_and_documents(artifacts):
    sdist, _ = artifacts
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    for path in (*tree_files().values(), *(p for p in ROOT.glob("*.md"))):
        assert path.relative_to(ROOT).as_posix() in names
    assert {
        "LICENSE",
        "Makefile",
        "docs/DESIGN.md",
        "scripts/typecheck.py",
        "tests/packaging/test_packaging.py",
        "tests/golden/biformer_tiny_224.npz",
    } <= names
    assert not [n for n in names if "__pycache__" in n or n.startswith((".venv", ".timm", "build/", "dist/"))]


def check(answer, version_is_installed=True):
    names = tree_files()
    assert answer["models"] == [
        "biformer_base",
        "biformer_pico",
        "biformer_small",
        "biformer_stl",
        "biformer_stl_nchw",
        "biformer_tiny",
    ]
    for folder in ("csrc", "configs"):
        prefix = f"vitrail/{folder}/"
        there = {n for n in answer[folder] if "__pycache__" not in n}
        assert there == {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    assert any(n.endswith(".cpp") for n in answer["csrc"])
    assert any(n.endswith(".yaml") for n in answer["configs"])
    assert answer["heavy"] == [], "import vitrail must stay quick"
    if version_is_installed:
        assert answer["metadata"] == answer["version"]


def test_an_installed_wheel_imports_and_finds_its_sources_and_configs(artifacts, environment, tmp_path):
    _, wheel = artifacts
    install(environment, wheel)
    answer = inquire(environment, tmp_path, "--installed")
    check(answer)
    assert Path(answer["file"]).is_relative_to(environment.parents[1])
    said = run(environment.parent / "vitrail", "--version", cwd=tmp_path).stdout
    assert answer["version"] in said


def test_an_editable_install_imports_from_anywhere_and_from_its_own_root(checkout, environment, tmp_path):
    install(environment, "--editable", checkout)
    for directory in (tmp_path, checkout):
        answer = inquire(environment, directory, "--installed")
        check(answer)
        assert Path(answer["file"]) == checkout / "vitrail" / "__init__.py"


def test_a_clone_imports_where_it_lies_without_being_installed(checkout, environment):
    answer = inquire(environment, checkout)
    check(answer, version_is_installed=False)
    assert Path(answer["file"]) == checkout / "vitrail" / "__init__.py"
