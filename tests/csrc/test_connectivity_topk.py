"""The compiled kernel of `connectivity_topk`: against a float64 definition, and on wrong arguments.

The operator is called directly, past the checks of the public function: what is tested is what the library does when
nothing protects it.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.ops.connectivity_topk import fits_gpu

from .kernels import EXAMPLES, GPU_KERNELS, operator
from .kernels import TOLERANCE as COMPUTED

BASIS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# of a sum of up to n products, relative to the largest score
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 2e-6, torch.float16: 2e-6}


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    batch: int = 2
    heads: int = 2
    queries: int = 37
    rows: int = 19
    tokens: int = 41
    candidates: int | None = None
    num_keys: int = 11
    num_coefficients: int = 8
    coefficient_threshold: float = 0.0
    basis_threshold: float = 0.5
    score_threshold: float = 0.0
    dtype: torch.dtype = torch.float32
    basis_dtype: torch.dtype = torch.float32
    index: torch.dtype = torch.int64
    spread: float = 1.0  # of the logits

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator; the basis is a view of a parameter with one row per token."""
        g = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.heads, self.queries, self.rows)
        logits = (torch.randn(shape, generator=g, dtype=torch.float64) * self.spread).to(self.dtype)
        basis = torch.randn(self.tokens, self.rows, generator=g, dtype=torch.float64).to(self.basis_dtype).t()
        candidates = None
        if self.candidates is not None:
            lists = [torch.randperm(self.tokens, generator=g)[: self.candidates] for _ in range(self.batch)]
            candidates = (
                torch.stack(lists).to(self.index) if lists else torch.zeros(0, self.candidates).to(self.index)
            )
        thresholds = (self.coefficient_threshold, self.basis_threshold, self.score_threshold)
        return [logits, basis, candidates, self.num_keys, self.num_coefficients, *thresholds]


choose = operator("connectivity_topk")


def scores(
    logits, basis, candidates, num_keys, num_coefficients, coefficient_threshold, basis_threshold, _
) -> Tensor:
    """The definition's scores in float64, of what the operator's own precision makes of the arguments."""
    coefficients = logits.double().softmax(-1)
    kept = coefficients > coefficient_threshold
    if 0 < num_coefficients < logits.shape[-1]:
        # of equal ones the first
        largest = logits.double().argsort(dim=-1, descending=True, stable=True)[..., :num_coefficients]
        kept = torch.zeros_like(kept).scatter(-1, largest, True)
    if logits.dtype != torch.float64:
        basis = basis.float()
    rows = basis.double().abs()
    rows = torch.where(rows > basis_threshold, rows, 0)
    if candidates is not None:
        rows = rows.t()[candidates.long()].mT.unsqueeze(1)
    return (coefficients * kept) @ rows


def assert_chooses_the_largest(arguments: list) -> None:
    keys = choose(*arguments)
    logits, _, _, num_keys, *_ = arguments
    all_scores = scores(*arguments)
    tokens = all_scores.shape[-1]
    assert keys.dtype == torch.int64
    assert keys.is_contiguous()
    assert keys.shape == (*logits.shape[:3], num_keys or tokens)
    slots = torch.where(keys < 0, tokens, keys)
    chosen = torch.zeros(*keys.shape[:3], tokens + 1).scatter_add(-1, slots, torch.ones(keys.shape))[
        ..., :tokens
    ]
    assert chosen.max() <= 1, "a key was chosen twice"
    rounding = TOLERANCE[logits.dtype] * all_scores.max()
    if num_keys == 0:
        threshold = arguments[-1]
        assert (all_scores[chosen == 1] > threshold - rounding).all()
        assert (all_scores[chosen == 0] <= threshold + rounding).all()
        return
    assert torch.equal(keys, keys.sort(-1).values)
    worst_kept = torch.where(chosen == 1, all_scores, math.inf).amin(-1)
    best_left = torch.where(chosen == 0, all_scores, -math.inf).amax(-1)
    assert (worst_kept >= best_left - rounding).all()


