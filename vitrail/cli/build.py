"""`vitrail build`: compile the operators ahead of time."""

import argparse
from typing import Any

from .terminal import JobFailed, Stopwatch, Terminal

_EXAMPLES = """\
examples:
  vitrail build            # nothing to do where it is done
  vitrail build --force    # once more from the sources
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "build",
        parents=[common],
        help="compile the operators now instead of at first use",
        description="Compile the C++ operators into the cache, which otherwise happens at their first use.\n"
        "Needs a C++ compiler; without one everything runs on the operators' definitions in PyTorch.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--force", action="store_true", help="build even where a matching library is in the cache")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Build and say where the library is."""
    from ..ops import library

    cached = library.status().cached and not args.force
    watch = Stopwatch()
    with terminal.steps(1) as steps:
        steps.begin("looking at the cache" if cached else "compiling the operators")
        try:
            path = library.build(force=args.force, progress=steps.detail)
        except RuntimeError as error:
            raise JobFailed(str(error)) from error
    status = library.status()
    document = {
        "path": str(path),
        "built": not cached,
        "seconds": watch.seconds,
        "size_bytes": path.stat().st_size,
        "compiler": status.compiler,
        "compiler_version": status.compiler_version,
    }
    what = "already built" if cached else f"built in {watch.seconds:.1f} s"
    terminal.result(document, f"{what}: {path} ({path.stat().st_size / 1e3:.0f} kB)")
    return 0
