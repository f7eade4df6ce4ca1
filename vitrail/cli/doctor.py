"""`vitrail doctor`: what runs here, and why."""

import argparse
from typing import Any

from .terminal import Terminal

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


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Print the diagnosis."""
    from ..doctor import diagnose

    found = diagnose()
    machine, status = found.machine, found.library
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
        ("library", f"{status.path}" if status.cached or status.loaded else "not built"),
        ("cache", str(status.cache_dir)),
    ]
    operators = terminal.table(
        ["operator", "runs", "why"],
        [[op.name, "compiled" if op.compiled else "definition", op.reason] for op in found.operators],
    )
    advice = [("to do", line) for line in found.advice] or [("to do", "nothing")]
    terminal.result(found.to_dict(), terminal.facts(facts), "", operators, terminal.facts(advice))
    return 0
