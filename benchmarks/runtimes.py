"""Exported networks in ONNX Runtime: ours (float32, our kernels, 8 bits), timm's and the authors' own, and torch.

All files come from the same torch and hold the same weights where it is the same network. Ours are written by
`vitrail.export`, with a batch that is open; others by torch's exporter as their users call it, with the batch fixed to
the one that is timed (some of the authors' networks come out of it wrong with an open one). The candidates run in turn
in one process, with the same number of threads.

    python benchmarks/runtimes.py
    python benchmarks/runtimes.py --peers ~/peers --models biformer_tiny --batch 1
    python benchmarks/runtimes.py --calibration photos/ --output runtimes.json
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import options, suite
from harness.networks import FUSED, INFERENCE, NETWORKS, Candidate, Group, build_group, runs
from harness.peers import Checkout
from harness.report import Table, milliseconds, ratio
from harness.timing import GEMM, GEMM_SIDE, Run, alternate, gemm, gemm_rate
from vitrail.catalog import default_size
from vitrail.cli.terminal import JobFailed, Terminal
from vitrail.export import ExportError, QuantizationReport, onnxruntime_library, quantize_onnx, to_onnx
from vitrail.export.calibration import find_photos
from vitrail.export.capture import quiet
from vitrail.export.images import load_image, sample_photos
from vitrail.export.runs import open_session
from vitrail.ops.library import BuildError
from vitrail.zoo.inference import standard_form

ONNX, INT8 = "ONNX Runtime", "ONNX Runtime, int8"
KERNELS, KERNELS_INT8 = "ONNX Runtime, kernels", "ONNX Runtime, kernels, int8"
_LIMIT = 1e-2
"""Of float32 files against the same network in torch: largest error over largest logit; routes that flip leave some."""
_CUTTINGS = 48


@dataclass
class Row:
    """One candidate for one network at one batch size."""

    model: str
    size: int
    batch: int
    threads: int
    candidate: str
    seconds: float
    iqr_seconds: float
    rounds: int
    macs: int
    """Of the batch."""
    gemm_gflops: float
    efficiency: float
    """Share of the rate of float32 matrix products in the same run."""
    as_long_as: dict[str, float]
    """How many times as long as our float32 file, and as our inference form in torch."""
    error: float | None
    """Of logits against the definition, largest over largest; None where another network is compared."""


@dataclass
class Files:
    """Exported networks by candidate; those that could not be exported, and why; what is in 8 bits."""

    written: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    quantisation: dict[str, QuantizationReport] = field(default_factory=dict)


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def calibration(folder: Path | None) -> Iterator[Path]:
    """The folder of photos to calibrate with; by default one of cuttings of scikit-learn's two."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(_CUTTINGS):
            photo = load_image(sample_photos()[i % 2])
            side = min(photo.size) * (24 + i) // 72
            left, top = (
                (length - side) * step // (_CUTTINGS - 1)
                for length, step in zip(photo.size, (i, 17 * i % _CUTTINGS), strict=True)
            )
            photo.crop((left, top, left + side, top + side)).save(Path(scratch) / f"{i:02}.png")
        yield Path(scratch)


def export_ours(group: Group, photos: Path | None, folder: Path, kernels: bool) -> Files:
    """Our network in standard operators and, if they are asked for, for our kernels; in 8 bits, too, with photos.

    Raises:
        JobFailed: an export fails, or the kernels can't be built.
    """
    model = next(c.model for c in group.candidates if c.name == FUSED)
    files = Files()
    try:
        if kernels:
            onnxruntime_library()
        for operators, plain, int8 in (("standard", ONNX, INT8), ("fused", KERNELS, KERNELS_INT8)):
            if operators == "fused" and not kernels:
                continue
            path, made = folder / f"{operators}.onnx", folder / f"{operators}_int8.onnx"
            to_onnx(
                model, path, img_size=group.size, operators=operators, rewrite=standard_form, verify=False
            )
            files.written[plain] = path
            if photos is not None:
                files.quantisation[int8] = quantize_onnx(path, made, calibration=photos, model=model)
                files.written[int8] = made
    except (BuildError, ExportError) as error:
        raise JobFailed(f"{group.name}: {error}") from error
    return files


def export_other(candidate: Candidate, images: Tensor, file: Path) -> None:
    """Somebody else's network, as torch exports it.

    Raises:
        Exception: whatever torch's exporter makes of it.
    """
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            candidate.model.eval(), (images,), dynamo=True, opset_version=20, verbose=False
        )
        assert program is not None
        program.save(file)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(group: Group, files: Files, batch: int, folder: Path, args: argparse.Namespace) -> list[Row]:
    """Time a network's candidates in torch and their files in ONNX Runtime.

    Raises:
        JobFailed: a float32 file computes something else than the network.
    """
    todo, errors = runs(group, batch, training=False)
    images = group.images(batch, torch.float32)
    paths = dict(files.written)
    for candidate in group.candidates:
        if candidate.ours or candidate.name not in todo:
            continue
        name, path = f"{candidate.name}, {ONNX}", folder / f"{len(paths)}_{batch}.onnx"
        try:
            export_other(candidate, images, path)
        except Exception as error:  # code of others, in a version of torch that they did not know
            files.missing[f"{name}, batch {batch}"] = " ".join(str(error.__cause__ or error).split())[:300]
            continue
        paths[name] = path
    candidates: dict[str, Run] = {name: run for name, run in todo.items() if not name.startswith("reference")}
    sources = dict.fromkeys(files.written, FUSED) | {f"{name}, {ONNX}": name for name in todo}
    for name, path in paths.items():
        source = sources[name]
        candidates[name] = _runner(path, images, name in (KERNELS, KERNELS_INT8))
        expected: Any = todo[source]()
        (found,) = candidates[name]()
        error = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
        if name not in files.quantisation and not error <= _LIMIT:
            raise JobFailed(f"{group.name}, {name}: the file differs from {source} in torch by {error:.1e}")
        if source in errors:
            errors[name] = error
    found_times = alternate(candidates | {GEMM: gemm(torch.float32)}, args.min_seconds, args.min_rounds)
    rate = gemm_rate(found_times.pop(GEMM))
    return [
        Row(
            model=group.name,
            size=group.size,
            batch=batch,
            threads=torch.get_num_threads(),
            candidate=name,
            seconds=measured.median,
            iqr_seconds=measured.iqr,
            rounds=len(measured.times),
            macs=group.macs[sources.get(name, name)] * batch,
            gemm_gflops=2 * rate / 1e9,
            efficiency=group.macs[sources.get(name, name)] * batch / measured.median / rate,
            as_long_as={
                other: measured.median / found_times[other].median
                for other in (ONNX, INFERENCE)
                if other in found_times
            },
            error=errors.get(name),
        )
        for name, measured in found_times.items()
    ]


