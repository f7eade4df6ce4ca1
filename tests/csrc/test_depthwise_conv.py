"""The compiled kernels of `depthwise_conv`: against stock convolutions in float64, and on maps of every layout."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .kernels import EXAMPLES, TOLERANCE, operator

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    images: int = 2
    height: int = 5
    width: int = 11
    channels: int = 37
    kernel: tuple[int, int] = (3, 3)
    dtype: torch.dtype = torch.float32
    per_image: bool = False
    affine: bool = True
    activation: str = "gelu"
    added: bool = True  # bias and residual

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.images, self.height, self.width, self.channels)

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator."""
        g = torch.Generator().manual_seed(seed)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def normal(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        x = normal(*self.shape, dtype=self.dtype)
        weight = normal(*([self.images] if self.per_image else []), *self.kernel, self.channels)
        bias = normal(self.channels) if self.added else None
        residual = normal(*self.shape, dtype=self.dtype) if self.added else None
        scale, shift = (normal(self.channels) if self.affine else None for _ in range(2))
        return [x, weight, bias, residual, scale, shift, self.activation]


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """An image at a time, in float64."""
    kernels = weight.double().expand(len(x), *weight.shape[-3:])
    padding = (weight.shape[-3] // 2, weight.shape[-2] // 2)
    outs = [
        F.conv2d(
            image.permute(2, 0, 1)[None],
            kernel.permute(2, 0, 1)[:, None],
            padding=padding,
            groups=x.shape[3],
        )[0].permute(1, 2, 0)
        for image, kernel in zip(x, kernels, strict=True)
    ]
    return torch.stack(outs)


def definition(x, weight, bias, residual, scale, shift, activation) -> tuple[Tensor, Tensor]:
    """The result, and the magnitude of what was added up."""
    y = x.double() * (1 if scale is None else scale.double()) + (0 if shift is None else shift.double())
    bound = convolution(y.abs(), weight.abs())  # gelu's 1 + erf cancels: its error is one of y
    out = convolution(F.gelu(y) if activation == "gelu" else y, weight)
    for more in (bias, residual):
        if more is not None:
            out, bound = out + more.double(), bound + more.double().abs()
    return out, bound


def convolve(arguments: list) -> Tensor:
    return operator("depthwise_conv")(*arguments)


def assert_matches(arguments: list) -> None:
    x = arguments[0]
    want, bound = definition(*arguments)
    got = convolve(arguments)
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    assert got.is_contiguous()
    assert (got.double() - want).abs().max() <= TOLERANCE[x.dtype] * bound.max()


SHAPES = {
    "BiFormer's positions": Case(1, 14, 14, 48, (3, 3), affine=False, activation="none"),
    "BiFormer's LePE": Case(2, 7, 7, 64, (5, 5), affine=False, activation="none"),
    "Strip-MLP's first": Case(1, 14, 14, 40, (3, 3), added=False),
    "Strip-MLP's blend": Case(2, 7, 7, 40, (7, 7), per_image=True, added=False),
    "one place": Case(1, 1, 1, 1, (7, 7)),
    "a row": Case(2, 1, 40, 5, (5, 5)),
    "a column": Case(2, 40, 1, 5, (5, 5)),
    "one tap": Case(2, 6, 9, 33, (1, 1)),
    "a strip of taps": Case(1, 9, 10, 20, (1, 7)),
    "taps higher than wide": Case(2, 10, 9, 20, (7, 3), per_image=True),
    "more taps than places": Case(1, 3, 4, 18, (11, 13)),
    "as large as a tile of a GPU": Case(1, 16, 16, 32, (3, 3)),
    "a little larger": Case(1, 17, 17, 33, (7, 7)),
    "many images": Case(70, 9, 10, 7, (3, 3), per_image=True),
    "enough for the largest tiles of a GPU": Case(27, 17, 9, 130, (5, 5)),
}


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype):
    assert_matches(replace(SHAPES[shape], dtype=dtype).arguments())


@settings(max_examples=EXAMPLES)
@given(
    case=st.builds(
        Case,
        images=st.integers(1, 3),
        height=st.integers(1, 18),
        width=st.integers(1, 18),
        channels=st.integers(1, 40),
        kernel=st.tuples(*[st.sampled_from([1, 3, 5, 7, 9])] * 2) | st.sampled_from([(3, 3), (5, 5), (7, 7)]),
        dtype=st.sampled_from(list(TOLERANCE)),
        per_image=st.booleans(),
        affine=st.booleans(),
        activation=st.sampled_from(["none", "gelu"]),
        added=st.booleans(),
    )
)
def test_any_shape_matches(case):
    assert_matches(case.arguments())


@each_dtype
@pytest.mark.parametrize("kernel", [(3, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 4], ids="from channel {}".format)
def test_maps_may_lie_anywhere_in_wider_ones(dtype, kernel, offset):
    case = Case(2, 9, 10, 36, kernel, dtype)
    arguments = case.arguments()
    want = convolve(arguments)
    for i in (0, 3):
        wider = torch.full((2, 12, 11, 60), torch.nan, dtype=dtype)
        part = wider[:, 2:11, 1:, offset : offset + 36]
        part.copy_(arguments[i])
        arguments[i] = part
    assert torch.equal(convolve(arguments), want)
    turned = [
        x.transpose(1, 2).contiguous().transpose(1, 2) if i in (0, 3) else x for i, x in enumerate(arguments)
    ]
    assert torch.equal(convolve(turned), want)


@each_dtype
@pytest.mark.parametrize("kernel", [(5, 5), (9, 9)], ids=str)
def test_an_image_does_not_depend_on_the_others(dtype, kernel):
    case = Case(40, 18, 12, 40, kernel, dtype, per_image=True)
    arguments = case.arguments()
    alone = [x[7:8] if isinstance(x, Tensor) and x.dim() == 4 else x for x in arguments]
    assert torch.equal(convolve(alone), convolve(arguments)[7:8])


@each_dtype
@pytest.mark.parametrize("kernel", [(3, 3), (9, 3)], ids=str)
def test_what_is_not_finite_stays_within_reach(dtype, kernel):
    x = torch.zeros(1, 20, 20, 16, dtype=dtype)
    x[0, 12, 12] = torch.inf
    weight = torch.ones(*kernel, 16, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    got = convolve([x, weight, None, None, None, None, "none"])
    high, wide = kernel[0] // 2, kernel[1] // 2
    near = got[0, 12 - high : 13 + high, 12 - wide : 13 + wide]
    assert near.isinf().all()
    near.zero_()
    assert (got == 0).all()


@each_dtype
def test_a_shift_does_not_reach_past_the_map(dtype):
    """Zeros stand there after scale, shift and activation."""
    x = torch.zeros(1, 4, 4, 8, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ones = torch.ones(8, dtype=wide)
    got = convolve([x, torch.ones(3, 3, 8, dtype=wide), None, None, None, ones, "none"])
    assert (got[0, 0, 0] == 4).all()
    assert (got[0, 0, 1] == 6).all()
    assert (got[0, 1, 1] == 9).all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_empty_maps_stay_empty(shape):
    assert convolve(Case(*shape, 8).arguments()).shape == (*shape, 8)


REFUSED = {
    "no channels": ({0: torch.zeros(2, 5, 11, 0)}, "x must have from 1 to"),
    "dtype": ({1: torch.zeros(3, 3, 37).half()}, "weight must be float32, got float16"),
    "channels": ({1: torch.zeros(3, 3, 36)}, r"weight must have shape \(3, 3, 37\), got \(3, 3, 36\)"),
    "even": ({1: torch.zeros(2, 3, 37)}, "the kernel must be odd, up to 1023 high and wide, got 2 x 3"),
    "bias": ({2: torch.zeros(4)}, r"bias must have shape \(37\), got \(4\)"),
    "residual": ({3: torch.zeros(2, 5, 11, 36)}, r"residual must have shape \(2, 5, 11, 37\)"),
    "name": ({6: "relu"}, "activation must be 'none' or 'gelu', got 'relu'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused(case):
    change, message = REFUSED[case]
    arguments = [change.get(i, x) for i, x in enumerate(Case().arguments())]
    with pytest.raises(RuntimeError, match=message):
        convolve(arguments)
