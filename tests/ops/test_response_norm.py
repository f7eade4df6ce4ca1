"""response_norm: timm's layer behind a GELU, and its place in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm

from vitrail.ops import response_norm, use_ops

from .counting import macs_by_both
from .place import check_compiled_and_scripted, check_vmap

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
each_mode = pytest.mark.parametrize("mode", ["auto", "reference"])


def example(shape=(2, 5, 6), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    weight = torch.randn(shape[-1], generator=g, dtype=torch.float64)
    return x.to(dtype), weight.to(torch.float64 if dtype == torch.float64 else torch.float32)


@each_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_it_is_timms_layer_behind_an_activation(activation, dtype, mode):
    x, weight = example((3, 4, 5, 70), dtype)
    grn = GlobalResponseNorm(70, channels_last=True).double()
    grn.weight.data.copy_(weight)
    with use_ops(mode), torch.no_grad():
        got = response_norm(x, weight, grn.eps, activation)
        want = grn(F.gelu(x.double()) if activation == "gelu" else x.double())
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= DTYPES[dtype] * want.abs().max()


@each_mode
@pytest.mark.parametrize("shape", [(0, 4, 4, 8), (2, 0, 8), (0, 8), (3, 8)], ids=str)
def test_the_shape_stays(shape, mode):
    with use_ops(mode):
        assert response_norm(*example(shape)).shape == shape


def test_channels_need_not_be_contiguous():
    x, weight = example((2, 5, 6))
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(response_norm(turned, weight), response_norm(x, weight))


def test_registrations_pass_opcheck():
    args = [x.requires_grad_() for x in example()]
    torch.library.opcheck(torch.ops.vitrail.response_norm.default, (*args, 1e-6, "gelu"))


def test_gradients_are_those_of_the_definition():
    args = [x.requires_grad_() for x in example()]
    assert torch.autograd.gradcheck(lambda *a: torch.ops.vitrail.response_norm(*a, 1e-6, "gelu"), args)


def test_vmap_gives_each_entry_its_own_result():
    check_vmap(torch.ops.vitrail.response_norm, *example(), 1e-6, "gelu")


def test_it_can_be_compiled_and_scripted():
    x, weight = example((2, 3, 4, 6), torch.float32)
    check_compiled_and_scripted(response_norm, {"x": x, "weight": weight, "activation": "gelu"})


def test_norms_count_as_nothing():
    x, weight = example()
    assert macs_by_both(lambda x: torch.ops.vitrail.response_norm(x, weight, 1e-6, "gelu"), x) == (0, 0)


BAD = {
    "no tensor": ({"x": 1.0}, ValueError, r"x must be a tensor \(B, \.\.\., channels\), got float"),
    "a vector": ({"x": torch.zeros(6)}, ValueError, r"x must be a tensor \(B, \.\.\., channels\), got \(6,\)"),
    "integers": ({"x": torch.zeros(2, 6).int()}, TypeError, "x must be float32, .* got torch.int32"),
    "weight": ({"weight": torch.zeros(7)}, ValueError, r"weight must have shape \(6,\) and dtype torch.float64, got \(7,\)"),
    "activation": ({"activation": "relu"}, ValueError, "activation must be one of none, gelu, got 'relu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(case):
    change, kind, message = BAD[case]
    x, weight = example()
    with pytest.raises(kind, match=message):
        response_norm(**{"x": x, "weight": weight, **change})
