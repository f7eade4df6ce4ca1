"""`vitrail doctor`: what runs here, and why."""

import argparse
from typing import TYPE_CHECKING, Any

from .terminal import Terminal

if TYPE_CHECKING:
    from ..ops.library import LibraryStatus

_EXAMPLES = """\
examples:
  vitrail doctor
  vitrail doctor --json > doctor.json     # to attach to a bug report
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="show versions, machine, which operators are compiled, and why (not)",
        description="Show what this installation consists of, whether each operator runs compiled or as its\n"
        "definition in plain PyTorch, and what would make it faster. Builds nothing.",
        epilog=_EXAMPLES,
    )
    parser.set_defaults(run=run)


def _where(status: "LibraryStatus") -> str:
    return str(status.path) if status.cached or status.loaded else "not built"


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Print the diagnosis."""
    from ..doctor import diagnose

    found = diagnose()
    machine, status, gpu = found.machine, found.library, found.cuda_library
    cuda = ", ".join(machine["cuda"]) or (
        "no device" if machine["torch_cuda"] else "this torch is built without"
    )
    facts = [
        ("versions", ", ".join(f"{name} {number}" for name, number in found.versions.items())),
        ("system", machine["system"]),
        ("CPU", f"{machine['cpu']}, {machine['capability']}"),
        ("threads", f"{machine['threads']} of {machine['cores']} cores"),
        ("CUDA", cuda),
        (
            "compiler",
            status.compiler_version or status.compiler or "none found",
        ),
        ("VITRAIL_OPS", status.mode),
        ("library", _where(status)),
        ("CUDA compiler", gpu.compiler_version or gpu.reason or "none found"),
        ("CUDA library", _where(gpu)),
        ("for ONNX Runtime", _where(found.onnxruntime_library)),
        ("cache", str(status.cache_dir)),
    ]
    operators = terminal.table(
        ["operator", "on", "runs", "why"],
        [
            [op.name, op.device, "compiled" if op.compiled else "definition", op.reason]
            for op in found.operators
        ],
    )
    advice = [("to do", line) for line in found.advice] or [("to do", "nothing")]
    terminal.result(found.to_dict(), terminal.facts(facts), "", operators, terminal.facts(advice))
    return 0
