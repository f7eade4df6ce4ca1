"""The compiled kernels of `strip_mix`: against a float64 definition, and on wrong arguments."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .kernels import EXAMPLES, GPU_KERNELS, operator

# Of single elements, relative to the sum of the magnitudes that were added.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 2e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}
if GPU_KERNELS:  # which know no float64
    del TOLERANCE[torch.float64]

fused, backward = operator("strip_mix"), operator("strip_mix_backward")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    batch: int = 2
    strips: int = 9
    length: int = 7
    groups: int = 21
    patches: int = 2
    axis: int = 2
    dtype: torch.dtype = torch.float32
    biased: bool = True

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator; x is half of the channels of a map, as the models pass it."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        size = (self.strips, self.length) if self.axis == 2 else (self.length, self.strips)
        x = normal(self.batch, *size, 2 * self.groups * self.patches).chunk(2, -1)[1]
        weight = normal(3, self.length, self.length, self.groups)
        return [x, weight, normal(self.length, self.groups) if self.biased else None, self.axis]


def definition(x, weight, bias, axis) -> Tensor:
    """Tap by tap, in float64."""
    x, weight = x.double(), weight.double()
    x = x if axis == 2 else x.transpose(1, 2)
    strips, groups = x.shape[1], weight.shape[3]
    beside = F.pad(x, (0, 0, 0, 0, 1, 1)).unflatten(3, (x.shape[3] // groups, groups))
    out = sum(torch.einsum("ysjpg,ijg->ysipg", beside[:, t : t + strips], weight[t]) for t in range(3))
    if bias is not None:
        out = out + bias.double()[:, None]
    out = out.flatten(3)
    return out if axis == 2 else out.transpose(1, 2)


def backward_by_definition(grad, x, weight, bias, axis) -> list[Tensor]:
    leaves = [t.double().detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = definition(*leaves, *[None] * (3 - len(leaves)), axis)
    return list(torch.autograd.grad(out, leaves, grad.double()))


def magnitudes(*arguments) -> list:
    return [a.double().abs() if isinstance(a, Tensor) else a for a in arguments]


def assert_close(case: Case, got, want, bound) -> None:
    assert got.dtype == case.dtype
    assert got.is_contiguous()
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= TOLERANCE[case.dtype] * bound).all()


def assert_matches(case: Case, arguments: list, grad: Tensor | None = None) -> None:
    want, bound = definition(*arguments), definition(*magnitudes(*arguments))
    assert_close(case, fused(*arguments), want, bound)
    if grad is None:
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    got = backward(grad, *arguments)
    want = backward_by_definition(grad, *arguments)
    bound = backward_by_definition(*magnitudes(grad, *arguments))
    for g, w, b in zip(got, want, bound, strict=False):
        assert_close(case, g, w, b)
    if arguments[2] is None:
        assert got[2].shape == (0,)


SHAPES = {
    "Strip-MLP-T, stage 1": Case(1, 12, 56, 20, 2),
    "Strip-MLP-T, stage 2": Case(1, 28, 28, 40, 2),
    "Strip-MLP-T, stage 3": Case(2, 14, 14, 80, 2),
    "Strip-MLP-T, stage 4": Case(3, 7, 7, 160, 2),
    "Strip-MLP-B, stage 1": Case(1, 9, 16, 14, 4),
    "one token in all": Case(1, 1, 1, 1, 1),
    "one strip": Case(2, 1, 5, 3, 3),
    "strips of one token": Case(2, 6, 1, 5, 2),
    "one group": Case(1, 5, 4, 1, 37),
    "one patch": Case(3, 5, 4, 18, 1),
    "groups that fill a vector": Case(1, 8, 6, 32, 1),
    "more strips than are summed at a time": Case(3, 70, 3, 17, 1),
    "weights larger than a cache": Case(1, 3, 90, 16, 1),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [1, 2])
def test_matches_the_definition(shape, dtype, axis):
    case = replace(SHAPES[shape], dtype=dtype, axis=axis)
    assert_matches(case, case.arguments())


cases = st.builds(
    Case,
    batch=st.integers(1, 4),
    strips=st.integers(1, 17),
    length=st.integers(1, 9),
    groups=st.integers(1, 40),
    patches=st.integers(1, 4),
    axis=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(TOLERANCE)),
    biased=st.booleans(),
)


@settings(max_examples=EXAMPLES)
@given(cases, st.integers(0, 99))
def test_matches_the_definition_for_any_sizes(case, seed):
    assert_matches(case, case.arguments(seed))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("groups", [5, 16])
def test_any_strides_are_read_and_only_the_last_must_be_one(axis, groups):
    case = Case(groups=groups, axis=axis)
    x, weight, bias, _ = case.arguments()
    grad = torch.randn_like(x).flip(0)[:1].expand_as(x)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight = weight.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert_matches(case, [x, weight, bias.t().contiguous().t(), axis], grad)
    assert_matches(case, [x[:1].expand_as(x), weight[:1].expand_as(weight), bias[:1].expand_as(bias), axis])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_not_a_number_stays_in_the_strips_beside_it_and_its_channel(dtype):
    case = Case(1, 20, 4, 5, 3, dtype=dtype)
    x, *rest = case.arguments()
    clean = fused(x, *rest)
    x = x.clone()
    x[0, 9, 2, 7] = torch.nan
    out = fused(x, *rest)
    assert out[0, 8:11, :, 7].isnan().all()
    assert out.isnan().sum() == 3 * 4
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


@pytest.mark.parametrize("shape", ["Strip-MLP-T, stage 1", "Strip-MLP-T, stage 3", "one group"])
def test_the_number_of_threads_does_not_change_a_bit(shape, assert_same_bits_on_any_number_of_threads):
    case = replace(SHAPES[shape], batch=5)
    arguments = case.arguments()
    assert_same_bits_on_any_number_of_threads(lambda: (fused(*arguments),))
    grad = torch.randn_like(arguments[0])
    assert_same_bits_on_any_number_of_threads(lambda: backward(grad, *arguments))


TILES = {
    "strips past a tile of short ones": Case(3, 43, 7, 9, 1),
    "strips past a tile of long ones": Case(1, 33, 17, 5, 2),
    "places that fill a tile": Case(1, 3, 16, 8, 2),
    "and two": Case(2, 5, 32, 4, 1),
    "places past a tile": Case(1, 4, 33, 9, 1),
    "a chunk of groups, and one": Case(2, 5, 9, 9, 2),
    "many small images": Case(65, 2, 3, 4, 3),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", TILES)
def test_what_is_cut_into_tiles_matches_at_their_edges(shape, dtype):
    case = replace(TILES[shape], dtype=dtype)
    assert_matches(case, case.arguments())


@pytest.mark.parametrize("strips", [128, 129, 257])
def test_sums_over_strips_match_at_the_edges_of_their_parts(strips):
    """With so many groups a part of a sum on a GPU is two segments of 128 strips."""
    case = Case(1, strips, 1, 1029, 1, dtype=torch.bfloat16)
    assert_matches(case, case.arguments())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [12, 14, 16])
@pytest.mark.parametrize("first", [0, 1, 2, 4])
def test_memory_may_begin_anywhere(first, groups, dtype):
    case = Case(strips=3, length=5, groups=groups, dtype=dtype)
    x, weight, bias, axis = case.arguments()

    def moved(t: Tensor) -> Tensor:
        room = t.new_full((*t.shape[:-1], t.shape[-1] + 8), torch.nan)
        room[..., first : first + t.shape[-1]] = t
        return room[..., first : first + t.shape[-1]]

    assert_matches(case, [moved(x), moved(weight), moved(bias), axis], moved(torch.randn_like(x)))


def test_gradients_have_the_same_bits_each_time():
    case = Case(4, 40, 7, 12, 2, dtype=torch.bfloat16)
    arguments = case.arguments()
    grad = torch.randn_like(arguments[0])
    for once, again in zip(backward(grad, *arguments), backward(grad, *arguments), strict=True):
        assert torch.equal(once, again)


def test_an_image_gives_the_same_bits_alone_and_in_a_batch():
    x, *rest = Case(batch=6).arguments()
    out = fused(x, *rest)
    for b in range(6):
        assert torch.equal(fused(x[b : b + 1], *rest)[0], out[b])


@pytest.mark.parametrize("empty", [{"batch": 0}, {"strips": 0}, {"length": 0}, {"patches": 0}], ids=str)
@pytest.mark.parametrize("axis", [1, 2])
def test_nothing_to_compute_is_no_error(empty, axis):
    arguments = replace(Case(axis=axis), **empty).arguments()
    out = fused(*arguments)
    assert out.shape == arguments[0].shape
    for g, x in zip(backward(out, *arguments), arguments, strict=False):
        assert g.shape == x.shape
        assert not g.any()


# --- wrong arguments --------------------------------------------------------------------------------------------------

WRONG = {
    "x must have 4 dimensions": (0, lambda x: x[0]),
    "x must be float32, float64, bfloat16 or float16": (0, lambda x: x.int()),
    "last dimension of x must be contiguous": (0, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "groups of weight must divide the channels of x, 41, got 21": (0, lambda x: x[..., :41]),
    r"weight must have shape \(3, 6, 6, 21\), got \(3, 7, 7, 21\)": (0, lambda x: x[:, :, :6]),
    "weight must be float32, got float64": (1, lambda w: w.double()),
    r"weight must have shape \(3, 7, 7, 42\), got \(7, 7, 21\)": (1, lambda w: w[0]),
    r"weight must have shape \(3, 7, 7, 21\), got \(2, 7, 7, 21\)": (1, lambda w: w[1:]),
    r"weight must have shape \(3, 7, 7, 21\), got \(3, 7, 6, 21\)": (1, lambda w: w[:, :, 1:]),
    "groups of weight must divide the channels of x, 42, got 20": (1, lambda w: w[..., 1:]),
    "groups of weight must divide the channels of x, 42, got 0": (1, lambda w: w[..., :0]),
    r"last dimension of weight must be contiguous \(stride 1\), got stride 2": (
        1,
        lambda w: w.repeat(1, 1, 1, 2)[..., ::2],
    ),
    "bias must be float32, got bfloat16": (2, lambda b: b.bfloat16()),
    r"bias must have shape \(7, 21\), got \(7,?\)": (2, lambda b: b[:, 0]),
    r"bias must have shape \(7, 21\), got \(6, 21\)": (2, lambda b: b[1:]),
    "axis must be 1 or 2, got 0": (3, lambda _: 0),
    "axis must be 1 or 2, got -1": (3, lambda _: -1),
    "axis must be 1 or 2, got 9223372036854775807": (3, lambda _: 2**63 - 1),
}


@pytest.mark.parametrize("call", [fused, lambda x, *rest: backward(x, x, *rest)], ids=["forward", "backward"])
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message, call):
    position, change = WRONG[message]
    arguments = Case().arguments()
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=f"^strip_mix.*{message}"):
        call(*arguments)


WRONG_GRADIENT = {
    "grad must be float32, got float64": lambda grad: grad.double(),
    r"grad must have shape \(2, 9, 7, 42\), got \(2, 8, 7, 42\)": lambda grad: grad[:, 1:],
    "grad must have 4 dimensions": lambda grad: grad[0],
    "last dimension of grad must be contiguous": lambda grad: grad.mT.contiguous().mT,
}


@pytest.mark.parametrize("message", WRONG_GRADIENT)
def test_a_wrong_gradient_is_refused(message):
    arguments = Case().arguments()
    with pytest.raises(RuntimeError, match=message):
        backward(WRONG_GRADIENT[message](arguments[0]), *arguments)


@pytest.mark.parametrize(("position", "name"), [(1, "weight"), (2, "bias")])
def test_tensors_elsewhere_are_refused(position, name):
    """A tensor without memory stands for any other device; the dispatcher is told to use the CPU kernel."""
    arguments = Case().arguments()
    arguments[position] = arguments[position].to("meta")
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{name} must be on the CPU"):
        torch.ops.vitrail.strip_mix.default.redispatch(kernel, *arguments)


@pytest.mark.parametrize(("strips", "length"), [(1, 2**20), (1, 2**30), (2**31 - 1, 2**22)])
def test_sizes_too_large_for_memory_are_an_error_and_not_a_crash(strips, length):
    x = torch.zeros(1).expand(1, strips, length, 1)
    weight = torch.zeros(1).expand(3, length, length, 1)
    with pytest.raises((RuntimeError, MemoryError), match=r"memory|alloc|too large"):
        backward(x, x, weight, None, 2)


def test_every_instruction_set_matches_the_definition(lesser_instruction_set):
    """The tests above again: the fixture does it."""
