"""Command lines: what both benchmarks take, and how they end."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vitrail.cli.terminal import JobFailed, Terminal, UsageError, at_least, positive_number
from vitrail.ops import library, use_ops

from .device import DEVICES, require
from .memory import limit_to_free_memory
from .report import RESULTS, check_output

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    made.add_argument(
        "--device", choices=DEVICES, default="cpu", help="where everything runs (default: %(default)s)"
    )
    made.add_argument(
        "--time-limit",
        type=positive_number,
        metavar="S",
        help="begin no further row after so many seconds, and give up one that takes longer; the results name them",
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


def check(args: argparse.Namespace, made: argparse.ArgumentParser) -> None:
    """What goes together."""
    if args.dtype == "float16" and args.device == "cpu":
        made.error("--dtype float16 is for --device cuda: stock PyTorch has few kernels for it on a CPU")


def output(given: str | None, stem: str, complete: bool, made: argparse.ArgumentParser) -> Path | None:
    """The file to write: the one named, or the usual one where the run is complete."""
    if given is None and not complete:
        return None
    try:
        return check_output(given or RESULTS / f"{stem}.json")
    except (ValueError, OSError) as error:
        made.error(f"--output: {error}")


class TimeIsUp(BaseException):
    """Raised in a row that takes longer than there is time: not an error that a row might handle."""


class TimeLimit:
    """Whether another row may begin, and which ones did not, or did not end; to be entered around all rows."""

    GRACE = 6.0
    """Seconds that a row may take longer."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds
        self.left_out: list[str] = []

    def __enter__(self) -> "TimeLimit":
        if self._seconds is not None:
            self._before = signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, self._seconds + self.GRACE)
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    @staticmethod
    def _ring(*_: object) -> None:
        raise TimeIsUp

    def allows(self, row: str) -> bool:
        """Asked before a row; remembers those that it refuses."""
        if self._end is None or time.monotonic() < self._end:
            return True
        self.left_out.append(row)
        return False

    def stop(self, *unfinished: str) -> None:
        """No further row may begin, and these did not end."""
        self.left_out += unfinished
        self._end = time.monotonic()


def run(job: Callable[[Terminal], int], as_json: bool, threads: int | None, device: str = "cpu") -> int:
    """Run a benchmark along the compiled path; the exit status."""
    terminal = Terminal(as_json)
    if device == "cpu":  # CUDA reserves far more than it uses
        limit_to_free_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        require(device)
        if library.mode() == "reference":
            raise UsageError("VITRAIL_OPS=reference leaves nothing to compare; unset it")
        with use_ops("fused"):
            library.load(device)
            if device != "cpu":
                # what is compared in float32 must agree to its accuracy: cuDNN's convolutions would use TF32
                torch.backends.cudnn.allow_tf32 = False
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
