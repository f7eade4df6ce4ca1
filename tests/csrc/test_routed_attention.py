"""The compiled kernel of `routed_attention`: against a float64 definition, and on wrong arguments.

The operator is called directly, past the checks and the autograd of the public function: what is tested is
what the library does when nothing protects it.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.ops import library

from ..threads import with_threads
from .kernels import (
    EXAMPLES,
    OTHER_CAPABILITIES,
    TOLERANCE,
    WIDE,
    check_gradients,
    check_outputs,
    check_with,
    operator,
)


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    batch: int = 2
    grid: tuple[int, int] = (9, 7)
    kv_grid: tuple[int, int] = (9, 7)
    region: tuple[int, int] = (4, 4)
    kv_region: tuple[int, int] = (4, 4)
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    topk: int = 3
    dtype: torch.dtype = torch.float32
    index: torch.dtype = torch.int64
    weighted: bool = False
    scale: float = 0.5

    @property
    def regions(self) -> int:
        return math.prod(-(-n // r) for n, r in zip(self.grid, self.region, strict=True))

    @property
    def kv_regions(self) -> int:
        return math.prod(-(-n // r) for n, r in zip(self.kv_grid, self.kv_region, strict=True))

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator; q, k and v are strided views of one projection where the grids agree."""
        g = torch.Generator().manual_seed(seed)
        qk, cv = self.heads * self.head_dim, self.heads * self.value_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        if self.grid == self.kv_grid:
            q, k, v = normal(self.batch, *self.grid, 2 * qk + cv).split([qk, qk, cv], -1)
        else:
            q = normal(self.batch, *self.grid, qk)
            k, v = normal(self.batch, *self.kv_grid, qk + cv).split([qk, cv], -1)
        slots = (self.batch, self.regions, self.topk)
        routes = torch.randint(self.kv_regions, slots, generator=g, dtype=self.index)
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        weights = torch.rand(slots, generator=g, dtype=compute) if self.weighted else None
        return [q, k, v, routes, weights, self.region, self.kv_region, self.heads, self.scale]


def fused(*arguments) -> tuple[Tensor, Tensor]:
    return operator("routed_attention")(*arguments)


