"""window_attention against a plain loop over tokens, and its place in PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.ops import use_ops, window_attention
from vitrail.ops.regions import ceil_div

OP = torch.ops.vitrail.window_attention.default


def by_hand(
    q, k, v, window_size, num_heads, scale=None, shift=(0, 0), bias=None, pad_key=None, pad_value=None
):
    """Token by token, straight from the documentation; slow and independent of the operator's own definition."""
    q, k, v = (x.double() for x in (q, k, v))
    (b, h, w, c), (wh, ww), (sh, sw) = q.shape, window_size, shift
    cv = v.shape[3]
    d, dv = c // num_heads, cv // num_heads
    scale = d**-0.5 if scale is None else scale
    pad_key = torch.zeros(c, dtype=q.dtype) if pad_key is None else pad_key.double()
    pad_value = torch.zeros(cv, dtype=q.dtype) if pad_value is None else pad_value.double()
    height, width = ceil_div(h, wh) * wh, ceil_div(w, ww) * ww

    def window(y, x):
        return (y - sh) // wh, (x - sw) // ww

    def place(y, x):
        return (y - sh) % wh * ww + (x - sw) % ww

    out = q.new_zeros(b, h, w, cv)
    for i, y, x in ((i, y, x) for i in range(b) for y in range(h) for x in range(w)):
        there = [(m, n) for m in range(height) for n in range(width) if window(m, n) == window(y, x)]
        keys = torch.stack([k[i, m, n] if m < h and n < w else pad_key for m, n in there])
        values = torch.stack([v[i, m, n] if m < h and n < w else pad_value for m, n in there])
        for head in range(num_heads):
            at, at_v = slice(head * d, (head + 1) * d), slice(head * dv, (head + 1) * dv)
            scores = scale * keys[:, at] @ q[i, y, x, at]
            if bias is not None:
                scores = scores + bias.double()[head, place(y, x), [place(m, n) for m, n in there]]
            out[i, y, x, at_v] = scores.softmax(0) @ values[:, at_v]
    return out


