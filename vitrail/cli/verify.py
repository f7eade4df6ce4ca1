"""`vitrail verify`: whether two of models, checkpoints, files and engines compute the same, and where they part."""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import (
    JobFailed,
    Terminal,
    UsageError,
    add_image_size,
    add_seed,
    at_least,
    existing_file,
    existing_path,
    model_name,
    positive_number,
)

if TYPE_CHECKING:
    from ..export.subjects import Subject

_DESCRIPTION = """\
Compare B with the reference A: photographs and seeded noise, several batch sizes, several image sizes where
those are open. Reports errors, cosines, and how many images keep their class. Where an output differs by
more than the tolerance, both sides are run once more, and the first value on the way that differs is named.

A and B are each one of
  NAME          a model of vitrail's or timm's, weights from --checkpoint or random from --seed
  NAME@FILE     the same with weights from a checkpoint (.pth, .safetensors; our layout or the authors')
  FILE          a checkpoint alone; its model is what the file itself, the other side or --model says
  FILE.onnx     an ONNX file, of whatever precision, quantised or not (ONNX Runtime, CPU)
  FILE.engine   a TensorRT engine, also .plan (needs its GPU)
A model beside a file is made with the image size, classes and form (features, ...) that the file has.

exit codes: 0 within tolerance, 1 past it (or a side can't be run), 2 wrong use
"""

_EXAMPLES = """\
examples:
  vitrail verify biformer_tiny@weights.safetensors biformer_tiny.onnx
  vitrail verify biformer_tiny.onnx biformer_tiny.int8.onnx --images photos/
  vitrail verify model.onnx model.engine --batch 1,4 --json
  vitrail verify biformer_tiny fused.onnx --kernels        # fused operators by our kernels in ONNX Runtime
  vitrail verify biformer_small@published.pth converted.safetensors --trace
  vitrail verify biformer_pico biformer_pico.onnx          # an export of random weights, --seed 0
"""

_WEIGHTS = (".pth", ".pt", ".bin", ".tar", ".safetensors")


@dataclass(frozen=True)
class _Side:
    """One argument, taken apart: a file for a runtime, or a model and its weights."""

    text: str
    file: str | None = None
    model: str | None = None
    weights: str | None = None


def _side(text: str) -> _Side:
    suffix = Path(text).suffix.lower()
    if suffix in (".onnx", ".engine", ".plan"):
        return _Side(text, file=existing_file(text))
    if "@" in text and not Path(text).exists() and "/" not in text.partition("@")[0]:
        name, _, weights = text.partition("@")
        return _Side(text, model=model_name(name), weights=existing_file(weights))
    if suffix in _WEIGHTS or Path(text).is_file():
        return _Side(text, weights=existing_file(text))
    return _Side(text, model=model_name(text))


