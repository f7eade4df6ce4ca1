"""`vitrail build`: compile the operators ahead of time."""

import argparse
from typing import Any

from .terminal import JobFailed, Stopwatch, Terminal

_EXAMPLES = """\
examples:
  vitrail build                  # nothing to do where it is done
  vitrail build --force          # once more from the sources
  vitrail build --device cuda    # for GPUs, here or elsewhere; needs nvcc, no GPU
  TORCH_CUDA_ARCH_LIST="9.0" vitrail build --device cuda    # for Hopper alone, in a fraction of the time
  TORCH_CUDA_ARCH_LIST="8.9" vitrail build --device tensorrt    # plugins for engines on Ada; needs nvcc alone
  vitrail build --device onnxruntime    # kernels with which ONNX Runtime runs files with fused operators
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "build",
        parents=[common],
        help="compile the operators now instead of at first use",
        description="Compile the operators into the cache, which otherwise happens at their first use.\n"
        "For the CPU that takes a C++ compiler, for NVIDIA GPUs nvcc as well; without them everything runs\n"
        "on the operators' definitions in PyTorch. GPU kernels are compiled for the GPUs of this machine, and\n"
        "where there are none, for all that are supported.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "tensorrt", "onnxruntime", "all"),
        help="for which device, or the plugins for TensorRT, or the kernels for ONNX Runtime; `all` is CPU and GPU; "
        "default: the CPU, and the GPU where torch sees one",
    )
    parser.add_argument(
        "--force", action="store_true", help="build even where a matching library is in the cache"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Build and say where the libraries are."""
    import torch

    from ..ops import library

    chosen = args.device or ("all" if torch.cuda.is_available() else "cpu")
    documents, lines = [], []
    for device in ("cpu", "cuda") if chosen == "all" else (chosen,):
        part = library.PARTS[device]
        watch = Stopwatch()
        before = library.status(part.device)
        reused = before.cached and not args.force
        try:
            with terminal.steps() as steps:
                path = library.build(force=args.force, progress=steps.update, part=part)
        except library.BuildError as error:
            raise JobFailed(str(error)) from error
        size = path.stat().st_size
        documents.append(
            {
                "device": part.device,
                "path": str(path),
                "built": not reused,
                "seconds": watch.seconds,
                "size_bytes": size,
                "compiler": before.compiler,
                "compiler_version": before.compiler_version,
            }
        )
        what = "already built" if reused else f"built in {watch.seconds:.1f} s"
        lines.append(f"{part.device}: {what}: {path} ({size / 1e3:.0f} kB)")
    terminal.result({"ok": True, "libraries": documents}, "\n".join(lines))
    return 0
