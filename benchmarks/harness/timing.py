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

GEMM = "GEMM"
"""Name of the matrix product that runs among the candidates."""
_GEMM_SIDE = 1024
_BLOCK_SECONDS = 0.004
"""A block of calls that is timed as one lasts at least about this long: the clock and the loop then cost nothing."""


def gemm(dtype: torch.dtype) -> Run:
    """A product of two square matrices: the machine's rate, measured in the same minute as everything else."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_GEMM_SIDE, _GEMM_SIDE, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def gemm_rate(measurement: Measurement) -> float:
    """Multiply-accumulates per second."""
    return _GEMM_SIDE**3 / measurement.median


def alternate(
    candidates: Mapping[str, Run], min_seconds: float, min_rounds: int = 5, warm_up: int = 2
) -> dict[str, Measurement]:
    """Measure candidates in turn.

    Args:
        candidates: by name; each call is one run.
        min_seconds: after these no further round begins, unless there were too few.
        min_rounds: at least these many rounds; but three of a candidate that takes longer than `min_seconds` by itself.
        warm_up: untimed calls of each: the first of a process pays for memory that the others then find.
    """
    blocks, estimates = {}, {}
    for name, run in candidates.items():
        for _ in range(warm_up):
            start = time.perf_counter()
            run()
            estimates[name] = time.perf_counter() - start
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
                start = time.perf_counter()
                for _ in range(blocks[name]):
                    run()
                times[name].append(time.perf_counter() - start)
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
