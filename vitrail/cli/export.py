"""`vitrail export`: a model as a verified ONNX file, and as what is made of it."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import export_tensorrt
from .terminal import (
    JobFailed,
    Terminal,
    UsageError,
    add_image_size,
    add_model,
    add_operators,
    add_seed,
    at_least,
    existing_file,
    existing_path,
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
  vitrail export onnx biformer_tiny fused.onnx --operators fused    # our kernels in TensorRT, see docs/EXPORT.md
  vitrail export onnx biformer_tiny int8.onnx --checkpoint biformer_tiny.safetensors \\
      --quantize int8 --calibration photos/ --calibration-limit 256
  vitrail export onnx biformer_tiny serve8.onnx --preprocess --quantize int8 --calibration photos/
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
        epilog="examples:\n  vitrail export onnx biformer_tiny biformer_tiny.onnx\n"
        "  vitrail export tensorrt biformer_tiny biformer_tiny.engine --dtype fp16",
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
    add_operators(parser)
    parser.add_argument(
        "--images",
        type=existing_path,
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
    add_seed(parser)
    _add_quantisation(parser)
    parser.set_defaults(run=run)
    export_tensorrt.add(formats, common)


def _check_model(model: Any, args: argparse.Namespace) -> None:
    """Wrong use that only the model can tell."""
    from ..export.capture import check_form
    from ..export.metadata import check_classes

    try:
        check_form(model, args.form)
        check_classes(model, args.classes)
    except ValueError as error:
        raise UsageError(str(error)) from error


_QUANTISATION = (
    "calibration",
    "calibration_limit",
    "calibration_method",
    "int8_error",
    "int8_top1",
    "int8_all",
)


def _add_quantisation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "8 bits",
        "The file is written in float32 and verified, then its layers go to 8 bits, as far as those are faster on\n"
        "this machine and the outputs stay within a tolerance. The report says what each layer brings.",
    )
    group.add_argument("--quantize", choices=("int8",), help="multiply in 8 bits; needs --calibration")
    group.add_argument(
        "--calibration",
        type=existing_path,
        metavar="FOLDER",
        help="photos like those that the model will see",
    )
    group.add_argument(
        "--calibration-limit",
        type=at_least(8),
        metavar="N",
        help="the most photos to calibrate with (default: 128); up to 32 others verify the file",
    )
    group.add_argument(
        "--calibration-method",
        choices=("minmax", "entropy", "percentile"),
        help="how the range of a tensor follows from its values (default: minmax)",
    )
    group.add_argument(
        "--int8-error",
        type=_share,
        metavar="X",
        help="largest error of the outputs, as a share of their norm (default: that of vitrail.export)",
    )
    group.add_argument(
        "--int8-top1",
        type=_share,
        metavar="X",
        help="least share of photos that keep their class (default: 0)",
    )
    group.add_argument(
        "--int8-all",
        action="store_true",
        default=None,
        help="quantise layers that are no faster here, too: the same file on every machine",
    )


def _share(text: str) -> float:
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share: give a number above 0, at most 1")
    return value


def _quantisation(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `quantize_onnx`, checked before the long work starts."""
    from ..export.calibration import find_photos
    from ..export.files import check_target
    from ..export.images import load_image

    given = [name for name in _QUANTISATION if getattr(args, name) is not None]
    if args.quantize is None:
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} is for files in 8 bits: add --quantize int8")
        return {}
    if args.dtype != "float32":
        raise UsageError(f"--quantize starts from a file in float32: leave out --dtype {args.dtype}")
    if args.calibration is None:
        raise UsageError(
            "--quantize needs photos to find the ranges of tensors with: add --calibration FOLDER"
        )
    named = {
        "limit": args.calibration_limit,
        "method": args.calibration_method,
        "max_error": args.int8_error,
        "min_top1": args.int8_top1,
        "faster_only": None if args.int8_all is None else False,
    }
    options = {name: value for name, value in named.items() if value is not None}
    check_target(args.output, ".onnx")
    try:
        photos = find_photos(args.calibration, options.get("limit", 128))
        for photo in {*photos.calibration, *photos.verification}:
            load_image(photo)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return {"calibration": args.calibration, **options}


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Export, verify, report."""
    import torch

    from ..catalog import create_model, family_of
    from ..export import (
        OPSETS,
        ExportError,
        QuantizationError,
        VerificationError,
        quantize_onnx,
        to_onnx,
    )
    from ..export.files import temporary_folder
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
    quantisation = _quantisation(args)
    torch.manual_seed(args.seed)
    quantised = None
    try:
        with terminal.steps() as steps, temporary_folder() as scratch:
            written = scratch / "float32.onnx" if quantisation else Path(args.output)
            steps.begin(f"creating {args.model}")
            model = create_model(args.model, args.img_size, args.num_classes, args.checkpoint)
            _check_model(model, args)
            report = to_onnx(
                model,
                written,
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
                operators=args.operators,
                **tolerance,
            )
            if quantisation:
                quantised = quantize_onnx(
                    written,
                    args.output,
                    model=model,
                    verify=args.verify,
                    progress=steps.update,
                    **quantisation,
                )
    except QuantizationError as error:
        raise JobFailed(str(error), quantization=error.report.to_dict()) from error
    except VerificationError as error:
        raise JobFailed(str(error), verification=error.report.to_dict()) from error
    except (ExportError, CheckpointError) as error:
        raise JobFailed(str(error)) from error
    if quantised is None:
        terminal.result({"ok": True, **report.to_dict()}, report.table())
    else:
        report = replace(report, path="in float32, not kept")
        document = {"ok": True, **quantised.to_dict(), "float32": report.to_dict()}
        terminal.result(document, report.table(), quantised.table())
    if args.checkpoint is None:
        terminal.warn("the weights are random; name a file with --checkpoint for real ones")
    return 0
