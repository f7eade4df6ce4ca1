"""strip_mix against a plain loop over tokens, and its place in PyTorch."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import library, strip_mix, use_ops

from .counting import macs_by_both

OP = torch.ops.vitrail.strip_mix.default
BACKWARD = torch.ops.vitrail.strip_mix_backward.default
module = importlib.import_module("vitrail.ops.strip_mix")  # the package has a function of this name


def by_hand(x, weight, bias=None, axis=2):
    """Token by token, straight from the documentation; slow and independent of the operator's own definition."""
    x, weight = x.double(), weight.double()
    b, h, w, channels = x.shape
    groups = weight.shape[3]
    out = torch.zeros_like(x)
    for i, y, z, c in torch.cartesian_prod(*(torch.arange(n) for n in (b, h, w, channels))).tolist():
        g = c % groups
        strip, place = (y, z) if axis == 2 else (z, y)
        total = 0.0 if bias is None else bias.double()[place, g]
        for tap in range(3):
            beside = strip + tap - 1
            if 0 <= beside < (h if axis == 2 else w):
                for giver in range(w if axis == 2 else h):
                    value = x[i, beside, giver, c] if axis == 2 else x[i, giver, beside, c]
                    total = total + weight[tap, place, giver, g] * value
        out[i, y, z, c] = total
    return out


def example(batch=2, height=4, width=5, groups=3, patches=2, axis=2, bias=True, dtype=torch.float64, seed=0):
    """Arguments with x as half of the channels of a map, as the models pass it."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    length = width if axis == 2 else height
    args = {"x": draw(batch, height, width, 2 * groups * patches).chunk(2, -1)[1], "axis": axis}
    args["weight"] = draw(3, length, length, groups) * (3 * length) ** -0.5
    return args | {"bias": draw(length, groups) if bias else None}


def error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"height": 1, "width": 1},
        {"height": 1, "width": 7},
        {"height": 7, "width": 1},
        {"groups": 1},
        {"patches": 1},
    ],
    ids=str,
)
def test_every_token_receives_from_its_strip_and_the_two_beside_it(mode, axis, bias, shape):
    args = example(axis=axis, bias=bias, **shape)
    with use_ops(mode):
        assert error(strip_mix(**args), by_hand(**args)) < 1e-13


@settings(max_examples=50)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    groups=st.integers(1, 4),
    patches=st.integers(1, 3),
    axis=st.sampled_from([1, 2]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    columns_first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_operator_and_definition_agree_with_the_loop_on_any_shape(columns_first, **shape):
    args = example(**shape)
    if columns_first:
        args["x"] = args["x"].transpose(1, 2).contiguous().transpose(1, 2)
    limit = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[
        shape["dtype"]
    ]
    want = by_hand(**args)
    for mode in ("auto", "reference"):
        with use_ops(mode):
            got = strip_mix(**args)
        assert got.dtype == shape["dtype"]
        assert (got - want).abs().max() <= limit * want.abs().max()


def test_the_two_axes_are_each_others_transpose():
    args = example(axis=2)
    turned = args | {"x": args["x"].transpose(1, 2), "axis": 1}
    assert torch.equal(strip_mix(**turned), strip_mix(**args).transpose(1, 2))


def test_it_is_a_convolution_across_strips_with_a_matrix_for_each_tap():
    """The definition of the paper's layer: a grouped convolution whose channels are the positions of a strip."""
    args = example(groups=1, patches=1, axis=2)
    got = strip_mix(**args)[..., 0]
    conv = torch.nn.functional.conv1d(
        args["x"][..., 0].transpose(1, 2),
        args["weight"][..., 0].permute(1, 2, 0),
        args["bias"][:, 0],
        padding=1,
    )
    torch.testing.assert_close(got, conv.transpose(1, 2))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("axis", [1, 2])
def test_lower_precision_stays_within_the_rounding_of_its_inputs_and_outputs(dtype, limit, axis):
    args = example(height=14, width=28, groups=20, axis=axis, dtype=dtype)
    want = strip_mix(**{n: v.double() if torch.is_tensor(v) else v for n, v in args.items()})
    got = strip_mix(**args)
    assert got.dtype == dtype
    assert error(got, want) < limit


def test_the_weight_may_be_of_another_precision_than_the_grid():
    args = example(dtype=torch.bfloat16)
    wide = args | {n: args[n].float() for n in ("weight", "bias")}
    assert torch.equal(strip_mix(**wide), strip_mix(**args))


