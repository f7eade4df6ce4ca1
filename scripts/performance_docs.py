"""Write the tables of docs/PERFORMANCE.md and README.md from benchmarks/results.

python scripts/performance_docs.py           # write them
python scripts/performance_docs.py --check   # fail if they are not up to date
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pages import page, prose, table, write_pages

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

NONE = "\N{EN DASH}"

Rows = list[dict[str, Any]]


_shown: set[str] = set()


def _load(name: str) -> dict[str, Any]:
    _shown.add(name)
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _check_all_are_shown() -> None:
    """Every file of results stands in some table.

    Raises:
        ValueError: there is one that does not.
    """
    left = sorted({path.stem for path in RESULTS.glob("*.json")} - _shown)
    if left:
        raise ValueError(
            f"no table shows {', '.join(left)} of {RESULTS}: add it to {Path(__file__).name}, or remove it"
        )


def _heading(result: dict[str, Any], text: str) -> str:
    machine, versions = result["machine"], result["versions"]
    threads = f"{machine['threads']} threads on {machine['cores']} cores"
    return prose(
        f"`{' '.join(('benchmarks/' + result['command'][0], *result['command'][1:]))}`: {text} {machine['cpu']}, "
        f"{threads}, {result['instruction_set']}; torch {versions['torch']}, timm {versions['timm']}; "
        f"{result['date'][:10]}."
    )


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
    return f"{_heading(result, text)}\n\n{table(headers, rows, 2)}"


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
    return f"{_heading(result, text)}\n\n{table(headers, rows, 1)}"


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
    return f"{_heading(result, text)}\n\n{table(headers, rows, 1)}"


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
    return f"{_heading(result, text)}\n\n{table(headers, rows, 2)}"


def runtimes() -> str:
    """Exported files in ONNX Runtime."""
    if not (RESULTS / "runtimes_cpu.json").exists():
        return prose(
            """No complete run is kept yet. `benchmarks/runtimes.py` (part of `make bench`) makes the results that stand
            here then."""
        )
    result, rows = _load("runtimes_cpu"), []
    for (model, batch), group in _groups(result["rows"], "model", "batch"):
        file, timm = group["ONNX Runtime"], _peer_in_timm(group)
        others = (
            "ONNX Runtime, kernels",
            "ONNX Runtime, int8",
            "ONNX Runtime, kernels, int8",
            "authors, ONNX Runtime",
            f"{timm}, ONNX Runtime",
            "fused",
            "inference form",
        )
        ratios = [_ratio(group, name, "ONNX Runtime") for name in others]
        rows.append([f"`{model}`", str(batch), _milliseconds(file), _spread(file), *ratios])
    text = """float32 but for int8. Milliseconds of our file in ONNX Runtime, and how many times as long as it the
        others take: with fused operators by our kernels, in 8 bits, both; the authors' and timm's models exported;
        ours in torch."""
    headers = [
        "model",
        "batch",
        "our file",
        "spread",
        "kernels",
        "int8",
        "kernels, int8",
        "authors",
        "timm",
        "torch",
    ]
    headers.append("inference form")
    return f"{_heading(result, text)}\n\n{table(headers, rows, 1)}"


def gpu() -> str:
    """What a GPU gave: checks, operators, models."""
    names = [path.stem for kind in ("gpu_*", "*_cuda*") for path in sorted(RESULTS.glob(f"{kind}.json"))]
    if not names:
        return prose(
            """No GPU has run any of this yet, so there is no figure. `scripts/gpu_check.sh` makes the results that
            stand here then."""
        )
    return "\n\n".join(part for name in names for part in _gpu_parts(_load(name), name))


def _gpu_parts(result: dict[str, Any], name: str) -> Iterator[str]:
    """A file of `gpu_check.sh`, or of one benchmark."""
    about, versions = result["gpu"], result["versions"]
    command = " ".join(result["command"])
    where = "scripts" if result["benchmark"] == "gpu_check" else "benchmarks"
    code = (
        f"; commit {result['commit'][:12]}{' and changes' * bool(result['changed'])}"
        if "commit" in result
        else ""
    )
    yield prose(
        f"`{where}/{command}` (`benchmarks/results/{name}.json`): {about['name']}, driver {about.get('driver')}, CUDA "
        f"{about.get('torch_cuda')}; torch {versions['torch']}{code}; {result['date'][:10]}."
    )
    if result["benchmark"] != "gpu_check":
        yield from _gpu_tables(result)
        return
    rows = []
    for phase in result["phases"]:
        counts = phase["found"].get("counts", {}) if isinstance(phase["found"], dict) else {}
        reason = phase["reason"].splitlines()[0].replace("|", "\\|") if phase["reason"] else ""
        cells = [str(counts.get(what, NONE)) for what in ("passed", "failed", "skipped")]
        rows.append([phase["name"], f"{phase['outcome']}{': ' * bool(reason)}{reason}", *cells])
    yield table(["phase", "outcome", "tests passed", "failed", "skipped"], rows, 2)
    for phase in result["phases"]:
        if isinstance(phase["found"], dict) and "benchmark" in phase["found"]:
            yield prose(f"{phase['name']}: `benchmarks/{' '.join(phase['found']['command'])}`.")
            yield from _gpu_tables(phase["found"])


def _gpu_tables(found: dict[str, Any]) -> Iterator[str]:
    """The rows of a benchmark, and what of it there is not."""
    if not found["rows"]:
        yield "There are no rows."
    elif found["benchmark"] == "operators":
        yield _gpu_operators(found["rows"])
    elif found["benchmark"].startswith("memory"):
        yield _gpu_memory(found["rows"])
    else:
        yield _gpu_models(found["rows"])
    failed = found.get("failed") or []
    if isinstance(failed, dict):
        failed = [
            f"{model}, {what}: {why}" for model, reasons in failed.items() for what, why in reasons.items()
        ]
    failed = failed + [
        f"{row['operator']}, {row['setting']}, {row['kind']}, {name}: {why}"
        for row in found["rows"]
        for name, why in row.get("missing", {}).items()
    ]
    if failed:
        yield "\n".join(["Did not run:", "", *(f"- {text}" for text in failed)])
    if found.get("left_out"):
        yield prose(f"There was no time for {'; '.join(found['left_out'])}.")


def _gpu_operators(rows: Rows) -> str:
    cells = []
    for row in rows:
        by_name = row["candidates"]
        fused = by_name["fused"]
        graph = fused["graph_seconds"]
        key = "graph_seconds" if graph else "seconds"
        stock = [n for n, c in by_name.items() if n not in ("fused", "reference") and c.get(key)]
        best = min(stock, key=lambda name: by_name[name][key], default=None)

        def times(name: str | None, by_name: Any = by_name, key: str = key) -> str:
            known = name in by_name and by_name[name].get(key)
            return f"{by_name[name][key] / by_name['fused'][key]:.2f}x" if known else NONE

        cells.append(
            [
                f"`{row['operator']}`{'' if row['compiled'] else '*'}", row["setting"], row["kind"], str(row["batch"]),
                row["dtype"], _milliseconds(fused), _milliseconds({"seconds": graph}) if graph else NONE,
                f"{row['roofline']:.0%}", row["bound"], times("reference"),
                NONE if best is None else f"{times(best)}, {best}",
            ]
        )  # fmt: skip
    headers = [
        "operator",
        "layer",
        "pass",
        "batch",
        "dtype",
        "eager",
        "graph",
        "of roofline",
        "bound",
        "reference",
    ]
    notes = (
        "Milliseconds of the operator; how many times as long the others take, as graphs where both can be."
    )
    if any(not row["compiled"] for row in rows):
        notes += " A star marks what has no kernel for all of it."
    return f"{prose(notes)}\n\n{table([*headers, 'fastest of the others'], cells, 3)}"


def _gpu_models(rows: Rows) -> str:
    cells = []
    for (model, size, batch), group in _groups(rows, "model", "size", "batch"):
        for name, row in group.items():
            dtype = "autocast to bfloat16" if row["amp"] else row["dtype"]
            cells.append(
                [
                    f"`{model}`", row["kind"], name, dtype, str(size), str(batch), _milliseconds(row),
                    _ratio(group, name, "fused") if "fused" in group else NONE, f"{row['peak_bytes'] / 2**20:.0f}",
                ]
            )  # fmt: skip
    headers = ["model", "pass", "candidate", "dtype", "pixels", "batch", "ms", "of fused", "peak MiB"]
    return table(headers, cells, 4)


def _gpu_memory(rows: Rows) -> str:
    cells = []
    for row in rows:
        peak = f"{row['allocated_bytes'] / 2**20:.0f}"
        cells.append(
            [f"`{row['model']}`", row["kind"], row["candidate"], str(row["size"]), str(row["batch"]), peak]
        )
    return table(["model", "pass", "candidate", "pixels", "batch", "peak MiB"], cells, 3)


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
    text = prose(
        f"""The inference form, float32, 224 x 224, {machine["cores"]} cores of an {machine["cpu"]}
        ({result["instruction_set"]}), torch {result["versions"]["torch"]}. How many times as long the authors' code and
        timm's models take, with one image and with eight; all run in turn in one process (`PEERS=~/peers make bench`,
        all of it in [benchmarks/results/models_cpu.json](benchmarks/results/models_cpu.json)). The machine was shared:
        read the ratios."""
    )
    headers = ["model", "one image", "authors", "timm", "eight images", "authors", "timm"]
    return f"{text}\n\n{table(headers, list(rows.values()), 1)}"


SECTIONS: dict[str, list[Callable[[], str]]] = {
    "docs/PERFORMANCE.md": [operators, models, training, memory, runtimes, gpu],
    "README.md": [measured],
}


def main() -> int:
    """Write the tables, or check them."""
    made = {ROOT / name: partial(page, ROOT / name, sections) for name, sections in SECTIONS.items()}
    status = write_pages(__doc__, made, "the results say")
    _check_all_are_shown()
    return status


if __name__ == "__main__":
    sys.exit(main())
