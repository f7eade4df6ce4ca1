"""packed_linear, packed_mlp and packed_grn_mlp: against stock layers in float64, and their place in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.grn import GlobalResponseNorm

from vitrail.ops import pack_weight, packed_grn_mlp, packed_linear, packed_mlp, use_ops
from vitrail.ops.packed_linear import unpack_weight

from ..threads import torch_threads, with_threads
from .counting import macs_by_both
from .place import check_vmap
from .refusals import check_kernel_refuses

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def example(rows=(5,), depth=7, hidden=40, columns=33, dtype=torch.float64, norm=True, residual=True, seed=0):
    """Arguments of packed_mlp with plain weights."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, of=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(of)

    return {
        "x": draw(*rows, depth),
        "weight1": draw(hidden, depth) * depth**-0.5,
        "bias1": draw(hidden, of=wide(dtype)),
        "weight2": draw(columns, hidden) * hidden**-0.5,
        "bias2": draw(columns, of=wide(dtype)),
        "residual": draw(*rows, columns) if residual else None,
        "norm_eps": 1e-5 if norm else None,
    }


def packed(args):
    return args | {name: pack_weight(args[name]) for name in ("weight1", "weight2")}


def call_mlp(args, **kwargs):
    sizes = {"hidden": len(args["weight1"]), "columns": len(args["weight2"])}
    return packed_mlp(**packed(args), **sizes, **kwargs)


def stock_mlp(args, activation="gelu", factors=None):
    """The same from stock layers, in float64."""
    args = {n: v.double() if torch.is_tensor(v) else v for n, v in args.items()}
    x = args["x"]
    if args["norm_eps"] is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=args["norm_eps"])
    x = F.linear(x, args["weight1"], args["bias1"])
    x = F.gelu(x) if activation == "gelu" else x
    if factors is not None:
        x = factors(x)
    x = F.linear(x, args["weight2"], args["bias2"])
    return x if args["residual"] is None else x + args["residual"]


def error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


# --- packing ----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (32, 8), (33, 7), (100, 3)], ids=str)
def test_a_packed_weight_can_be_unpacked(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    assert torch.equal(unpack_weight(pack_weight(weight), *shape), weight)


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (
            torch.zeros(2, 3).half(),
            TypeError,
            "weight must be float32, float64 or bfloat16, got torch.float16",
        ),
        (torch.zeros(3), ValueError, r"weight must be a matrix \(columns, depth\), got shape \(3,\)"),
        (torch.zeros(3, 0), ValueError, r"got shape \(3, 0\)"),
    ],
    ids=["half", "vector", "empty"],
)
def test_only_matrices_can_be_packed(weight, kind, message):
    with pytest.raises(kind, match=message):
        pack_weight(weight)


# --- values -----------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    rows=st.sampled_from([(1,), (13,), (109,), (2, 3, 40), (500,)]),
    depth=st.integers(1, 70),
    hidden=st.sampled_from([1, 31, 384, 385, 800]),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(list(DTYPES)),
    norm=st.booleans(),
    residual=st.booleans(),
    mode=st.sampled_from(["auto", "reference"]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_an_mlp_of_any_shape_is_that_of_stock_layers(mode, threads, **shape):
    args = example(**shape)
    if shape["norm"] and shape["depth"] == 1:
        return  # the norm of a single channel is the rounding of nothing
    with torch_threads(threads), use_ops(mode):
        got = call_mlp(args)
    assert got.dtype == shape["dtype"]
    assert got.is_contiguous()
    assert error(got, stock_mlp(args)) <= DTYPES[shape["dtype"]]


@each_dtype
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_a_linear_layer_is_that_of_stock_layers(dtype, activation, mode):
    args = example(rows=(3, 50), depth=45, hidden=70, dtype=dtype)
    residual = torch.randn(3, 50, 70).to(dtype)
    with use_ops(mode):
        got = packed_linear(
            args["x"], pack_weight(args["weight1"]), args["bias1"], 70, residual, 1e-5, activation
        )
    want = F.linear(F.layer_norm(args["x"].double(), [45]), args["weight1"].double(), args["bias1"].double())
    want = (F.gelu(want) if activation == "gelu" else want) + residual.double()
    assert error(got, want) <= DTYPES[dtype]


@each_dtype
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("widths", [(5, 3), (8, 6, 40), (1, 1, 1)], ids=str)
def test_joined_inputs_are_one(dtype, mode, widths):
    args = example(rows=(3, 50), depth=sum(widths), hidden=70, dtype=dtype)
    parts = dict(zip(("x", "x2", "x3"), args["x"].split(widths, dim=-1), strict=False))
    weight = pack_weight(args["weight1"])
    with use_ops(mode):
        got = packed_linear(**parts, weight=weight, bias=args["bias1"], columns=70, norm_eps=1e-5)
        want = packed_linear(args["x"], weight, args["bias1"], 70, norm_eps=1e-5)
    assert torch.equal(got, want)


@each_dtype
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(50,), (5, 50)], ids=str)
def test_a_bias_may_depend_on_the_token(dtype, mode, shape):
    args = example(rows=(3, 5, 50), depth=45, hidden=70, dtype=dtype, norm=False)
    bias = torch.randn(*shape, 70).to(wide(dtype))
    with use_ops(mode):
        got = packed_linear(args["x"], pack_weight(args["weight1"]), bias, 70, activation="gelu")
        none = packed_linear(args["x"][:0], pack_weight(args["weight1"]), bias, 70)
    want = F.gelu(F.linear(args["x"].double(), args["weight1"].double()) + bias.double())
    assert error(got, want) <= DTYPES[dtype]
    assert none.shape == (0, 5, 50, 70)


