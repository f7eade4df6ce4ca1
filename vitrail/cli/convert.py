"""`vitrail convert`: published weights to a safetensors file of ours."""

import argparse
from typing import Any

from .terminal import JobFailed, Terminal, existing_file, model_name, new_file

_EXAMPLES = """\
examples:
  vitrail convert biformer_small biformer_small_best.pth biformer_small.safetensors

then, in Python:
  timm.create_model("biformer_small", pretrained=True,
                    pretrained_cfg_overlay={"file": "biformer_small.safetensors"})
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "convert",
        parents=[common],
        help="turn published weights into a safetensors file",
        description="Read a checkpoint in the authors' layout (or ours), check that it fits the model in every\n"
        "tensor, and write it as safetensors. Pickled code in a file is never run: such a file is refused.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", type=model_name, help="the model that the weights are for")
    parser.add_argument(
        "source", metavar="SOURCE", type=existing_file, help="checkpoint, .pth or .safetensors"
    )
    parser.add_argument(
        "target", metavar="TARGET", type=new_file(".safetensors"), help="file to write, ends in .safetensors"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Convert and say what was converted."""
    from ..zoo.weights import CheckpointError, convert_checkpoint

    try:
        report = convert_checkpoint(args.model, args.source, args.target)
    except CheckpointError as error:
        raise JobFailed(str(error)) from error
    text = (
        f"{report.target}: {report.model} with {report.num_classes} classes, "
        f"{report.parameters / 1e6:.2f} M parameters in {report.tensors} tensors"
    )
    terminal.result({"ok": True, **report.to_dict()}, text)
    return 0
