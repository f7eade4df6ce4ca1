"""What commands share: results on stdout, progress on stderr, errors, argument types."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress


class UsageError(Exception):
    """The command line asks for something that cannot be: exit code 2."""


class JobFailed(Exception):
    """The command was fine, its job failed: exit code 1. `details` join the document of `--json`."""

    def __init__(self, text: str, **details: Any):
        super().__init__(text)
        self.details = details


class ResultLost(Exception):
    """The result can't be written to stdout: exit code 1."""


@contextmanager
def _writing_result() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ResultLost(
            f"the result can't be written to stdout: {error.strerror}; make room where it goes, or send it elsewhere"
        ) from error


def _console(stream: Any) -> "Console":
    from rich.console import Console

    console = Console(file=stream, highlight=False, soft_wrap=False)
    if not console.is_terminal and console.width == 80:
        # a file or a pipe has no width: nothing needs to be cut to 80 columns
        console.width = 160
    return console


class Steps:
    """Progress of a job: a bar on a terminal, a line for each step elsewhere."""

    def __init__(self, total: int | None, progress: "Progress | None") -> None:
        self._total, self._begun, self._progress = total, 0, progress
        self._task = progress.add_task("", total=total) if progress else None

    def begin(self, text: str) -> None:
        """Name the step that starts now; the one before is done."""
        self._begun += 1
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text, completed=self._begun - 1)
        else:
            count = f"[{self._begun}/{self._total}] " if self._total else ""
            print(f"{count}{text}", file=sys.stderr, flush=True)

    def step(self, text: str) -> None:
        """Like `begin`, for a job whose steps are too many to print where there is no terminal."""
        self._begun += 1
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text, completed=self._begun - 1)

    def detail(self, text: str) -> None:
        """Say what happens inside the current step; shown on a terminal only."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)

    def update(self, done: int, total: int, text: str) -> None:
        """Set the state of a job that counts its steps itself."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text, completed=done, total=total)
        elif done in (0, total):
            print(text, file=sys.stderr, flush=True)


class Terminal:
    """Results go to stdout, as text or as one JSON document; everything else goes to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = sys.stdout

    def result(self, document: dict[str, Any], *renderables: "RenderableType") -> None:
        """Print the result: `document` with `--json`, else the renderables."""
        if self.as_json:
            text = json.dumps(document, indent=2, allow_nan=False, default=str)
            with _writing_result():
                print(text, file=self._stdout, flush=True)
            return
        console = _console(self._stdout)
        if console.is_terminal:
            console.print(*renderables, sep="\n")
            return
        with console.capture() as capture:
            console.print(*renderables, sep="\n")
        text = "\n".join(line.rstrip() for line in capture.get().splitlines())
        with _writing_result():
            print(text, file=self._stdout, flush=True)

    def error(self, text: str, **details: Any) -> None:
        """Say on stderr what went wrong; with `--json` also in a document on stdout, with `details`."""
        if self.as_json:
            self.result({"ok": False, "error": text, **details})
        print(f"error: {text}", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """One line on stderr that does not end the job."""
        print(f"warning: {' '.join(text.split())}", file=sys.stderr, flush=True)

    @contextmanager
    def steps(self, total: int | None = None) -> Iterator[Steps]:
        """Show the progress of a job of `total` steps, None where that is not known beforehand."""
        console = _console(sys.stderr)
        if not console.is_terminal:
            yield Steps(total, None)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (
            SpinnerColumn(),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
            yield Steps(total, progress)

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        numbers: Sequence[str] = (),
        title: str | None = None,
    ) -> "RenderableType":
        """A table, or where the terminal is too narrow for it, a paragraph for each row.

        Args:
            headers: column names.
            rows: the cells.
            numbers: the columns to align right.
            title: a line above the table.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        console = _console(self._stdout)
        table = Table(
            title=Text(title, style="bold") if title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for header in headers:
            table.add_column(header, justify="right" if header in numbers else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
            return table
        widest = max(len(header) for header in headers)
        text = Text(f"{title}\n" if title else "", style="")
        for row in rows:
            text.append(f"{row[0]}\n", style="bold")
            for header, cell in list(zip(headers, row, strict=True))[1:]:
                if cell:
                    text.append(f"  {header:<{widest}}  {cell}\n")
        return text

    def facts(self, pairs: Sequence[tuple[str, str]], title: str | None = None) -> "RenderableType":
        """Names and values, one pair a line; long values go on below each other."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in pairs:
            grid.add_row(Text(name, style="dim"), Text(value))
        return Group(Text(title, style="bold"), grid) if title else grid


# --- argument types ---------------------------------------------------------------------------------------------------


def image_size(text: str) -> tuple[int, int]:
    """`224` or `256x192` (height x width)."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is no image size; write N or HxW, such as 224 or 256x192")
    return int(parts[0]), int(parts[-1])


def at_least(minimum: int) -> Callable[[str], int]:
    """Whole numbers from `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least {minimum}")
        return value

    return parse


def positive_number(text: str) -> float:
    """A number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number above zero")
    return value


def existing_file(text: str) -> str:
    """A file that is there."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder; name a file")
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no file '{text}'")
    return text


def new_file(suffix: str) -> Callable[[str], str]:
    """A file to write, with this suffix, in a folder that is there."""

    def parse(text: str) -> str:
        path = Path(text)
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"'{text}' must end in {suffix}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"'{text}' is a folder; name a file")
        if not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}'; create it first")
        return text

    return parse


def model_name(text: str) -> str:
    """The name of a model that timm or vitrail has."""
    from ..catalog import UnknownModelError, check_model_name

    try:
        return check_model_name(text)
    except UnknownModelError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# --- words ------------------------------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser) -> None:
    """The argument MODEL, for any model that timm knows."""
    parser.add_argument(
        "model", metavar="MODEL", type=model_name, help="a model name, of vitrail's or timm's"
    )


def add_operators(parser: argparse.ArgumentParser) -> None:
    """Add `--operators`."""
    parser.add_argument(
        "--operators",
        choices=("standard", "fused"),
        default="standard",
        help="vitrail's operators as standard ones alone, or each as one node with its definition in the file, for "
        "which TensorRT takes this project's kernels as plugins (default: %(default)s)",
    )


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """The option --img-size."""
    parser.add_argument(
        "--img-size",
        type=image_size,
        metavar="N|HxW",
        help="input size (default: what the model is meant for)",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """The option --seed."""
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of random weights and noise (default: %(default)s)",
    )


def existing_path(text: str) -> str:
    """Parse a file or folder that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder '{text}'")
    return text


def size_text(size: Sequence[int]) -> str:
    """`(256, 192)` as `256x192`."""
    return "x".join(map(str, size))


def millions(count: int, decimals: int = 2) -> str:
    """A count in millions."""
    return f"{count / 1e6:.{decimals}f}"


def billions(count: int) -> str:
    """A count in billions, with as many decimals as a small one needs."""
    return f"{count / 1e9:.{2 if count >= 1e8 else 4}f}"


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Elapsed so far."""
        return time.perf_counter() - self._start
