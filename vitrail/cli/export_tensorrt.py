"""`vitrail export tensorrt`: a model or an ONNX file as a TensorRT engine."""

import argparse
from pathlib import Path
from typing import Any

from .terminal import (
    JobFailed,
    Terminal,
    UsageError,
    add_image_size,
    add_operators,
    add_seed,
    at_least,
    existing_file,
    image_size,
    model_name,
    new_file,
    positive_number,
)

_EXAMPLES = """\
examples:
  vitrail export tensorrt biformer_tiny biformer_tiny.engine --dtype fp16
  vitrail export tensorrt model.onnx model.engine --arch sm_89 sm_120 --batch 1,16,64
  vitrail export tensorrt davit_fused_tiny davit.engine --batch 8 --checkpoint davit_t.safetensors
  vitrail export tensorrt any_size.onnx any_size.engine --size 224,384,512x768 --json
  vitrail export tensorrt biformer_small fused.engine --operators fused --arch sm_89 --dtype fp16
"""

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_DTYPES |= {name: name for name in _DTYPES.values()}
_FORMS = ("classifier", "features", "pre_logits")


def _source(text: str) -> str:
    if Path(text).suffix.lower() == ".onnx":
        return existing_file(text)
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a model nor an ONNX file, whose name ends in .onnx"
        )
    return model_name(text)


def _batch(text: str) -> Any:
    from ..export.engine_shapes import triple

    try:
        numbers = [int(part) for part in text.split(",")]
        return triple(numbers[0] if len(numbers) == 1 else numbers)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no batch: write N, or MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX, such as 1,8,32"
        ) from error


def _sizes(text: str) -> Any:
    from ..export.engine_shapes import size_triple

    sizes = [image_size(part) for part in text.split(",")]
    try:
        return size_triple(sizes * 3 if len(sizes) == 1 else sizes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no range of sizes: write MIN,OPT,MAX ascending, each N or HxW, such as 224,384,512x768"
        ) from error


