"""The compiled kernels of `sparse_attention`: against a float64 definition, and on wrong arguments.

The operators are called directly, past the checks and the autograd of the public function: what is tested is what the
library does when nothing protects it.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .kernels import EXAMPLES, GPU_KERNELS, GRADIENT_TOLERANCE, TOLERANCE, WIDE, operator


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    batch: int = 2
    queries: int = 37
    tokens: int = 41
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    slots: int = 11
    dtype: torch.dtype = torch.float32
    index: torch.dtype = torch.int64
    empty: float = 0.2
    scale: float = 0.5

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator; q, k and v are strided views of one projection where there are enough tokens."""
        g = torch.Generator().manual_seed(seed)
        c, cv = self.heads * self.head_dim, self.heads * self.value_dim
        rows = max(self.queries, self.tokens)
        packed = torch.randn(self.batch, rows, 2 * c + cv, generator=g, dtype=torch.float64).to(self.dtype)
        q, k, v = packed.split([c, c, cv], -1)
        shape = (self.batch, self.heads, self.queries, self.slots)
        keys = torch.randint(max(self.tokens, 1), shape, generator=g)
        keys = torch.where(torch.rand(shape, generator=g) < self.empty, -1, keys)
        return [
            q[:, : self.queries],
            k[:, : self.tokens],
            v[:, : self.tokens],
            keys.to(self.index),
            self.heads,
            self.scale,
        ]


def fused(*arguments) -> tuple[Tensor, Tensor]:
    return operator("sparse_attention")(*arguments)


def gradients(grad, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    return operator("sparse_attention_backward")(grad, *fused(*arguments), *arguments)


def definition(q, k, v, keys, heads, scale) -> tuple[Tensor, Tensor]:
    """Head by head with copies of the listed keys, in float64."""
    outs, lses = [], []
    q, k, v = (x.double().unflatten(2, (heads, -1)) for x in (q, k, v))
    for h in range(heads):
        empty = keys[:, h] < 0
        image = torch.arange(len(q))[:, None, None]
        listed, values = (x[image, keys[:, h].clamp(min=0).long(), h] for x in (k, v))
        scores = (torch.einsum("bqd,bqkd->bqk", q[:, :, h], listed) * scale).masked_fill(empty, -math.inf)
        lses.append(scores.logsumexp(-1))
        weights = scores.softmax(-1).masked_fill(empty, 0)
        outs.append(torch.einsum("bqk,bqkd->bqd", weights, values))
    return torch.cat(outs, -1), torch.stack(lses, -1)


def gradients_by_definition(grad, *arguments) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in arguments[:3]]
    return list(torch.autograd.grad(definition(*leaves, *arguments[3:])[0], leaves, grad.double()))


def assert_matches(case: Case, arguments: list) -> None:
    out, lse = fused(*arguments)
    expected, expected_lse = definition(*arguments)
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    assert out.shape == expected.shape
    assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    # errors of single elements, relative to the values that were averaged
    assert (out.double() - expected).abs().max() <= TOLERANCE[case.dtype] * arguments[2].double().abs().max()
    lse_tolerance = 1e-14 if case.dtype == torch.float64 else 3e-6
    torch.testing.assert_close(lse.double(), expected_lse, rtol=lse_tolerance, atol=lse_tolerance)


def assert_gradients_match(case: Case, arguments: list, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = (*arguments[0].shape[:2], arguments[2].shape[2])
    grad = torch.randn(shape, generator=g, dtype=torch.float64).to(case.dtype)
    got = gradients(grad, *arguments)
    want = gradients_by_definition(grad, *arguments)
    # a gradient may be the small difference of large terms
    q, k, v = (x.double().abs().max().item() for x in arguments[:3])
    terms = grad.double().abs().max().item() * v * max(q, k) * case.value_dim
    epsilon = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    # a GPU's tensor cores take attention and its gradient in half types, too
    tolerance = (GRADIENT_TOLERANCE if GPU_KERNELS else TOLERANCE)[case.dtype]
    for x, g, w in zip(arguments, got, want, strict=False):
        assert g.dtype == case.dtype
        assert g.shape == x.shape
        assert (g.double() - w).abs().max() <= tolerance * w.abs().max() + 2 * epsilon * terms


SHAPES = {
    "Sparsifiner-S, few tokens": Case(1, 49, 50, 6, 64, 64, 13, empty=0),
    "Sparsifiner-T": Case(1, 196, 197, 3, 64, 64, 50, empty=0),
    "one token in all": Case(1, 1, 1, 1, 3, 5, 1, empty=0),
    "more queries than a block holds": Case(1, 70, 5, 1, 16, 16, 3),
    "more keys than a step": Case(1, 5, 300, 1, 16, 16, 150),
    "more slots than keys": Case(1, 5, 3, 2, 4, 4, 70),
    "values wider than keys": Case(2, 9, 30, 3, 5, WIDE, 9),
    "keys wider than values": Case(2, 9, 30, 3, WIDE, 6, 9),
    "wide heads": Case(1, 6, 9, 1, 64 if GPU_KERNELS else 200, 61 if GPU_KERNELS else 130, 8),
    "many heads": Case(1, 7, 12, 16, 8, 8, 5),
    "mostly empty lists": Case(1, 40, 20, 2, 8, 8, 9, empty=0.9),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype):
    case = replace(SHAPES[shape], dtype=dtype)
    assert_matches(case, case.arguments())
    assert_gradients_match(case, case.arguments())


cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    slots=st.integers(1, 70),
    dtype=st.sampled_from(list(TOLERANCE)),
    index=st.sampled_from([torch.int32, torch.int64]),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([0.1, 1.0, -0.7]),
)


