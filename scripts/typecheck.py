"""Runs mypy on the package as it is installed.

A type checker sees neither the folder mapping of pyproject.toml nor an editable install's import hook, so the
packages are linked together once more, under the names they are imported by.

    python scripts/typecheck.py [mypy options]
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # mypy depends on it there

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / ".mypy_cache" / "packages"


def link_packages() -> dict[str, str]:
    """Link every package below LINKS; returns {link: folder}, both relative to the root."""
    shutil.rmtree(LINKS, ignore_errors=True)
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    top = LINKS / "vitrail"
    top.mkdir(parents=True)
    links = {}
    for package, folder in folders.items():
        sources = list((ROOT / folder).iterdir()) if package == "vitrail" else [ROOT / folder]
        for source in sources:
            link = top / source.name
            link.symlink_to(source)
            links[str(link.relative_to(ROOT))] = str(source.relative_to(ROOT))
    return links


def main() -> int:
    """Exit status of mypy; its messages name the files where they really lie."""
    links = link_packages()
    command = [sys.executable, "-m", "mypy", "-p", "vitrail", *sys.argv[1:]]
    environment = dict(os.environ, MYPYPATH=str(LINKS))
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = result.stdout + result.stderr
    for link, folder in links.items():
        output = output.replace(link, folder)
    print(output, end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