SHAPES = {
    "Sparsifiner at 224": Case(1, 6, 60, 32, 197, num_keys=50, basis_threshold=1.0),
    "Sparsifiner at 512": Case(1, 2, 33, 170, 1025, num_keys=257, basis_threshold=1.0),
    "more keys than are collected": Case(1, 1, 7, 20, 3000, num_keys=700),
    "pruned": Case(3, 2, 20, 32, 197, candidates=99, num_keys=50, index=torch.int32),
    "one key of one": Case(1, 1, 1, 1, 1, num_keys=1, num_coefficients=1),
    "all keys": Case(num_keys=41),
    "one key": Case(num_keys=1),
    "all coefficients": Case(num_coefficients=0),
    "more coefficients than rows": Case(num_coefficients=99),
    "one coefficient": Case(num_coefficients=1),
    "coefficients above a threshold": Case(num_coefficients=0, coefficient_threshold=0.05),
    "no coefficient": Case(num_coefficients=0, coefficient_threshold=1.0),
    "twelve coefficients": Case(num_coefficients=12),
    "scores above a threshold": Case(num_keys=0, score_threshold=0.3),
    "candidates above a threshold": Case(candidates=17, num_keys=0, score_threshold=0.3),
    "few scores that are not zero": Case(basis_threshold=2.5),
    "no score that is not zero": Case(basis_threshold=9.0),
    "whole steps of a warp": Case(1, 1, 9, 32, 128, num_keys=32),
    "a key more than a step": Case(1, 3, 3, 33, 129, num_keys=128),
    "more rows than keys": Case(rows=150, tokens=30),
    "many keys of a few": Case(1, 1, 2, 65, 16384, num_keys=4096),
    "a basis in float64": Case(basis_dtype=torch.float64),
    "a basis in bfloat16": Case(basis_dtype=torch.bfloat16),
    "a basis in float16": Case(basis_dtype=torch.float16),
}


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_chooses_where_the_mixture_is_largest(shape, dtype):
    assert_chooses_the_largest(replace(SHAPES[shape], dtype=dtype).arguments())


cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 40),
    rows=st.integers(1, 40),
    tokens=st.integers(20, 90),
    candidates=st.sampled_from([None, 20]),
    num_keys=st.integers(1, 20),
    num_coefficients=st.integers(0, 20),
    basis_threshold=st.sampled_from([0.0, 1.0, 2.5]),
    dtype=st.sampled_from(list(COMPUTED)),
    basis_dtype=st.sampled_from(BASIS_DTYPES),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
)


@settings(max_examples=EXAMPLES * 3 // 2)
@given(cases, st.integers(0, 99))
def test_chooses_where_the_mixture_is_largest_for_any_sizes(case, seed):
    assert_chooses_the_largest(case.arguments(seed))


def test_any_strides_are_read():
    logits, basis, candidates, *rest = Case(candidates=23).arguments()
    want = choose(logits, basis, candidates, *rest)
    strided = logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(choose(strided, basis, candidates, *rest), want)
    assert torch.equal(choose(logits, basis.contiguous(), candidates, *rest), want)
    assert torch.equal(choose(logits, basis.repeat_interleave(2, 1)[:, ::2], candidates, *rest), want)
    assert torch.equal(choose(logits, basis, candidates.t().contiguous().t(), *rest), want)


def test_equal_scores_give_the_first_keys():
    logits, basis = torch.zeros(1, 1, 3, 4), torch.ones(4, 100)
    assert torch.equal(choose(logits, basis, None, 30, 2, 0.0, 0.0, 0.0)[0, 0, 1], torch.arange(30))
    basis[:, 50:60] = 2
    want = torch.tensor([0, 1, 2, *range(50, 60)])
    assert torch.equal(choose(logits, basis, None, 13, 2, 0.0, 0.0, 0.0)[0, 0, 2], want)


@pytest.mark.parametrize("order", ["rising", "falling", "steps", "far apart"])
def test_rows_unlike_those_before_them_are_searched_all_the_same(order):
    """What one row teaches about the next is wrong here, time after time."""
    generator = torch.Generator().manual_seed(0)
    scale = {
        "rising": torch.logspace(-30, 30, 64),
        "falling": torch.logspace(30, -30, 64),
        "steps": torch.ones(64),
        "far apart": torch.tensor([1e-38, 1e38]).repeat(32),
    }[order]
    basis = torch.rand(64, 500, generator=generator, dtype=torch.float64)
    if order == "steps":
        basis = (basis * 5).floor() + torch.arange(500) / 1e9
    basis = basis.float().double() * scale[:, None]
    logits = torch.eye(64, dtype=torch.float64)[None, None] * 1e4
    arguments = [logits.float(), basis.float(), None, 77, 1, 0.0, 0.0, 0.0]
    chosen = choose(*arguments)[0, 0]
    for row, keys in zip(basis.float(), chosen, strict=True):
        values = row[keys].sort().values
        assert torch.equal(values, row.sort().values[-77:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_gives_keys_all_the_same(bad):
    arguments = Case().arguments()
    clean = choose(*arguments)
    arguments[0][0, 1, 5, 3] = bad
    keys = choose(*arguments)
    assert keys.min() >= 0
    assert keys.max() < 41
    assert (keys.diff(dim=-1) > 0).all()
    keys[0, 1, 5] = clean[0, 1, 5]
    assert torch.equal(keys, clean)
    arguments[1] = arguments[1].clone()
    arguments[1][:, 7] = bad
    keys = choose(*arguments)
    assert (keys.diff(dim=-1) > 0).all()


def test_the_number_of_threads_does_not_change_the_choice(assert_same_bits_on_any_number_of_threads):
    for case in (replace(SHAPES["Sparsifiner at 224"], batch=3), replace(SHAPES["pruned"], batch=5)):
        arguments = case.arguments()
        assert_same_bits_on_any_number_of_threads(lambda arguments=arguments: (choose(*arguments),))


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"tokens": 0, "num_keys": 0}, {"candidates": 0, "num_keys": 0}],
    ids=str,
)  # fmt: skip
def test_nothing_to_choose_is_no_error(empty):
    case = replace(Case(), **empty)
    slots = case.num_keys
    assert choose(*case.arguments()).shape == (case.batch, case.heads, case.queries, slots)


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-1, 41, 2**31 - 1, 2**40, 2**32 + 3, -(2**63)])
def test_a_candidate_out_of_range_is_refused(index, bad):
    if bad not in range(torch.iinfo(index).min, torch.iinfo(index).max + 1):
        bad = torch.iinfo(index).max
    arguments = Case(candidates=20, index=index).arguments()
    arguments[2][1, 13] = bad
    with pytest.raises(
        IndexError, match=rf"candidates\[1, 13\] is {bad}, but the basis has 41 tokens: allowed are 0 to 40"
    ):
        choose(*arguments)


