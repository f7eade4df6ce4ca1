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
    parser.add_argument(
        "--force", action="store_true", help="build even where a matching library is in the cache"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Build and say where the library is."""
    from ..ops import library

    watch = Stopwatch()
    before = library.status()
    reused = before.cached and not args.force
    try:
        with terminal.steps() as steps:
            path = library.build(force=args.force, progress=steps.update)
    except library.BuildError as error:
        raise JobFailed(str(error)) from error
    size = path.stat().st_size
    document = {
        "ok": True,
        "path": str(path),
        "built": not reused,
        "seconds": watch.seconds,
        "size_bytes": size,
        "compiler": before.compiler,
        "compiler_version": before.compiler_version,
    }
    what = "already built" if reused else f"built in {watch.seconds:.1f} s"
    terminal.result(document, f"{what}: {path} ({size / 1e3:.0f} kB)")
    return 0