def _batches(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(at_least(1)(part.strip()) for part in text.split(",")))


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "verify",
        parents=[common],
        help="compare models, checkpoints, ONNX files and engines",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument("a", metavar="A", type=_side, help="the reference")
    parser.add_argument("b", metavar="B", type=_side, help="what is to compute the same")
    parser.add_argument(
        "--model", type=model_name, metavar="NAME", help="the model of checkpoints given alone"
    )
    parser.add_argument(
        "--checkpoint", type=existing_file, metavar="FILE", help="weights of models given by NAME alone"
    )
    parser.add_argument(
        "--num-classes",
        type=at_least(0),
        metavar="N",
        help="classes of models (default: what the other side has)",
    )
    add_image_size(parser)
    parser.add_argument(
        "--images",
        type=existing_path,
        nargs="+",
        metavar="PATH",
        help="photos or folders (default: the two that scikit-learn ships)",
    )
    parser.add_argument(
        "--batch",
        type=_batches,
        metavar="N,...",
        help="batch sizes to try where the batch is open (default: 1,2,3,5)",
    )
    parser.add_argument(
        "--tolerance",
        type=positive_number,
        metavar="X",
        help="largest error relative to the largest value (default: by the less precise side: float32 1e-4, "
        "float16 0.01, bfloat16 0.08, int8 0.15)",
    )
    parser.add_argument(
        "--preprocessing",
        choices=("a", "b"),
        help="prepare photos as this side says; without it, sides that say different things are a failure",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="run the fused operators of B, an ONNX file, by vitrail's kernels and not by the functions in the file "
        "(built where that was not done, see `vitrail build --device onnxruntime`)",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        default=None,
        help="show how the error grows on the way, also where nothing fails",
    )
    parser.add_argument("--no-trace", dest="trace", action="store_false", help="show outputs only")
    add_seed(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Compare and report."""
    from ..export import ExportError, compare
    from ..export.compare import BATCHES
    from ..export.images import find_images, load_image
    from ..zoo.inference import standard_form
    from ..zoo.weights import CheckpointError

    for photo in find_images(args.images):
        try:
            load_image(photo)
        except ValueError as error:
            raise UsageError(str(error)) from error
    try:
        with terminal.steps() as steps:
            steps.begin("loading both sides")
            a, b = _subjects(args)
            chosen = {"a": a.preprocessing, "b": b.preprocessing}.get(args.preprocessing or "")
            if args.preprocessing and chosen is None:
                raise UsageError(
                    f"{args.preprocessing} does not say how photos are prepared; leave --preprocessing out"
                )
            report = compare(
                a,
                b,
                img_size=args.img_size,
                batches=args.batch or BATCHES,
                images=args.images,
                preprocessing=chosen,
                rtol=args.tolerance,
                atol=None if args.tolerance is None else 0.0,
                seed=args.seed,
                trace=args.trace,
                rewrite=standard_form,
                progress=steps.begin,
            )
    except (ExportError, CheckpointError) as error:
        raise JobFailed(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    document = {"ok": report.passed, "sides": [_described(a), _described(b)], **report.to_dict()}
    terminal.result(document, report.table())
    if not report.passed:
        terminal.warn(report.explain().partition("\n")[0])
        for hint in _hints(args, a, b):
            terminal.warn(hint)
    return 0 if report.passed else 1


def _described(side: "Subject") -> dict[str, Any]:
    return {"name": side.name, "kind": side.noun, "precision": side.precision, "runtime": side.runtime}


def _subjects(args: argparse.Namespace) -> tuple["Subject", "Subject"]:
    """Both sides, loaded; files first, since they say how models are to be made."""
    from ..export.subjects import subject

    if args.kernels and not (args.b.file or "").lower().endswith(".onnx"):
        raise UsageError(f"--kernels is for an ONNX file with fused operators as B, got '{args.b.text}'")
    files = {
        id(side): subject(side.file, kernels=args.kernels and side is args.b)
        for side in (args.a, args.b)
        if side.file
    }
    facts = next((f for f in map(_facts, files.values()) if f), {})
    named = next((side.model for side in (args.a, args.b) if side.model), None)
    sides = [files.get(id(side)) or _model(side, args, facts, named) for side in (args.a, args.b)]
    return sides[0], sides[1]


def _facts(file: "Subject") -> dict[str, Any]:
    """What a file's metadata says of its model: name, input_size, num_classes, form, in JSON where it isn't text."""
    facts = {}
    for key, value in getattr(file, "meta", {}).items():
        try:
            facts[key] = json.loads(value)
        except ValueError:
            facts[key] = value
    return facts | {"form": getattr(file, "form", "classifier")} if facts else {}


def _model(side: _Side, args: argparse.Namespace, facts: dict[str, Any], named: str | None) -> "Subject":
    """A model with its weights, in the image size, classes and form of the file beside it."""
    import torch

    from ..catalog import create_model, default_size
    from ..export.subjects import ModuleSubject

    name = side.model or args.model or _model_in(side.weights) or named or _known(facts.get("model"))
    if name is None:
        raise UsageError(
            f"'{side.text}' does not say which model it is for: write NAME@{side.text}, or add --model NAME"
        )
    weights = side.weights or args.checkpoint
    size = args.img_size
    if size is None and isinstance(facts.get("input_size"), list):
        height, width = facts["input_size"][-2:]
        size = None if (height, width) == default_size(name) else (height, width)
    classes = args.num_classes
    if classes is None:
        classes = facts.get("num_classes")
        if classes is None and weights:
            classes = _classes_in(weights)
    torch.manual_seed(args.seed)
    model = create_model(name, size, classes, weights)
    label = f"{name}@{weights}" if weights else f"{name}, random weights of seed {args.seed}"
    return ModuleSubject(model, facts.get("form", "classifier"), label)


def _known(text: Any) -> str | None:
    """A model name from a file's metadata, None where timm has no such model."""
    import timm

    return text if isinstance(text, str) and timm.is_model(text) else None


def _model_in(weights: str | None) -> str | None:
    """The model that a safetensors file says it is for, as `vitrail convert` writes it."""
    return _known(_header(weights).get("model")) if weights else None


def _classes_in(weights: str) -> int | None:
    """The number of classes that a safetensors file says it has."""
    text = _header(weights).get("num_classes", "")
    return int(text) if re.fullmatch(r"\d+", text) else None


def _header(path: str) -> dict[str, str]:
    if Path(path).suffix.lower() != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):  # whoever reads the weights says what is wrong
        return {}


def _hints(args: argparse.Namespace, a: "Subject", b: "Subject") -> list[str]:
    """What may be behind a failure that is not the file's fault: other weights than it was exported from."""
    hints = []
    for side, other in ((args.a, b), (args.b, a)):
        source = getattr(other, "meta", {}).get("weights", "")
        if side.model and not side.weights and not args.checkpoint and source:
            if source.startswith("random") and source != f"random, seed {args.seed}":
                hints.append(f"{other.name} was exported with weights '{source}': give that --seed")
            elif not source.startswith("random"):
                hints.append(
                    f"{other.name} was exported from {source}: compare it with {side.model}@{source}"
                )
    return hints
