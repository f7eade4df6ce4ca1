"""channel_attention against a plain loop over channels, and its place in PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.ops import channel_attention, use_ops

OP = torch.ops.vitrail.channel_attention.default


def by_hand(q, k, v, num_heads, scale=None):
    """Channel by channel, straight from the documentation; slow and independent of the operator's own definition."""
    q, k, v = (x.double() for x in (q, k, v))
    b, c = q.shape[0], q.shape[3]
    d = c // num_heads
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros_like(v)
    for image in range(b):
        for i in range(c):
            head = range(i // d * d, i // d * d + d)
            scores = torch.stack([scale * (q[image, :, :, i] * k[image, :, :, j]).sum() for j in head])
            for weight, j in zip(scores.softmax(0), head, strict=True):
                out[image, :, :, i] += weight * v[image, :, :, j]
    return out


def example(batch=2, height=3, width=5, heads=2, d=4, dtype=torch.float64, seed=0):
    """Arguments with q, k, v as views of one packed projection, as the models pass them."""
    g = torch.Generator().manual_seed(seed)
    c = heads * d
    packed = torch.randn(batch, height, width, 3 * c, generator=g, dtype=torch.float64).to(dtype)
    q, k, v = packed.split(c, -1)
    return {"q": q, "k": k, "v": v, "num_heads": heads}


def error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("scale", [None, 0.07])
@pytest.mark.parametrize(("heads", "d"), [(1, 8), (2, 4), (3, 5), (6, 1)])
def test_every_channel_attends_to_the_channels_of_its_head_over_all_tokens(mode, scale, heads, d):
    args = example(heads=heads, d=d)
    with use_ops(mode):
        assert error(channel_attention(**args, scale=scale), by_hand(**args, scale=scale)) < 1e-13


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 3),
    d=st.integers(1, 9),
    scale=st.floats(0.01, 2),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_operator_and_definition_agree_with_the_loop_on_any_shape_and_stride(scale, turned, **shape):
    args = example(**shape)
    if turned:  # rows and columns the other way round in memory
        args |= {n: args[n].transpose(1, 2) for n in "qkv"}
    with use_ops("reference"):
        reference = channel_attention(**args, scale=scale)
    assert error(channel_attention(**args, scale=scale), reference) < 1e-12
    assert error(reference, by_hand(**args, scale=scale)) < 1e-12


def test_the_order_of_the_tokens_does_not_matter():
    args = example(height=4, width=6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    mixed = args | {n: args[n].flatten(1, 2)[:, order].unflatten(1, (3, 8)) for n in "qkv"}
    want = channel_attention(**args).flatten(1, 2)[:, order]
    torch.testing.assert_close(channel_attention(**mixed).flatten(1, 2), want)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
def test_lower_precision_stays_within_the_rounding_of_its_inputs_and_outputs(dtype, limit):
    args = example(height=28, width=28, heads=2, d=32, dtype=dtype) | {"scale": 0.02}
    want = channel_attention(**{n: x.double() if torch.is_tensor(x) else x for n, x in args.items()})
    got = channel_attention(**args)
    assert got.dtype == dtype
    assert error(got, want) < limit


def test_sums_over_many_tokens_do_not_overflow_in_float16():
    ones = torch.ones(1, 300, 300, 32, dtype=torch.float16)
    assert torch.equal(channel_attention(ones, ones, ones, 1), ones)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_an_empty_batch_gives_an_empty_result(mode):
    args = example()
    with use_ops(mode):
        assert channel_attention(**args | {n: args[n][:0] for n in "qkv"}).shape == (0, 3, 5, 8)


def test_one_token_is_enough():
    args = example(height=1, width=1)
    assert error(channel_attention(**args), by_hand(**args)) < 1e-13


def test_results_are_contiguous_whatever_the_strides_of_the_inputs():
    args = example()
    assert not args["q"].is_contiguous()
    flipped = args | {n: args[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    got = channel_attention(**flipped)
    assert got.is_contiguous()
    assert torch.equal(got, channel_attention(**args))


def test_first_and_second_derivatives_are_those_of_the_definition():
    args = example(batch=2, height=2, width=2, d=3)
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(*qkv):
        return channel_attention(*qkv, 2, 0.7)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_lower_precision_follow_the_float64_ones(dtype):
    args = example(height=8, width=8, d=16, dtype=dtype) | {"scale": 0.1}

    def gradients(args):
        leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]
        channel_attention(*leaves, args["num_heads"], args["scale"]).double().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    want = gradients({n: x.double() if torch.is_tensor(x) else x for n, x in args.items()})
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for name, got, w in zip("qkv", gradients(args), want, strict=True):
        assert got.dtype == dtype
        assert error(got, w) < limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_registrations_pass_opcheck(dtype):
    args = example(dtype=dtype)
    q, k, v = (args[n].detach().clone().requires_grad_() for n in "qkv")
    torch.library.opcheck(OP, (q, k, v, 2, 0.5))


def test_the_bare_operator_also_gives_the_log_sum_exp_of_every_channels_scores():
    args = example()
    _, lse = OP(args["q"], args["k"], args["v"], 2, 0.5)
    queries, keys = (args[n].flatten(1, 2).unflatten(-1, (2, 4)) for n in "qk")
    scores = torch.einsum("bnhi,bnhj->bhij", queries, keys) * 0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1).flatten(1)[:, None, None])


