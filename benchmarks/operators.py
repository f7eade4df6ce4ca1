"""The operators against their definitions and the best formulations in stock PyTorch: time and memory.

Every row is an operator at the shapes of one layer. Its candidates must agree before they are timed, run in turn in
one process, and are set beside the machine's rate of matrix products, measured among them.

    python benchmarks/operators.py
    python benchmarks/operators.py --only routed_attention sparse --batch 1 --dtype bfloat16 --compile
    python benchmarks/operators.py --check --batch 1 --min-seconds 0.3     # fails where fused is slower
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness import attention, layers, options, sparsity, strips
from harness.memory import peak, return_memory_at_once
from harness.problems import (
    FUSED,
    REFERENCE,
    Disagreement,
    Problem,
    Setting,
    check,
    count_macs,
    functions,
    runs,
)
from harness.report import Table, machine, mebibytes, milliseconds, publish, ratio
from harness.timing import GEMM, alternate, gemm, gemm_rate, spread
from vitrail.cli.terminal import JobFailed, Terminal, at_least

SETTINGS: tuple[Setting, ...] = (*attention.SETTINGS, *sparsity.SETTINGS, *strips.SETTINGS, *layers.SETTINGS)
PASSES = ("forward", "training")


@dataclass
class Candidate:
    """One way to compute it."""

    seconds: float
    iqr_seconds: float
    rounds: int
    ratio: float
    """How many times as long as the fused operator."""
    error: float | None
    """Against the definition; None for a yardstick, which computes something else."""
    allocated_bytes: int | None = None
    resident_bytes: int | None = None


@dataclass
class Row:
    """One operator, one layer, one batch size, forward or with backward."""

    operator: str
    setting: str
    batch: int
    kind: str
    dtype: str
    threads: int
    macs: int
    compiled: bool
    """Whether compiled kernels do all of the fused candidate."""
    gemm_gflops: float
    efficiency: float
    """Share of the rate of matrix products that the fused candidate reaches."""
    spread: float
    """Largest interquartile range of a candidate, as a share of its median."""
    candidates: dict[str, Candidate]


@dataclass(frozen=True)
class Place:
    """Where a row is in the table of all that is to be measured."""

    setting: Setting
    batch: int
    training: bool

    def __str__(self) -> str:
        return f"{self.setting.operator}, {self.setting.name}, batch {self.batch}, {PASSES[self.training]}"

    def problem(self, dtype: str) -> Problem:
        """Its inputs, the same every time."""
        torch.manual_seed(0)
        return self.setting.build(self.batch, options.DTYPES[dtype])


def places(settings: list[Setting], batches: list[int], passes: list[str]) -> Iterator[Place]:
    for setting in settings:
        for batch in batches:
            if batch <= setting.largest_batch:
                for kind in passes:
                    if setting.trains or kind == "forward":
                        yield Place(setting, batch, kind == "training")


def measure(place: Place, args: argparse.Namespace, seconds: float) -> Row:
    """Time the candidates of one row."""
    problem = place.problem(args.dtype)
    candidates = functions(problem, with_stock=not args.check, compile_reference=args.compile)
    todo = runs(problem, candidates, place.training)
    try:
        errors = check(problem, todo, place.training)
    except Disagreement as error:
        raise JobFailed(f"{place}: {error}") from error
    macs = count_macs(todo[FUSED])
    found = alternate(todo | {GEMM: gemm(options.DTYPES[args.dtype])}, seconds, warm_up=1)
    rate = gemm_rate(found.pop(GEMM))
    fused = found[FUSED].median
    return Row(
        operator=place.setting.operator,
        setting=place.setting.name,
        batch=place.batch,
        kind=PASSES[place.training],
        dtype=args.dtype,
        threads=torch.get_num_threads(),
        macs=macs,
        compiled=place.setting.compiled(place.training),
        gemm_gflops=2 * rate / 1e9,
        efficiency=macs / fused / rate,
        spread=max(map(spread, found.values())),
        candidates={
            name: Candidate(m.median, m.iqr, len(m.times), m.median / fused, errors.get(name))
            for name, m in found.items()
        },
    )


def add_memory(place: Place, row: Row, args: argparse.Namespace) -> None:
    """Add the peaks, above the inputs, of the candidates that were timed."""
    problem = place.problem(args.dtype)
    for name, run in runs(problem, functions(problem), place.training).items():
        found = peak(run)
        row.candidates[name].allocated_bytes = found.allocated
        row.candidates[name].resident_bytes = found.resident


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(rows: list[Row]) -> list[Table]:
    """A table for each operator."""
    made = []
    for operator in dict.fromkeys(row.operator for row in rows):
        mine = [row for row in rows if row.operator == operator]
        others = [name for name in dict.fromkeys(n for row in mine for n in row.candidates) if name != FUSED]
        made.append(_times(operator, mine, others))
        if all(c.allocated_bytes is not None for row in mine for c in row.candidates.values()):
            made.append(_memory(operator, mine, others))
    return made


def _times(operator: str, rows: list[Row], others: list[str]) -> Table:
    headers = ["layer", "pass", "batch", f"{FUSED} ms", *others, "of GEMM", "spread"]
    table = Table(f"{operator}, {rows[0].dtype}: milliseconds (times as long as fused)", headers, words=2)
    for row in rows:
        fused = row.candidates[FUSED]
        cells = [row.setting, row.kind, str(row.batch)]
        cells.append(milliseconds(fused.seconds) + ("" if row.compiled else "*"))
        for name in others:
            c = row.candidates.get(name)
            cells.append(f"{milliseconds(c.seconds)} ({ratio(c.ratio)})" if c else "")
        table.rows.append([*cells, f"{row.efficiency:.0%}", f"{row.spread:.0%}"])
    if any(not row.compiled for row in rows):
        table.notes.append("* without a compiled kernel for all of it: definitions run inside the operator.")
    if sparsity.DENSE in others:
        table.notes.append(f"{sparsity.DENSE} attends to all keys, which is another function.")
    return table


def _memory(operator: str, rows: list[Row], others: list[str]) -> Table:
    headers = ["layer", "pass", "batch", FUSED, *others]
    table = Table(f"{operator}, {rows[0].dtype}: peak MiB above the inputs", headers, words=2)
    for row in rows:
        found = [row.candidates.get(name) for name in (FUSED, *others)]
        peaks = [mebibytes(c.allocated_bytes, c.resident_bytes) if c else "" for c in found]
        table.rows.append([row.setting, row.kind, str(row.batch), *peaks])
    return table


# --- the check --------------------------------------------------------------------------------------------------------


def slower(place: Place, row: Row, args: argparse.Namespace) -> bool:
    """Whether fused is slower than the definition; measured twice more before it is said, as machines are busy."""
    for _ in range(2):
        if row.candidates[REFERENCE].ratio >= 1:
            return False
        row = measure(place, args, 2 * args.min_seconds)
    return row.candidates[REFERENCE].ratio < 1


def run_check(
    terminal: Terminal, args: argparse.Namespace, settings: list[Setting]
) -> tuple[list[Row], list[str]]:
    """Rows of all operators with compiled kernels, and the names of those that are slower."""
    rows, failed = [], []
    listed = list(places([s for s in settings if s.quick], args.batch, args.passes))
    todo = [place for place in listed if place.setting.compiled(place.training)]
    for kind in PASSES:
        missing = {p.setting.operator for p in listed if p not in todo and PASSES[p.training] == kind}
        if missing:
            print(
                f"{kind} not checked, without a compiled kernel: {', '.join(sorted(missing))}",
                file=sys.stderr,
            )
    with terminal.steps(len(todo)) as steps:
        for place in todo:
            steps.step(str(place))
            rows.append(measure(place, args, args.min_seconds))
            if slower(place, rows[-1], args):
                failed.append(str(place))
    return rows, failed


def run_all(terminal: Terminal, args: argparse.Namespace, settings: list[Setting]) -> list[Row]:
    """All rows, timed first; memory is measured afterwards, as that slows the allocator down."""
    todo = list(places(settings, args.batch, args.passes))
    rows = []
    with terminal.steps(len(todo) * (1 if args.no_memory else 2)) as steps:
        for place in todo:
            steps.step(str(place))
            rows.append(measure(place, args, args.min_seconds))
        if not args.no_memory:
            return_memory_at_once()
            for place, row in zip(todo, rows, strict=True):
                steps.step(f"memory of {place}")
                add_memory(place, row, args)
    return rows


def parse(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--batch", type=at_least(1), nargs="+", metavar="N", help="batch sizes (default: 1 8)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="rows whose operator or layer contains a text"
    )
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=list(PASSES), help="forward, training (default: both)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--list", action="store_true", help="list the rows and measure nothing")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with the definition alone, and fail where fused is slower, confirmed by two more measurements",
    )
    args = parser.parse_args(arguments)
    if args.check and args.dtype != "float32":
        parser.error("--check is in float32")
    if args.check and args.compile:
        parser.error("--check compares with the definition as it is, without --compile")
    return parser, args


def main(arguments: list[str] | None = None) -> int:
    parser, args = parse(arguments)
    complete = not (args.check or args.only or args.batch or args.no_memory or args.passes != list(PASSES))
    args.batch = args.batch or ([1] if args.check else [1, 8])
    args.min_seconds = args.min_seconds or (0.3 if args.check else 1.0)
    named = [
        setting
        for setting in SETTINGS
        if not args.only or any(text in f"{setting.operator}, {setting.name}" for text in args.only)
    ]
    if not named:
        parser.error(f"--only {' '.join(args.only)}: no row contains that; --list shows them")
    if args.list:
        print(*places(named, args.batch, args.passes), sep="\n")
        return 0
    stem = "operators_cpu" + ("" if args.dtype == "float32" else f"_{args.dtype}")
    output = options.output(args.output, stem, complete, parser)

    def job(terminal: Terminal) -> int:
        failed: list[str] = []
        if args.check:
            rows, failed = run_check(terminal, args, named)
        else:
            rows = run_all(terminal, args, named)
        document: dict[str, Any] = {
            "benchmark": "operators",
            **machine(),
            "rows": [asdict(row) for row in rows],
        }
        if args.check:
            document["slower"] = failed
        publish(terminal, document, tables(rows), args.markdown, output)
        for name in failed:
            print(f"slower than its definition: {name}", file=sys.stderr)
        return 1 if failed else 0

    return options.run(job, args.json, args.threads)


if __name__ == "__main__":
    sys.exit(main())