def _runner(path: Path, images: Tensor, kernels: bool) -> Any:
    session = open_session(path.read_bytes(), kernels=onnxruntime_library() if kernels else None)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def table(rows: list[Row]) -> Table:
    """All rows, network by network."""
    headers = [
        "model",
        "candidate",
        "batch",
        "ms",
        f"of {ONNX}",
        f"of {INFERENCE}",
        "efficiency",
        "spread",
        "error",
    ]
    threads = rows[0].threads
    made = Table(
        f"ONNX Runtime and torch, float32 but for int8, {threads} thread{'s' * (threads > 1)}: milliseconds, and how "
        f"many times as long as our file and as our inference form",
        headers,
        words=2,
    )
    for row in rows:
        cells = [row.model, row.candidate, str(row.batch), milliseconds(row.seconds)]
        cells += [
            ratio(row.as_long_as[name]) if name in row.as_long_as and row.candidate != name else ""
            for name in (ONNX, INFERENCE)
        ]
        cells += [f"{row.efficiency:.0%}", f"{row.iqr_seconds / row.seconds:.0%}"]
        made.rows.append([*cells, "" if row.error is None else f"{row.error:.0e}"])
    side = GEMM_SIDE["cpu"]
    made.notes.append(
        f"efficiency: 2 x MACs / time / the rate of a float32 product of {side} x {side} matrices in the same run, "
        f"{min(row.gemm_gflops for row in rows):.0f} to {max(row.gemm_gflops for row in rows):.0f} GFLOP/s."
    )
    return made


def measure_all(
    terminal: Terminal, args: argparse.Namespace, checkouts: dict[str, Checkout]
) -> tuple[dict[str, Any], list[Table], bool]:
    """The results, their table, and whether all of ours ran."""
    rows: list[Row] = []
    missing: dict[str, dict[str, str]] = {}
    quantised: dict[str, Any] = {}
    with (
        terminal.steps(len(args.models) * (1 + len(args.batch))) as steps,
        calibration(args.calibration) as photos,
    ):
        for name in args.models:
            if not args.limit.allows(name):
                continue
            begun = len(rows)
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    steps.step(f"{name}: building, exporting")
                    size, dtype = default_size(name)[0], torch.float32
                    group = build_group(name, size, dtype, checkouts.get(name), NETWORKS.get(name))
                    files = export_ours(
                        group, None if args.no_int8 else photos, Path(scratch), not args.no_kernels
                    )
                    for batch in args.batch:
                        steps.step(f"{name}, batch {batch}")
                        rows += measure(group, files, batch, Path(scratch), args)
            except options.TimeIsUp:
                del rows[begun:]
                args.limit.stop(name)
                continue
            missing[name] = group.missing | files.missing
            quantised[name] = {
                candidate: {
                    **report.settings,
                    "layers": len(report.layers),
                    "float32": {layer.module or layer.name: layer.verdict for layer in report.excluded},
                    **report.result.to_dict(),
                }
                for candidate, report in files.quantisation.items()
            }
    for name, reasons in missing.items():
        for candidate, reason in reasons.items():
            terminal.warn(f"{name}, {candidate}: {reason}")
    document = {"rows": [asdict(row) for row in rows], "quantisation": quantised, "failed": missing}
    return document, [table(rows)] if rows else [], True


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = options.parser(__doc__)
    suite.add_networks(parser, "1 8")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="photos to quantise with (default: cuttings of the two that scikit-learn ships)",
    )
    parser.add_argument("--no-int8", action="store_true", help="leave files in 8 bits out")
    parser.add_argument("--no-kernels", action="store_true", help="leave files with our kernels out")
    args = parser.parse_args(arguments)
    if args.device != "cpu" or args.dtype != "float32" or args.compile:
        parser.error(
            "ONNX Runtime is measured on the CPU in float32: leave --device, --dtype and --compile out"
        )
    if args.calibration is not None:
        if args.no_int8:
            parser.error("--calibration is for files in 8 bits: leave --no-int8 out")
        try:
            find_photos(args.calibration, 128)
        except (ValueError, OSError) as error:
            parser.error(f"--calibration: {error}")
    return parser, args


def main(arguments: list[str] | None = None) -> int:
    parser, args = parse(arguments)
    complete = not (args.models or args.batch or args.no_int8 or args.no_kernels)
    args.size = None  # each network's own, which most files are made for
    args.models = args.models or list(NETWORKS)
    args.batch = args.batch or [1, 8]
    return suite.run(measure_all, args, parser, "runtimes_cpu", complete)


if __name__ == "__main__":
    sys.exit(main())