def example(
    batch=2,
    height=5,
    width=6,
    heads=2,
    d=4,
    dv=3,
    window=(3, 2),
    shift=None,
    extras=False,
    dtype=torch.float64,
    seed=0,
):
    """Arguments with q, k, v as views of one packed projection, as the models pass them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    q, k, v = draw(batch, height, width, heads * (2 * d + dv)).split([heads * d, heads * d, heads * dv], -1)
    args = {"q": q, "k": k, "v": v, "window_size": list(window), "num_heads": heads}
    if shift is not None:
        args["shift"] = list(shift)
    if extras:
        tokens = window[0] * window[1]
        args |= {
            "bias": draw(heads, tokens, tokens),
            "pad_key": draw(heads * d),
            "pad_value": draw(heads * dv),
        }
    return args


def error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    ("window", "shift"),
    [((1, 1), None), ((3, 2), None), ((3, 2), (1, 1)), ((5, 6), (2, 0)), ((2, 4), (0, 3)), ((8, 8), (4, 4))],
)
def test_every_token_attends_to_the_tokens_of_its_window(mode, extras, window, shift):
    args = example(window=window, shift=shift, extras=extras)
    with use_ops(mode):
        assert error(window_attention(**args), by_hand(**args)) < 1e-13


@settings(max_examples=40)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    heads=st.integers(1, 3),
    d=st.integers(1, 5),
    dv=st.integers(1, 5),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    data=st.data(),
    extras=st.booleans(),
    seed=st.integers(0, 99),
)
def test_operator_and_definition_agree_with_the_loop_on_any_shape(data, window, **shape):
    shift = data.draw(st.tuples(st.integers(0, window[0] - 1), st.integers(0, window[1] - 1)))
    args = example(window=window, shift=shift, **shape)
    with use_ops("reference"):
        reference = window_attention(**args)
    assert error(window_attention(**args), reference) < 1e-12
    assert error(reference, by_hand(**args)) < 1e-12


def test_padding_keys_equal_a_projection_of_padded_tokens():
    """DaViT pads the normalised map before its projection, whose bias the padded keys and values then are."""
    torch.manual_seed(0)
    proj = torch.nn.Linear(8, 24).double()
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64)
    q, k, v = proj(torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 3))).chunk(3, -1)
    want = window_attention(q, k, v, [4, 4], 2)[:, :5, :6]
    q, k, v = proj(x).chunk(3, -1)
    _, pad_key, pad_value = proj.bias.chunk(3)
    torch.testing.assert_close(
        window_attention(q, k, v, [4, 4], 2, pad_key=pad_key, pad_value=pad_value), want
    )


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("shift", [None, (3, 3)])
def test_lower_precision_stays_within_the_rounding_of_its_inputs_and_outputs(dtype, limit, shift):
    args = example(height=12, width=13, d=32, dv=32, window=(7, 7), shift=shift, extras=True, dtype=dtype)
    want = window_attention(**{n: x.double() if torch.is_tensor(x) else x for n, x in args.items()})
    got = window_attention(**args)
    assert got.dtype == dtype
    assert error(got, want) < limit


def test_bias_and_padding_may_be_of_another_precision_than_the_queries():
    args = example(extras=True, dtype=torch.bfloat16)
    wide = args | {n: args[n].float() for n in ("bias", "pad_key", "pad_value")}
    assert torch.equal(window_attention(**wide), window_attention(**args))


def test_an_empty_batch_gives_an_empty_result():
    args = example(extras=True)
    assert window_attention(**args | {n: args[n][:0] for n in "qkv"}).shape == (0, 5, 6, 6)


def test_results_are_contiguous_whatever_the_strides_of_the_inputs():
    args = example()
    assert not args["q"].is_contiguous()
    flipped = args | {n: args[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    got = window_attention(**flipped)
    assert got.is_contiguous()
    assert torch.equal(got, window_attention(**args))


@pytest.mark.parametrize(("extras", "shift"), [(False, None), (True, (1, 1))])
def test_first_and_second_derivatives_are_those_of_the_definition(extras, shift):
    args = example(batch=1, height=3, width=4, d=2, dv=1, window=(2, 3), shift=shift, extras=extras)
    names = ["q", "k", "v"] + ["bias", "pad_key", "pad_value"] * extras
    leaves = [args[n].detach().clone().requires_grad_() for n in names]

    def call(*tensors):
        return window_attention(**{**args, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registrations_pass_opcheck(extras, dtype):
    a = example(extras=extras, dtype=dtype)
    q, k, v = (a[n].detach().clone().requires_grad_() for n in "qkv")
    bias = a["bias"].float().requires_grad_() if extras else None
    rest = (
        [a[n].requires_grad_() if extras else None for n in ("pad_key", "pad_value")]
        if extras
        else [None, None]
    )
    torch.library.opcheck(OP, (q, k, v, bias, *rest, [3, 2], [1, 0], 2, 0.5))


def test_torch_compile_sees_one_graph_forward_and_backward():
    args = example(extras=True, shift=(1, 1), dtype=torch.float32)
    names = ["q", "k", "v", "bias", "pad_key"]
    leaves = [args[n].detach().clone().requires_grad_() for n in names]

    def call(*tensors):
        return window_attention(**{**args, **dict(zip(names, tensors, strict=True))}).sin()

    want = torch.autograd.grad(call(*leaves).sum(), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for g, w in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_torch_export_keeps_batch_free(mode):
    class Module(torch.nn.Module):
        def forward(self, x):
            q, k, v = x.chunk(3, -1)
            return window_attention(q, k, v, [3, 2], 2, shift=[1, 1])

    x = torch.randn(3, 5, 6, 24)
    with use_ops(mode):
        program = torch.export.export(Module(), (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert any(node.target is OP for node in program.graph.nodes) == (mode == "auto")
    torch.testing.assert_close(program.module()(x), Module()(x))


def test_torchscript_calls_the_operator():
    args = example(dtype=torch.float32)
    scripted = torch.jit.script(window_attention)
    positional = [args[n] for n in ("q", "k", "v", "window_size", "num_heads")]
    torch.testing.assert_close(scripted(*positional), window_attention(*positional))


def test_torch_func_transforms_compose_and_give_each_image_its_own_bias_gradient():
    args = example(batch=3, extras=True, shift=(1, 0))

    def loss(q, k, v, bias):
        mapped = {"q": q[None], "k": k[None], "v": v[None], "bias": bias}
        return window_attention(**{**args, **mapped}).square().sum()

    grad = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    tensors = [args[n] for n in ("q", "k", "v")]
    per_image = torch.vmap(grad, in_dims=(0, 0, 0, None))(*tensors, args["bias"])
    for i in range(3):
        alone = grad(*(x[i] for x in tensors), args["bias"])
        for batched, single in zip(per_image, alone, strict=True):
            torch.testing.assert_close(batched[i], single)


def test_a_bias_can_be_mapped_over():
    args = example(extras=True)
    biases = torch.stack([args["bias"], -args["bias"]])
    got = torch.vmap(lambda bias: window_attention(**{**args, "bias": bias}))(biases)
    for i in range(2):
        torch.testing.assert_close(got[i], window_attention(**{**args, "bias": biases[i]}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    args = example(dtype=torch.float32, extras=True)
    with torch.autocast("cpu", dtype=dtype):
        got = window_attention(**args)
    assert got.dtype == dtype
    assert error(got, window_attention(**args)) < 2e-2


def test_gradient_checkpointing_gives_the_same_gradients():
    args = example()
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(*qkv):
        return window_attention(*qkv, [3, 2], 2).sin().sum()

    want = torch.autograd.grad(call(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False).backward()
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


BAD = {
    "q of rank 3": ({"q": torch.zeros(5, 6, 8)}, ValueError, r"q must have 4 dimensions .* got shape \(5, 6, 8\)"),
    "integer k": ({"k": torch.zeros(2, 5, 6, 8).int()}, TypeError, "k must be float32.*got torch.int32"),
    "mixed dtypes": ({"v": torch.zeros(2, 5, 6, 6)}, TypeError, "v is torch.float32 but q is torch.float64"),
    "mixed devices": ({"k": torch.zeros(2, 5, 6, 8, device="meta").double()}, ValueError, "k is on meta but q is on cpu"),
    "strided channels": ({"q": torch.zeros(2, 8, 6, 5).double().transpose(1, 3)}, ValueError, "q must have contiguous channels"),
    "another grid": ({"k": torch.zeros(2, 4, 6, 8).double(), "v": torch.zeros(2, 4, 6, 6).double()}, ValueError, r"same grid, got \(2, 5, 6, 8\) and \(2, 4, 6, 8\)"),
    "heads": ({"num_heads": 3}, ValueError, r"num_heads must divide the channels of q \(8\) and of v \(6\), got 3"),
    "window": ({"window_size": [0, 2]}, ValueError, r"window_size must be positive, got \(0, 2\)"),
    "window's rank": ({"window_size": [2]}, ValueError, r"window_size must be \(height, width\)"),
    "shift too large": ({"shift": [3, 0]}, ValueError, r"shift must be two numbers from 0 to below window_size \(3, 2\), got \(3, 0\)"),
    "negative shift": ({"shift": [0, -1]}, ValueError, "shift must be two numbers from 0"),
    "bias' shape": ({"bias": torch.zeros(2, 6, 5)}, ValueError, r"bias must have shape \(2, 6, 6\), got \(2, 6, 5\)"),
    "integer bias": ({"bias": torch.zeros(2, 6, 6).long()}, TypeError, "bias must be a floating-point tensor, got torch.int64"),
    "padding's shape": ({"pad_key": torch.zeros(6)}, ValueError, r"pad_key must have shape \(8,\), got \(6,\)"),
    "padding's device": ({"pad_value": torch.zeros(6, device="meta")}, ValueError, "pad_value is on meta but q is on cpu"),
    "no tensor": ({"bias": 1.0}, TypeError, "bias must be a tensor of shape .* got float"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(mode, case):
    change, kind, message = BAD[case]
    with use_ops(mode), pytest.raises(kind, match=message):
        window_attention(**example() | change)