def definition(q, k, v, routes, weights, region, kv_region, heads, scale) -> tuple[Tensor, Tensor]:
    """Region by region, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    kh, kw = kv_region
    k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % kw, 0, -x.shape[1] % kh)) for x in (k, v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_zeros(*q.shape[:3], heads)
    across, kv_across = -(-q.shape[2] // region[1]), k.shape[2] // kw
    for b in range(q.shape[0]):
        for r in range(routes.shape[1]):
            top, left = r // across * region[0], r % across * region[1]
            here = (b, slice(top, top + region[0]), slice(left, left + region[1]))
            keys, values, factors = [], [], []
            for j, chosen in enumerate(routes[b, r].tolist()):
                y, x = chosen // kv_across * kh, chosen % kv_across * kw
                there = (b, slice(y, y + kh), slice(x, x + kw))
                factor = q.new_ones(()) if weights is None else weights[b, r, j].double()
                keys.append(k[there].reshape(kh * kw, heads, -1))
                values.append(v[there].reshape(kh * kw, heads, -1) * factor)
                factors += [factor] * (kh * kw)
            queries = q[here].unflatten(-1, (heads, -1))
            scores = torch.einsum("yxhd,khd->yxhk", queries, torch.cat(keys)) * scale * torch.stack(factors)
            out[here] = torch.einsum("yxhk,khd->yxhd", scores.softmax(-1), torch.cat(values)).flatten(2)
            lse[here] = scores.logsumexp(-1)
    return out, lse


def assert_matches(case: Case, arguments: list) -> None:
    check_outputs(fused(*arguments), definition(*arguments), arguments[2])


def assert_gradients_match(arguments: list, tolerance: float = 1.0) -> list[Tensor]:
    return check_gradients("routed_attention", arguments, (0, 1, 2, 4), definition, tolerance)


SHAPES = {
    "BiFormer stage 1 at 64": Case(1, (16, 16), (16, 16), (8, 8), (8, 8), 2, 32, 32, 1),
    "BiFormer stage 2 at 56": Case(2, (7, 7), (7, 7), (4, 4), (4, 4), 4, 32, 32, 4),
    "BiFormer stage 3": Case(2, (14, 14), (14, 14), (2, 2), (2, 2), 8, 32, 32, 16),
    "a window of 7": Case(1, (14, 14), (14, 14), (7, 7), (7, 7), 3, 24, 24, 2),
    "single tokens": Case(1, (3, 5), (3, 5), (1, 1), (1, 1), 1, 1, 1, 4),
    "one token in all": Case(1, (1, 1), (1, 1), (1, 1), (1, 1), 1, 3, 5, 1),
    "a region larger than the grid": Case(1, (3, 4), (2, 3), (7, 6), (5, 5), 2, 8, 8, 1),
    "more queries in a region than a block holds": Case(
        1, (20, 20), (20, 20), (20, 10), (10, 10), 1, 16, 16, 3
    ),
    "more keys in a region than a block holds": Case(1, (4, 4), (30, 30), (2, 2), (15, 30), 1, 16, 16, 2),
    "values wider than keys": Case(2, (9, 7), (5, 6), (2, 3), (2, 2), 3, 5, WIDE, 4),
    "keys wider than values": Case(2, (9, 7), (5, 6), (2, 3), (3, 1), 3, WIDE, 6, 4),
    "a different grid of keys": Case(2, (8, 8), (4, 4), (2, 2), (1, 1), 2, 16, 16, 7),
    "regions that do not divide the grid": Case(2, (13, 11), (13, 11), (4, 3), (4, 3), 2, 17, 33, 5),
    "many heads": Case(1, (6, 6), (6, 6), (3, 3), (3, 3), 16, 8, 8, 2),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_matches_the_definition(shape, dtype, weighted):
    case = replace(SHAPES[shape], dtype=dtype, weighted=weighted)
    assert_matches(case, case.arguments())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gradients_match_the_definition(shape, dtype, weighted):
    assert_gradients_match(replace(SHAPES[shape], dtype=dtype, weighted=weighted).arguments())


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))
regions = st.tuples(st.integers(1, 9), st.integers(1, 9))
cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    grid=sizes,
    kv_grid=sizes,
    region=regions,
    kv_region=regions,
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    topk=st.integers(1, 9),
    dtype=st.sampled_from(list(TOLERANCE)),
    index=st.sampled_from([torch.int32, torch.int64]),
    weighted=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, -0.7]),
)


@settings(max_examples=EXAMPLES)
@given(cases, st.integers(0, 99))
def test_matches_the_definition_for_any_sizes(case, seed):
    assert_matches(case, case.arguments(seed))
    assert_gradients_match(case.arguments(seed), 4)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_a_route_may_repeat(index):
    case = Case(index=index)
    arguments = case.arguments()
    arguments[3] = arguments[3][..., :1].repeat(1, 1, 3)
    assert_matches(case, arguments)


def test_any_strides_are_read_and_only_the_last_must_be_one():
    case = Case(grid=(8, 8), kv_grid=(8, 8), weighted=True)
    q, k, v, routes, weights, *rest = case.arguments()
    q = q.transpose(1, 2)
    k = k[:, :, :1].expand(-1, -1, 8, -1)
    v = v.flip(0)[:, ::2].repeat_interleave(2, 1)
    routes = routes.transpose(1, 2).contiguous().transpose(1, 2)
    weights = weights[:1].expand(2, -1, -1)
    assert_matches(case, [q, k, v, routes, weights, *rest])
    assert_gradients_match([q, k, v, routes, weights, *rest])


def test_large_scores_do_not_overflow():
    case = Case(scale=1.0)
    q, k, *rest = case.arguments()
    out, lse = fused(q * 1e3, k * 1e3, *rest)
    expected, expected_lse = definition(q * 1e3, k * 1e3, *rest)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)


def test_a_later_key_that_outweighs_all_others_wins_exactly():
    """Keys beyond the first block of scores: what was summed before must shrink to nothing."""
    case = Case(1, (1, 1), (40, 40), (1, 1), (40, 40), 1, 4, 4, 1, scale=1.0)
    q, k, v, *rest = case.arguments()
    q, k = torch.ones_like(q), k.clone()
    k[0, 39, 39] = 1000.0
    out, _ = fused(q, k, v, *rest)
    assert torch.equal(out[0, 0, 0], v[0, 39, 39])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_so_in_its_row_and_nowhere_else(bad):
    case = Case(1, (4, 4), (4, 4), (2, 2), (2, 2), 1, 8, 8, 2)
    q, *rest = case.arguments()
    clean, _ = fused(q, *rest)
    q = q.clone()
    q[0, 1, 2, 3] = bad
    out, _ = fused(q, *rest)
    changed = out.isnan().any(-1)
    assert changed[0, 1, 2]
    assert changed.sum() == 1
    assert torch.equal(out[~changed], clean[~changed])


def test_halves_of_every_kind_are_read_and_rounded_as_torch_does():
    """Values pass through unchanged where the only key of a region is the token itself."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        v = every[: every.numel() // 16 * 16].reshape(1, 1, -1, 16)
        n = v.shape[2]
        q = torch.zeros(1, 1, n, 1, dtype=dtype)
        out, _ = fused(q, q, v, torch.arange(n).reshape(1, n, 1), None, (1, 1), (1, 1), 1, 1.0)
        if dtype == torch.bfloat16 and library.status().capability == "avx512_bf16":
            # the instruction takes subnormal numbers for zeros
            v = torch.where(v.abs() < torch.finfo(dtype).tiny, torch.zeros_like(v), v)
        assert torch.equal(out, v)

    floats = torch.cat([torch.randn(4096) * 10.0**e for e in range(-9, 6)])
    for dtype in (torch.float16, torch.bfloat16):
        # 3/4 a + 1/4 b needs more places than a half has
        a, b = floats.to(dtype), floats.flip(0).to(dtype)
        a, b = (torch.where(x.isfinite(), x, torch.ones_like(x)) for x in (a, b))
        v = torch.stack([a, a, a, b]).reshape(1, 4, -1, 16).transpose(1, 2).contiguous()
        n = v.shape[1]
        q = torch.zeros(1, n, 1, 1, dtype=dtype)
        k = torch.zeros(1, n, 4, 1, dtype=dtype)
        out, _ = fused(q, k, v, torch.arange(n).reshape(1, n, 1), None, (1, 1), (1, 4), 1, 1.0)
        exact = (v.float().sum(2, keepdim=True) / 4).to(dtype)
        assert (out != exact).float().mean() < 1e-2  # sums in another order may round the other way
        torch.testing.assert_close(out, exact, rtol=0.01, atol=1e-7)


