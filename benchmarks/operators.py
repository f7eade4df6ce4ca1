"""The operators against their definitions and the best formulations in stock PyTorch: time and memory.

Every row is an operator at the shapes of one layer. Its candidates must agree before they are timed, run in turn in
one process, and are set beside the machine's rate of matrix products, measured among them.

    python benchmarks/operators.py
    python benchmarks/operators.py --only routed_attention sparse --batch 1 --dtype bfloat16 --compile
    python benchmarks/operators.py --check --batch 1 --min-seconds 0.3     # fails where fused is slower
    python benchmarks/operators.py --device cuda --dtype bfloat16          # on an NVIDIA GPU
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness import attention, device, layers, options, sparsity, strips
from harness.memory import peak, return_memory_at_once
from harness.problems import (
    FUSED,
    REFERENCE,
    Disagreement,
    Problem,
    Setting,
    check,
    count_bytes,
    count_macs,
    functions,
    runs,
)
from harness.report import Table, machine, mebibytes, milliseconds, publish, ratio
from harness.timing import GEMM, Run, alternate, gemm, gemm_rate, spread
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


@dataclass
class GpuCandidate(Candidate):
    """One way to compute it on a GPU. Its seconds are eager, its bytes those of PyTorch's allocator."""

    graph_seconds: float | None = None
    """Of a captured call, replayed with its data in memory; None where it cannot be captured."""
    graph_ratio: float | None = None
    """How many times as long as the fused operator, both captured."""
    not_captured: str | None = None
    """Why not."""


@dataclass
class GpuRow(Row):
    """The same on a GPU, against what its rates allow."""

    bytes: int
    """That the operator's calls must move: arguments read once, results written once."""
    copy_gbytes: float
    """10^9 bytes per second, read and written, of a copy in the same run."""
    product_gflops: dict[str, float]
    """Of products of large matrices in the same run; `gemm_gflops` is the one that bounds this operator."""
    bound: str
    """What takes longer at these rates: `memory`, or `arithmetic`."""
    roofline: float
    """Share of the fused candidate's time (captured, where it can be) that the slower of the two needs."""
    missing: dict[str, str]
    """Candidates that did not run, and why."""


@dataclass(frozen=True)
class Place:
    """Where a row is in the table of all that is to be measured."""

    setting: Setting
    batch: int
    training: bool

    def __str__(self) -> str:
        return f"{self.setting.operator}, {self.setting.name}, batch {self.batch}, {PASSES[self.training]}"

    def problem(self, dtype: str, where: str = "cpu") -> Problem:
        """Its inputs, the same every time."""
        torch.manual_seed(0)
        with torch.device(where):
            return self.setting.build(self.batch, options.DTYPES[dtype])


def places(
    settings: list[Setting], batches: list[int] | None, passes: list[str], where: str = "cpu"
) -> Iterator[Place]:
    """All rows; on a GPU each setting has a batch size of its own, unless some are given."""
    for setting in settings:
        if not (setting.on_cpu if where == "cpu" else setting.gpu_batch):
            continue
        for batch in batches or ([1, 8] if where == "cpu" else [setting.gpu_batch or 1]):
            if where != "cpu" or batch <= setting.largest_batch:
                for kind in passes:
                    if setting.trains or kind == "forward":
                        yield Place(setting, batch, kind == "training")


def described(place: Place, args: argparse.Namespace) -> dict[str, Any]:
    """What a row is of, on any device."""
    return {
        "operator": place.setting.operator,
        "setting": place.setting.name,
        "batch": place.batch,
        "kind": PASSES[place.training],
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "compiled": place.setting.compiled(place.training, args.device),
    }


def measure(place: Place, args: argparse.Namespace, seconds: float) -> Row:
    """Time the candidates of one row."""
    if args.device != "cpu":
        return measure_on_gpu(place, args, seconds)
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
        **described(place, args),
        macs=macs,
        gemm_gflops=2 * rate / 1e9,
        efficiency=macs / fused / rate,
        spread=max(map(spread, found.values())),
        candidates={
            name: Candidate(m.median, m.iqr, len(m.times), m.median / fused, errors.get(name))
            for name, m in found.items()
        },
    )