def test_any_candidate_is_out_of_range_where_there_are_no_tokens():
    logits, basis, candidates, *rest = Case(candidates=20).arguments()
    with pytest.raises(IndexError, match="the basis has 0 tokens"):
        choose(logits, basis[:, :0], candidates, *rest)


WRONG = {
    "logits must have 4 dimensions": (0, lambda logits: logits[0]),
    "logits must be float32, float64, bfloat16 or float16": (0, lambda logits: logits.int()),
    r"basis must have one row per logit, shape \(19 .*\), got \(18, 41\)": (1, lambda basis: basis[1:]),
    r"basis must have one row per logit, .* got \(19\)": (1, lambda basis: basis[:, 0]),
    "basis must be float32, float64, bfloat16 or float16": (1, lambda basis: basis.long()),
    "candidates must be int32 or int64": (2, lambda candidates: candidates.to(torch.int16)),
    r"candidates must have shape \(B, keys\) = \(2, keys\), got \(1, 20\)": (2, lambda candidates: candidates[:1]),
    r"candidates must have shape .*, got \(20\)": (2, lambda candidates: candidates[0]),
    "num_keys must lie between 0 and the number of keys, 20, got 21": (3, lambda _: 21),
    "num_keys must lie between 0 and the number of keys, 20, got -1": (3, lambda _: -1),
    "num_coefficients must not be negative, got -1": (4, lambda _: -1),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message):
    position, change = WRONG[message]
    arguments = Case(candidates=20).arguments()
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=f"^connectivity_topk: {message}"):
        choose(*arguments)


def test_logits_of_no_rows_are_refused():
    with pytest.raises(RuntimeError, match="one row per logit"):
        choose(torch.zeros(1, 1, 1, 0), torch.zeros(0, 5), None, 1, 0, 0.0, 0.0, 0.0)


@pytest.mark.skipif(not GPU_KERNELS, reason="the CPU takes float64")
def test_float64_is_refused():
    arguments = Case(dtype=torch.float64).arguments()
    with pytest.raises(RuntimeError, match=r"logits must be .* on a GPU, got float64; VITRAIL_OPS=reference"):
        choose(*arguments)


@pytest.mark.skipif(not GPU_KERNELS, reason="the CPU has memory for any number")
def test_more_than_a_block_of_threads_has_memory_for_is_refused():
    case = Case(1, 1, 1, 100, 24 * 1024 - 200, num_keys=5)
    assert fits_gpu(*case.arguments()[:3])
    assert_chooses_the_largest(case.arguments())
    arguments = replace(case, tokens=case.tokens + 1).arguments()
    assert not fits_gpu(*arguments[:3])
    with pytest.raises(
        RuntimeError, match="twice the rows must be at most 24576, got 24577; VITRAIL_OPS=reference"
    ):
        choose(*arguments)


@pytest.mark.parametrize(("position", "name"), [(1, "basis"), (2, "candidates")])
def test_tensors_elsewhere_are_refused(position, name):
    """A tensor without memory stands for any other device; the dispatcher is told to use the CPU kernel."""
    arguments = Case(candidates=20).arguments()
    arguments[position] = arguments[position].to("meta")
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{name} must be on the CPU"):
        torch.ops.vitrail.connectivity_topk.default.redispatch(kernel, *arguments)


def test_a_choice_too_large_for_memory_is_an_error_and_not_a_crash():
    basis = torch.zeros(1, 1).expand(2**14, 2**30 - 1)
    with pytest.raises((RuntimeError, MemoryError), match=r"memory|alloc"):
        choose(torch.zeros(1, 1, 1, 2**14), basis, None, 1, 8, 0.0, 0.0, 0.0)


def test_every_instruction_set_matches_the_definition(lesser_instruction_set):
    """The tests above again: the fixture does it."""
