"""What every benchmark says about itself, and its results as tables, Markdown and JSON."""

import datetime
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitrail.cli.terminal import Terminal
from vitrail.doctor import diagnose
from vitrail.export.files import check_target, write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass
class Table:
    """Rows of text under headings; all columns but the first few are numbers."""

    title: str
    headers: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    words: int = 1
    """Columns of words, which come first."""
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table for a document."""
        lines = [f"**{self.title}**", ""]
        marks = ["---" if i < self.words else "---:" for i in range(len(self.headers))]
        for cells in (self.headers, marks, *self.rows):
            lines.append(f"| {' | '.join(cells)} |")
        for note in self.notes:
            lines += ["", note]
        return "\n".join([*lines, ""])

    def renderables(self, terminal: Terminal) -> list[Any]:
        """The table for a terminal."""
        return [
            terminal.table(self.headers, self.rows, self.headers[self.words :], self.title),
            *self.notes,
            "",
        ]


def machine() -> dict[str, Any]:
    """Versions, machine and compiled library, as `vitrail doctor` knows them."""
    found = diagnose()
    status = found.library
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": found.versions,
        "machine": found.machine | {"threads": torch.get_num_threads()},
        "compiler": status.compiler_version,
        "instruction_set": status.capability,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(
                ("OMP_", "MKL_", "KMP_", "VITRAIL_", "MALLOC_", "LD_PRELOAD", "ONEDNN_", "CUDA_", "CUBLAS_")
            )
        },
    }


def heading(about: dict[str, Any]) -> str:
    """The machine in a line."""
    system, versions, gpu = about["machine"], about["versions"], about.get("gpu")
    cpu = (
        f"{system['cpu']}, {system['threads']} of {system['cores']} cores, "
        f"{about['instruction_set'] or 'no compiled operators'}"
    )
    return (
        f"{cpu if gpu is None else '{}, driver {}, CUDA {}'.format(gpu['name'], gpu['driver'], gpu['torch_cuda'])}; "
        f"torch {versions['torch']}, timm {versions['timm']}, vitrail {versions['vitrail']}; {about['date'][:10]}"
    )


def check_output(path: str | os.PathLike[str]) -> Path:
    """The file that results go to, checked before the long work starts; the folder of results is made.

    Raises:
        ValueError, OSError: it cannot be written.
    """
    if Path(path).resolve().parent == RESULTS:
        RESULTS.mkdir(exist_ok=True)
    return check_target(path, ".json")


def publish(
    terminal: Terminal,
    document: dict[str, Any],
    tables: Iterable[Table],
    as_markdown: bool,
    output: Path | None,
) -> None:
    """Print the results in the form that was asked for and write the file."""
    rates = [row["gemm_gflops"] for row in document["rows"] if "gemm_gflops" in row]
    document["gemm_gflops"] = statistics.median(rates) if rates else None
    if output is not None:
        text = json.dumps(document, indent=1, allow_nan=False, default=str)
        write_atomically(output, f"{text}\n".encode())
    if terminal.as_json:
        terminal.result(document)
    elif as_markdown:
        print("\n".join([f"{heading(document)}.", "", *(table.markdown() for table in tables)]))
    else:
        parts = [heading(document), "", *(part for table in tables for part in table.renderables(terminal))]
        terminal.result(document, *parts)
    if output is not None:
        print(f"written to {output}", file=sys.stderr)


def milliseconds(seconds: float) -> str:
    """A time with three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def ratio(value: float) -> str:
    """How many times as long."""
    return f"{value:.0f}x" if value >= 19.5 else f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


def mebibytes(allocated: int | None, resident: int | None) -> str:
    """A peak; two numbers where the system saw notably more than PyTorch's allocator knows of."""
    low, high = (allocated or 0) / 2**20, (resident or 0) / 2**20
    digits = 0 if low >= 99.5 else 1
    if high > 1.1 * low + 0.25:
        return f"{low:.{digits}f} to {high:.{digits}f}"
    return f"{low:.{digits}f}"
