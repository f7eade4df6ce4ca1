"""Time by alternation: every candidate runs in turn, in one process, so that whatever else the machine does falls on
all of them alike.

`torch.utils.benchmark` holds the measurements and their statistics. Its `Timer` is not used to take them: it warms
every block up anew, which would triple the time of a model and let the candidates no longer follow one another.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

Run = Callable[[], object]
Clock = Callable[[Run, int], float]
"""Seconds of so many calls in a row."""

GEMM = "GEMM"
"""Name of the matrix product that runs among the candidates."""
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
_BLOCK_SECONDS = 0.004
"""A block of calls that is timed as one lasts at least about this long: the clock and the loop then cost nothing."""


def gemm(dtype: torch.dtype, device: str = "cpu") -> Run:
    """A product of two square matrices: the machine's rate, measured in the same minute as everything else."""
    side, generator = GEMM_SIDE[device], torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def gemm_rate(measurement: Measurement, device: str = "cpu") -> float:
    """Multiply-accumulates per second."""
    return GEMM_SIDE[device] ** 3 / measurement.median


def wall_clock(run: Run, count: int) -> float:
    """The clock of the CPU."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return time.perf_counter() - start


def alternate(
    candidates: Mapping[str, Run],
    min_seconds: float,
    min_rounds: int = 5,
    warm_up: int = 2,
    clock: Clock = wall_clock,
) -> dict[str, Measurement]:
    """Measure candidates in turn.

    Args:
        candidates: by name; each call is one run.
        min_seconds: after these no further round begins, unless there were too few.
        min_rounds: at least these many rounds; but three of a candidate that takes longer than `min_seconds` by itself.
        warm_up: untimed calls of each: the first of a process pays for memory that the others then find.
        clock: how a block of calls is timed.
    """
    blocks, estimates = {}, {}
    for name, run in candidates.items():
        for _ in range(warm_up):
            estimates[name] = clock(run, 1)
        blocks[name] = max(1, math.ceil(_BLOCK_SECONDS / max(estimates[name], 1e-9)))
    slow = {name for name, seconds in estimates.items() if seconds > min_seconds > 0}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    enabled = gc.isenabled()
    gc.disable()
    try:
        end, rounds = time.perf_counter() + min_seconds, 0
        while rounds < min_rounds or time.perf_counter() < end:
            for name, run in candidates.items():
                if rounds >= 3 and name in slow:
                    continue
                times[name].append(clock(run, blocks[name]))
            gc.collect(0)
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    threads = torch.get_num_threads()
    return {
        name: Measurement(
            blocks[name], times[name], TaskSpec(name, setup="", description=name, num_threads=threads)
        )
        for name in candidates
    }


def spread(measurement: Measurement) -> float:
    """The interquartile range as a share of the median."""
    return measurement.iqr / measurement.median
