"""What differs between a CPU and a GPU when something is measured: clocks, capturing, memory, the rates that bound it.

On a GPU a call is timed twice. *eager*: blocks of calls one after the other, as a user's loop makes them, so that what
the host takes to launch kernels counts where it is longer than they run. *graph*: the call captured as a CUDA graph and
replayed, each replay after the second-level cache was overwritten: what the kernels take with their data in memory.
"""

import gc
import subprocess
from dataclasses import dataclass, field
from typing import Any

import torch

from vitrail.cli.terminal import UsageError

from .timing import Run

DEVICES = ("cpu", "cuda")
_FLUSHED_BYTES = 256 * 2**20
"""More than the second-level cache of any GPU holds."""
_COPIED_BYTES = 512 * 2**20
_WARM_UP = 3


def require(device: str) -> None:
    """The device is there.

    Raises:
        UsageError: it is not.
    """
    if device == "cuda" and not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "sees no NVIDIA GPU here"
        raise UsageError(f"--device cuda: this torch ({torch.__version__}) {why}")


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


# --- clocks -----------------------------------------------------------------------------------------------------------


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def eager_clock(run: Run, count: int) -> float:
    """Seconds of so many calls in a row, by events on the GPU."""
    start, end = _event(), _event()
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class ColdClock:
    """Seconds of so many calls, each with its data in memory and not in the second-level cache."""

    def __init__(self) -> None:
        self._other = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, run: Run, count: int) -> float:
        """Measure; the cache is overwritten outside of what is timed."""
        pairs = [(_event(), _event()) for _ in range(count)]
        for start, end in pairs:
            self._other.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3


# --- graphs -----------------------------------------------------------------------------------------------------------


class NotCapturableError(Exception):
    """A call that cannot become a CUDA graph, and why."""


def capture(run: Run) -> Run:
    """The call as a CUDA graph: a function that replays it.

    Raises:
        NotCapturableError: it waits for the GPU, or does something else that a graph cannot hold.
    """
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
        torch.cuda.synchronize()
    except (RuntimeError, torch.AcceleratorError) as error:
        raise NotCapturableError(first_line(error)) from error

    def replay() -> object:
        graph.replay()
        return kept  # its memory belongs to the graph

    return replay


def first_line(error: BaseException) -> str:
    """An error in a line that fits into a table's note."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_allocated(run: Run) -> int:
    """Bytes on the GPU above those at the start, at most, during one run after another."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before, 0)


# --- what bounds a call -----------------------------------------------------------------------------------------------

COPY, TF32 = "copy", "TF32 product"


def copy() -> Run:
    """A copy of memory to memory."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.int8, device="cuda").zero_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def with_tf32(run: Run) -> Run:
    """Products of float32 matrices by TF32 multiplications while it runs."""

    def call() -> object:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return run()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return call


@dataclass(frozen=True)
class Roofline:
    """The rates that were measured in the same run: nothing can be faster than the slower of the two makes it."""

    bytes_per_second: float
    """Read and written, of a copy."""
    macs_per_second: float
    """Of a product of large matrices at the accuracy of the operator."""
    rates: dict[str, float] = field(default_factory=dict)
    """Multiply-accumulates per second of the products that were measured, by name."""

    def seconds(self, moved_bytes: int, macs: int) -> float:
        """The least time for so many bytes and multiply-accumulates."""
        return max(moved_bytes / self.bytes_per_second, macs / self.macs_per_second)

    def bound(self, moved_bytes: int, macs: int) -> str:
        """Which of the two it is."""
        by_memory = moved_bytes / self.bytes_per_second >= macs / self.macs_per_second
        return "memory" if by_memory else "arithmetic"


def roofline(copy_seconds: float, gemm: float, tf32: float | None) -> Roofline:
    """From the time of a copy and the rates of products.

    Args:
        copy_seconds: of `copy`.
        gemm: multiply-accumulates per second of a product in the operator's dtype.
        tf32: of one in TF32, for float32: three of them make a product of almost the accuracy of float32.
    """
    rates = {"product": gemm} | ({} if tf32 is None else {"TF32": tf32})
    best = gemm if tf32 is None else max(gemm, tf32 / 3)
    return Roofline(2 * _COPIED_BYTES / copy_seconds, best, rates)


# --- what it says about itself ----------------------------------------------------------------------------------------


_FIELDS = {"driver": "driver_version", "power_limit_watts": "power.limit", "clock_mhz": "clocks.max.sm"}


def _driver(uuid: str) -> dict[str, str | None]:
    """What only the driver's own tool says of a GPU; nothing where it does not know it, as parts of one."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_FIELDS.values())}"]
    try:
        run = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(_FIELDS)
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(_FIELDS, values, strict=False))


def describe() -> dict[str, Any]:
    """The GPU, its driver, and torch's CUDA."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **_driver(str(getattr(properties, "uuid", ""))),
    }


def answers() -> bool:
    """Whether the GPU still takes work from this process, which an error of a kernel ends."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def free(device: str) -> None:
    """Give unused memory and compiled code back, so that the next row starts with all of it."""
    if device == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
