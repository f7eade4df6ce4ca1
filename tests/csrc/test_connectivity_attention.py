"""The compiled kernel of `connectivity_attention`: against a float64 definition, and on wrong arguments.

The operator is called directly, past the checks and the autograd of the public function: what is tested is what the
library does when nothing protects it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.ops.connectivity_attention import composed

from .kernels import EXAMPLES, GPU_KERNELS, TOLERANCE, WIDE, on_device, operator


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    batch: int = 2
    queries: int = 41
    tokens: int = 41
    rows: int = 19
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    compressed_dim: int | None = None
    candidates: int | None = None
    num_keys: int = 11
    num_coefficients: int = 8
    coefficient_threshold: float = 0.0
    basis_threshold: float = 0.5
    score_threshold: float = 0.0
    num_dense: int = 1
    num_pruned: int = 0
    dtype: torch.dtype = torch.float32
    scale: float = 0.5

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator; q, k and v are strided views of one projection where there are enough tokens."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        c, cv = self.heads * self.head_dim, self.heads * self.value_dim
        keys = self.candidates or self.tokens
        q, k, v = normal(self.batch, max(self.queries, keys), 2 * c + cv).split([c, c, cv], -1)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        width = self.compressed_dim or self.head_dim
        compressed = normal(self.batch, self.rows, self.heads * width).to(wide) / width**0.5
        projection = None
        if self.compressed_dim is not None:
            projection = normal(self.compressed_dim, self.head_dim).to(wide) / self.head_dim**0.5
        offset = normal(self.batch, self.heads, self.rows).to(wide).mT
        basis = normal(self.tokens, self.rows).t()
        candidates = None
        if self.candidates is not None:
            lists = [torch.randperm(self.tokens, generator=g)[: self.candidates] for _ in range(self.batch)]
            candidates = torch.stack(lists)
        thresholds = (self.coefficient_threshold, self.basis_threshold, self.score_threshold)
        q, k, v = q[:, : self.queries], k[:, :keys], v[:, :keys]
        tensors = [q, k, v, compressed, offset, projection, basis, candidates]
        numbers = [self.num_keys, self.num_coefficients, *thresholds, self.num_dense, self.num_pruned]
        return [*tensors, *numbers, self.heads, self.scale]


fused = operator("connectivity_attention")


def gap(x: Tensor, count: int) -> Tensor:
    """Between the smallest of the `count` largest and the largest of the others."""
    if not 0 < count < x.shape[-1]:
        return torch.full(x.shape[:-1], math.inf)
    ranked = x.sort(-1, descending=True).values
    return ranked[..., count - 1] - ranked[..., count]


def definition(
    q, k, v, compressed, offset, projection, basis, candidates, num_keys, num_coefficients, coefficient_threshold, basis_threshold,
    score_threshold, num_dense, num_pruned, heads, scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result in float64, and which queries' choice is clear: rounding may decide that of the others."""
    q, k, v, compressed = (
        x.double().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v, compressed)
    )
    logits = (q if projection is None else q @ projection.double().mT) @ compressed.mT + offset.double().mT[
        :, :, None
    ]
    coefficients = logits.softmax(-1)
    kept = coefficients > coefficient_threshold
    clear = (coefficients - coefficient_threshold).abs().amin(-1) > 1e-6 * (coefficient_threshold > 0)
    if 0 < num_coefficients < logits.shape[-1]:
        kept = torch.zeros_like(kept).scatter(-1, logits.topk(num_coefficients, -1).indices, True)
        clear &= gap(logits, num_coefficients) > 1e-4
    rows = basis.double().abs()
    rows = torch.where(rows > basis_threshold, rows, 0)
    rows = rows.expand(len(q), -1, -1) if candidates is None else rows.t()[candidates].mT
    scores = (coefficients * kept) @ rows.unsqueeze(1)
    if num_keys > 0:
        visible = torch.zeros_like(scores, dtype=torch.bool).scatter(
            -1, scores.topk(num_keys, -1).indices, True
        )
        clear &= gap(scores, num_keys) > 1e-5
    else:
        visible = scores > score_threshold
        clear &= (scores - score_threshold).abs().amin(-1) > 1e-5
    visible[:, :, :num_dense] = True
    clear[:, :, :num_dense] = True
    attention = (q @ k.mT * scale).masked_fill(~visible, -math.inf)
    nothing = attention.new_zeros(*attention.shape[:3], num_pruned)
    nothing[:, :, num_dense:] = -math.inf
    weights = torch.cat([attention, nothing], -1).softmax(-1)[..., : k.shape[2]]
    out = weights.masked_fill(~visible, 0) @ v
    return out.transpose(1, 2).flatten(2), clear.transpose(1, 2).repeat_interleave(v.shape[3], 2)


def assert_matches(case: Case, arguments: list, attend: Callable[..., Tensor] = fused) -> None:
    out = attend(*arguments)
    expected, clear = definition(*arguments)
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    assert out.shape == expected.shape
    if case.dtype == torch.float64:
        clear = torch.ones_like(clear)
    assert clear.float().mean() > 0.5
    error = (out.double() - expected).abs() * clear
    # errors of single elements, relative to the values that were averaged
    assert error.max() <= TOLERANCE[case.dtype] * arguments[2].double().abs().max()


