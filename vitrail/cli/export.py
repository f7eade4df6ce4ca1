"""`vitrail export onnx`: a model as a verified ONNX file."""

import argparse
from pathlib import Path
from typing import Any

from .terminal import (
    JobFailed,
    Terminal,
    UsageError,
    add_image_size,
    add_model,
    at_least,
    existing_file,
    new_file,
    positive_number,
)

_EXAMPLES = """\
examples:
  vitrail export onnx biformer_tiny biformer_tiny.onnx
  vitrail export onnx biformer_small out.onnx --checkpoint biformer_small.safetensors --images photos/
  vitrail export onnx biformer_tiny any.onnx --dynamic batch,height,width --img-size 256x320
  vitrail export onnx biformer_tiny half.onnx --dtype float16
  vitrail export onnx biformer_tiny serve.onnx --preprocess --classes imagenet.txt
  vitrail export onnx biformer_tiny pyramid.onnx --form features --json
"""

_AXES = ("batch", "height", "width")
_DTYPES = ("float32", "float16", "bfloat16")
_FORMS = ("classifier", "features", "pre_logits")


def _axes(text: str) -> tuple[str, ...]:
    axes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if axes == ("none",):
        return ()
    if not set(axes) <= set(_AXES):
        raise argparse.ArgumentTypeError(
            f"'{text}' must be none, or some of {','.join(_AXES)} with commas between"
        )
    return axes


def _images(text: str) -> str:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder '{text}'")
    return text


def _classes(text: str) -> list[str]:
    try:
        lines = Path(text).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(
            f"the names of classes in '{text}' can't be read: {error}"
        ) from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if empty := [i for i, name in enumerate(names, 1) if not name]:
        raise argparse.ArgumentTypeError(f"line {empty[0]} of '{text}' is empty; write one class a line")
    return names


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    group = commands.add_parser(
        "export",
        help="write a model as a file for runtimes",
        description="Write a model as a file that runtimes load, proven to compute what the model computes.",
        epilog="example:\n  vitrail export onnx biformer_tiny biformer_tiny.onnx",
    )
    formats = group.add_subparsers(title="formats", metavar="FORMAT", required=True, parser_class=type(group))
    parser = formats.add_parser(
        "onnx",
        parents=[common],
        help="an ONNX file of standard operators",
        description="Write any model that timm knows as an ONNX file of standard operators. By default the file is\n"
        "run in ONNX Runtime, on photos and on noise, at two batch sizes, and appears only when it computes\n"
        "what the model computes in torch; otherwise the exit code is 1 and there is no file.",
        epilog=_EXAMPLES,
    )
    add_model(parser)
    parser.add_argument("output", metavar="OUT", type=new_file(".onnx"), help="file to write, ends in .onnx")
    add_image_size(parser)
    parser.add_argument(
        "--dynamic",
        type=_axes,
        default="batch",
        metavar="AXES",
        help="axes left open: batch, height, width with commas between, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--num-classes",
        type=at_least(0),
        metavar="N",
        help="classes, 0 for pooled features (default: the model's)",
    )
    parser.add_argument(
        "--checkpoint",
        type=existing_file,
        metavar="FILE",
        help="weights, in our layout or the authors' (default: random weights from --seed)",
    )
    parser.add_argument(
        "--opset", type=int, metavar="N", help="operator set, 17 to 23 (default: 20; 22 for bfloat16)"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of weights and activations; input and output stay float32, and so do norms, softmax and choices "
        "inside (default: %(default)s)",
    )
    parser.add_argument(
        "--form",
        choices=_FORMS,
        default="classifier",
        help="what comes out: class scores, the feature pyramid (stage0, stage1, ...), or what the classifier reads "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="let the file take pixels, uint8 (B, H, W, C), and normalise them itself",
    )
    parser.add_argument(
        "--classes",
        type=_classes,
        metavar="FILE",
        help="names of the classes, one a line, to note in the file",
    )
    parser.add_argument(
        "--images",
        type=_images,
        nargs="+",
        metavar="PATH",
        help="photos or folders to verify with (default: the two that scikit-learn ships)",
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="write the file without proof"
    )
    parser.add_argument(
        "--tolerance",
        type=positive_number,
        metavar="X",
        help="largest error relative to the largest value (default: that of vitrail.export)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of random weights and noise (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def _check_model(model: Any, args: argparse.Namespace) -> None:
    """Wrong use that only the model can tell."""
    from ..export.capture import check_form
    from ..export.metadata import check_classes

    try:
        check_form(model, args.form)
        check_classes(model, args.classes)
    except ValueError as error:
        raise UsageError(str(error)) from error


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Export, verify, report."""
    import torch

    from ..catalog import create_model, family_of
    from ..export import OPSETS, ExportError, VerificationError, to_onnx
    from ..export.images import find_images, load_image
    from ..zoo.inference import standard_form
    from ..zoo.weights import CheckpointError

    if args.opset is not None and args.opset not in OPSETS:
        raise UsageError(f"--opset must lie between {OPSETS[0]} and {OPSETS[-1]}, got {args.opset}")
    tolerance = {} if args.tolerance is None else {"rtol": args.tolerance, "atol": 0.0}
    for photo in find_images(args.images):
        try:
            load_image(photo)
        except ValueError as error:
            raise UsageError(str(error)) from error
    weights = Path(args.checkpoint).name if args.checkpoint else f"random, seed {args.seed}"
    torch.manual_seed(args.seed)
    try:
        with terminal.steps() as steps:
            steps.begin(f"creating {args.model}")
            model = create_model(args.model, args.img_size, args.num_classes, args.checkpoint)
            _check_model(model, args)
            report = to_onnx(
                model,
                args.output,
                img_size=args.img_size,
                dynamic=args.dynamic,
                opset=args.opset,
                dtype=args.dtype,
                form=args.form,
                preprocess=args.preprocess,
                classes=args.classes,
                images=args.images,
                verify=args.verify,
                seed=args.seed,
                progress=steps.begin,
                metadata={"weights": weights, "family": family_of(args.model) or "timm"},
                rewrite=standard_form,
                **tolerance,
            )
    except VerificationError as error:
        if not terminal.as_json:
            raise JobFailed(str(error)) from error
        terminal.result({"ok": False, "error": str(error), "verification": error.report.to_dict()})
        return 1
    except (ExportError, CheckpointError) as error:
        raise JobFailed(str(error)) from error
    terminal.result({"ok": True, **report.to_dict()}, report.table())
    if args.checkpoint is None:
        terminal.warn("the weights are random; name a file with --checkpoint for real ones")
    return 0
