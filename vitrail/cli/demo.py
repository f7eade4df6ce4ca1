"""`vitrail demo`: everything at work on one photo."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import (
    JobFailed,
    Stopwatch,
    Terminal,
    UsageError,
    existing_file,
    millions,
    model_name,
    size_text,
)

if TYPE_CHECKING:
    from ..demo import DemoReport

_EXAMPLES = """\
examples:
  vitrail demo
  vitrail demo --image holiday.jpg --output holiday/
  vitrail demo --model sparsifiner_small
  vitrail demo --model biformer_small --checkpoint biformer_small.safetensors
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="a photo through a model: features, a picture, cost, speed, verified ONNX file",
        description="Take a photo through a model: shapes of the feature pyramid, a picture of what its centre looks\n"
        "at (regions, windows, strips, chosen keys, semantic tokens), cost beside the paper's, speed of the\n"
        "compiled operators, and a verified ONNX file. Takes a minute or two; writes everything into a folder.\n"
        "Weights are random unless --checkpoint names some, so class scores mean nothing.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--output",
        type=_folder,
        default="demo",
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        type=model_name,
        default="biformer_tiny",
        metavar="MODEL",
        help="one of vitrail's models (default: %(default)s)",
    )
    parser.add_argument(
        "--image",
        type=existing_file,
        metavar="FILE",
        help="a photo (default: china.jpg, which scikit-learn ships)",
    )
    parser.add_argument(
        "--checkpoint",
        type=existing_file,
        metavar="FILE",
        help="weights, in our layout or the authors' (default: random weights from a fixed seed)",
    )
    parser.set_defaults(run=run)


def _folder(text: str) -> str:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a file; name a folder")
    return text


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run the demo and print its summary."""
    from ..catalog import family_of
    from ..demo import STEPS, run_demo
    from ..export import ExportError
    from ..export.images import load_image
    from ..zoo.weights import CheckpointError

    if family_of(args.model) is None:
        raise UsageError(f"{args.model} is timm's; choose a model of vitrail's (`vitrail models` lists them)")
    if args.image is not None:
        try:
            load_image(Path(args.image))
        except ValueError as error:
            raise UsageError(str(error)) from error
    watch = Stopwatch()
    try:
        with terminal.steps(STEPS) as steps:
            report = run_demo(args.output, args.model, args.image, args.checkpoint, steps.begin, steps.detail)
    except (ExportError, CheckpointError) as error:
        raise JobFailed(str(error)) from error
    terminal.result(report.to_dict(), *render(report, terminal, watch.seconds))
    for failure in report.profile.failures:
        terminal.warn(failure)
    return 0 if report.ok else 1


def render(report: "DemoReport", terminal: Terminal, seconds: float) -> list[Any]:
    """The summary, compact."""
    cost, speed, export = report.profile, report.speed, report.export
    facts = [
        ("photo", Path(report.photo).name),
        (
            "weights",
            f"{report.weights}; class scores mean nothing" if report.random_weights else report.weights,
        ),
        ("features", "  ".join(size_text(shape[1:]) for shape in report.features)),
        ("picture", f"{report.files['picture']}: what the photo's centre looks at, layer by layer"),
        ("parameters", f"{millions(cost.parameters)} M" + _beside(cost, "parameters (M)")),
        ("MACs", f"{cost.macs / 1e9:.2f} G" + _beside(cost, "GMAC")),
    ]
    if speed.ratio:
        facts.append(
            (
                "speed",
                f"fused {speed.fused_ms:.0f} ms, reference {speed.reference_ms:.0f} ms: {speed.ratio:.2f}x "
                f"(medians of {speed.rounds}, {speed.threads} threads; scores differ by {speed.max_difference:.1g})",
            )
        )
    else:
        facts.append(
            (
                "speed",
                f"{speed.reference_ms:.0f} ms by the definitions; no compiled operators: {speed.reason}",
            )
        )
    facts.append(("ONNX", f"{report.files['onnx']}, {export.size_bytes / 1e6:.1f} MB"))
    if export.verification:
        checks = export.verification.checks
        worst = max(check.max_relative for check in checks)
        agree = sum(check.top1 or 0 for check in checks)
        asked = sum(check.images for check in checks if check.top1 is not None)
        batches = sorted({check.shape[0] for check in checks})
        facts.append(
            (
                "verified",
                f"{export.verification.runtime} against torch at batch {' and '.join(map(str, batches))}: "
                f"largest relative error {worst:.1g}, same top-1 for {agree} of {asked} images",
            )
        )
    facts.append(("report", report.files["report"]))
    return [
        terminal.facts(facts, f"{report.model} at {size_text(cost.img_size)}"),
        f"\ndone in {seconds:.0f} s",
    ]


def _beside(cost: Any, figure: str) -> str:
    found = next((c for c in cost.comparisons if c.figure == figure), None)
    return f" (paper {found.paper:g}, {found.deviation:+.1%})" if found else ""
