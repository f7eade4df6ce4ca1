"""Whole networks against their definitions, timm's networks and the authors' own code: time and memory.

The candidates of a network hold the same weights, must compute the same before they are timed, and run in turn in one
process, the machine's rate of matrix products among them. The authors' code is taken from checkouts of their
repositories in a folder that you name; nothing of it is here.

    python benchmarks/models.py
    python benchmarks/models.py --peers ~/peers --models biformer_tiny --compile
    python benchmarks/models.py --peers ~/peers --training
    python benchmarks/models.py --peers ~/peers --memory      # biformer_small at 896 x 896
    python benchmarks/models.py --models sparsifiner_small --size 1024
    python benchmarks/models.py --device cuda --amp --training   # on an NVIDIA GPU
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness import device, footprint, options, suite
from harness.networks import FUSED, INFERENCE, NETWORKS, Group, build_group, runs
from harness.peers import Checkout
from harness.report import Table, mebibytes, milliseconds, ratio
from harness.timing import GEMM, GEMM_SIDE, alternate, gemm, gemm_rate, wall_clock
from vitrail.catalog import default_size
from vitrail.cli.terminal import JobFailed, Terminal, at_least

INFERRING, TRAINING = "inference", "training"
_TRAINING_MACS = 3  # of a forward pass: the gradients of inputs and of weights cost as much again each


@dataclass
class Row:
    """One candidate for one network at one size and batch size."""

    model: str
    size: int
    batch: int
    kind: str
    dtype: str
    threads: int
    candidate: str
    seconds: float
    iqr_seconds: float
    rounds: int
    parameters: int
    macs: int
    """Of the batch; in training three times those of the forward pass."""
    gemm_gflops: float
    efficiency: float | None
    """Share of the rate of matrix products in the same run; None for another dtype than the run's."""
    as_long_as: dict[str, float]
    """How many times as long as our candidates."""
    error: float | None
    """Of logits (in training, of the loss) against the definition; None where another network is compared."""


@dataclass
class GpuRow(Row):
    """The same on a GPU."""

    amp: bool
    """Whether autocast to bfloat16 was in force."""
    peak_bytes: int
    """Of PyTorch's allocator, above what was there before the run: weights, and in training their gradients."""


