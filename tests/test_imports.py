"""Imports point one way: ops <- zoo <- vitrail, ops <- export <- vitrail."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def neighbours(path: Path, folder: Path) -> set[str]:
    """The subpackages of vitrail, other than its own, that a file imports; `vitrail` for the package itself."""
    found = set()
    outside = len(path.relative_to(folder).parts) + 1  # this many dots lead to the package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level >= outside:
            found |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("vitrail"):
            found.add("vitrail")
        elif isinstance(node, ast.Import):
            found |= {"vitrail" for alias in node.names if alias.name.startswith("vitrail")}
    return found


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("csrc", set()), ("configs", set()), ("ops", set()), ("zoo", {"ops"}), ("export", {"ops"})],
)
def test_a_folder_imports_only_those_below_it(folder, allowed):
    for path in (ROOT / folder).rglob("*.py"):
        assert neighbours(path, ROOT / folder) <= allowed, path
