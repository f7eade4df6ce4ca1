"""Memory that a run needs above what was there before it, seen from two sides.

- `allocated`: the largest sum of what PyTorch's allocator handed out and had not got back, from the profiler's records
  of every allocation. Exact and the same every time, but it knows nothing of what kernels take from the C++ runtime
  (scratch of vitrail's own kernels, of MKL and oneDNN).
- `resident`: the largest resident set of the process, as the system saw it. It knows everything, and also pages that
  the C++ runtime kept for later.

Where both agree, both are right. Where they don't, the difference is scratch, or pages of libraries that were touched
for the first time.
"""

import contextlib
import ctypes
import gc
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on stderr about what it finds no GPU for

MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of mallopt


@dataclass(frozen=True)
class Peak:
    """Bytes above those at the start."""

    allocated: int
    resident: int | None
    """None where the system does not tell."""


def return_memory_at_once() -> None:
    """Have glibc give freed blocks back to the system, so that the resident set follows what is in use.

    Slows every allocation down and holds for the rest of the process: not before anything is timed.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 * 1024)


def peak(run: Callable[[], object]) -> Peak:
    """The peaks of one run, after another that leaves behind what is kept for good."""
    start = time.perf_counter()
    run()
    # pages that the runtime happens to touch for the first time come on top of what is needed; of a long run they are
    # few beside all others
    looks = 3 if time.perf_counter() - start < 1 else 1
    allocated = _peak_allocated(run)
    resident = [seen for seen in (_peak_resident(run) for _ in range(looks)) if seen is not None]
    return Peak(allocated, min(resident, default=None))


def _peak_allocated(run: Callable[[], object]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
    events = [
        event
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


_PROCESS = Path("/proc/self")


def _status(field: str) -> int:
    """A figure of the process's status, in bytes."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _peak_resident(run: Callable[[], object]) -> int | None:
    if not (_PROCESS / "clear_refs").exists():
        return None
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library keeps what it keeps
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def limit_to_free_memory() -> None:
    """Have an allocation that does not fit fail, as an error that can be told, instead of the system ending us."""
    with contextlib.suppress(ImportError, OSError, StopIteration, ValueError):
        import resource

        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = _status("VmData") + int(0.95 * free)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def weights(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)
