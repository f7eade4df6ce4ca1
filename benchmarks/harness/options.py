"""Command lines: what both benchmarks take, and how they end."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from vitrail.cli.terminal import JobFailed, Terminal, UsageError, at_least, positive_number
from vitrail.ops import library, use_ops

from .memory import limit_to_free_memory
from .report import RESULTS, check_output

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--threads", type=at_least(1), metavar="N", help="threads (default: torch's own number)"
    )
    made.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and inputs (default: %(default)s)"
    )
    made.add_argument("--compile", action="store_true", help="add candidates under torch.compile")
    made.add_argument(
        "--min-seconds", type=positive_number, metavar="S", help="measure each row for this long at least"
    )
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    made.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    made.add_argument(
        "--output",
        metavar="FILE.json",
        help="where results are written (default: a file in benchmarks/results/, where everything is measured)",
    )
    return made


def output(given: str | None, stem: str, complete: bool, made: argparse.ArgumentParser) -> Path | None:
    """The file to write: the one named, or the usual one where the run is complete."""
    if given is None and not complete:
        return None
    try:
        return check_output(given or RESULTS / f"{stem}.json")
    except (ValueError, OSError) as error:
        made.error(f"--output: {error}")


def run(job: Callable[[Terminal], int], as_json: bool, threads: int | None) -> int:
    """Run a benchmark along the compiled path; the exit status."""
    terminal = Terminal(as_json)
    limit_to_free_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if library.mode() == "reference":
            raise UsageError("VITRAIL_OPS=reference leaves nothing to compare; unset it")
        with use_ops("fused"):
            library.load()
            return job(terminal)
    except UsageError as error:
        terminal.error(str(error))
        return 2
    except (JobFailed, RuntimeError) as error:
        terminal.error(str(error))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