@pytest.mark.parametrize("axis", [1, 2])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(axis):
    args = example(axis=axis)
    leaves = {n: args[n].detach().clone().requires_grad_() for n in ("weight", "bias")}
    got = strip_mix(**args | leaves | {"x": args["x"][:0].requires_grad_()})
    assert got.shape == (0, 4, 5, 6)
    got.sum().backward()
    for leaf in leaves.values():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("axis", [1, 2])
def test_results_have_the_layout_of_the_inputs_channels(mode, axis):
    args = example(axis=axis)
    assert not args["x"].is_contiguous()
    with use_ops(mode):
        got = strip_mix(**args)
        flipped = strip_mix(**args | {"x": args["x"].transpose(1, 2).contiguous().transpose(1, 2)})
    assert got.shape == args["x"].shape
    assert torch.equal(got, flipped)
    if mode == "auto":
        assert got.is_contiguous()


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_first_and_second_derivatives_are_those_of_the_definition(axis, bias):
    args = example(batch=2, height=3, width=4, groups=2, axis=axis, bias=bias)
    names = ["x", "weight"] + ["bias"] * bias
    leaves = [args[n].detach().clone().requires_grad_() for n in names]

    def call(*tensors):
        return strip_mix(**{**args, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_follow_those_of_the_definition(axis, dtype):
    args = example(height=6, width=7, groups=4, axis=axis, dtype=dtype)
    names = ("x", "weight", "bias")

    def gradients(args, mode):
        leaves = {n: args[n].detach().clone().requires_grad_() for n in names}
        with use_ops(mode):
            strip_mix(**args | leaves).double().square().sum().backward()
        return [leaves[n].grad for n in names]

    wide = {n: v.double() if torch.is_tensor(v) else v for n, v in args.items()}
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for name, got, want in zip(names, gradients(args, "auto"), gradients(wide, "reference"), strict=True):
        assert got.dtype == dtype
        assert error(got, want) < limit, name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", [1, 2])
def test_without_a_compiled_library_gradients_need_no_forward_pass(axis, bias, monkeypatch):
    args = example(axis=axis, bias=bias)
    grad = torch.randn(args["x"].shape, dtype=torch.float64)
    positional = [args[n] for n in ("x", "weight", "bias", "axis")]
    want = BACKWARD(grad, *positional)
    calls = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *a, **k: calls.append(1) or conv2d(*a, **k))
    monkeypatch.setattr(library, "load", lambda *_: False)
    for got, w in zip(module._operator._backward_kernel(grad, *positional), want, strict=True):
        torch.testing.assert_close(got, w)
    assert len(calls) == 1  # the gradient of x, which is a mixing itself


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registrations_pass_opcheck(axis, bias, dtype):
    a = example(axis=axis, bias=bias, dtype=dtype)
    x, weight = (a[n].detach().clone().requires_grad_() for n in ("x", "weight"))
    torch.library.opcheck(OP, (x, weight, a["bias"].requires_grad_() if bias else None, axis))
    bias = a["bias"].detach() if bias else None
    torch.library.opcheck(BACKWARD, (torch.ones_like(x), x.detach(), weight.detach(), bias, axis))


def test_torch_compile_sees_one_graph_forward_and_backward():
    args = example(dtype=torch.float32)
    names = ["x", "weight", "bias"]
    leaves = [args[n].detach().clone().requires_grad_() for n in names]

    def call(*tensors):
        return strip_mix(**{**args, **dict(zip(names, tensors, strict=True))}).sin()

    want = torch.autograd.grad(call(*leaves).sum(), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for g, w in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_torch_export_keeps_batch_free(mode):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 5, 5, 3))

        def forward(self, x):
            return strip_mix(x, self.weight)

    module, x = Module(), torch.randn(3, 4, 5, 6)
    with use_ops(mode):
        program = torch.export.export(module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert any(node.target is OP for node in program.graph.nodes) == (mode == "auto")
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("bias", [False, True])
def test_torchscript_calls_the_operator(bias):
    args = example(dtype=torch.float32, axis=1, bias=bias)
    scripted = torch.jit.script(strip_mix)
    positional = [args[n] for n in ("x", "weight", "bias", "axis")]
    torch.testing.assert_close(scripted(*positional), strip_mix(*positional))


def test_torch_func_transforms_compose_and_give_each_image_its_own_weight_gradient():
    args = example(batch=3, axis=1)

    def loss(x, weight, bias):
        return strip_mix(x[None], weight, bias, 1).square().sum()

    grad = torch.func.grad(loss, argnums=(0, 1, 2))
    per_image = torch.vmap(grad, in_dims=(0, None, None))(args["x"], args["weight"], args["bias"])
    for i in range(3):
        alone = grad(args["x"][i], args["weight"], args["bias"])
        for batched, single in zip(per_image, alone, strict=True):
            torch.testing.assert_close(batched[i], single)


def test_a_weight_can_be_mapped_over():
    args = example()
    weights = torch.stack([args["weight"], -args["weight"]])
    got = torch.vmap(lambda weight: strip_mix(args["x"], weight))(weights)
    for i in range(2):
        torch.testing.assert_close(got[i], strip_mix(args["x"], weights[i]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    args = example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        got = strip_mix(**args)
    assert got.dtype == dtype
    assert error(got, strip_mix(**args)) < 2e-2


def test_gradient_checkpointing_gives_the_same_gradients():
    args = example()
    leaves = [args[n].detach().clone().requires_grad_() for n in ("x", "weight", "bias")]

    def call(*tensors):
        return strip_mix(*tensors).sin().sum()

    want = torch.autograd.grad(call(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False).backward()
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_both_counters_find_three_strips_for_every_value(mode):
    args = example(dtype=torch.float32)
    x, weight = args["x"].clone().requires_grad_(), args["weight"].requires_grad_()
    macs = 2 * 4 * 5 * 6 * 3 * 5
    with use_ops(mode):
        assert macs_by_both(strip_mix, x, weight) == (macs, macs)
        out = strip_mix(x, weight)
    if mode == "auto":
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * macs


BAD = {
    "x of rank 3": ({"x": torch.zeros(4, 5, 6)}, ValueError, r"x must have 4 dimensions .* got shape \(4, 5, 6\)"),
    "integer x": ({"x": torch.zeros(2, 4, 5, 6).int()}, TypeError, "x must be float32.*got torch.int32"),
    "no tensor": ({"x": 1.0}, TypeError, r"x must be a tensor of shape \(B, H, W, C\), got float"),
    "strided channels": ({"x": torch.zeros(2, 6, 5, 4).transpose(1, 3)}, ValueError, "x must have contiguous channels"),
    "another axis": ({"axis": 3}, ValueError, r"axis must be 2 \(mix along rows\) or 1 \(mix along columns\), got 3"),
    "no number": ({"axis": "rows"}, ValueError, "axis must be 2 .*, got 'rows'"),
    "weight of other strips": ({"axis": 1}, ValueError, r"weight must have shape \(3, 4, 4, 3\), got \(3, 5, 5, 3\)"),
    "weight without taps": ({"weight": torch.zeros(5, 5, 3)}, ValueError, r"weight must have shape \(3, 5, 5, 6\), got \(5, 5, 3\)"),
    "groups": ({"weight": torch.zeros(3, 5, 5, 4)}, ValueError, "the groups of weight must divide the 6 channels of x, got 4"),
    "no groups": ({"weight": torch.zeros(3, 5, 5, 0)}, ValueError, "groups of weight must divide the 6 channels of x, got 0"),
    "strided groups": ({"weight": torch.zeros(3, 3, 5, 5).transpose(1, 3)}, ValueError, "weight must have contiguous groups .* got stride 25"),
    "integer weight": ({"weight": torch.zeros(3, 5, 5, 3).long()}, TypeError, "weight must be a floating-point tensor, got torch.int64"),
    "weight elsewhere": ({"weight": torch.zeros(3, 5, 5, 3, device="meta")}, ValueError, "weight is on meta but x is on cpu"),
    "no weight": ({"weight": None}, TypeError, r"weight must be a tensor of shape \(3, 5, 5, 6\), got NoneType"),
    "bias' shape": ({"bias": torch.zeros(3, 5)}, ValueError, r"bias must have shape \(5, 3\), got \(3, 5\)"),
    "bias elsewhere": ({"bias": torch.zeros(5, 3, device="meta")}, ValueError, "bias is on meta but x is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(mode, case):
    change, kind, message = BAD[case]
    with use_ops(mode), pytest.raises(kind, match=message):
        strip_mix(**example() | change)