SHAPES = {
    "Sparsifiner at 224": Case(1, 70, 70, 32, 6, 64, 64, num_keys=18),
    "many keys": Case(1, 300, 300, 50, 1, 16, 16, num_keys=75),
    "more queries than a task takes": Case(1, 150, 150, 19, 1, 8, 8),
    "pruned": Case(candidates=23, queries=23, num_pruned=18),
    "projected queries": Case(compressed_dim=5),
    "projected queries of Sparsifiner at 512": Case(1, 20, 65, 70, 2, 64, 64, 32, num_keys=17),
    "no dense query": Case(num_dense=0),
    "dense queries only": Case(num_dense=41),
    "more dense queries than a block holds": Case(queries=90, num_dense=80),
    "fewer queries than keys": Case(queries=9),
    "one token in all": Case(1, 1, 1, 1, 1, 3, 5, num_keys=1, num_dense=0),
    "the class token alone": Case(1, 1, 1, 1, 1, 3, 5, num_keys=1),
    "values wider than keys": Case(heads=3, head_dim=5, value_dim=WIDE),
    "keys wider than values": Case(heads=3, head_dim=WIDE, value_dim=6),
    "all keys": Case(num_keys=41),
    "one key": Case(num_keys=1),
    "all coefficients": Case(num_coefficients=0),
    "coefficients above a threshold": Case(num_coefficients=0, coefficient_threshold=0.05),
    "scores above a threshold": Case(num_keys=0, score_threshold=0.6),
    "no score above the threshold": Case(num_keys=0, score_threshold=9.0),
    "a negative scale": Case(scale=-0.7),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype):
    case = replace(SHAPES[shape], dtype=dtype)
    assert_matches(case, case.arguments())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_operators_one_after_the_other_match_it_too(shape, dtype):
    case = replace(SHAPES[shape], dtype=dtype)
    assert_matches(case, case.arguments(), on_device(composed))


cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    queries=st.integers(2, 50),
    tokens=st.integers(20, 60),
    rows=st.integers(1, 40),
    heads=st.integers(1, 3),
    head_dim=st.integers(4, 40),
    value_dim=st.integers(1, 40),
    compressed_dim=st.sampled_from([None, 1, 19]),
    candidates=st.sampled_from([None, 20]),
    num_keys=st.integers(1, 20),
    num_coefficients=st.integers(0, 20),
    num_dense=st.integers(0, 2),
    num_pruned=st.integers(0, 5),
    basis_threshold=st.just(0.0),
    dtype=st.sampled_from(list(TOLERANCE)),
)


@settings(max_examples=EXAMPLES)
@given(cases, st.integers(0, 99))
def test_matches_the_definition_for_any_sizes(case, seed):
    assert_matches(case, case.arguments(seed))


def test_any_strides_are_read_and_only_the_last_must_be_one():
    case = Case(candidates=23, queries=23, compressed_dim=5)
    q, k, v, compressed, offset, projection, basis, candidates, *rest = case.arguments()
    projection = projection.t().contiguous().t()
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k = k[:1].expand(2, -1, -1)
    v = v.repeat_interleave(2, 1)[:, ::2]
    compressed = compressed.transpose(0, 1).contiguous().transpose(0, 1)
    offset = offset.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for matrix in (basis, basis.contiguous()):
        assert_matches(case, [q, k, v, compressed, offset, projection, matrix, candidates, *rest])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_so_in_its_row_and_nowhere_else(bad):
    q, *rest = Case(1, heads=1).arguments()
    clean = fused(q, *rest)
    q = q.clone()
    q[0, 5, 3] = bad
    out = fused(q, *rest)
    changed = (out != clean).any(-1)
    assert out[0, 5].isnan().all()
    assert changed.sum() == 1


@pytest.mark.parametrize("position", [3, 4, 5, 6], ids=["compressed", "offset", "projection", "basis"])
def test_a_choice_by_what_is_not_a_number_is_some_choice(position):
    arguments = Case(compressed_dim=5).arguments()
    arguments[position] = torch.full_like(arguments[position], math.nan)
    assert fused(*arguments).isfinite().all()


def test_the_number_of_threads_does_not_change_a_bit(assert_same_bits_on_any_number_of_threads):
    for name in ("Sparsifiner at 224", "pruned", "more queries than a task takes"):
        arguments = replace(SHAPES[name], batch=3).arguments()
        assert_same_bits_on_any_number_of_threads(lambda arguments=arguments: (fused(*arguments),))


@pytest.mark.skipif(GPU_KERNELS, reason="a GPU's products of matrices may round by the batch")
def test_an_image_gives_the_same_bits_alone_and_in_a_batch():
    arguments = Case(batch=6, candidates=23, queries=23).arguments()
    out = fused(*arguments)
    for b in range(6):
        alone = [x[b : b + 1] if i != 6 and isinstance(x, Tensor) else x for i, x in enumerate(arguments)]
        assert torch.equal(fused(*alone)[0], out[b])


