"""The GPU kernels of `response_norm` against float64; on the CPU, where there are none, its definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .kernels import EXAMPLES, GPU_KERNELS, TOLERANCE, operator

EPS = 1e-6
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def example(shape: tuple[int, int, int], dtype: torch.dtype, activation: str = "gelu") -> list:
    """Arguments of the operator."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    weight = torch.randn(shape[2], generator=g, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype), weight.to(wide), EPS, activation]


def normalise(arguments: list) -> Tensor:
    return operator("response_norm")(*arguments)


def definition(x, weight, eps, activation) -> Tensor:
    y = F.gelu(x.double()) if activation == "gelu" else x.double()
    norm = y.square().sum(1, keepdim=True).sqrt()
    return y + y * weight.double() * norm / (norm.mean(2, keepdim=True) + eps)


def assert_matches(arguments: list) -> None:
    x = arguments[0]
    want, got = definition(*arguments), normalise(arguments)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    # of the rounding of the result and of what it is made from, where terms may cancel: in gelu's 1 + erf, and in y + f * y
    y = F.gelu(x.double()) if arguments[3] == "gelu" else x.double()
    limit = TOLERANCE[x.dtype] * (x.double().abs() + (want - y).abs()).max()
    assert (got.double() - want).abs().max() <= limit


SHAPES = {
    "Strip-MLP-T, stage 1": (1, 300, 240),
    "Strip-MLP-T, stage 4": (3, 49, 1920),
    "one number": (1, 1, 1),
    "one token": (4, 1, 33),
    "as many tokens as a block has": (2, 64, 128),
    "one more, and channels": (2, 65, 129),
    "more parts": (2, 200, 6),
    "many images": (70, 3, 5),
}


@each_dtype
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype, activation):
    assert_matches(example(SHAPES[shape], dtype, activation))


@settings(max_examples=EXAMPLES)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 140)),
    dtype=st.sampled_from(list(TOLERANCE)),
    activation=st.sampled_from(["none", "gelu"]),
)
def test_any_shape_matches(shape, dtype, activation):
    assert_matches(example(shape, dtype, activation))


@each_dtype
@pytest.mark.parametrize("offset", [0, 1, 4], ids="from channel {}".format)
def test_tokens_may_lie_anywhere_in_wider_ones(dtype, offset):
    x, *rest = example((2, 70, 36), dtype)
    wider = torch.full((2, 72, 60), torch.nan, dtype=dtype)
    part = wider[:, 1:71, offset : offset + 36]
    part.copy_(x)
    assert_matches([part, *rest])
    if GPU_KERNELS:
        assert torch.equal(normalise([part, *rest]), normalise([x, *rest]))


@pytest.mark.skipif(not GPU_KERNELS, reason="stock operators may add in another order")
@each_dtype
def test_an_image_does_not_depend_on_the_others(dtype):
    x, *rest = example((5, 130, 40), dtype)
    assert torch.equal(normalise([x[3:4], *rest]), normalise([x, *rest])[3:4])


@each_dtype
def test_zeros_stay_zeros(dtype):
    x, *rest = example((2, 9, 8), dtype)
    assert (normalise([torch.zeros_like(x), *rest]) == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_no_tokens_give_none(shape):
    assert normalise(example(shape, torch.float32)).shape == shape
