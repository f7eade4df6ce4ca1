"""Random arguments for the compiled operators: whatever comes, they must answer or raise, never crash.

Each call starts from arguments that fit together (random sizes, zero among them, dtypes and strides), of which none,
one or a few are then spoiled: other ranks, sizes, dtypes, strides, overlapping memory, indices out of range, numbers
that are huge, negative or not finite. The library is called directly, past the checks of the public functions. A crash
ends the process; the line before it, with --trace, names the call, and the same --seed and --start repeat it.

    python scripts/fuzz_operators.py --calls 1000000
    python scripts/fuzz_operators.py --operators routed_attention --seed 7 --start 4000 --calls 1 --trace
"""

import argparse
import collections
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from vitrail.ops import library, pack_kernel, pack_weight, use_ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MEMORY = 16 * 2**30


class Source:
    """Random numbers and tensors that follow from a seed."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def size(self, most: int = 6) -> int:
        """Mostly small, sometimes zero."""
        return 0 if self.random.random() < 0.03 else self.random.randint(1, most)

    def positive(self, most: int) -> int:
        """At least one."""
        return self.random.randint(1, most)

    def maybe(self, make: Callable[[], Any]) -> Any:
        """An optional argument."""
        return make() if self.random.random() < 0.5 else None

    def floats(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normal numbers, in one of several layouts whose last dimension is contiguous."""
        layout = self.random.choice(("plain", "part", "turned")) if len(shape) > 1 else "plain"
        if layout == "part":
            wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=self.generator)
            return wide.to(dtype)[..., 2 : 2 + shape[-1]]
        x = torch.randn(*shape, generator=self.generator).to(dtype)
        return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "turned" and len(shape) > 2 else x

    def indices(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from `low` to below `high`."""
        dtype = self.random.choice((torch.int64, torch.int32))
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator, dtype=dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- arguments that fit together --------------------------------------------------------------------------------------


def _grids(s: Source) -> dict[str, Any]:
    heads, dtype = s.positive(3), s.random.choice(DTYPES)
    c, cv, batch, grid, kv_grid = (
        heads * s.positive(20), heads * s.positive(20), s.size(3), (s.size(9), s.size(9)), (s.size(9), s.size(9))
    )  # fmt: skip
    return {
        "heads": heads,
        "dtype": dtype,
        "c": c,
        "cv": cv,
        "batch": batch,
        "grid": grid,
        "kv_grid": kv_grid,
    }


def routed_attention(s: Source) -> list[Any]:
    """Routes to some of the regions."""
    g = _grids(s)
    region, kv_region = [s.positive(5), s.positive(5)], [s.positive(5), s.positive(5)]
    regions, kv_regions = (
        math.prod(-(-n // r) for n, r in zip(grid, size, strict=True))
        for grid, size in ((g["grid"], region), (g["kv_grid"], kv_region))
    )
    topk = s.size(5) if kv_regions else 0
    routes = s.indices(0, kv_regions, g["batch"], regions, topk)
    weights = s.maybe(lambda: torch.rand(g["batch"], regions, topk, dtype=wide(g["dtype"])))
    q, k, v = (
        s.floats(g["batch"], *grid, c, dtype=g["dtype"])
        for grid, c in ((g["grid"], g["c"]), (g["kv_grid"], g["c"]), (g["kv_grid"], g["cv"]))
    )
    return [q, k, v, routes, weights, region, kv_region, g["heads"], s.random.random()]


def window_attention(s: Source) -> list[Any]:
    """Windows that need not divide the grid."""
    g = _grids(s)
    window = [s.positive(8), s.positive(8)]
    n = window[0] * window[1]
    q, k, v = (s.floats(g["batch"], *g["grid"], c, dtype=g["dtype"]) for c in (g["c"], g["c"], g["cv"]))
    bias = s.maybe(lambda: s.floats(g["heads"], n, n, dtype=g["dtype"]))
    pads = [s.maybe(lambda c=c: s.floats(c, dtype=g["dtype"])) for c in (g["c"], g["cv"])]
    shift = [s.random.randrange(window[0]), s.random.randrange(window[1])]
    return [q, k, v, bias, *pads, window, shift, g["heads"], s.random.random()]


def semantic_attention(s: Source) -> list[Any]:
    """Patches inside the image."""
    g = _grids(s)
    window = [s.positive(3), s.positive(3)]
    grid = [window[0] * s.size(3), window[1] * s.size(3)]
    image = [s.positive(9), s.positive(9)]
    patch = [s.positive(image[0]), s.positive(image[1])]
    shapes = ((grid, "c"), (image, "c"), (image, "cv"), (grid, "c"), (grid, "cv"))
    tensors = [s.floats(g["batch"], *size, g[c], dtype=g["dtype"]) for size, c in shapes]
    return [*tensors, window, patch, g["heads"], s.random.random()]


def channel_attention(s: Source) -> list[Any]:
    """Three maps alike."""
    g = _grids(s)
    tensors = [s.floats(g["batch"], *g["grid"], g["c"], dtype=g["dtype"]) for _ in range(3)]
    return [*tensors, g["heads"], s.random.random()]


def sparse_attention(s: Source) -> list[Any]:
    """Lists with empty slots."""
    g = _grids(s)
    queries, count = s.size(40), s.positive(150)
    q = s.floats(g["batch"], queries, g["c"], dtype=g["dtype"])
    k, v = (s.floats(g["batch"], count, c, dtype=g["dtype"]) for c in (g["c"], g["cv"]))
    keys = s.indices(-1, count, g["batch"], g["heads"], queries, s.size(40))
    return [q, k, v, keys, g["heads"], s.random.random()]


def connectivity_topk(s: Source) -> list[Any]:
    """All ways to choose."""
    batch, rank, tokens, dtype = s.size(3), s.positive(40), s.positive(80), s.random.choice(DTYPES)
    logits = s.floats(batch, s.positive(3), s.size(20), rank, dtype=dtype)
    basis = s.floats(rank, tokens, dtype=s.random.choice(DTYPES))
    candidates = s.maybe(lambda: s.indices(0, tokens, batch, s.positive(60)))
    most = tokens if candidates is None else candidates.shape[1]
    by_number = s.random.random() < 0.7
    return [
        logits, basis, candidates, s.positive(most) if by_number else 0, s.random.choice((0, 3, 8)), 0.0,
        s.random.choice((0.0, 0.02)), 0.0 if by_number else 0.05,
    ]  # fmt: skip


def connectivity_attention(s: Source) -> list[Any]:
    """The arguments of both, with and without projection and dense queries."""
    logits, basis, candidates, *settings = connectivity_topk(s)
    (batch, heads, queries, rank), dtype = logits.shape, logits.dtype
    tokens = basis.shape[1] if candidates is None else candidates.shape[1]
    width, value_width = s.positive(20), s.positive(20)
    q, k, v = (
        s.floats(batch, count, heads * c, dtype=dtype)
        for count, c in ((queries, width), (tokens, width), (tokens, value_width))
    )
    projection = s.maybe(lambda: s.floats(s.positive(20), width, dtype=wide(dtype)))
    compressed = s.floats(
        batch, rank, heads * (width if projection is None else len(projection)), dtype=wide(dtype)
    )
    offset = s.floats(batch, rank, heads, dtype=wide(dtype))
    counts = [s.random.randint(0, min(queries, 2)), s.random.choice((0, 5)), heads]
    return [q, k, v, compressed, offset, projection, basis, candidates, *settings, *counts, s.random.random()]


def strip_mix(s: Source) -> list[Any]:
    """Rows or columns."""
    axis, groups, dtype = s.random.choice((1, 2)), s.positive(20), s.random.choice(DTYPES)
    size = (s.positive(8), s.positive(8))
    x = s.floats(s.size(3), *size, groups * s.positive(4), dtype=dtype)
    length = size[axis - 1]
    bias = s.maybe(lambda: s.floats(length, groups, dtype=dtype))
    return [x, s.floats(3, length, length, groups, dtype=dtype), bias, axis]


def depthwise_conv(s: Source) -> list[Any]:
    """Any odd kernel, of all images or of each."""
    dtype, channels = s.random.choice(DTYPES), s.positive(40)
    shape = (s.size(3), s.size(9), s.size(9), channels)
    kernel = [2 * s.random.randrange(5) + 1 for _ in range(2)]
    images = [shape[0]] if s.random.random() < 0.3 else []
    weight = torch.randn(*images, *kernel, channels, generator=s.generator).to(wide(dtype))
    bias, scale, shift = (s.maybe(lambda: torch.randn(channels, dtype=wide(dtype))) for _ in range(3))
    residual = s.maybe(lambda: s.floats(*shape, dtype=dtype))
    x = s.floats(*shape, dtype=dtype)
    return [x, weight, bias, residual, scale, shift, s.random.choice(("none", "gelu"))]


def region_route(s: Source) -> list[Any]:
    """Regions that need not divide the grid."""
    batch, c, dtype = s.size(3), s.positive(40), s.random.choice(DTYPES)
    grid, region = [s.positive(9), s.positive(9)], [s.positive(5), s.positive(5)]
    q, k = (s.floats(batch, *grid, c, dtype=dtype) for _ in range(2))
    regions = -(-grid[0] // region[0]) * -(-grid[1] // region[1])
    return [q, k, s.positive(regions), region, region]


def _packed(s: Source) -> tuple[torch.dtype, Tensor, int, int, int]:
    dtype = s.random.choice(DTYPES[:3])
    rows, depth = s.size(200), s.positive(70)
    return dtype, s.floats(rows, depth, dtype=dtype), rows, depth, s.positive(70)


def packed_linear(s: Source) -> list[Any]:
    """With and without further inputs, norm, bias, activation, residual."""
    dtype, x, rows, depth, columns = _packed(s)
    others = [s.maybe(lambda: s.floats(rows, s.positive(40), dtype=dtype)) for _ in range(2)]
    depth += sum(other.shape[1] for other in others if other is not None)
    weight = pack_weight(torch.randn(columns, depth).to(dtype))
    bias = s.maybe(lambda: torch.randn(columns, dtype=wide(dtype)))
    residual = s.maybe(lambda: s.floats(rows, columns, dtype=dtype))
    return [
        x,
        *others,
        weight,
        bias,
        residual,
        columns,
        s.random.choice((-1.0, 1e-5)),
        s.random.choice(("none", "gelu")),
    ]


def packed_conv(s: Source) -> list[Any]:
    """Any kernel that the padded map holds."""
    dtype, channels, columns = s.random.choice(DTYPES[:3]), s.positive(20), s.positive(70)
    size = [s.positive(20), s.positive(20)]
    kernel = [s.positive(min(n, 8)) for n in size]
    padding = [s.random.randrange(taps) for taps in kernel]
    weight = pack_kernel(torch.randn(columns, channels, *kernel).to(dtype))
    bias = s.maybe(lambda: torch.randn(columns, dtype=wide(dtype)))
    x = s.floats(s.size(3), *size, channels, dtype=dtype)
    stride = [s.positive(5), s.positive(5)]
    return [x, weight, bias, columns, kernel, stride, padding]


def packed_mlp(s: Source) -> list[Any]:
    """Two such layers."""
    dtype, x, rows, depth, columns = _packed(s)
    hidden = s.positive(500)
    weights = [pack_weight(torch.randn(n, k).to(dtype)) for n, k in ((hidden, depth), (columns, hidden))]
    biases = [s.maybe(lambda n=n: torch.randn(n, dtype=wide(dtype))) for n in (hidden, columns)]
    residual = s.maybe(lambda: s.floats(rows, columns, dtype=dtype))
    return [x, weights[0], biases[0], weights[1], biases[1], residual, hidden, columns, 1e-5, "gelu"]


def packed_grn_mlp(s: Source) -> list[Any]:
    """Several images in the rows."""
    args = packed_mlp(s)
    x, residual, hidden, columns = args[0], args[5], args[6], args[7]
    images = s.positive(3)
    rows = len(x) // images * images
    grn = torch.randn(hidden, dtype=wide(x.dtype))
    parts = [x[:rows], *args[1:3], grn, *args[3:5], None if residual is None else residual[:rows]]
    return [*parts, images, hidden, columns, 1e-5, 1e-6]


BUILDERS: dict[str, Callable[[Source], list[Any]]] = {
    f.__name__: f
    for f in (
        routed_attention, window_attention, semantic_attention, channel_attention, sparse_attention,
        connectivity_topk, connectivity_attention, strip_mix, depthwise_conv, region_route, packed_linear, packed_mlp,
        packed_grn_mlp, packed_conv,
    )
}  # fmt: skip

# --- and how they are spoiled -----------------------------------------------------------------------------------------

_NUMBERS = (0, -1, 1, 2, 7, 31, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63))


def _spoiled_tensor(s: Source, x: Tensor) -> Any:
    kind = s.random.randrange(12)
    dim = s.random.randrange(max(x.dim(), 1))
    if kind == 0:
        return x.to(
            s.random.choice((*DTYPES, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8))
        )
    if kind == 1:
        return x.unsqueeze(s.random.randint(0, x.dim()))
    if kind == 2 and x.dim():
        return x.sum(dim).to(x.dtype)
    if kind == 3 and x.dim() and x.shape[dim]:
        return x.narrow(dim, 0, s.random.randrange(x.shape[dim]))
    if kind == 4 and x.dim():
        return torch.cat([x, x], dim)
    if kind == 5 and x.dim() > 1:
        return x.transpose(dim, s.random.randrange(x.dim()))
    if kind == 6 and x.dim() and x.shape[dim]:
        return x.narrow(dim, 0, 1).expand(x.shape)  # a stride of zero
    if kind == 7 and x.numel():
        return x.as_strided(x.shape, [s.random.randrange(2) for _ in x.shape], x.storage_offset())
    if kind == 8 and x.numel():
        x = x.clone(memory_format=torch.contiguous_format)
        value = (
            s.random.choice(_NUMBERS)
            if not x.is_floating_point()
            else s.random.choice((math.nan, math.inf, -1e38))
        )
        whole = x.dtype in (torch.int64, torch.int32)
        if x.is_floating_point() or (whole and torch.iinfo(x.dtype).min <= value <= torch.iinfo(x.dtype).max):
            x.view(-1)[s.random.randrange(x.numel())] = value
        return x
    if kind == 9:
        return torch.empty(0, dtype=x.dtype)
    if kind == 10:
        return x.to("meta")
    return torch.randn([s.size(5) for _ in range(s.random.randint(0, 5))]).to(x.dtype)


def spoiled(s: Source, value: Any) -> Any:
    """Something else in place of an argument."""
    if isinstance(value, Tensor):
        return None if s.random.random() < 0.05 else _spoiled_tensor(s, value)
    if value is None:
        return torch.randn([s.size(5) for _ in range(s.random.randint(0, 4))])
    if isinstance(value, int):
        return s.random.choice((*_NUMBERS, value + 1, value - 1))
    if isinstance(value, float):
        return s.random.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300))
    if isinstance(value, str):
        return s.random.choice(("", "relu", "x" * 1000))
    changed = list(value)
    changed[s.random.randrange(len(changed))] = s.random.choice(_NUMBERS)
    return changed


def arguments(name: str, seed: int, number: int) -> tuple[str, list[Any]]:
    """The operator and the arguments of call `number`; backward operators get what their forward ones gave."""
    s = Source(f"{name} {seed} {number}")
    args = BUILDERS[name](s)
    operator = name
    backward = hasattr(torch.ops.vitrail, f"{name}_backward")
    if backward and library.has_kernel(f"vitrail::{name}_backward", "CPU") and s.random.random() < 0.4:
        try:
            outs = getattr(torch.ops.vitrail, name)(*args)
        except Exception:
            outs = None
        if outs is not None:
            operator = f"{name}_backward"
            saved = list(outs) if isinstance(outs, (tuple, list)) else []
            out = saved[0] if saved else outs
            args = [torch.randn(out.shape).to(out.dtype), *saved, *args]
    for _ in range(s.random.choice((0, 0, 1, 1, 2, 3))):
        at = s.random.randrange(len(args))
        args[at] = spoiled(s, args[at])
    return operator, args


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{list(value.stride())}"
    return repr(value)


def run(names: list[str], calls: int, seed: int, start: int, trace: bool, console: Console) -> dict[str, Any]:
    """Call the operators in turn; returns how many calls each answered and refused."""
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    began = time.perf_counter()
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        for number in progress.track(range(start, start + calls), description="calling"):
            name = names[number % len(names)]
            operator, args = arguments(name, seed, number)
            if trace:
                print(number, operator, *map(_described, args), file=sys.stderr, flush=True)
            try:
                getattr(torch.ops.vitrail, operator)(*args)
            except Exception:  # any; what must not happen is that the process ends
                counts[name]["refused"] += 1
            else:
                counts[name]["answered"] += 1
    return {"seed": seed, "calls": calls, "seconds": time.perf_counter() - began, "operators": counts}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calls", type=int, default=100_000, help="how many, over all operators (default: 100000)"
    )
    parser.add_argument(
        "--operators", nargs="+", choices=list(BUILDERS), help="default: all that are compiled"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
    parser.add_argument("--start", type=int, default=0, help="number of the first call (default: 0)")
    parser.add_argument("--trace", action="store_true", help="print every call before it is made")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args()
    if options.calls < 1 or options.start < 0:
        parser.error("--calls must be positive, --start must not be negative")
    with use_ops("fused"):
        library.load()
        compiled = [name for name in BUILDERS if library.has_kernel(f"vitrail::{name}", "CPU")]
        names = options.operators or compiled
        if missing := sorted(set(names) - set(compiled)):
            parser.error(f"{', '.join(missing)} has no compiled kernel")
        # what asks for absurd amounts of memory must be told so by the allocator, not by the system's killer
        # (sanitizers themselves reserve terabytes)
        if "san.so" not in os.environ.get("LD_PRELOAD", ""):
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        console = Console(stderr=True)
        report = run(names, options.calls, options.seed, options.start, options.trace, console)
    if options.json:
        print(json.dumps(report))
    else:
        for name, count in report["operators"].items():
            print(f"{name:20} {count['answered']:8} answered {count['refused']:8} refused")
        print(f"{options.calls} calls in {report['seconds']:.0f} s, no crash")
    return 0


if __name__ == "__main__":
    sys.exit(main())