EMPTY = [{"batch": 0}, {"queries": 0, "num_dense": 0}]
if not GPU_KERNELS:  # sparse_attention, which attends there, wants a key
    EMPTY.append({"tokens": 0, "num_keys": 0, "queries": 3})


@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_nothing_to_compute_is_no_error(empty):
    case = replace(Case(), **empty)
    out = fused(*case.arguments())
    assert out.shape == (case.batch, case.queries, 16)
    assert not out.any()


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 41, 2**40, 2**32 + 3, -(2**63)])
def test_a_candidate_out_of_range_is_refused(bad):
    arguments = Case(candidates=23, queries=23).arguments()
    arguments[7][1, 13] = bad
    with pytest.raises(
        IndexError, match=rf"candidates\[1, 13\] is {bad}, but the basis has 41 tokens: allowed are 0 to 40"
    ):
        fused(*arguments)


def test_any_candidate_is_out_of_range_where_there_are_no_tokens():
    arguments = Case(candidates=23, queries=23).arguments()
    arguments[6] = arguments[6][:, :0]
    with pytest.raises(IndexError, match="the basis has 0 tokens"):
        fused(*arguments)


WRONG = {
    "q must have 3 dimensions": (0, lambda q: q[0]),
    "q must be float32, float64, bfloat16 or float16": (0, lambda q: q.int()),
    "k must have the dtype of q, float32, got float64": (1, lambda k: k.double()),
    "k must have the channels of q, 16, got 14": (1, lambda k: k[..., :14]),
    "v must have the tokens of k, 23, got 22": (2, lambda v: v[:, 1:]),
    "v must have the batch size of q, 2, got 1": (2, lambda v: v[:1]),
    "compressed must be float32, got float64": (3, lambda compressed: compressed.double()),
    "compressed must have 3 dimensions": (3, lambda compressed: compressed[0]),
    r"compressed must have shape \(2, 19, 10\), got \(2, 19, 9\)": (
        3,
        lambda compressed: compressed[..., :9],
    ),
    r"compressed must have shape \(2, 19, 10\), got \(1, 19, 10\)": (3, lambda compressed: compressed[:1]),
    "last dimension of compressed must be contiguous": (3, lambda compressed: compressed.mT.contiguous().mT),
    "offset must be float32, got bfloat16": (4, lambda offset: offset.bfloat16()),
    r"offset must have shape \(2, 19, 2\), got \(2, 18, 2\)": (4, lambda offset: offset[:, 1:]),
    "projection must be float32, got float64": (5, lambda projection: projection.double()),
    r"projection must have shape \(c, 8\) with c at least 1, got \(5, 7\)": (
        5,
        lambda projection: projection[:, 1:],
    ),
    r"projection must have shape .*, got \(0, 8\)": (5, lambda projection: projection[:0]),
    r"compressed must have shape \(2, 19, 8\), got \(2, 19, 10\)": (5, lambda projection: projection[1:]),
    "basis must have one row per logit": (6, lambda basis: basis[1:]),
    "candidates must be int32 or int64": (7, lambda candidates: candidates.to(torch.int16)),
    "candidates must have the tokens of k, 23, got 22": (7, lambda candidates: candidates[:, 1:]),
    "basis must have the tokens of k, 23, got 41": (7, lambda _: None),
    "num_keys must lie between 0 and the number of keys, 23, got 24": (8, lambda _: 24),
    "num_coefficients must not be negative, got -1": (9, lambda _: -1),
    "num_dense must lie between 0 and the number of queries, 23, got 24": (13, lambda _: 24),
    "num_dense must lie between 0 and the number of queries, 23, got -1": (13, lambda _: -1),
    "num_pruned must not be negative, got -1": (14, lambda _: -1),
    "num_heads must be at least 1, got 0": (15, lambda _: 0),
}


@pytest.mark.skipif(GPU_KERNELS, reason="there it is other operators that check")
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message):
    position, change = WRONG[message]
    arguments = Case(candidates=23, queries=23, compressed_dim=5).arguments()
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=f"^connectivity_attention: .*{message}"):
        fused(*arguments)


@pytest.mark.parametrize(
    ("position", "name"),
    [
        (1, "k"),
        (2, "v"),
        (3, "compressed"),
        (4, "offset"),
        (5, "projection"),
        (6, "basis"),
        (7, "candidates"),
    ],
)
def test_tensors_elsewhere_are_refused(position, name):
    """A tensor without memory stands for any other device; the dispatcher is told to use the CPU kernel."""
    arguments = Case(candidates=23, queries=23, compressed_dim=5).arguments()
    arguments[position] = arguments[position].to("meta")
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{name} must be on the CPU"):
        torch.ops.vitrail.connectivity_attention.default.redispatch(kernel, *arguments)


def test_every_instruction_set_matches_the_definition(lesser_instruction_set):
    """The tests above again: the fixture does it."""
