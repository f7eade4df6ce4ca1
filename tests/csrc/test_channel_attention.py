"""The compiled kernels of `channel_attention`: against a float64 definition, and on wrong arguments.

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

from .kernels import EXAMPLES, GPU_KERNELS, operator

TOLERANCE = {torch.float32: 1e-6, torch.float64: 2e-15, torch.bfloat16: 8e-3, torch.float16: 6e-4}
if GPU_KERNELS:  # which know no float64
    del TOLERANCE[torch.float64]


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    batch: int = 2
    height: int = 9
    width: int = 7
    heads: int = 2
    head_dim: int = 21
    dtype: torch.dtype = torch.float32
    scale: float = 0.1

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator; q, k and v are strided views of one projection."""
        g = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.height, self.width, 3 * self.heads * self.head_dim)
        q, k, v = torch.randn(shape, generator=g, dtype=torch.float64).to(self.dtype).chunk(3, -1)
        return [q, k, v, self.heads, self.scale]


def fused(*arguments) -> tuple[Tensor, Tensor]:
    return operator("channel_attention")(*arguments)


def gradients(grad, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    return operator("channel_attention_backward")(grad, *fused(*arguments), *arguments)


def definition(q, k, v, heads, scale) -> tuple[Tensor, Tensor]:
    """Head by head, in float64."""
    q, k, v = (x.double().flatten(1, 2).unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("nthi,nthj->nhij", q, k) * scale
    out = torch.einsum("nhij,nthj->nthi", scores.softmax(-1), v)
    return out.flatten(2), scores.logsumexp(-1).flatten(1)[:, None, None]


def gradients_by_definition(grad, q, k, v, heads, scale) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each gradient in float64, and the magnitudes that are added to get it: those of its last sum, and of all sums."""
    grad, q, k, v = (x.double().flatten(1, 2).unflatten(-1, (heads, -1)) for x in (grad, q, k, v))
    weights = (torch.einsum("nthi,nthj->nhij", q, k) * scale).softmax(-1)
    of_weights, all_of_weights = (
        torch.einsum("nthi,nthj->nhij", *pair) for pair in ((grad, v), (grad.abs(), v.abs()))
    )

    def softened(x, sign):
        return weights * (x + sign * (weights * x).sum(-1, keepdim=True)) * scale

    scores, all_scores = softened(of_weights, -1), softened(all_of_weights, 1).abs()
    results = []
    for x, matrix, all_of_it in (
        (k, scores.mT, all_scores.mT), (q, scores, all_scores), (grad, weights, weights)
    ):  # fmt: skip
        factors = ((x, matrix), (x.abs(), matrix.abs()), (x.abs(), all_of_it))
        results.append(tuple(torch.einsum("nthi,nhij->nthj", *pair).flatten(2) for pair in factors))
    return results


def assert_matches(case: Case, arguments: list, grad: Tensor | None = None) -> None:
    q, k, v, _, scale = arguments
    out, lse = fused(*arguments)
    want, want_lse = definition(*arguments)
    assert out.shape == v.shape
    assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert lse.shape == (q.shape[0], 1, 1, q.shape[3])
    # what sums over the tokens are rounded by ends up in the exponents
    exponent = 1 + abs(scale) * torch.einsum("...i,...j->ij", q.double().abs(), k.double().abs()).max().item()
    inexact = 4 * torch.finfo(lse.dtype).eps * exponent
    assert (lse.double() - want_lse).abs().max() <= inexact
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    wants = [
        (want, v.double().abs().max(), v.double().abs().max()),
        *gradients_by_definition(grad, *arguments),
    ]
    for got, (want, size, all_sizes) in zip((out, *gradients(grad, *arguments)), wants, strict=True):
        assert got.dtype == case.dtype
        assert got.is_contiguous()
        assert got.shape == out.shape
        assert (
            (got.double().flatten(1, 2) - want).abs() <= TOLERANCE[case.dtype] * size + inexact * all_sizes
        ).all()


SHAPES = {
    "DaViT-T, stage 1": Case(1, 28, 28, 3, 32),
    "DaViT-T, stage 3": Case(2, 14, 14, 12, 32),
    "DaViT-T, stage 4": Case(3, 7, 7, 24, 32),
    "one token in all": Case(1, 1, 1, 1, 1),
    "one token of many channels": Case(2, 1, 1, 3, 33),
    "channels of their own": Case(2, 5, 4, 7, 1),
    "two channels to a head": Case(2, 5, 4, 7, 2),
    "tokens of several chunks": Case(2, 40, 17, 1, 5),
    "wide heads": Case(1, 6, 5, 2, 61 if GPU_KERNELS else 130),
    "tokens that fill what is multiplied at a time": Case(1, 8, 16, 2, 16),
    "one token more": Case(1, 3, 43, 2, 32),
    "heads that fill a tile, tokens that fill a chunk": Case(1, 16, 32, 1, 64),
    "one channel and one token more": Case(1, 27, 19, 1, 33),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype):
    case = replace(SHAPES[shape], dtype=dtype)
    assert_matches(case, case.arguments())


cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 50),
    dtype=st.sampled_from(list(TOLERANCE)),
    scale=st.sampled_from([0.01, 0.1, -0.07, 0.0]),
)


@settings(max_examples=EXAMPLES)
@given(cases, st.integers(0, 99))
def test_matches_the_definition_for_any_sizes(case, seed):
    assert_matches(case, case.arguments(seed))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 21])
def test_any_strides_are_read_and_only_the_last_must_be_one(head_dim, dtype):
    case = Case(height=8, width=8, head_dim=head_dim, dtype=dtype)
    q, k, v, *rest = case.arguments()
    grad = torch.randn(8, 2, 8, 2 * head_dim).to(dtype).transpose(0, 1)
    assert_matches(
        case, [q.transpose(1, 2), k[:, :, :1].expand_as(k), v.flip(0)[:1].expand_as(v), *rest], grad
    )
    assert_matches(
        case, [q.repeat_interleave(2, 1)[:, ::2], k.contiguous(), v, *rest], grad[:1, :1].expand_as(q)
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_may_begin_anywhere(dtype):
    q, *rest = Case(head_dim=16, dtype=dtype).arguments()
    shifted = torch.empty(q.numel() + 1, dtype=dtype)[1:].view(q.shape)
    assert_matches(Case(dtype=dtype), [shifted.copy_(q), *rest])


def test_a_large_image_is_summed_in_larger_chunks():
    case = Case(1, 129, 130, 1, 2, dtype=torch.bfloat16, scale=0.001)
    assert_matches(case, case.arguments())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_weights_that_are_too_small_for_float16_still_count(dtype):
    case = Case(scale=0.5, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.rand(4, 2, 9, 7, 42, generator=g).to(dtype).unbind()
    k[..., ::21] *= -0.5  # one channel of each head
    arguments = [q, k, v, case.heads, case.scale]
    of_small = gradients_by_definition(grad * 1000, *arguments)[2][0][..., ::21]
    assert of_small.max() < 21 * 1000 * 1e-6
    assert_matches(case, arguments, grad * 1000)


def test_large_scores_do_not_overflow():
    q, k, *rest = Case(scale=1.0).arguments()
    out, lse = fused(q * 1e3, k * 1e3, *rest)
    want, want_lse = definition(q * 1e3, k * 1e3, *rest)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.double().flatten(1, 2), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_so_in_its_channel_and_nowhere_else(dtype, bad):
    q, *rest = Case(heads=3, dtype=dtype).arguments()
    clean, _ = fused(q, *rest)
    q = q.clone()
    q[1, 5, 3, 30] = bad
    out, lse = fused(q, *rest)
    changed = torch.zeros_like(out, dtype=torch.bool)
    changed[1, :, :, 30] = True
    assert torch.equal(out.isnan(), changed)
    assert torch.equal(out[~changed], clean[~changed])
    assert lse.isfinite().sum() == lse.numel() - 1


@pytest.mark.parametrize("shape", ["DaViT-T, stage 1", "DaViT-T, stage 4", "tokens of several chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(shape, dtype, assert_same_bits_on_any_number_of_threads):
    arguments = replace(SHAPES[shape], dtype=dtype).arguments()
    assert_same_bits_on_any_number_of_threads(lambda: fused(*arguments))
    grad = torch.randn_like(arguments[0])
    assert_same_bits_on_any_number_of_threads(lambda: gradients(grad, *arguments))


def test_an_image_gives_the_same_bits_alone_and_in_a_batch():
    q, k, v, *rest = Case(batch=6, height=20, width=30).arguments()
    grad = torch.randn_like(q)
    together = [*fused(q, k, v, *rest), *gradients(grad, q, k, v, *rest)]
    for b in range(6):
        image = [x[b : b + 1] for x in (q, k, v)]
        alone = [*fused(*image, *rest), *gradients(grad[b : b + 1], *image, *rest)]
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x[0], y[b])


@pytest.mark.parametrize("empty", [{"batch": 0}, {"height": 0}, {"width": 0}], ids=str)
def test_nothing_to_compute_is_no_error(empty):
    arguments = replace(Case(), **empty).arguments()
    out, lse = fused(*arguments)
    assert out.shape == arguments[0].shape
    assert lse.shape == (out.shape[0], 1, 1, 42)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(21)))
    for g in gradients(out, *arguments):
        assert g.shape == out.shape


# --- wrong arguments --------------------------------------------------------------------------------------------------


def backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator called first, with outputs that were never computed."""
    q = arguments[0]
    out = q if isinstance(q, Tensor) else torch.zeros(1)
    lse = torch.zeros(q.shape[0], 1, 1, q.shape[-1])
    return operator("channel_attention_backward")(out, out, lse, *arguments)


WRONG = {
    "q must have 4 dimensions": (0, lambda q: q[0]),
    "q must be float32, float64, bfloat16 or float16": (0, lambda q: q.int()),
    "k must have the dtype of q, float32, got float64": (1, lambda k: k.double()),
    "v must have the dtype of q, float32, got bfloat16": (2, lambda v: v.bfloat16()),
    "k must have 4 dimensions": (1, lambda k: k[0]),
    "v must have 4 dimensions": (2, lambda v: v[None]),
    "k must have the batch size of q, 2, got 1": (1, lambda k: k[:1]),
    r"k must have shape \(2, 9, 7, 42\), got \(2, 9, 7, 40\)": (1, lambda k: k[..., :40]),
    r"v must have shape \(2, 9, 7, 42\), got \(2, 8, 7, 42\)": (2, lambda v: v[:, :8]),
    r"v must have shape \(2, 9, 7, 42\), got \(2, 9, 6, 42\)": (2, lambda v: v[:, :, 1:]),
    "q must have a positive multiple of num_heads = 2 channels, got 41": (0, lambda q: q[..., :41]),
    "v must have a positive multiple of num_heads = 2 channels, got 0": (2, lambda v: v[..., :0]),
    r"last dimension of q must be contiguous \(stride 1\), got stride 2": (0, lambda q: q.repeat(1, 1, 1, 2)[..., ::2]),
    "last dimension of v must be contiguous": (2, lambda v: v.mT.contiguous().mT),
    "num_heads must be at least 1, got 0": (3, lambda _: 0),
    "num_heads must be at least 1, got -2": (3, lambda _: -2),
}  # fmt: skip


@pytest.mark.parametrize("call", [fused, backward])
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message, call):
    position, change = WRONG[message]
    arguments = Case().arguments()
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=f"^channel_attention.*{message}"):
        call(*arguments)