def runnable(todo: dict[str, Run], missing: dict[str, str]) -> dict[str, Run]:
    """Those that run: others than ours may not fit into memory, or not compile, which `missing` then says."""
    found = {}
    for name, run in todo.items():
        try:
            run()
            device.synchronize("cuda")
        except Exception as error:  # whatever compilers raise
            if name == FUSED:
                raise
            missing[name] = device.first_line(error)
            continue
        found[name] = run
    return found


def measure_on_gpu(place: Place, args: argparse.Namespace, seconds: float) -> GpuRow:
    """Time the candidates of one row eagerly and as CUDA graphs, and their memory."""
    dtype = options.DTYPES[args.dtype]
    problem = place.problem(args.dtype, args.device)
    missing: dict[str, str] = {}
    candidates = functions(problem, not args.check, args.compile, with_flex=args.flex)
    todo = runnable(runs(problem, candidates, place.training), missing)
    errors = None
    while errors is None:
        try:
            errors = check(problem, todo, place.training)
        except Disagreement as error:
            if error.candidate in (FUSED, REFERENCE):
                raise JobFailed(f"{place}: {error}") from error
            missing[error.candidate] = str(error)
            del todo[error.candidate]
    macs, moved = count_macs(todo[FUSED]), count_bytes(todo[FUSED])
    peaks = {name: device.peak_allocated(run) for name, run in todo.items()}
    product = gemm(dtype, args.device)
    yardsticks = {GEMM: product, device.COPY: device.copy()}
    if dtype == torch.float32:
        yardsticks[device.TF32] = device.with_tf32(product)
    eager = alternate(todo | yardsticks, seconds, clock=device.eager_clock)
    bounds = device.roofline(
        eager.pop(device.COPY).median,
        gemm_rate(eager.pop(GEMM), args.device),
        gemm_rate(eager.pop(device.TF32), args.device) if device.TF32 in eager else None,
    )
    graphs, refused = captured(todo)
    replayed = alternate(graphs, seconds, clock=device.ColdClock()) if graphs else {}
    best = replayed.get(FUSED, eager[FUSED]).median
    found = {}
    for name, m in eager.items():
        graph = replayed[name].median if name in replayed else None
        times = (m.median, m.iqr, len(m.times), m.median / eager[FUSED].median)
        compared = graph / best if graph is not None and FUSED in replayed else None
        peak_bytes = peaks[name]
        found[name] = GpuCandidate(
            *times, errors.get(name), peak_bytes, None, graph, compared, refused.get(name)
        )
    return GpuRow(
        **described(place, args),
        macs=macs,
        gemm_gflops=2 * bounds.macs_per_second / 1e9,
        efficiency=macs / best / bounds.macs_per_second,
        spread=max(map(spread, eager.values())),
        candidates=found,
        bytes=moved,
        copy_gbytes=bounds.bytes_per_second / 1e9,
        product_gflops={name: 2 * rate / 1e9 for name, rate in bounds.rates.items()},
        bound=bounds.bound(moved, macs),
        roofline=bounds.seconds(moved, macs) / best,
        missing=missing,
    )


