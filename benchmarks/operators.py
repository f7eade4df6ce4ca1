"""Time of the operators against the best formulations in stock PyTorch, and the machine's GEMM rate.

The candidates run in turn, in one process, so that whatever else the machine does falls on all of them alike.

    python benchmarks/operators.py --batch 1 8 --threads 1 2
    python benchmarks/operators.py --check --batch 1 --min-seconds 0.3
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vitrail.ops import library, region_route, routed_attention, use_ops
from vitrail.ops.regions import merge, partition


@dataclass(frozen=True)
class Setting:
    """One attention layer of BiFormer at 224: side of map, heads of 32 channels, side of region, top-k."""

    name: str
    side: int
    heads: int
    region: int
    topk: int


SETTINGS = (
    Setting("stage 1", 56, 2, 8, 1),
    Setting("stage 2", 28, 4, 4, 4),
    Setting("stage 3", 14, 8, 2, 16),
)
REFERENCES = ("gather + SDPA", "gather + matmul")


@dataclass
class Result:
    """Median milliseconds of each candidate, and what follows from them."""

    setting: str
    batch: int
    threads: int
    milliseconds: dict[str, float]
    speedup: dict[str, float]  # of the fused operator over each reference formulation
    efficiency: float  # fused: share of the GEMM rate measured in the same run
    gemm_gflops: float


def gathered_sdpa(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region: tuple[int, int], heads: int
) -> Tensor:
    """Whole regions picked by a flat `index_select`, then `scaled_dot_product_attention`."""
    b, regions, _ = routes.shape
    index = (routes + regions * torch.arange(b).view(b, 1, 1)).flatten()

    def pick(x: Tensor) -> Tensor:
        chosen = partition(x, region).flatten(0, 1).flatten(1).index_select(0, index)
        return chosen.view(b * regions, -1, heads, x.shape[3] // heads).transpose(1, 2)

    queries = partition(q, region).view(b * regions, -1, heads, q.shape[3] // heads).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, pick(k), pick(v))
    return merge(out.transpose(1, 2).reshape(b, regions, -1, v.shape[3]), region, q.shape[1], q.shape[2])


def gathered_matmul(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, region: tuple[int, int], heads: int
) -> Tensor:
    """The definition: the same gather, then matmul, softmax, matmul."""
    with use_ops("reference"):
        return routed_attention(q, k, v, routes, region, heads)


def medians(candidates: dict[str, Callable[[], object]], min_seconds: float) -> dict[str, float]:
    """Median seconds of each candidate, run in turn for `min_seconds`, five times at least."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + min_seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def measure(setting: Setting, batch: int, threads: int, min_seconds: float) -> Result:
    """Measure one setting; the candidates must agree first."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    channels = setting.heads * 32
    region = (setting.region, setting.region)
    # strided views of one projection, as the model has them
    q, k, v = torch.randn(batch, setting.side, setting.side, 3 * channels).split(channels, -1)
    routes = region_route(q, k, setting.topk, region)
    arguments = (q, k, v, routes, region, setting.heads)
    a, b = torch.randn(2, 768, 768)
    candidates: dict[str, Callable[[], object]] = {
        "fused": partial(routed_attention, *arguments),
        REFERENCES[0]: partial(gathered_sdpa, *arguments),
        REFERENCES[1]: partial(gathered_matmul, *arguments),
        "gemm": partial(torch.mm, a, b),
    }
    for name in REFERENCES:
        torch.testing.assert_close(candidates["fused"](), candidates[name](), rtol=1e-4, atol=1e-5)
    seconds = medians(candidates, min_seconds)
    gemm = 2 * 768**3 / seconds.pop("gemm")
    keys = setting.topk * setting.region**2
    flops = 4 * batch * setting.side**2 * keys * channels
    return Result(
        setting=setting.name,
        batch=batch,
        threads=threads,
        milliseconds={name: value * 1e3 for name, value in seconds.items()},
        speedup={name: seconds[name] / seconds["fused"] for name in REFERENCES},
        efficiency=flops / seconds["fused"] / gemm,
        gemm_gflops=gemm / 1e9,
    )


def table(results: list[Result], capability: str | None) -> Table:
    """The results, a line for each setting."""
    view = Table(title=f"routed_attention, float32, {capability}: median milliseconds (speed-up of fused)")
    for heading in ("threads", "batch", "setting", "fused", *REFERENCES, "of GEMM rate", "GEMM GFLOP/s"):
        view.add_column(heading, justify="left" if heading == "setting" else "right")
    for r in results:
        references = [f"{r.milliseconds[name]:.3f} ({r.speedup[name]:.2f}x)" for name in REFERENCES]
        fused = f"{r.milliseconds['fused']:.3f}"
        row = (
            r.threads,
            r.batch,
            r.setting,
            fused,
            *references,
            f"{r.efficiency:.0%}",
            f"{r.gemm_gflops:.0f}",
        )
        view.add_row(*map(str, row))
    return view


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default: 1, and torch's own)")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="time for each setting (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit 1 where fused is slower than a reference")
    options = parser.parse_args()
    if min(options.batch + (options.threads or [])) < 1 or options.min_seconds < 0:
        parser.error("batch sizes and thread counts must be positive, --min-seconds must not be negative")
    threads = options.threads or sorted({1, torch.get_num_threads()})
    try:
        with use_ops("fused"):
            library.load()
            results = [
                measure(setting, batch, count, options.min_seconds)
                for count in threads
                for batch in options.batch
                for setting in SETTINGS
            ]
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    capability = library.status().capability
    if options.json:
        machine = {"cpu": cpu_name(), "capability": capability, "torch": torch.__version__}
        print(json.dumps(machine | {"results": [asdict(r) for r in results]}, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table(results, capability))
    if not options.check:
        return 0
    slower = [r for r in results if not confirmed_faster(r, options.min_seconds)]
    for r in slower:
        print(f"slower than a reference: {r.setting}, batch {r.batch}, {r.threads} threads", file=sys.stderr)
    return 1 if slower else 0


def confirmed_faster(result: Result, min_seconds: float) -> bool:
    """Whether fused is the fastest; measured twice more before it is called slower, as machines are busy."""
    setting = next(s for s in SETTINGS if s.name == result.setting)
    for _ in range(2):
        if min(result.speedup.values()) >= 1:
            return True
        with use_ops("fused"):
            result = measure(setting, result.batch, result.threads, 2 * min_seconds)
    return min(result.speedup.values()) >= 1


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