WRONG_BACKWARD = {
    "grad must be float32, got float64": (0, lambda grad: grad.double()),
    r"grad must have shape \(2, 9, 7, 42\), got \(2, 8, 7, 42\)": (0, lambda grad: grad[:, 1:]),
    "last dimension of grad must be contiguous": (0, lambda grad: grad.mT.contiguous().mT),
    r"out must have shape \(2, 9, 7, 42\), got \(2, 9, 7, 8\)": (1, lambda out: out[..., :8]),
    "lse must be float32, got float64": (2, lambda lse: lse.double()),
    r"lse must have shape \(2, 1, 1, 42\), got \(2, 42\)": (2, lambda lse: lse[:, 0, 0]),
}


@pytest.mark.parametrize("message", WRONG_BACKWARD)
def test_a_wrong_output_is_refused_by_the_backward(message):
    position, change = WRONG_BACKWARD[message]
    arguments = Case().arguments()
    out, lse = fused(*arguments)
    saved = [torch.ones_like(out), out, lse]
    saved[position] = change(saved[position])
    with pytest.raises(RuntimeError, match=message):
        operator("channel_attention_backward")(*saved, *arguments)


@pytest.mark.parametrize(("position", "name"), [(1, "k"), (2, "v")])
def test_tensors_elsewhere_are_refused(position, name):
    """A tensor without memory stands for any other device; the dispatcher is told to use the CPU kernel."""
    arguments = Case().arguments()
    arguments[position] = arguments[position].to("meta")
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{name} must be on the CPU"):
        torch.ops.vitrail.channel_attention.default.redispatch(kernel, *arguments)


def test_scores_too_large_for_memory_are_an_error_and_not_a_crash():
    q = torch.zeros(1, 1, 1, 2**20)
    with pytest.raises((RuntimeError, MemoryError), match=r"memory|alloc"):
        fused(q, q, q, 1, 1.0)


def test_every_instruction_set_matches_the_definition(lesser_instruction_set):
    """The tests above again: the fixture does it."""