def test_torch_compile_sees_one_graph_forward_and_backward():
    args = example(dtype=torch.float32)
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(q, k, v):
        return channel_attention(q, k, v, 2).sin()

    want = torch.autograd.grad(call(*leaves).sum(), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for g, w in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_torch_export_keeps_batch_height_and_width_free(mode):
    class Module(torch.nn.Module):
        def forward(self, x):
            q, k, v = x.chunk(3, -1)
            return channel_attention(q, k, v, 2)

    sizes = {i: torch.export.Dim(name, min=2) for i, name in enumerate(("batch", "height", "width"))}
    with use_ops(mode):
        program = torch.export.export(Module(), (torch.randn(2, 3, 5, 24),), dynamic_shapes=(sizes,))
    assert any(node.target is OP for node in program.graph.nodes) == (mode == "auto")
    x = torch.randn(3, 7, 4, 24)
    torch.testing.assert_close(program.module()(x), Module()(x))


def test_torchscript_calls_the_operator():
    args = example(dtype=torch.float32)
    scripted = torch.jit.script(channel_attention)
    positional = [args[n] for n in ("q", "k", "v", "num_heads")]
    torch.testing.assert_close(scripted(*positional), channel_attention(*positional))


def test_torch_func_transforms_compose():
    args = example(batch=3)
    tensors = [args[n] for n in "qkv"]

    def loss(q, k, v):
        return channel_attention(q[None], k[None], v[None], 2).square().sum()

    grad = torch.func.grad(loss, argnums=(0, 1, 2))
    per_image = torch.vmap(grad)(*tensors)
    for i in range(3):
        for batched, single in zip(per_image, grad(*(x[i] for x in tensors)), strict=True):
            torch.testing.assert_close(batched[i], single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    args = example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        got = channel_attention(**args)
    assert got.dtype == dtype
    assert error(got, channel_attention(**args)) < 2e-2


def test_gradient_checkpointing_gives_the_same_gradients():
    args = example()
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(*qkv):
        return channel_attention(*qkv, 2).sin().sum()

    want = torch.autograd.grad(call(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False).backward()
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


BAD = {
    "q of rank 3": ({"q": torch.zeros(3, 5, 8)}, ValueError, r"q must have 4 dimensions .* got shape \(3, 5, 8\)"),
    "integer k": ({"k": torch.zeros(2, 3, 5, 8).int()}, TypeError, "k must be float32.*got torch.int32"),
    "no tensor": ({"v": [1.0]}, TypeError, "v must be a tensor .*got list"),
    "mixed dtypes": ({"v": torch.zeros(2, 3, 5, 8)}, TypeError, "v is torch.float32 but q is torch.float64"),
    "mixed devices": ({"k": torch.zeros(2, 3, 5, 8, device="meta").double()}, ValueError, "k is on meta but q is on cpu"),
    "strided channels": ({"q": torch.zeros(2, 8, 5, 3).double().transpose(1, 3)}, ValueError, "q must have contiguous channels"),
    "batches differ": ({"k": torch.zeros(1, 3, 5, 8).double()}, ValueError, "q and k must agree in batch and channels"),
    "channels differ": ({"k": torch.zeros(2, 3, 5, 6).double()}, ValueError, "q and k must agree in batch and channels"),
    "another grid": (
        {n: torch.zeros(2, 3, 4, 8).double() for n in "kv"}, ValueError, r"k must have the shape of q, \(2, 3, 5, 8\), got \(2, 3, 4, 8\)",
    ),
    "wider values": ({"v": torch.zeros(2, 3, 5, 16).double()}, ValueError, r"v must have the shape of q, \(2, 3, 5, 8\), got \(2, 3, 5, 16\)"),
    "heads": ({"num_heads": 3}, ValueError, r"num_heads must divide the channels of q \(8\) and of v \(8\), got 3"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads must divide"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(mode, case):
    change, kind, message = BAD[case]
    with use_ops(mode), pytest.raises(kind, match=message):
        channel_attention(**example() | change)
