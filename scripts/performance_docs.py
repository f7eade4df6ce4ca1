"""Write the tables of docs/PERFORMANCE.md and README.md from benchmarks/results.

python scripts/performance_docs.py           # write them
python scripts/performance_docs.py --check   # fail if they are not up to date
"""

import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pages import write_pages

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

NONE = "\N{EN DASH}"

Rows = list[dict[str, Any]]


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _heading(result: dict[str, Any], text: str) -> str:
    machine, versions = result["machine"], result["versions"]
    threads = f"{machine['threads']} threads on {machine['cores']} cores"
    return _prose(
        f"`{' '.join(('benchmarks/' + result['command'][0], *result['command'][1:]))}`: {text} {machine['cpu']}, "
        f"{threads}, {result['instruction_set']}; torch {versions['torch']}, timm {versions['timm']}; "
        f"{result['date'][:10]}."
    )


def _table(headers: list[str], rows: list[list[str]], words: int) -> str:
    marks = ["---" if i < words else "---:" for i in range(len(headers))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, marks, *rows))


def _milliseconds(row: dict[str, Any]) -> str:
    ms = row["seconds"] * 1e3
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _groups(rows: Rows, *keys: str) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Rows that are compared with each other, by candidate."""
    for _, group in itertools.groupby(rows, lambda row: [row[key] for key in keys]):
        same = list(group)
        yield [same[0][key] for key in keys], {row["candidate"]: row for row in same}


def _ratio(group: dict[str, Any], name: str, ours: str) -> str:
    return f"{group[name]['seconds'] / group[ours]['seconds']:.2f}x" if name in group else NONE


def _peer_in_timm(group: dict[str, Any]) -> str:
    return next((name for name in group if name.startswith("timm ")), "timm")


def _spread(row: dict[str, Any]) -> str:
    return f"{row['iqr_seconds'] / row['seconds']:.0%}"


# --- the tables -------------------------------------------------------------------------------------------------------


def operators() -> str:
    """Forward passes in float32."""
    result, rows = _load("operators_cpu"), []
    for row in result["rows"]:
        if (row["kind"], row["dtype"]) != ("forward", "float32"):
            continue
        by_name = row["candidates"]
        stock = [name for name in by_name if name not in ("fused", "reference")]
        best = min(stock, key=lambda name: by_name[name]["seconds"], default=None)
        rows.append(
            [
                f"`{row['operator']}`", row["setting"], str(row["batch"]), _milliseconds(by_name["fused"]),
                f"{row['efficiency']:.0%}", f"{by_name['reference']['ratio']:.2f}x",
                NONE if best is None else f"{by_name[best]['ratio']:.2f}x, {best}",
            ]
        )  # fmt: skip
    text = """float32, forward: milliseconds of the compiled operator, its share of the rate of matrix products, and how
        many times as long the others take. All rows, with backward and memory, are in
        `benchmarks/results/operators_cpu.json`."""
    headers = ["operator", "layer", "batch", "fused", "of GEMM", "reference", "stock PyTorch (fastest)"]
    return f"{_heading(result, text)}\n\n{_table(headers, rows, 2)}"


def _models(name: str, text: str, columns: dict[str, str]) -> str:
    """Milliseconds of the inference form, and how many times as long the candidates of some columns take."""
    result, rows = _load(name), []
    for (model, size, batch), group in _groups(result["rows"], "model", "size", "batch"):
        ours = group["inference form"]
        timm = _peer_in_timm(group)
        ratios = [
            _ratio(group, timm if candidate == "timm" else candidate, "inference form")
            for candidate in columns.values()
        ]
        if "timm" in columns.values() and timm in group:
            ratios[-1] += f" ({timm.removeprefix('timm ')})"
        rows.append(
            [
                f"`{model}`",
                str(size),
                str(batch),
                _milliseconds(ours),
                _spread(ours),
                f"{ours['efficiency']:.0%}",
                *ratios,
            ]
        )
    headers = ["model", "pixels", "batch", "inference form", "spread", "efficiency", *columns]
    return f"{_heading(result, text)}\n\n{_table(headers, rows, 1)}"


def models() -> str:
    """Inference of whole models."""
    parts = [
        _models(
            "models_cpu",
            """float32. Milliseconds of our inference form, how far its times spread, its efficiency, and how many times
            as long as it the others take.""",
            {
                "plain model, fused": "fused",
                "plain model, reference": "reference",
                "authors": "authors",
                "timm": "timm",
            },
        ),
        _models(
            "biformer_compiled_cpu",
            "the authors' model under torch.compile as well.",
            {"authors": "authors", "authors, compiled": "authors, compiled"},
        ),
        *(
            _models(
                f"sparsifiner_{size}_cpu",
                f"images of {size} x {size} pixels.",
                {"plain model, fused": "fused", "plain model, reference": "reference", "timm": "timm"},
            )
            for size in (512, 1024)
        ),
        _models(
            "models_cpu_bfloat16",
            "bfloat16, beside the inference form in float32.",
            {"our float32": "inference form, float32", "reference": "reference", "timm": "timm"},
        ),
    ]
    return "\n\n".join(parts)


def training() -> str:
    """Steps of training."""
    result, rows = _load("training_cpu"), []
    for (model,), group in _groups(result["rows"], "model"):
        ours = group["fused"]
        ratios = [_ratio(group, name, "fused") for name in ("reference", "authors", _peer_in_timm(group))]
        rows.append([f"`{model}`", _milliseconds(ours), _spread(ours), f"{ours['efficiency']:.0%}", *ratios])
    text = """one step of SGD with 8 images, float32: milliseconds of the fused model, and how many times as long the
        others take."""
    headers = ["model", "fused", "spread", "efficiency", "reference", "authors", "timm"]
    return f"{_heading(result, text)}\n\n{_table(headers, rows, 1)}"


def memory() -> str:
    """Peaks of memory."""
    result, rows = _load("memory_cpu"), []
    ours = {row["kind"]: row["allocated_bytes"] for row in result["rows"] if row["candidate"] == "fused"}
    for row in result["rows"]:
        allocated, resident = row["allocated_bytes"], row["resident_bytes"]
        rows.append(
            [
                row["kind"], row["candidate"], f"{allocated / 2**20:.0f}", f"{resident / 2**20:.0f}",
                f"{allocated / ours[row['kind']]:.2f}x",
            ]
        )  # fmt: skip
    text = "`biformer_small`, one image of 896 x 896, float32: MiB above the weights."
    headers = ["pass", "candidate", "allocated", "resident", "of fused"]
    return f"{_heading(result, text)}\n\n{_table(headers, rows, 2)}"


def measured() -> str:
    """Inference of whole models, in short."""
    result, rows = _load("models_cpu"), {}
    for (model, _), group in _groups(result["rows"], "model", "batch"):
        form = "inference form"
        rows.setdefault(model, [f"`{model}`"]).extend(
            [
                f"{_milliseconds(group[form])} ms",
                *(_ratio(group, n, form) for n in ("authors", _peer_in_timm(group))),
            ]
        )
    machine = result["machine"]
    text = _prose(
        f"""The inference form, float32, 224 x 224, {machine["cores"]} cores of an {machine["cpu"]}
        ({result["instruction_set"]}), torch {result["versions"]["torch"]}. How many times as long the authors' code and
        timm's models take, with one image and with eight; all run in turn in one process (`PEERS=~/peers make bench`,
        all of it in [benchmarks/results/models_cpu.json](benchmarks/results/models_cpu.json)). The machine was shared:
        read the ratios."""
    )
    headers = ["model", "one image", "authors", "timm", "eight images", "authors", "timm"]
    return f"{text}\n\n{_table(headers, list(rows.values()), 1)}"


SECTIONS: dict[str, list[Callable[[], str]]] = {
    "docs/PERFORMANCE.md": [operators, models, training, memory],
    "README.md": [measured],
}


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


def main() -> int:
    """Write the tables, or check them."""
    made = {ROOT / name: partial(page, ROOT / name, sections) for name, sections in SECTIONS.items()}
    return write_pages(__doc__, made, "the results say")


if __name__ == "__main__":
    sys.exit(main())
