"""What the documents say, held against the project."""

import ast
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vitrail
from vitrail.cli import main
from vitrail.zoo import list_families

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> list[list[list[str]]]:
    """Body rows of every table, as cells."""
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
        for table in found
    ]


def shell_lines() -> list[list[str]]:
    """Every command in the shell blocks of every document."""
    lines = [
        line
        for path in DOCUMENTS
        for block in blocks("sh", path.read_text())
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.long
def test_the_snippets_of_the_readme_run_one_after_the_other(tmp_path):
    code = "\n".join(blocks("python"))
    assert "timm.create_model" in code
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "torch.Size([1, 10])" in result.stdout
    assert (tmp_path / "biformer_tiny.onnx").stat().st_size > 1e6


@pytest.mark.parametrize("words", [w for w in shell_lines() if w[0] == "vitrail"], ids=" ".join)
def test_every_command_shown_exists_with_its_options(words, capsys):
    command = words[1 : 3 if words[1] == "export" else 2]
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in (w for w in words if w.startswith("--")):
        assert option in text


def test_every_command_that_exists_is_shown_in_the_readme(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\w+)  ", capsys.readouterr().out.partition("COMMAND")[2], flags=re.MULTILINE)
    assert {"models", "profile", "convert", "export", "build", "doctor"} <= set(listed)
    shown = {words[1] for words in shell_lines() if words[0] == "vitrail"} | {"demo"}  # as `make demo`
    assert set(listed) == shown


def test_every_make_target_shown_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = [words for words in shell_lines() if "make" in words]
    assert {"demo", "test"} <= {words[-1] for words in shown}
    for words in shown:
        assert set(words[words.index("make") + 1 :]) <= targets


def test_every_relative_link_leads_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_table_of_families_covers_every_model():
    rows = next(table for table in tables(README) if "davit_fused" in str(table))
    patterns = [pattern for *_, models in rows for pattern in re.findall(r"`(\w+\*)`", models)]
    for family, names in list_families().items():
        assert any(pattern.startswith(family) for pattern in patterns), family
        for name in names:
            assert any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.long
def test_the_pages_of_models_and_weights_are_what_the_registry_says():
    command = [sys.executable, ROOT / "scripts" / "model_docs.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("script", ["performance_docs.py", "support_docs.py"])
def test_tables_are_what_the_results_say(script):
    command = [sys.executable, ROOT / "scripts" / script, "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_the_changelog_knows_the_current_version():
    assert metadata.version("vitrail") == vitrail.__version__
    assert f"\n## [{vitrail.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def names(requirements: list[str]) -> list[str]:
    return [Requirement(r).name for r in requirements]


def test_every_dependency_is_accounted_for_and_no_other():
    run, compilers, extras, develop = tables((ROOT / "docs" / "DEPENDENCIES.md").read_text())
    project = PYPROJECT["project"]
    optional = dict(project["optional-dependencies"])
    assert sorted(row[0].strip("`") for row in run) == sorted(names(project["dependencies"]))
    assert sorted(row[0].strip("`") for row in develop) == sorted(names(optional.pop("dev")))
    stated = [(row[0].strip("`"), row[1].strip("`")) for row in extras]
    assert stated == [(extra, name) for extra, required in optional.items() for name in names(required)]
    assert all(cell for row in run + compilers + extras + develop for cell in row)


def test_the_package_imports_what_it_declares():
    modules = {
        "PIL": "pillow",
        "huggingface_hub": "huggingface-hub",
        "onnx_ir": "onnx-ir",
        "sklearn": "scikit-learn",
        "tensorrt_rtx": "tensorrt-rtx",
        "yaml": "pyyaml",
    }
    project = PYPROJECT["project"]
    declared = names(project["dependencies"])
    for extra, required in project["optional-dependencies"].items():
        declared += names(required) if extra != "dev" else []
    imported = set()
    for folder in PYPROJECT["tool"]["setuptools"]["package-dir"].values():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported.add(node.module.partition(".")[0])
    foreign = {modules.get(m, m) for m in imported} - sys.stdlib_module_names - {"vitrail", "tensorrt"}
    assert foreign <= set(declared)
