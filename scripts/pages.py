"""Pages that are made from something else: written, or compared with what is there."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prose(text: str) -> str:
    """A paragraph in lines of 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def table(headers: list[str], rows: list[list[str]], words: int) -> str:
    """A table, whose first columns, `words` of them, are text and the others numbers."""
    marks = ["---" if i < words else "---:" for i in range(len(headers))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, marks, *rows))


def page(path: Path, sections: list[Callable[[], str]]) -> str:
    """A page with its tables made anew."""
    text = path.read_text(encoding="utf-8")
    for section in sections:
        begin, end = (f"<!-- {section.__name__}: {mark} -->" for mark in ("begin", "end"))
        if begin not in text or end not in text:
            raise ValueError(f"{path} must have the marks {begin} and {end}, between which a table goes")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{section()}\n{end}{rest.split(end, 1)[1]}"
    return text


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