@settings(max_examples=EXAMPLES)
@given(cases, st.integers(0, 99))
def test_matches_the_definition_for_any_sizes(case, seed):
    assert_matches(case, case.arguments(seed))
    assert_gradients_match(case, case.arguments(seed))


def test_any_strides_are_read_and_only_the_last_must_be_one():
    case = Case(empty=0.3)
    q, k, v, keys, *rest = case.arguments()
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k = k[:1].expand(2, -1, -1)
    v = v.repeat_interleave(2, 1)[:, ::2]
    keys = keys.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    assert_matches(case, [q, k, v, keys, *rest])
    assert_gradients_match(case, [q, k, v, keys, *rest])
    shared = [q, k, v, keys[:1, :1, :1].expand(2, 2, 37, 11), *rest]
    assert_matches(case, shared)
    assert_gradients_match(case, shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_key_counts_as_often_as_it_is_listed(dtype):
    """In lists of several tiles of keys, also where only one head of one image names a key twice."""
    case = Case(queries=70, tokens=150, slots=60, head_dim=32, dtype=dtype)
    *rest, heads, scale = case.arguments()
    q, k, v, keys = rest
    keys = torch.stack([torch.randperm(150)[:60] for _ in range(2 * 2 * 70)]).view(2, 2, 70, 60)
    assert_matches(case, [q, k, v, keys, heads, scale])
    keys[1, 0, 69, :7] = keys[1, 0, 69, 7]
    keys[1, 0, 3, 50:] = 149
    assert_matches(case, [q, k, v, keys, heads, scale])
    assert_gradients_match(case, [q, k, v, keys, heads, scale])


def test_gradients_of_any_strides_are_read():
    arguments = Case().arguments()
    grad = torch.randn(37, 2, 16).transpose(0, 1)
    for g, w in zip(gradients(grad, *arguments), gradients(grad.contiguous(), *arguments), strict=True):
        assert torch.equal(g, w)


def test_large_scores_do_not_overflow():
    q, k, *rest = Case(scale=1.0, empty=0).arguments()
    out, lse = fused(q * 1e3, k * 1e3, *rest)
    expected, expected_lse = definition(q * 1e3, k * 1e3, *rest)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_so_in_its_row_and_nowhere_else(bad):
    q, *rest = Case(1, heads=1).arguments()
    clean, _ = fused(q, *rest)
    q = q.clone()
    q[0, 5, 3] = bad
    out, _ = fused(q, *rest)
    changed = out.isnan().any(-1)
    assert changed[0, 5]
    assert changed.sum() == 1
    assert torch.equal(out[~changed], clean[~changed])


def test_the_number_of_threads_does_not_change_a_bit(assert_same_bits_on_any_number_of_threads):
    arguments = replace(SHAPES["Sparsifiner-T"], batch=3).arguments()
    assert_same_bits_on_any_number_of_threads(lambda: fused(*arguments))
    grad = torch.randn(3, 196, 192)
    assert_same_bits_on_any_number_of_threads(lambda: gradients(grad, *arguments))


def test_an_image_gives_the_same_bits_alone_and_in_a_batch():
    q, k, v, keys, *rest = Case(batch=6).arguments()
    out, _ = fused(q, k, v, keys, *rest)
    for b in range(6):
        alone, _ = fused(q[b : b + 1], k[b : b + 1], v[b : b + 1], keys[b : b + 1], *rest)
        assert torch.equal(alone[0], out[b])


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"queries": 0}, {"slots": 0}, {"tokens": 0, "empty": 1.0}], ids=str
)
def test_nothing_to_compute_is_no_error(empty):
    case = replace(Case(), **empty)
    arguments = case.arguments()
    out, lse = fused(*arguments)
    assert out.shape == (case.batch, case.queries, 16)
    assert lse.shape == (case.batch, case.queries, 2)
    assert not out.any()
    assert (lse == -math.inf).all()
    for g, x in zip(gradients(torch.randn_like(out), *arguments), arguments, strict=False):
        assert g.shape == x.shape
        assert not g.any()


# --- wrong arguments --------------------------------------------------------------------------------------------------


def backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator called first, with outputs that were never computed."""
    q, _, v, _, heads, _ = arguments
    if q.dim() != 3 or v.dim() != 3:
        out = lse = torch.zeros(1)
    else:
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_zeros(*q.shape[:2], max(heads, 0), dtype=compute)
    return operator("sparse_attention_backward")(out, out, lse, *arguments)


@pytest.mark.parametrize("call", [fused, backward])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-2, 41, 2**31 - 1, -(2**31), 2**40, 2**32 + 3, -(2**63)])
def test_a_key_out_of_range_is_refused(call, index, bad):
    if bad not in range(torch.iinfo(index).min, torch.iinfo(index).max + 1):
        bad = torch.iinfo(index).max
    arguments = Case(index=index).arguments()
    arguments[3][1, 1, 35, 10] = bad
    allowed = rf"keys\[1, 1, 35, 10\] is {bad}, but there are 41 keys: allowed are 0 to 40, and -1 for an empty slot"
    with pytest.raises(IndexError, match=allowed):
        call(*arguments)


def test_any_key_is_out_of_range_where_there_are_none():
    q, k, v, keys, *rest = Case(empty=0).arguments()
    with pytest.raises(IndexError, match="there are 0 keys"):
        fused(q, k[:, :0], v[:, :0], keys, *rest)


WRONG = {
    "q must have 3 dimensions": (0, lambda q: q[0]),
    "q must be float32, float64, bfloat16 or float16": (0, lambda q: q.int()),
    "k must have the dtype of q, float32, got float64": (1, lambda k: k.double()),
    "v must have the dtype of q, float32, got bfloat16": (2, lambda v: v.bfloat16()),
    "k must have 3 dimensions": (1, lambda k: k[0]),
    "v must have 3 dimensions": (2, lambda v: v[None]),
    "k must have the batch size of q, 2, got 1": (1, lambda k: k[:1]),
    "v must have the batch size of q, 2, got 1": (2, lambda v: v[:1]),
    "k must have the channels of q, 16, got 14": (1, lambda k: k[..., :14]),
    "v must have the tokens of k, 41, got 40": (2, lambda v: v[:, :40]),
    "q must have a positive multiple of num_heads = 2 channels, got 15": (0, lambda q: q[..., :15]),
    "v must have a positive multiple of num_heads = 2 channels, got 0": (2, lambda v: v[..., :0]),
    r"last dimension of q must be contiguous \(stride 1\), got stride 2": (0, lambda q: q.repeat(1, 1, 2)[..., ::2]),
    "last dimension of v must be contiguous": (2, lambda v: v.mT.contiguous().mT),
    "keys must be int32 or int64": (3, lambda keys: keys.to(torch.int16)),
    r"keys must have shape .* = \(2, 2, 37, slots\), got \(2, 2, 36, 11\)": (3, lambda keys: keys[:, :, 1:]),
    r"keys must have shape .*, got \(1, 2, 37, 11\)": (3, lambda keys: keys[:1]),
    r"keys must have shape .*, got \(2, 37, 11\)": (3, lambda keys: keys[0]),
    "num_heads must be at least 1, got 0": (4, lambda _: 0),
    "num_heads must be at least 1, got -2": (4, lambda _: -2),
}  # fmt: skip


@pytest.mark.parametrize("call", [fused, backward])
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message, call):
    position, change = WRONG[message]
    arguments = Case().arguments()
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=f"^sparse_attention.*{message}"):
        call(*arguments)


WRONG_BACKWARD = {
    "grad must have the dtype of q, float32, got float64": (0, lambda grad: grad.double()),
    r"grad must have shape \(2, 37, 16\), got \(2, 36, 16\)": (0, lambda grad: grad[:, 1:]),
    "last dimension of grad must be contiguous": (0, lambda grad: grad.mT.contiguous().mT),
    r"out must have shape \(2, 37, 16\), got \(2, 37, 8\)": (1, lambda out: out[..., :8]),
    "lse must be float32, got float64": (2, lambda lse: lse.double()),
    r"lse must have shape \(2, 37, 2\), got \(2, 37\)": (2, lambda lse: lse[..., 0]),
}


@pytest.mark.parametrize("message", WRONG_BACKWARD)
def test_a_wrong_output_is_refused_by_the_backward(message):
    position, change = WRONG_BACKWARD[message]
    arguments = Case().arguments()
    out, lse = fused(*arguments)
    saved = [torch.ones_like(out), out, lse]
    saved[position] = change(saved[position])
    with pytest.raises(RuntimeError, match=message):
        operator("sparse_attention_backward")(*saved, *arguments)


@pytest.mark.parametrize(("position", "name"), [(1, "k"), (2, "v"), (3, "keys")])
def test_tensors_elsewhere_are_refused(position, name):
    """A tensor without memory stands for any other device; the dispatcher is told to use the CPU kernel."""
    arguments = Case().arguments()
    arguments[position] = arguments[position].to("meta")
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{name} must be on the CPU"):
        torch.ops.vitrail.sparse_attention.default.redispatch(kernel, *arguments)


def test_keys_too_large_for_memory_are_an_error_and_not_a_crash():
    q = torch.zeros(1, 1, 2**10)
    k = q.expand(1, 2**31 - 1, 2**10)
    with pytest.raises((RuntimeError, MemoryError), match=r"memory|alloc"):
        fused(q, k, k, torch.zeros(1, 1, 1, 1, dtype=torch.int64), 1, 1.0)


def test_every_instruction_set_matches_the_definition(lesser_instruction_set):
    """The tests above again: the fixture does it."""
