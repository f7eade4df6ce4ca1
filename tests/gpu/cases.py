"""A call of every operator at sizes and values drawn from a seed, and what it must give.

What is expected comes from the definitions in float64 on the CPU, of the very numbers that the operator gets.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitrail.ops import (
    channel_attention,
    connectivity_attention,
    connectivity_topk,
    depthwise_conv,
    library,
    region_route,
    response_norm,
    routed_attention,
    semantic_attention,
    sparse_attention,
    strip_mix,
    use_ops,
    window_attention,
)
from vitrail.ops.regions import region_means

from ..csrc.kernels import DEVICE

SEED = int(os.environ.get("VITRAIL_TEST_SEED", "0"))
ON_GPU = DEVICE == "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of results, relative to the largest: two roundings of a half type, which probabilities and results go through, and what
# is left of a float32 that three TF32 products multiply.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Of gradients, relative to the largest or to 1: they start from results that were rounded.
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Draw:
    """Sizes and values, the same for the same seed; `largest` bounds the sides of grids."""

    def __init__(self, key: str, batch: int, largest: int) -> None:
        self.batch, self.largest = batch, largest
        self._sizes = random.Random(f"{SEED} {key}")
        self._values = torch.Generator().manual_seed(self._sizes.randrange(2**31))

    def size(self, low: int, high: int) -> int:
        return self._sizes.randint(low, max(low, high))

    def one_of(self, *choices):
        return self._sizes.choice(choices)

    def grid(self) -> tuple[int, int]:
        return self.size(1, self.largest), self.size(1, self.largest)

    def heads(self) -> tuple[int, int]:
        """Heads, and channels of one."""
        return self.size(1, 4), self.one_of(8, 16, 17, 32, 48, 64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._values)

    def distinct(self, *shape: int, among: int) -> Tensor:
        """Different numbers below `among` along the last dimension."""
        order = torch.rand(*shape[:-1], among, generator=self._values).argsort(-1)
        return order[..., : shape[-1]]

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self._values)


@dataclass(frozen=True)
class Case:
    """A call; `floats` come first among its arguments and are rounded to the dtype that is tested."""

    name: str
    call: Callable[..., Tensor]
    floats: tuple[Tensor, ...]
    wide: tuple[int, ...] = ()
    """Which of the floats stay float32."""
    others: tuple[Tensor, ...] = ()
    differentiable: bool = True
    comparable: Callable[..., Tensor] | None = None
    """From a choice and the arguments to the scores of what was chosen: of equals any may be."""
    may_differ: float = 0.0
    """Share of the tokens where rounding may choose otherwise, which shows in the result."""
    no_gradient: tuple[int, ...] = field(default=())
    """Which of the floats get none."""

    def arguments(self, dtype: torch.dtype, layout: str = "plain") -> tuple[Tensor, ...]:
        """On the device, laid out in memory as `LAYOUTS` say."""
        rounded = [x if i in self.wide else x.to(dtype) for i, x in enumerate(self.floats)]
        laid = LAYOUTS[layout]([x.to(DEVICE) for x in rounded])
        return (*laid, *(x.to(DEVICE) for x in self.others))


# --- layouts ----------------------------------------------------------------------------------------------------------


def _packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Neighbours of one shape, channels apart, are views of one projection."""
    found = list(tensors)
    for i in range(len(found) - 1):
        a, b = found[i], found[i + 1]
        if a.dim() > 2 and a.shape[:-1] == b.shape[:-1] and a.dtype == b.dtype and a.is_contiguous():
            both = torch.cat([a, b], -1).split([a.shape[-1], b.shape[-1]], -1)
            found[i], found[i + 1] = both
    return found