def measure(group: Group, batch: int, args: argparse.Namespace) -> list[Row]:
    """Time the candidates of a network."""
    dtype = options.DTYPES[args.dtype]
    product = gemm(torch.bfloat16 if args.amp else dtype, args.device)
    on_gpu = args.device != "cpu"
    clock = device.eager_clock if on_gpu else wall_clock
    todo, errors = runs(group, batch, args.training)
    peaks = {name: device.peak_allocated(run) for name, run in todo.items()} if on_gpu else {}
    found = alternate(todo | {GEMM: product}, args.min_seconds, min_rounds=args.min_rounds, clock=clock)
    rate = gemm_rate(found.pop(GEMM), args.device)
    kind = TRAINING if args.training else INFERRING
    rows: list[Row] = []
    for candidate in group.candidates:
        measured = found.get(candidate.name)
        if measured is None:
            continue
        macs = group.macs[candidate.name] * batch * (_TRAINING_MACS if args.training else 1)
        extra = {"amp": args.amp, "peak_bytes": peaks[candidate.name]} if on_gpu else {}
        rows.append(
            (GpuRow if on_gpu else Row)(
                model=group.name,
                size=group.size,
                batch=batch,
                kind=kind,
                dtype=str(candidate.dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                candidate=candidate.name,
                seconds=measured.median,
                iqr_seconds=measured.iqr,
                rounds=len(measured.times),
                parameters=group.parameters[candidate.name],
                macs=macs,
                gemm_gflops=2 * rate / 1e9,
                efficiency=macs / measured.median / rate if candidate.dtype == dtype else None,
                as_long_as={
                    name: measured.median / found[name].median for name in (FUSED, INFERENCE) if name in found
                },
                error=errors.get(candidate.name),
                **extra,
            )
        )
    return rows


def table(rows: list[Row]) -> Table:
    """All rows, network by network."""
    first = rows[0]
    ours = [name for name in (FUSED, INFERENCE) if any(name in row.as_long_as for row in rows)]
    headers = ["model", "candidate", "size", "batch", "ms", *(f"of {name}" for name in ours)]
    headers += ["efficiency", "spread", "params M", "GMAC an image"]
    on_gpu = isinstance(first, GpuRow)
    headers += ["peak MiB"] if on_gpu else []
    threads = f"{first.threads} thread{'s' * (first.threads > 1)}"
    place = f"GPU{', autocast to bfloat16' * first.amp}" if isinstance(first, GpuRow) else threads
    title = f"{first.kind}, {args_dtype(rows)}, {place}"
    made = Table(f"{title}: milliseconds, and how many times as long as ours", headers, words=2)
    for row in rows:
        cells = [row.model, row.candidate, str(row.size), str(row.batch), milliseconds(row.seconds)]
        cells += [
            ratio(row.as_long_as[name]) if name in row.as_long_as and row.candidate != name else ""
            for name in ours
        ]
        cells.append("" if row.efficiency is None else f"{row.efficiency:.0%}")
        cells += [
            f"{row.iqr_seconds / row.seconds:.0%}",
            f"{row.parameters / 1e6:.2f}",
            f"{row.macs / row.batch / 1e9:.2f}",
        ]
        if isinstance(row, GpuRow):
            cells.append(mebibytes(row.peak_bytes, None))
        made.rows.append(cells)
    side = GEMM_SIDE["cuda" if on_gpu else "cpu"]
    made.notes.append(
        f"efficiency: 2 x MACs / time / the rate of a float product of {side} x {side} matrices in the same run, "
        f"{min(row.gemm_gflops for row in rows):.0f} to {max(row.gemm_gflops for row in rows):.0f} GFLOP/s."
    )
    return made


def args_dtype(rows: list[Row]) -> str:
    """The dtype of the run: candidates in float32 stand beside those of another only for comparison."""
    return next((row.dtype for row in rows if row.dtype != "float32"), "float32")


def measure_all(
    terminal: Terminal, args: argparse.Namespace, checkouts: dict[str, Checkout]
) -> tuple[dict[str, Any], list[Table], bool]:
    """The results, their table, and whether all of ours ran."""
    rows: list[Row] = []
    same: dict[str, Any] = {}
    missing: dict[str, dict[str, str]] = {}
    failed = False
    with terminal.steps(len(args.models) * (1 + len(args.batch))) as steps:
        for name in args.models:
            steps.step(f"{name}: building, comparing")
            if not args.limit.allows(name):
                continue
            begun = len(rows)
            try:
                group = build_group(
                    name,
                    args.size or default_size(name)[0],
                    options.DTYPES[args.dtype],
                    checkouts.get(name),
                    NETWORKS.get(name),
                    args.compile,
                    args.training,
                    args.device,
                    args.amp,
                )
                for batch in args.batch:
                    steps.step(f"{name}, batch {batch}")
                    rows += measure(group, batch, args)
            except options.TimeIsUp:
                del rows[begun:]
                args.limit.stop(name)
                continue
            except (JobFailed, RuntimeError) as error:
                if args.device == "cpu":
                    raise
                # the other models have cost minutes already
                missing[name] = {
                    "all": str(error) if isinstance(error, JobFailed) else device.first_line(error)
                }
                failed = True
                if not device.answers():
                    args.limit.stop()
                continue
            same[name] = group.same
            if group.missing:
                missing[name] = group.missing
                failed |= any(c.ours for c in group.candidates if c.name in group.missing)
                failed |= any(what.startswith(INFERENCE) for what in group.missing)
            torch.compiler.reset()
            del group
            device.free(args.device)
    document = {"rows": [asdict(row) for row in rows], "same_network": same, "failed": missing}
    for name, reasons in missing.items():
        for candidate, reason in reasons.items():
            terminal.warn(f"{name}, {candidate}: {reason}")
    if not rows:
        return document, [], not failed
    shown = table(rows)
    proofs = [
        f"{name} and {what}: {found['parameters'][0]} parameters each, logits differ by {found['error']:.0e} in float64"
        for name, others in same.items()
        for what, found in others.items()
    ]
    shown.notes += [f"{proof}." for proof in proofs]
    return document, [shown], not failed


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(
    terminal: Terminal, args: argparse.Namespace, checkouts: dict[str, Checkout]
) -> tuple[dict[str, Any], list[Table], bool]:
    """Peak memory above the weights, in inference and training."""
    tasks = [
        footprint.Task(
            name,
            args.size or 896,
            candidate,
            training,
            args.batch[0],
            args.dtype,
            torch.get_num_threads(),
            args.peers if name in checkouts else None,
            args.device,
        )
        for name in args.models
        for training in (False, True)
        for candidate in footprint.candidates(name, name in checkouts, training)
    ]
    rows: list[dict[str, Any]] = []
    shown = Table(
        f"peak memory above the weights, {args.dtype}: MiB",
        ["model", "candidate", "pass", "size", "batch", "allocated", "resident", f"of {FUSED}", "weights"],
        words=3,
    )
    ok = True
    with terminal.steps(len(tasks)) as steps:
        for task in tasks:
            kind = TRAINING if task.training else INFERRING
            steps.step(f"{task.model}, {task.candidate}, {kind}")
            try:
                found = footprint.measure(task)
            except JobFailed as error:
                terminal.warn(str(error))
                ok &= task.candidate == footprint.AUTHORS or task.candidate.startswith("timm ")
                continue
            row = asdict(task) | {"kind": kind, "weights_bytes": found.weights}
            if args.device == "cpu":
                del row["device"]
            row |= {"allocated_bytes": found.peak.allocated, "resident_bytes": found.peak.resident}
            del row["training"], row["peers"]
            rows.append(row)
    for row in rows:
        key = (row["model"], row["kind"])
        own = [r for r in rows if (r["model"], r["kind"]) == key and r["candidate"] == FUSED]
        share = ratio(row["allocated_bytes"] / own[0]["allocated_bytes"]) if own and own[0] is not row else ""
        resident = "" if row["resident_bytes"] is None else mebibytes(row["resident_bytes"], None)
        cells = [row["model"], row["candidate"], row["kind"], str(row["size"]), str(row["batch"])]
        cells += [mebibytes(row["allocated_bytes"], None), resident, share]
        shown.rows.append([*cells, mebibytes(row["weights_bytes"], None)])
    shown.notes.append(
        "allocated: by PyTorch, of which every allocation is recorded; resident: of the whole process, as the system "
        "saw it, so with the scratch of all kernels. In training, gradients of weights were there before."
    )
    return {"rows": rows}, [shown], ok


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = options.parser(__doc__)
    suite.add_networks(parser, "1 8; on a GPU 128")
    parser.add_argument(
        "--size", type=at_least(8), metavar="N", help="pixels per side (default: the model's own)"
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="time steps of training (default batch: 8) in place of inference",
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="weights in float32 under autocast to bfloat16 (with --device cuda)",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory instead of time (default: biformer_small, 896, batch 1)",
    )
    args = parser.parse_args(arguments)
    options.check(args, parser)
    if args.amp and (args.device == "cpu" or args.dtype != "float32" or args.memory):
        parser.error("--amp is for --device cuda in float32, and for times: leave --memory out")
    if args.memory and (args.training or args.compile):
        parser.error(
            "--memory measures inference and training, both eager: leave --training and --compile out"
        )
    if args.memory and args.time_limit is not None:
        parser.error("--memory measures in processes of their own: leave --time-limit out")
    if args.memory and len(args.batch or ()) > 1:
        parser.error("--memory takes one batch size")
    return parser, args


def main(arguments: list[str] | None = None) -> int:
    parser, args = parse(arguments)
    complete = not (args.models or args.batch or args.size)
    args.models = args.models or (["biformer_small"] if args.memory else list(NETWORKS))
    usual = [128] if args.device != "cpu" else [8] if args.training else [1, 8]
    args.batch = args.batch or ([1] if args.memory else usual)
    stem = f"{'memory' if args.memory else 'training' if args.training else 'models'}_{args.device}"
    stem += "_amp" if args.amp else "" if args.dtype == "float32" else f"_{args.dtype}"
    return suite.run(measure_memory if args.memory else measure_all, args, parser, stem, complete)


if __name__ == "__main__":
    sys.exit(main())
