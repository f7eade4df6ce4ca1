"""Pages that are made from something else: written, or compared with what is there."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_pages(description: str | None, pages: Mapping[Path, Callable[[], str]], source: str) -> int:
    """The command line of a script that makes pages; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if the pages are not up to date")
    options = parser.parse_args()
    stale = []
    for path, make in pages.items():
        text = make()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if options.check and stale:
        print(f"error: {' and '.join(stale)}: not what {source}; run `make docs`", file=sys.stderr)
        return 1
    return 0