def _awkward(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cut out of more memory, so that rows begin anywhere; what lies around is not a number."""
    found = []
    for x in tensors:
        room = x.new_full([n + 3 for n in x.shape], torch.nan)
        inside = room[tuple(slice(1, 1 + n) for n in x.shape)]
        found.append(inside.copy_(x))
    return found


LAYOUTS: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {
    "plain": list,
    "packed": _packed,
    "awkward": _awkward,
}

# --- one case of every operator ---------------------------------------------------------------------------------------


def _routed_attention(draw: Draw) -> Case:
    heads, width = draw.heads()
    grid, region = draw.grid(), (draw.size(1, 8), draw.size(1, 8))
    kv_grid, kv_region = draw.one_of((grid, region), (draw.grid(), (draw.size(1, 8), draw.size(1, 8))))
    regions, kv_regions = (
        -(-g[0] // r[0]) * -(-g[1] // r[1]) for g, r in ((grid, region), (kv_grid, kv_region))
    )
    topk = draw.size(1, min(kv_regions, 6))
    q = draw.normal(draw.batch, *grid, heads * width)
    k, v = (draw.normal(draw.batch, *kv_grid, heads * width) for _ in range(2))
    routes = draw.distinct(draw.batch, regions, topk, among=kv_regions)
    weights = (draw.normal(draw.batch, regions, topk).sigmoid(),) * draw.one_of(0, 1)

    def call(q, k, v, *rest):
        *soft, routes = rest
        weights = soft[0] if soft else None
        return routed_attention(q, k, v, routes, region, heads, None, kv_region, weights)

    return Case("routed_attention", call, (q, k, v, *weights), (3,), (routes,))


def _window_attention(draw: Draw) -> Case:
    heads, width = draw.heads()
    grid, window = draw.grid(), (draw.size(1, 8), draw.size(1, 8))
    shift = draw.one_of((0, 0), tuple(draw.size(0, w - 1) for w in window))
    kind = draw.one_of("plain", "biased", "padded", "both")
    q, k, v = (draw.normal(draw.batch, *grid, heads * width) for _ in range(3))
    tokens = window[0] * window[1]
    extra = (draw.normal(heads, tokens, tokens),) if kind in ("biased", "both") else ()
    pads = (draw.normal(heads * width), draw.normal(heads * width)) if kind in ("padded", "both") else ()

    def call(q, k, v, *rest):
        bias = rest[0] if extra else None
        key, value = rest[-2:] if pads else (None, None)
        return window_attention(q, k, v, window, heads, None, shift, bias, key, value)

    return Case("window_attention", call, (q, k, v, *extra, *pads), (3,) if extra else ())


def _semantic_attention(draw: Draw) -> Case:
    heads, width = draw.heads()
    window, count = (draw.size(1, 3), draw.size(1, 3)), (draw.size(1, 3), draw.size(1, 3))
    side = (window[0] * count[0], window[1] * count[1])
    image = draw.grid()
    patch = (draw.size(1, image[0]), draw.size(1, image[1]))
    channels = heads * width
    q, own_k, own_v = (draw.normal(draw.batch, *side, channels) for _ in range(3))
    k, v = (draw.normal(draw.batch, *image, channels) for _ in range(2))

    def call(q, own_k, own_v, k, v):
        return semantic_attention(q, k, v, own_k, own_v, window, patch, heads)

    return Case("semantic_attention", call, (q, own_k, own_v, k, v))


def _channel_attention(draw: Draw) -> Case:
    heads, width = draw.heads()
    grid = draw.grid()
    scale = (grid[0] * grid[1]) ** -0.25  # scores are sums over all tokens
    q, k, v = (draw.normal(draw.batch, *grid, heads * width) for _ in range(3))

    def call(q, k, v):
        return channel_attention(q, k, v, heads)

    return Case("channel_attention", call, (scale * q, scale * k, v))


def _sparse_attention(draw: Draw) -> Case:
    heads, width = draw.heads()
    tokens, queries = draw.size(1, draw.largest**2), draw.size(1, draw.largest**2)
    slots = draw.size(1, min(tokens, 100))
    q = draw.normal(draw.batch, queries, heads * width)
    k, v = (draw.normal(draw.batch, tokens, heads * width) for _ in range(2))
    keys = draw.distinct(draw.batch, heads, queries, slots, among=tokens)
    if draw.one_of(True, False):
        keys = torch.where(draw.normal(*keys.shape) < -1, -1, keys)

    def call(q, k, v, keys):
        return sparse_attention(q, k, v, keys, heads)

    return Case("sparse_attention", call, (q, k, v), others=(keys,))


def _strip_mix(draw: Draw) -> Case:
    axis, grid = draw.one_of(1, 2), draw.grid()
    groups, patches = draw.size(1, 40), draw.size(1, 3)
    length = grid[axis - 1]
    x = draw.normal(draw.batch, *grid, groups * patches)
    weight = draw.normal(3, length, length, groups) / (3 * length) ** 0.5
    bias = (draw.normal(length, groups),) * draw.one_of(0, 1)

    def call(x, weight, bias=None):
        return strip_mix(x, weight, bias, axis)

    return Case("strip_mix", call, (x, weight, *bias))


def _depthwise_conv(draw: Draw) -> Case:
    channels, kernel = draw.size(1, 100), (draw.one_of(1, 3, 5, 7), draw.one_of(1, 3, 5, 7))
    x = draw.normal(draw.batch, *draw.grid(), channels)
    each = (draw.batch,) * draw.one_of(0, 1)
    weight = draw.normal(*each, *kernel, channels) / (kernel[0] * kernel[1]) ** 0.5
    given = [draw.one_of(True, False) for _ in range(3)]
    residual = (draw.normal(*x.shape),) * given[0]
    bias = (draw.normal(channels),) * given[1]
    affine = (draw.normal(channels), draw.normal(channels)) if given[2] else ()
    activation = draw.one_of("none", "gelu")

    def call(x, *rest):
        rest = list(rest)
        residual = rest.pop(0) if given[0] else None
        weight = rest.pop(0)
        bias = rest.pop(0) if given[1] else None
        scale, shift = rest if given[2] else (None, None)
        return depthwise_conv(x, weight, bias, residual, scale, shift, activation)

    floats = (x, *residual, weight, *bias, *affine)
    return Case("depthwise_conv", call, floats, tuple(range(1 + given[0], len(floats))))


def _response_norm(draw: Draw) -> Case:
    x = draw.normal(draw.batch, *draw.grid(), draw.size(1, 300))
    weight, activation = draw.normal(x.shape[-1]), draw.one_of("none", "gelu")

    def call(x, weight):
        return response_norm(x, weight, 1e-6, activation)

    return Case("response_norm", call, (x, weight), (1,))


def _region_route(draw: Draw) -> Case:
    grid, region, channels = draw.grid(), (draw.size(1, 8), draw.size(1, 8)), draw.size(1, 100)
    regions = -(-grid[0] // region[0]) * -(-grid[1] // region[1])
    topk = draw.size(1, min(regions, 20))
    q, k = (draw.normal(draw.batch, *grid, channels) for _ in range(2))

    def call(q, k):
        return region_route(q, k, topk, region)

    def scores(chosen, q, k):
        means = (region_means(x.double(), region) for x in (q, k))
        found = next(means) @ next(means).transpose(1, 2)
        assert all(len(set(row)) == topk for row in chosen.flatten(0, 1).tolist())
        return found.gather(2, chosen)

    return Case("region_route", call, (q, k), differentiable=False, comparable=scores)


_THRESHOLD = 0.02


def _choice(draw: Draw, tokens: int) -> tuple[Tensor, int, int]:
    """A basis, and how many keys and coefficients are kept.

    A quarter of its entries is below the threshold, and no more than half of the keys are chosen: of keys whose score is
    zero any might be.
    """
    rows = draw.size(1, 40)
    noise = draw.normal(rows, tokens)
    low = (torch.arange(rows)[:, None] + torch.arange(tokens)) % 4 == 3
    basis = noise.sign() * (0.03 + 0.05 * noise.abs())
    return torch.where(low, 0.1 * basis, basis), draw.size(1, tokens // 2), draw.size(1, min(rows, 8))


def _connectivity_topk(draw: Draw) -> Case:
    heads, tokens, queries = draw.size(1, 4), draw.size(1, draw.largest**2), draw.size(1, draw.largest**2)
    basis, count, coefficients = _choice(draw, tokens)
    # no two logits of a query are equal, in any of the types
    order = draw.distinct(draw.batch, heads, queries, len(basis), among=len(basis))
    logits = (order - len(basis) / 2) / 8

    def call(logits, basis):
        return connectivity_topk(logits, basis, count, coefficients, _THRESHOLD)

    def scores(chosen, logits, basis):
        found = logits.double().softmax(-1)
        kept = torch.zeros_like(found).scatter(-1, logits.topk(coefficients, -1).indices, 1.0)
        rows = torch.nn.functional.threshold(basis.double().abs(), _THRESHOLD, 0.0)
        assert all(len(set(row)) == count for row in chosen.flatten(0, 2).tolist())
        return ((found * kept) @ rows).gather(-1, chosen).sort(-1).values

    return Case("connectivity_topk", call, (logits, basis), (1,), differentiable=False, comparable=scores)


def _connectivity_attention(draw: Draw) -> Case:
    heads, width = draw.heads()
    tokens, queries, dense = draw.size(2, draw.largest**2), draw.size(2, draw.largest**2), draw.size(0, 1)
    basis, count, coefficients = _choice(draw, tokens)
    q = draw.normal(draw.batch, queries, heads * width)
    k, v = (draw.normal(draw.batch, tokens, heads * width) for _ in range(2))
    compressed = draw.normal(draw.batch, len(basis), heads * width) / width**0.5
    offset = draw.normal(draw.batch, len(basis), heads)

    def call(q, k, v, compressed, offset, basis):
        return connectivity_attention(
            q, k, v, compressed, offset, basis, heads, count, coefficients, _THRESHOLD, num_dense=dense
        )

    floats = (q, k, v, compressed, offset, basis)
    return Case("connectivity_attention", call, floats, (3, 4, 5), may_differ=0.02, no_gradient=(3, 4, 5))


CASES: dict[str, Callable[[Draw], Case]] = {
    "routed_attention": _routed_attention,
    "window_attention": _window_attention,
    "semantic_attention": _semantic_attention,
    "channel_attention": _channel_attention,
    "sparse_attention": _sparse_attention,
    "strip_mix": _strip_mix,
    "depthwise_conv": _depthwise_conv,
    "response_norm": _response_norm,
    "region_route": _region_route,
    "connectivity_topk": _connectivity_topk,
    "connectivity_attention": _connectivity_attention,
}


# Operators that others call where gradients are wanted.
_PARTS = {"connectivity_attention": ("connectivity_topk", "sparse_attention")}


def has_kernels(name: str, backward: bool = False) -> bool:
    """Whether compiled kernels do all of an operator on the device."""
    names = [name, *(_PARTS.get(name, ()) if backward else ())]
    backwards = [f"{x}_backward" for x in names if x not in _PARTS] if backward else []
    found = [f"vitrail::{x}" for x in (*names, *backwards)]
    return all(library.has_kernel(x, DEVICE.upper()) for x in found if x in _ALL)


_ALL = frozenset(torch._C._dispatch_get_all_op_names())

# --- running and comparing --------------------------------------------------------------------------------------------


def run(case: Case, arguments: Sequence[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The result, and with a gradient of it those of the floats."""
    if grad is None or not case.differentiable:
        with torch.no_grad():
            return [case.call(*arguments)]
    wanted = [i for i in range(len(case.floats)) if i not in case.no_gradient]
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(arguments[: len(case.floats)])]
    with torch.enable_grad():
        out = case.call(*leaves, *arguments[len(case.floats) :])
        # what pads windows that fit is not used
        grads = torch.autograd.grad(out, [leaves[i] for i in wanted], grad, materialize_grads=True)
    return [out.detach(), *grads]