def add(formats: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of `vitrail export`."""
    parser = formats.add_parser(
        "tensorrt",
        parents=[common],
        help="a TensorRT engine",
        description="Build a TensorRT engine from a model that timm knows, or from an ONNX file, and a report of what\n"
        "is in it, OUT.json: kernels and the modules they compute, fused attentions, memory. TensorRT-RTX\n"
        "(pip install 'vitrail[tensorrt]') builds for several architectures, and without a GPU; NVIDIA's\n"
        "tensorrt, where it is installed, for the GPU at hand. Where there is a GPU the engine must compute what\n"
        "the model computes, and is timed; elsewhere it is built and has not run, and the output says so.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "source",
        metavar="MODEL|FILE.onnx",
        type=_source,
        help="a model name, of vitrail's or timm's, or an ONNX file",
    )
    parser.add_argument(
        "output", metavar="OUT", type=new_file(".engine"), help="file to write, ends in .engine"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        metavar="fp32|fp16|bf16",
        help="precision inside (default: that of the file, fp32 for a model)",
    )
    parser.add_argument(
        "--batch",
        type=_batch,
        metavar="MIN,OPT,MAX",
        help="least, best and largest batch, or N to fix it (default: 1,8,32 where it is open)",
    )
    parser.add_argument(
        "--size",
        type=_sizes,
        metavar="MIN,OPT,MAX",
        help="image sizes, N or HxW each, where height and width are open",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        default=[],
        metavar="SM",
        help="GPU architectures, such as sm_89 (default: TensorRT-RTX's from sm_80 on, TensorRT's the GPU at hand)",
    )
    parser.add_argument(
        "--library", choices=("tensorrt", "tensorrt_rtx"), help="which to use if both are installed"
    )
    parser.add_argument(
        "--plugin",
        type=existing_file,
        nargs="+",
        default=[],
        metavar="FILE",
        help="libraries of TensorRT plugins (default: vitrail's own for --operators fused, or for a file with such "
        "nodes; built first where that was not done)",
    )
    parser.add_argument(
        "--tf32", action="store_true", help="let fp32 products round to TF32, which is faster"
    )
    parser.add_argument(
        "--workspace",
        type=positive_number,
        metavar="MIB",
        help="limit of the scratch memory (default: TensorRT's)",
    )
    parser.add_argument(
        "--timing-cache", metavar="FILE", help="measurements to read and to add to; TensorRT only"
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="that build (default: all)")
    group = parser.add_argument_group("a model only")
    add_image_size(group)
    add_operators(group)
    group.add_argument("--num-classes", type=at_least(0), metavar="N", help="classes, 0 for pooled features")
    group.add_argument("--checkpoint", type=existing_file, metavar="FILE", help="weights (default: random)")
    group.add_argument(
        "--form", choices=_FORMS, help="what comes out, see `vitrail export onnx` (default: classifier)"
    )
    group.add_argument("--preprocess", action="store_true", help="take pixels, uint8 (B, H, W, C)")
    group.add_argument(
        "--no-verify", dest="verify", action="store_false", help="compare nothing with the model"
    )
    group.add_argument(
        "--tolerance", type=positive_number, metavar="X", help="of the engine, relative to the largest value"
    )
    add_seed(group)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Export if it is a model, build, report."""
    from ..export import ExportError, VerificationError, to_tensorrt
    from ..export.engine import NOT_RUN
    from ..zoo.weights import CheckpointError

    is_file = Path(args.source).suffix.lower() == ".onnx"
    if is_file:
        _only_for_models(args)
    try:
        with terminal.steps() as steps:
            source, options = (args.source, None) if is_file else _model(args, steps.begin)
            plugins = args.plugin or _own_plugins(args, is_file, steps)
            report = to_tensorrt(
                source,
                args.output,
                dtype=_DTYPES.get(args.dtype),
                batch=args.batch,
                sizes=args.size,
                archs=args.arch,
                workspace=None if args.workspace is None else int(args.workspace * 2**20),
                timing_cache=args.timing_cache,
                threads=args.threads,
                tf32=args.tf32,
                plugins=plugins,
                library=args.library,
                verify=args.verify,
                rtol=args.tolerance,
                seed=args.seed,
                export=options,
                progress=steps.begin,
            )
    except VerificationError as error:
        raise JobFailed(str(error), verification=error.report.to_dict()) from error
    except (ExportError, CheckpointError, ImportError) as error:
        raise JobFailed(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    terminal.result({"ok": True, **report.to_dict()}, report.table())
    if not is_file and args.checkpoint is None:
        terminal.warn("the weights are random; name a file with --checkpoint for real ones")
    for note in report.notes:
        if note == NOT_RUN:
            terminal.warn(note)
    return 0


def _model(args: argparse.Namespace, say: Any) -> Any:
    """The model, and what `to_onnx` should know of it."""
    import torch

    from ..catalog import create_model, family_of
    from ..zoo.inference import standard_form

    say(f"creating {args.source}")
    torch.manual_seed(args.seed)
    model = create_model(args.source, args.img_size, args.num_classes, args.checkpoint)
    weights = Path(args.checkpoint).name if args.checkpoint else f"random, seed {args.seed}"
    return model, {
        "img_size": args.img_size,
        "form": args.form or "classifier",
        "preprocess": args.preprocess,
        "metadata": {"weights": weights, "family": family_of(args.source) or "timm"},
        "rewrite": standard_form,
        "operators": args.operators,
    }


def _own_plugins(args: argparse.Namespace, is_file: bool, steps: Any) -> list[Path]:
    """The library of vitrail's plugins where the engine has a use for it, built for the architectures asked for."""
    from ..export.functions import has_nodes
    from ..ops import library

    if not (has_nodes(args.source) if is_file else args.operators == "fused"):
        return []
    try:
        return [library.plugin_library(args.arch, steps.update)]
    except library.BuildError as error:
        raise JobFailed(
            f"the plugins for TensorRT could not be built: {error}. Without them, --operators standard makes an engine "
            f"of TensorRT's own kernels"
        ) from error


def _only_for_models(args: argparse.Namespace) -> None:
    given = {
        "--img-size": args.img_size,
        "--num-classes": args.num_classes,
        "--checkpoint": args.checkpoint,
        "--form": args.form,
        "--preprocess": args.preprocess,
        "--tolerance": args.tolerance,
        "--operators": args.operators != "standard",
    }
    if wrong := [name for name, value in given.items() if value not in (None, False)]:
        raise UsageError(
            f"{args.source} is a file that is finished already, so {' and '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} for models only: give `vitrail export onnx` these options"
        )