@each_dtype
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("tokens", [(4, 5), (11, 20)], ids=str)
def test_response_normalisation_is_timms(dtype, mode, tokens):
    args = example(rows=(3, *tokens), depth=24, hidden=72, columns=24, dtype=dtype)
    grn = GlobalResponseNorm(72, channels_last=True).double()
    torch.nn.init.normal_(grn.weight)
    with use_ops(mode):
        got = packed_grn_mlp(
            **packed(args), grn_weight=grn.weight.detach().to(wide(dtype)), hidden=72, columns=24
        )
    with torch.no_grad():
        assert error(got, stock_mlp(args, factors=grn)) <= DTYPES[dtype]


def test_rows_may_be_a_part_of_wider_ones():
    args = example(rows=(3, 4), depth=12)
    wider = torch.cat([args["x"], torch.full_like(args["x"], torch.nan)], -1)
    assert torch.equal(call_mlp(args | {"x": wider[..., :12]}), call_mlp(args))
    turned = args["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(call_mlp(args | {"x": turned}), call_mlp(args))


def test_absent_biases_are_zeros():
    args = example()
    zeros = {name: torch.zeros_like(args[name]) for name in ("bias1", "bias2")}
    assert torch.equal(call_mlp(args | dict.fromkeys(zeros)), call_mlp(args | zeros))


@each_dtype
@pytest.mark.parametrize("rows", [49, 196, 500])
def test_results_do_not_depend_on_the_number_of_threads_or_on_other_rows(dtype, rows):
    args = example(rows=(rows,), depth=50, hidden=800, columns=70, dtype=dtype)
    grn_weight = torch.randn(800, dtype=wide(dtype))

    def call():
        three_dims = packed(args | {n: args[n][None] for n in ("x", "residual")})
        return call_mlp(args), packed_grn_mlp(**three_dims, grn_weight=grn_weight, hidden=800, columns=70)

    with_threads(call)
    some = args | {name: args[name][7:20] for name in ("x", "residual")}
    assert torch.equal(call_mlp(some), call_mlp(args)[7:20])


def test_no_rows_give_no_rows():
    args = example(rows=(0, 3))
    assert call_mlp(args).shape == (0, 3, 33)
    with use_ops("reference"):
        assert call_mlp(args).shape == (0, 3, 33)
    grn_weight = torch.ones(40, dtype=torch.float64)
    assert packed_grn_mlp(**packed(args), grn_weight=grn_weight, hidden=40, columns=33).shape == (0, 3, 33)


def test_gelu_is_right_from_end_to_end():
    """Through a layer that multiplies by one: far to the left it is zero, far to the right the identity."""
    x = torch.linspace(-12, 12, 24001)[:, None]
    got = packed_linear(x, pack_weight(torch.ones(1, 1)), None, 1, activation="gelu")
    error = (got.double() - F.gelu(x.double())).abs() / x.double().abs().clamp(min=1)
    assert error.max() < 1e-6
    special = torch.tensor([[torch.nan], [torch.inf], [1e30], [-1e30]])
    got = packed_linear(special, pack_weight(torch.ones(1, 1)), None, 1, activation="gelu")
    assert got[0].isnan()
    torch.testing.assert_close(got[1:], torch.tensor([[torch.inf], [1e30], [0.0]]))


# --- its place in PyTorch ---------------------------------------------------------------------------------------------


def operands(name, dtype=torch.float64):
    """The operator and flat arguments for it."""
    a = packed(example(rows=(6,), depth=5, hidden=9, columns=5, dtype=dtype))
    if name == "packed_linear":
        x, x3 = a["x"][:, :3], a["x"][:, 3:].contiguous()
        return [x, None, x3, a["weight1"], a["bias1"].repeat(3, 1), None, 9, 1e-5, "gelu"]
    if name == "packed_mlp":
        return [a[n] for n in ("x", "weight1", "bias1", "weight2", "bias2", "residual")] + [
            9,
            5,
            1e-5,
            "gelu",
        ]
    grn = torch.ones(9, dtype=wide(dtype))
    tensors = [a["x"], a["weight1"], a["bias1"], grn, a["weight2"], a["bias2"], a["residual"]]
    return [*tensors, 2, 9, 5, 1e-5, 1e-6]


each_operator = pytest.mark.parametrize("name", ["packed_linear", "packed_mlp", "packed_grn_mlp"])


@each_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_registrations_pass_opcheck(name, dtype):
    args = [x.requires_grad_() if torch.is_tensor(x) else x for x in operands(name, dtype)]
    torch.library.opcheck(getattr(torch.ops.vitrail, name).default, args)


@each_operator
def test_gradients_are_those_of_the_definition(name):
    args = operands(name)
    at = [i for i, x in enumerate(args) if torch.is_tensor(x)]

    def call(*tensors):
        filled = list(args)
        for i, x in zip(at, tensors, strict=True):
            filled[i] = x
        return getattr(torch.ops.vitrail, name)(*filled)

    assert torch.autograd.gradcheck(call, [args[i].requires_grad_() for i in at])


@each_operator
def test_vmap_gives_each_entry_its_own_result(name):
    check_vmap(getattr(torch.ops.vitrail, name), *operands(name))


@each_operator
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_both_counters_agree(name, mode):
    args = operands(name, torch.float32)
    macs = 6 * 9 * (5 if name == "packed_linear" else 10)
    op = getattr(torch.ops.vitrail, name)
    with use_ops(mode):
        assert macs_by_both(lambda x: op(x, *args[1:]), args[0]) == (macs, macs)


# --- wrong arguments --------------------------------------------------------------------------------------------------

BAD = {
    "half x": ({"x": torch.zeros(5, 7).half()}, TypeError, "x must be float32, float64 or bfloat16, got torch.float16"),
    "no tensor": ({"x": 1.0}, TypeError, r"x must be a tensor \(\.\.\., channels\), got float"),
    "plain weight": ({"weight1": torch.zeros(40, 7).double()}, ValueError, r"weight1 must be what pack_weight makes of"),
    "other depth": ({"weight2": torch.zeros(2, 41, 32).double()}, ValueError, r"shape \(2, 40, 32\), got \(2, 41, 32\)"),
    "other bias": ({"bias1": torch.zeros(40)}, ValueError, r"bias1 must have shape \(40,\), .* and dtype torch.float64, got"),
    "other residual": ({"residual": torch.zeros(5, 7).double()}, ValueError, r"residual must have shape \(5, 33\)"),
    "activation": ({"activation": "relu"}, ValueError, "activation must be one of none, gelu, got 'relu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        packed_mlp(**{**packed(example()), "hidden": 40, "columns": 33, **change})


JOINED = {
    "rows": ({"x2": torch.zeros(4, 2).double()}, r"x2 must have shape \(5, 'channels'\) and dtype torch.float64, got \(4, 2\)"),
    "dtype": ({"x3": torch.zeros(5, 2)}, r"x3 must have shape .* and dtype torch.float64, got \(5, 2\) of torch.float32"),
    "depth": ({"x2": torch.zeros(5, 2).double()}, r"weight must be what pack_weight makes of .* matrix \(40, 9\)"),
    "bias": ({"bias": torch.zeros(4, 40).double()}, r"bias must have shape \(40,\), or the last dimensions of \(5, 40\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", JOINED)
def test_inputs_that_cannot_be_joined_are_named(case):
    change, message = JOINED[case]
    args = example()
    plain = {"x": args["x"], "weight": pack_weight(args["weight1"]), "bias": args["bias1"], "columns": 40}
    with pytest.raises(ValueError, match=message):
        packed_linear(**{**plain, **change})


RAW = {
    "rank": ({0: torch.zeros(2, 3, 5)}, r"x must have 2 dimensions \(rows, channels\)"),
    "strided": ({0: torch.zeros(5, 6).t()}, "the last dimension of x must be contiguous"),
    "dtype": ({1: torch.zeros(1, 5, 32)}, "weight1 must be float64, got float32"),
    "panel": ({1: torch.zeros(1, 5, 31).double()}, r"weight1 must have shape \(1, 5, 32\), got \(1, 5, 31\)"),
    "bias": ({2: torch.zeros(8).double()}, r"bias1 must have shape \(9\), got \(8\)"),
    "biases": ({2: torch.zeros(4, 9).double()}, "bias1 must have a number of rows that divides 6, got 4"),
    "residual": ({5: torch.zeros(5, 5).double()}, r"residual must have shape \(6, 5\), got \(5, 5\)"),
    "columns": ({7: 0}, "the number of columns must be from 1 to"),
    "eps": ({8: float("nan")}, "norm_eps must be finite, got nan"),
    "name": ({9: "relu"}, "activation must be 'none' or 'gelu', got 'relu'"),
}


@pytest.mark.parametrize("case", RAW)
def test_the_compiled_operator_checks_for_itself(case):
    check_kernel_refuses("packed_mlp", operands("packed_mlp"), *RAW[case])