def expected(case: Case, arguments: Sequence[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The same by the definition, in float64 on the CPU."""
    wide = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in arguments]
    with use_ops("reference"):
        return run(case, wide, None if grad is None else grad.cpu().double())


def gradient_for(out: Tensor) -> Tensor:
    """Random numbers to start a backward pass from."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def check(case: Case, arguments: Sequence[Tensor], backward: bool = True) -> None:
    """The operator on the device against its definition."""
    what = f"{case.name}, seed {SEED}, {[tuple(x.shape) for x in arguments]}"
    (out,) = run(case, arguments)
    if case.comparable is not None:
        host = [x.cpu() for x in arguments[: len(case.floats)]]
        got = case.comparable(out.cpu(), *host)
        want = case.comparable(expected(case, arguments)[0], *host)
        _close(got, want, 1e-5 * _largest(want), 0.0, what)
        return
    assert out.is_contiguous(), what
    assert out.device == arguments[0].device, what
    dtype = arguments[0].dtype
    assert out.dtype == dtype, what
    grad = gradient_for(out) if backward else None
    got, want = run(case, arguments, grad), expected(case, arguments, grad)
    assert case.may_differ or torch.equal(got[0], out), f"{what}: with gradients it gives something else"
    _close(got[0], want[0], TOLERANCE[dtype] * _largest(want[0]), case.may_differ, what)
    for i, (g, w) in enumerate(zip(got[1:], want[1:], strict=True)):
        assert g.shape == w.shape, f"{what}: gradient {i}"
        limit = GRADIENT_TOLERANCE[dtype] * max(1.0, _largest(w))
        # a query that chooses otherwise shows in the gradients of all keys that it meets
        _close(g, w, limit, 1.0 if case.may_differ and i > 0 else case.may_differ, f"{what}: gradient {i}")


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _close(got: Tensor, want: Tensor, limit: float, may_differ: float, what: str) -> None:
    assert got.shape == want.shape, what
    if want.numel() == 0:
        return
    assert bool(got.isfinite().all()), f"{what}: not a number, or infinite"
    error = (got.cpu().double() - want).abs()
    if may_differ:
        rows = error.flatten(0, -2).amax(-1)
        off = float((rows > limit).double().mean())
        assert off <= may_differ, f"{what}: {off:.0%} of the tokens differ by more than {limit:.1e}"
        return
    assert float(error.max()) <= limit, f"{what}: error {float(error.max()):.1e}, allowed {limit:.1e}"