@pytest.mark.parametrize("shape", ["BiFormer stage 1 at 64", "BiFormer stage 3", "values wider than keys"])
def test_the_number_of_threads_does_not_change_a_bit(shape):
    case = replace(SHAPES[shape], batch=5)
    arguments = case.arguments()
    out, lse = fused(*arguments)
    with_threads(lambda: fused(*arguments))
    with_threads(lambda: operator("routed_attention_backward")(out, out, lse, *arguments))


def test_an_image_gives_the_same_bits_alone_and_in_a_batch():
    q, k, v, routes, _, *rest = replace(SHAPES["BiFormer stage 2 at 56"], batch=6).arguments()
    out, _ = fused(q, k, v, routes, None, *rest)
    for b in range(6):
        alone, _ = fused(q[b : b + 1], k[b : b + 1], v[b : b + 1], routes[b : b + 1], None, *rest)
        assert torch.equal(alone[0], out[b])


def test_a_region_far_larger_than_the_grid_costs_nothing():
    case = Case(1, (3, 4), (4, 4), (2**15, 2**15), (4, 4), 1, 8, 8, 1)
    assert_matches(case, case.arguments())


@pytest.mark.parametrize("empty", [{"batch": 0}, {"grid": (0, 7)}, {"topk": 0}], ids=str)
def test_nothing_to_compute_is_no_error(empty):
    case = replace(Case(weighted=True), **empty)
    out, lse = fused(*case.arguments())
    assert out.shape == (case.batch, *case.grid, 16)
    assert lse.shape == (case.batch, *case.grid, 2)
    if case.topk == 0:
        assert not out.any()
        assert (lse == -math.inf).all()
    arguments = case.arguments()
    gradients = operator("routed_attention_backward")(out, out, lse, *arguments)
    for x, gradient in zip((*arguments[:3], arguments[4]), gradients, strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


# --- wrong arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1, -(2**31), 2**40, -(2**63)])
def test_a_route_out_of_range_is_refused(index, bad):
    if bad not in range(torch.iinfo(index).min, torch.iinfo(index).max + 1):
        bad = torch.iinfo(index).max
    arguments = Case(index=index).arguments()
    arguments[3][1, 2, 0] = bad
    allowed = rf"routes\[1, 2, 0\] is {bad}, but there are 6 key regions: allowed are 0 to 5"
    with pytest.raises(IndexError, match=allowed):
        fused(*arguments)


def test_any_route_is_out_of_range_where_there_are_no_keys():
    q, _, _, routes, *rest = Case().arguments()
    k = v = q.new_empty(2, 0, 7, 16)
    with pytest.raises(IndexError, match="there are 0 key regions"):
        fused(q, k, v, routes, *rest)


def _replaced(position: int, change) -> list:
    arguments = Case(weighted=True).arguments()
    arguments[position] = change(arguments[position])
    return arguments


WRONG = {
    "q must have 4 dimensions": (0, lambda q: q[0]),
    "q must be float32, float64, bfloat16 or float16": (0, lambda q: q.int()),
    "k must have the dtype of q, float32, got float64": (1, lambda k: k.double()),
    "v must have the dtype of q, float32, got bfloat16": (2, lambda v: v.bfloat16()),
    "k must have 4 dimensions": (1, lambda k: k[0]),
    "v must have 4 dimensions": (2, lambda v: v[None]),
    "k must have the batch size of q, 2, got 1": (1, lambda k: k[:1]),
    "v must have the batch size of q, 2, got 1": (2, lambda v: v[:1]),
    "k must have the channels of q, 16, got 14": (1, lambda k: k[..., :14]),
    "v must lie on the grid of k, 9 x 7, got 8 x 7": (2, lambda v: v[:, :8]),
    "q must have a positive multiple of num_heads = 2 channels, got 15": (0, lambda q: q[..., :15]),
    "v must have a positive multiple of num_heads = 2 channels, got 0": (2, lambda v: v[..., :0]),
    r"last dimension of q must be contiguous \(stride 1\), got stride 2": (
        0,
        lambda q: q.repeat(1, 1, 1, 2)[..., ::2],
    ),
    "last dimension of v must be contiguous": (2, lambda v: v.transpose(2, 3).contiguous().transpose(2, 3)),
    "routes must be int32 or int64": (3, lambda r: r.to(torch.int16)),
    r"routes must have shape .* = \(2, 6, topk\), got \(2, 5, 3\)": (3, lambda r: r[:, :5]),
    r"routes must have shape .*, got \(1, 6, 3\)": (3, lambda r: r[:1]),
    r"routes must have shape .*, got \(6, 3\)": (3, lambda r: r[0]),
    "weights must be float32 for q of float32, got float64": (4, lambda w: w.double()),
    r"weights must have the shape of routes, \(2, 6, 3\), got \(2, 6, 2\)": (4, lambda w: w[..., :2]),
    r"^routed_attention: region_size must be two positive numbers .*, got \(0, 4\)": (5, lambda _: (0, 4)),
    r"^routed_attention: region_size .*, got \(-4, -4\)": (5, lambda _: (-4, -4)),
    r"^routed_attention: region_size .*, got \(4, 4, 4\)": (5, lambda _: (4, 4, 4)),
    r"kv_region_size must be two positive numbers .*, got \(4, 0\)": (6, lambda _: (4, 0)),
    r"kv_region_size .* got \(9223372036854775807, 9223372036854775807\)": (
        6,
        lambda _: (2**63 - 1, 2**63 - 1),
    ),
    r"kv_region_size .* got \(65536, 65536\)": (6, lambda _: (2**16, 2**16)),
    "num_heads must be at least 1, got 0": (7, lambda _: 0),
    "num_heads must be at least 1, got -2": (7, lambda _: -2),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message):
    with pytest.raises(RuntimeError, match=message):
        fused(*_replaced(*WRONG[message]))


WRONG_OUTPUTS = {
    r"grad must have shape \(2, 9, 7, 16\), got \(1, 9, 7, 16\)": (0, lambda x: x[:1]),
    "grad must be float32, got float64": (0, lambda x: x.double()),
    "the last dimension of grad must be contiguous": (0, lambda x: x[..., :1].expand(-1, -1, -1, 16)),
    r"out must have shape \(2, 9, 7, 16\), got \(2, 9, 7, 8\)": (1, lambda x: x[..., :8]),
    "out must be float32, got bfloat16": (1, lambda x: x.bfloat16()),
    r"lse must have shape \(2, 9, 7, 2\), got \(2, 9, 6, 2\)": (2, lambda x: x[:, :, 1:]),
    "lse must be float32, got float64": (2, lambda x: x.double()),
}


@pytest.mark.parametrize("message", WRONG_OUTPUTS)
def test_what_the_backward_gets_is_checked_too(message):
    arguments = Case().arguments()
    out, lse = fused(*arguments)
    position, change = WRONG_OUTPUTS[message]
    saved = [out, out, lse]
    saved[position] = change(saved[position])
    with pytest.raises(RuntimeError, match=f"routed_attention_backward: {message}"):
        operator("routed_attention_backward")(*saved, *arguments)
    arguments[3] = arguments[3] + 6
    with pytest.raises(IndexError, match="routed_attention_backward: routes"):
        operator("routed_attention_backward")(out, out, lse, *arguments)


@pytest.mark.parametrize(("position", "name"), [(1, "k"), (2, "v"), (3, "routes"), (4, "weights")])
def test_tensors_elsewhere_are_refused(position, name):
    """A tensor without memory stands for any other device; the dispatcher is told to use the CPU kernel."""
    arguments = _replaced(position, lambda x: x.to("meta"))
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{name} must be on the CPU"):
        torch.ops.vitrail.routed_attention.default.redispatch(kernel, *arguments)


def test_a_padded_region_too_large_for_memory_is_an_error_and_not_a_crash():
    case = Case(1, (2, 2), (2, 2), (1, 1), (1, 1), 1, 2**13, 2**13, 1)
    arguments = case.arguments()
    arguments[3].zero_()
    arguments[6] = (2**20, 2**11 - 1)
    with pytest.raises((RuntimeError, MemoryError), match=r"memory|alloc"):
        fused(*arguments)


# --- instruction sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", OTHER_CAPABILITIES)
def test_every_instruction_set_matches_the_definition(capability):
    check_with(capability, __file__)
