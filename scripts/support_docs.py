"""Write the tables of docs/EXPORT.md on what is supported from docs/support.json.

python scripts/support_docs.py           # write them
python scripts/support_docs.py --check   # fail if they are not up to date
"""

import json
import sys
from functools import partial
from pathlib import Path

from pages import page, prose, table, write_pages

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "EXPORT.md"
RECORD = ROOT / "docs" / "support.json"

NOT_TRIED = "\N{EN DASH}"
DTYPES = ("float32", "float16", "bfloat16")
OPEN = {"fixed": "nothing, or batch", "batch": "nothing, or batch", "sides": "batch, height, width"}
RUNTIME = {
    "standard": [f"onnx-{dtype}" for dtype in DTYPES],
    "fused": [f"fused-{dtype}" for dtype in DTYPES],
    "": ["int8-int8"],
}
ENGINES = {
    "engine": [f"engine-{dtype}" for dtype in DTYPES],
    "with plugins": [f"plugins-{dtype}" for dtype in DTYPES],
}


def support() -> str:
    """Both tables, and what is refused."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    refused: dict[str, list[str]] = {}
    parts = [
        prose(f"Tried by `scripts/support_matrix.py` with {versions}."),
        "ONNX Runtime, largest error (in int8, of norms):",
        _table(record["models"], RUNTIME, refused),
        "TensorRT-RTX:",
        _table(record["models"], ENGINES, refused),
        "\n".join(_refusal(number, *item) for number, item in enumerate(refused.items(), 1)),
    ]
    return "\n\n".join(part for part in parts if part)


def _refusal(number: int, reason: str, models: list[str]) -> str:
    return f"{number}. {', '.join(f'`{name}`' for name in dict.fromkeys(models))}: {reason}".replace(
        "*", r"\*"
    )


def _table(
    models: dict[str, dict[str, str]], columns: dict[str, list[str]], refused: dict[str, list[str]]
) -> str:
    """Rows of a model: with nothing or the batch open, of which the worse counts, and with the sides."""
    cells = [cell for group in columns.values() for cell in group]
    headers = [
        "model",
        "open",
        *(f"{kind} {_dtype(cell)}".strip() for kind in columns for cell in columns[kind]),
    ]
    rows = []
    for name, outcomes in models.items():
        tried = [axes for axes in OPEN if f"{axes}-{cells[0]}" in outcomes]
        for text in dict.fromkeys(OPEN[axes] for axes in tried):
            same = [axes for axes in tried if OPEN[axes] == text]
            row = [
                _cell(
                    name, [outcomes[key] for axes in same if (key := f"{axes}-{cell}") in outcomes], refused
                )
                for cell in cells
            ]
            rows.append([f"`{name}`", text if len(same) > 1 or text == OPEN["sides"] else "batch", *row])
    return table(headers, rows, 2)


def _dtype(cell: str) -> str:
    return cell.rpartition("-")[2]


def _cell(name: str, outcomes: list[str], refused: dict[str, list[str]]) -> str:
    """The largest error, `built`, or the number of a reason; several where they differ."""
    if not outcomes:
        return NOT_TRIED
    states = [outcome.partition(" ")[::2] for outcome in outcomes]
    if all(state == "verified" for state, _ in states):
        return _error(max(float(rest) for _, rest in states))
    texts = [
        _error(float(rest))
        if state == "verified"
        else state
        if state == "built"
        else _number(name, rest, refused)
        for state, rest in states
    ]
    return ", ".join(dict.fromkeys(texts))


def _error(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def _number(name: str, reason: str, refused: dict[str, list[str]]) -> str:
    """Of a reason, without the model's name and the remedy."""
    short = reason.partition(". ")[0].replace(name, "it")
    refused.setdefault(short, []).append(name)
    return f"({1 + list(refused).index(short)})"


def main() -> int:
    """Write the tables, or check them."""
    return write_pages(__doc__, {PAGE: partial(page, PAGE, [support])}, "the record says")


if __name__ == "__main__":
    sys.exit(main())
