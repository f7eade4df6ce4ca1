"""connectivity_topk against a plain loop over queries, and its place in PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.ops import connectivity_topk, use_ops

from .counting import macs_by_both

OP = torch.ops.vitrail.connectivity_topk.default


def rows_by_hand(
    logits, basis, num_coefficients=0, basis_threshold=0.0, coefficient_threshold=0.0, candidates=None, **_
):
    """The approximate rows of attention, straight from the documentation; `queries x tokens`, which no one asks for."""
    basis = basis.double().abs()
    basis = torch.where(basis > basis_threshold, basis, 0)
    coefficients = logits.double().softmax(-1)
    rows = []
    for image, per_image in enumerate(coefficients):
        columns = basis if candidates is None else basis[:, candidates[image].tolist()]
        for row in per_image.flatten(0, 1):
            ranks = sorted(range(len(row)), key=lambda j, row=row: -row[j])
            kept = ranks[: num_coefficients or len(row)]
            kept = [j for j in kept if row[j] > coefficient_threshold]
            rows.append(sum((row[j] * columns[j] for j in kept), torch.zeros(columns.shape[1]).double()))
    shape = (*coefficients.shape[:3], basis.shape[1] if candidates is None else candidates.shape[1])
    return torch.stack(rows).view(shape) if rows else torch.zeros(shape)


def example(batch=2, heads=2, queries=5, n=6, tokens=9, dtype=torch.float64, seed=0, **settings):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, heads, queries, n, generator=g, dtype=torch.float64).to(dtype)
    basis = torch.randn(tokens, n, generator=g, dtype=torch.float64).to(dtype).t()
    return {"logits": logits, "basis": basis, **settings}


def chosen(keys, tokens):
    """`(..., tokens)`: how often each key was chosen."""
    counts = torch.zeros(*keys.shape[:3], tokens + 1, dtype=torch.int64)
    slots = torch.where(keys < 0, tokens, keys)
    return counts.scatter_add(-1, slots, torch.ones_like(keys))[..., :tokens]


def assert_keys_are_the_largest(keys, rows, num_keys):
    counts = chosen(keys, rows.shape[-1])
    assert keys.shape == (*rows.shape[:3], num_keys)
    assert counts.max() <= 1
    assert counts.sum(-1).eq(num_keys).all()
    worst_kept = torch.where(counts == 1, rows, torch.inf).amin(-1)
    best_left = torch.where(counts == 0, rows, -torch.inf).amax(-1)
    assert (worst_kept >= best_left - 1e-14).all()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_coefficients": 3},
        {"num_coefficients": 3, "basis_threshold": 0.3},
        {"num_coefficients": 99},
        {"coefficient_threshold": 0.1, "basis_threshold": 0.1},
    ],
    ids=str,
)
def test_keys_are_where_the_mixture_of_the_largest_coefficients_is_largest(mode, settings):
    args = example(**settings)
    with use_ops(mode):
        keys = connectivity_topk(**args, num_keys=4)
    assert keys.dtype == torch.int64
    assert_keys_are_the_largest(keys, rows_by_hand(**args), 4)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    queries=st.integers(1, 4),
    n=st.integers(1, 6),
    tokens=st.integers(1, 8),
    num_coefficients=st.integers(0, 7),
    basis_threshold=st.sampled_from([0.0, 0.5, 9.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_shape_and_rows_of_zeros_fill_the_number_of_keys(data, tokens, **shape):
    num_keys = data.draw(st.integers(1, tokens))
    args = example(tokens=tokens, **shape)
    for mode in ("auto", "reference"):
        with use_ops(mode):
            assert_keys_are_the_largest(
                connectivity_topk(**args, num_keys=num_keys), rows_by_hand(**args), num_keys
            )


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("candidates", [None, torch.tensor([[0, 2, 3, 8], [0, 1, 5, 7]])])
def test_a_threshold_keeps_every_key_above_it_and_leaves_slots_empty(mode, candidates):
    args = example(num_coefficients=3, candidates=candidates)
    rows = rows_by_hand(**args)
    with use_ops(mode):
        keys = connectivity_topk(**args, score_threshold=0.4)
    assert keys.shape == rows.shape
    assert torch.equal(chosen(keys, rows.shape[-1]), (rows > 0.4).long())
    assert 0 < (keys < 0).sum() < keys.numel()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_candidates_are_numbered_by_their_place_in_the_list(mode, kind):
    candidates = torch.tensor([[0, 2, 3, 4, 8], [0, 1, 5, 6, 7]])
    args = example(num_coefficients=2, candidates=candidates.to(kind))
    with use_ops(mode):
        keys = connectivity_topk(**args, num_keys=3)
    assert_keys_are_the_largest(keys, rows_by_hand(**args), 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    args = example(dtype=dtype, n=12, tokens=40, num_keys=9, num_coefficients=4)
    wide = args | {name: args[name].float() for name in ("logits", "basis")}
    assert torch.equal(connectivity_topk(**args).sort().values, connectivity_topk(**wide).sort().values)
    mixed = args | {"basis": args["basis"].float()}
    assert torch.equal(connectivity_topk(**mixed), connectivity_topk(**args))


def test_logits_near_zero_are_told_apart_though_their_coefficients_round_to_the_same():
    args = example(n=32, tokens=40)
    args["logits"] = args["logits"] * 1e-9
    keys = connectivity_topk(**args, num_keys=9, num_coefficients=8)
    single = {name: x.float() for name, x in args.items()}
    assert single["logits"].softmax(-1).unique().numel() == 1
    assert torch.equal(
        connectivity_topk(**single, num_keys=9, num_coefficients=8).sort().values, keys.sort().values
    )


def test_the_choice_carries_no_gradient():
    args = {name: x.requires_grad_() for name, x in example().items()}
    assert not connectivity_topk(**args, num_keys=2).requires_grad


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}])
def test_nothing_asked_gives_nothing(empty):
    args = example(**empty)
    assert connectivity_topk(**args, num_keys=2).shape == (*args["logits"].shape[:3], 2)


@pytest.mark.parametrize("candidates", [None, torch.tensor([[0, 2, 3], [0, 1, 5]])])
@pytest.mark.parametrize(("num_keys", "score_threshold"), [(2, 0.0), (0, 0.3)])
def test_registrations_pass_opcheck(candidates, num_keys, score_threshold):
    a = example(dtype=torch.float32)
    torch.library.opcheck(OP, (a["logits"], a["basis"], candidates, num_keys, 3, 0.0, 0.02, score_threshold))


def test_compiled_exported_scripted_and_mapped_forms_choose_the_same():
    args = example(batch=3, dtype=torch.float32)
    logits, basis = args.values()

    def call(logits, basis):
        return connectivity_topk(logits, basis, 4, 3)

    class Module(torch.nn.Module):
        def forward(self, logits, basis):
            return call(logits, basis)

    want = call(logits, basis)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(logits, basis), want)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Module(), (logits[:2], basis), dynamic_shapes=({0: batch}, None))
    assert torch.equal(program.module()(logits, basis), want)
    assert torch.equal(torch.jit.script(connectivity_topk)(logits, basis, 4, 3), want)
    assert torch.equal(torch.vmap(lambda x: call(x[None], basis)[0])(logits), want)
    bases = torch.stack([basis, -basis.flip(0)])
    mapped = torch.vmap(lambda b: call(logits, b))(bases)
    assert torch.equal(mapped[1], call(logits, bases[1]))


def test_both_counters_count_the_kept_coefficients_alone():
    def call(logits, basis, candidates):
        return connectivity_topk(logits, basis, 2, 3, candidates=candidates)

    args = (*example(dtype=torch.float32).values(), torch.tensor([[0, 2, 3, 4], [0, 1, 5, 7]]))
    expected = 2 * 2 * 5 * 3 * 4
    assert macs_by_both(call, *args) == (expected, expected)


BAD = {
    "logits of rank 3": ({"logits": torch.zeros(2, 5, 6)}, ValueError, r"logits must have 4 dimensions \(B, heads, queries, n\)"),
    "no tensor": ({"basis": 1.0}, TypeError, r"basis must be a tensor of shape \(n, N\), got float"),
    "integers": ({"logits": torch.zeros(2, 2, 5, 6).int()}, TypeError, "logits must be a floating-point tensor, got torch.int32"),
    "another device": ({"basis": torch.zeros(6, 9, device="meta")}, ValueError, "basis is on meta but logits is on cpu"),
    "rows": ({"basis": torch.zeros(5, 9)}, ValueError, r"basis must have one row per logit, 6 \(at least 1\), got shape \(5, 9\)"),
    "more keys than tokens": ({"num_keys": 10}, ValueError, "num_keys must lie between 1 and the number of candidates, 9; got 10"),
    "more keys than candidates": ({"candidates": torch.zeros(2, 3).long()}, ValueError, "number of candidates, 3; got 4"),
    "no rule": ({"num_keys": 0}, ValueError, r"say which keys to keep: num_keys \(at least 1\), or a positive score_threshold"),
    "two rules": ({"score_threshold": 0.1}, ValueError, "keys are kept by number or by threshold, got num_keys 4 and score_threshold 0.1"),
    "two rules for coefficients": ({"num_coefficients": 3, "coefficient_threshold": 0.1}, ValueError, "coefficients are kept by number or by threshold"),
    "negative number": ({"num_coefficients": -1}, ValueError, "num_coefficients must be positive, or 0 for all, got -1"),
    "negative threshold": ({"basis_threshold": -0.1}, ValueError, "basis_threshold must not be negative, got -0.1"),
    "threshold that is none": ({"basis_threshold": float("nan")}, ValueError, "basis_threshold must not be negative, got nan"),
    "float candidates": ({"candidates": torch.zeros(2, 5)}, TypeError, "candidates must be int32 or int64, got torch.float32"),
    "candidates' shape": ({"candidates": torch.zeros(3, 5).long()}, ValueError, r"candidates must have shape \(batch 2, tokens\), got \(3, 5\)"),
    "candidates' device": ({"candidates": torch.zeros(2, 5, device="meta").long()}, ValueError, "candidates is on meta but logits is on cpu"),
    "a token that is not there": ({"candidates": torch.full((2, 5), 9)}, IndexError, r"candidates\[0, 0\] is 9, but the basis has 9 tokens: allowed are 0 to 8"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(mode, case):
    change, kind, message = BAD[case]
    with use_ops(mode), pytest.raises(kind, match=message):
        connectivity_topk(**{**example(), "num_keys": 4, **change})