def captured(todo: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The candidates as CUDA graphs, and why some cannot be one."""
    graphs, refused = {}, {}
    for name, run in todo.items():
        try:
            graphs[name] = device.capture(run)
        except device.NotCapturableError as error:
            refused[name] = str(error)
    return graphs, refused


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
        on_gpu = [row for row in mine if isinstance(row, GpuRow)]
        if on_gpu:
            made.append(_gpu_times(operator, on_gpu, others))
            made.append(_memory(operator, mine, others))
            continue
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


def _gpu_times(operator: str, rows: list[GpuRow], others: list[str]) -> Table:
    headers = ["layer", "pass", "batch", f"{FUSED} eager", "graph", *others, "of roofline", "bound", "spread"]
    title = f"{operator}, {rows[0].dtype}: milliseconds (times as long as fused, eager; graph)"
    table = Table(title, headers, words=2)
    for row in rows:
        fused = row.candidates[FUSED]
        assert isinstance(fused, GpuCandidate)
        cells = [row.setting, row.kind, str(row.batch)]
        cells.append(milliseconds(fused.seconds) + ("" if row.compiled else "*"))
        cells.append("" if fused.graph_seconds is None else milliseconds(fused.graph_seconds))
        for name in others:
            c = row.candidates.get(name)
            if not isinstance(c, GpuCandidate):
                cells.append("failed" if name in row.missing else "")
                continue
            both = [ratio(c.ratio), *([] if c.graph_ratio is None else [ratio(c.graph_ratio)])]
            cells.append(f"{milliseconds(c.seconds)} ({'; '.join(both)})")
        table.rows.append([*cells, f"{row.roofline:.0%}", row.bound, f"{row.spread:.0%}"])
    if any(not row.compiled for row in rows):
        table.notes.append("* without a compiled kernel for all of it: definitions run inside the operator.")
    for row in rows:
        for name, reason in row.missing.items():
            table.notes.append(f"{row.setting}, {row.kind}: {name} did not run: {reason}")
        for name, c in row.candidates.items():
            if isinstance(c, GpuCandidate) and c.not_captured is not None:
                table.notes.append(f"{row.setting}, {row.kind}: no graph of {name}: {c.not_captured}")
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
    listed = list(places([s for s in settings if s.quick], args.batch, args.passes, args.device))
    todo = [place for place in listed if place.setting.compiled(place.training, args.device)]
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
            if not args.limit.allows(str(place)):
                continue
            try:
                rows.append(measure(place, args, args.min_seconds))
                if slower(place, rows[-1], args):
                    failed.append(str(place))
            except options.TimeIsUp:
                args.limit.stop(str(place))
            device.free(args.device)
    return rows, failed


def run_all(
    terminal: Terminal, args: argparse.Namespace, settings: list[Setting]
) -> tuple[list[Row], list[str]]:
    """All rows, timed first; memory is measured afterwards, as that slows the allocator down. And what failed."""
    failed: list[str] = []
    todo = list(places(settings, args.batch, args.passes, args.device))
    rows, measured = [], []
    apart = args.device == "cpu" and not args.no_memory
    with terminal.steps(len(todo) * (2 if apart else 1)) as steps:
        for place in todo:
            steps.step(str(place))
            if not args.limit.allows(str(place)):
                continue
            try:
                rows.append(measure(place, args, args.min_seconds))
            except options.TimeIsUp:
                args.limit.stop(str(place))
                continue
            except (JobFailed, RuntimeError) as error:
                if args.device == "cpu":
                    raise
                # the other rows have cost minutes already
                failed.append(f"{place}: {device.first_line(error)}")
                terminal.warn(failed[-1])
                if not device.answers():
                    args.limit.stop()
                continue
            measured.append(place)
            device.free(args.device)
        if apart:
            return_memory_at_once()
            for place, row in zip(measured, rows, strict=True):
                steps.step(f"memory of {place}")
                add_memory(place, row, args)
    return rows, failed


def parse(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--batch",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="batch sizes (default: 1 8; on a GPU one for each row, which --list shows)",
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
    parser.add_argument(
        "--flex",
        action="store_true",
        help="add FlexAttention on a GPU, which compiles for some ten seconds a row",
    )
    args = parser.parse_args(arguments)
    options.check(args, parser)
    if args.flex and args.device == "cpu":
        parser.error("--flex is for --device cuda")
    if args.check and args.dtype != "float32":
        parser.error("--check is in float32")
    if args.check and args.compile:
        parser.error("--check compares with the definition as it is, without --compile")
    return parser, args


def main(arguments: list[str] | None = None) -> int:
    parser, args = parse(arguments)
    complete = not (args.check or args.only or args.batch or args.no_memory or args.passes != list(PASSES))
    if args.device == "cpu":
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
        print(*places(named, args.batch, args.passes, args.device), sep="\n")
        return 0
    stem = f"operators_{args.device}" + ("" if args.dtype == "float32" else f"_{args.dtype}")
    output = options.output(args.output, stem, complete, parser)

    def job(terminal: Terminal) -> int:
        failed: list[str] = []
        with options.TimeLimit(args.time_limit) as args.limit:
            work = run_check if args.check else run_all
            rows, failed = work(terminal, args, named)
        document: dict[str, Any] = {
            "benchmark": "operators",
            **machine(),
            **({} if args.device == "cpu" else {"gpu": device.describe()}),
            **({} if args.time_limit is None else {"left_out": args.limit.left_out}),
            "rows": [asdict(row) for row in rows],
        }
        if args.check:
            document["slower"] = failed
        elif failed:
            document["failed"] = failed
        publish(terminal, document, tables(rows), args.markdown, output)
        for name in failed if args.check else ():
            print(f"slower than its definition: {name}", file=sys.stderr)
        return 1 if failed else 0

    return options.run(job, args.json, args.threads, args.device)


if __name__ == "__main__":
    sys.exit(main())
