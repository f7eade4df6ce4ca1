"""The command line: one module per command, this one to choose among them and to turn errors into exit codes.

0: done. 1: the job failed. 2: wrong use. 130: interrupted. 143: terminated. A user's mistake is one line on stderr
that says what to do; `--debug` shows where it came from. With `--json` stdout carries one JSON document and nothing
else.
"""

import argparse
import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from .. import __version__
from . import build, convert, demo, doctor, export, models, profile, verify
from .terminal import JobFailed, ResultLost, Terminal, UsageError

_DESCRIPTION = """\
Efficient vision backbones for PyTorch: list them, profile them, load published weights,
export them to verified ONNX files, compare any two of those."""

_EXAMPLES = """\
examples:
  vitrail demo                                    # see everything at work, in two minutes
  vitrail models                                  # what there is
  vitrail profile biformer_small                  # parameters and GMAC beside the paper's
  vitrail export onnx biformer_tiny model.onnx    # a verified ONNX file
  vitrail verify a.onnx b.onnx                    # do they compute the same, and where do they part
  vitrail doctor                                  # which operators are compiled, and why (not)

exit codes: 0 done, 1 the job failed, 2 wrong use
"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document on stdout, for machines")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    parser = _Parser(prog="vitrail", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument(
        "--version", action="version", version=f"vitrail {__version__}", help="show the version"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in (models, profile, convert, export, verify, build, doctor, demo):
        module.add(commands, common)
    return parser


@contextlib.contextmanager
def _only_our_words(terminal: Terminal) -> Iterator[None]:
    """What libraries print on the way is no result, and what they warn about is not for the user; our warnings are."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="vitrail ")
        warnings.showwarning = lambda message, *args, **kwargs: terminal.warn(str(message))
        yield


def _execute(args: argparse.Namespace, terminal: Terminal) -> int:
    from ..catalog import SizeError
    from ..ops import library

    try:
        library.mode()
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        code: int = args.run(args, terminal)
    except SizeError as error:
        raise UsageError(str(error)) from error
    return code


def _run(argv: list[str]) -> int:
    as_json, debug = "--json" in argv, "--debug" in argv
    terminal = Terminal(as_json)
    try:
        args = _parser().parse_args(argv)
        with _only_our_words(terminal):
            return _execute(args, terminal)
    except BrokenPipeError:
        raise
    except ResultLost as error:
        _discard_stdout()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, UsageError | JobFailed | OSError)
        terminal.error(
            str(error) if expected else f"{type(error).__name__}: {error} (--debug shows where)",
            **(error.details if isinstance(error, JobFailed) else {}),
        )
        return 2 if isinstance(error, UsageError) else 1


def _discard_stdout() -> None:
    """What is left in the buffer can't be written and should not be complained about when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Terminated(KeyboardInterrupt):
    """Somebody wants the process to end: it cleans up as after Ctrl-C."""


@contextlib.contextmanager
def _cleaning_up() -> Iterator[None]:
    """Turn the signal to terminate into an exception, so that what is half done is taken back."""

    def stop(*_: Any) -> NoReturn:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without these letters is no reason to fail
    try:
        with _cleaning_up():
            code = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
            return code
    except _Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output has left; what a shell reports of a program that SIGPIPE ended
        _discard_stdout()
        return 141
