"""sparse_attention against a plain loop over queries, and its place in PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import sparse_attention, use_ops

from .counting import macs_by_both

OP = torch.ops.vitrail.sparse_attention.default


def by_hand(q, k, v, keys, num_heads, scale=None):
    """Query by query, straight from the documentation; slow and independent of the operator's own definition."""
    q, k, v = (x.double() for x in (q, k, v))
    d, dv = q.shape[2] // num_heads, v.shape[2] // num_heads
    scale = d**-0.5 if scale is None else scale
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    for i, head, query in torch.cartesian_prod(
        *map(torch.arange, (q.shape[0], num_heads, q.shape[1]))
    ).tolist():
        listed = [key for key in keys[i, head, query].tolist() if key >= 0]
        if listed:
            at, at_v = slice(head * d, (head + 1) * d), slice(head * dv, (head + 1) * dv)
            scores = scale * k[i, listed][:, at] @ q[i, query, at]
            out[i, query, at_v] = scores.softmax(0) @ v[i, listed][:, at_v]
    return out


def example(
    batch=2, queries=5, tokens=7, heads=2, d=4, dv=3, slots=4, kind=torch.int64, dtype=torch.float64, seed=0
):
    """Arguments with q, k, v as views of one packed projection, as the models pass them, and some empty slots."""
    g = torch.Generator().manual_seed(seed)
    rows = max(queries, tokens)
    packed = torch.randn(batch, rows, heads * (2 * d + dv), generator=g, dtype=torch.float64).to(dtype)
    q, k, v = packed.split([heads * d, heads * d, heads * dv], -1)
    keys = torch.randint(-1, tokens, (batch, heads, queries, slots), generator=g).to(kind)
    if keys.numel():
        keys[0, 0, 0] = -1
    return {"q": q[:, :queries], "k": k[:, :tokens], "v": v[:, :tokens], "keys": keys, "num_heads": heads}


def error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("scale", [None, 2.0])
def test_every_query_attends_to_the_keys_of_its_list(mode, kind, scale):
    args = example(kind=kind)
    with use_ops(mode):
        got = sparse_attention(**args, scale=scale)
    assert error(got, by_hand(**args, scale=scale)) < 1e-13
    assert got.is_contiguous()


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 5),
    tokens=st.integers(1, 6),
    heads=st.integers(1, 3),
    d=st.integers(1, 5),
    dv=st.integers(1, 5),
    slots=st.integers(0, 7),
    seed=st.integers(0, 99),
)
def test_operator_and_definition_agree_with_the_loop_on_any_shape(**shape):
    args = example(**shape)
    want = by_hand(**args)
    for mode in ("auto", "reference"):
        with use_ops(mode):
            torch.testing.assert_close(sparse_attention(**args), want, rtol=0, atol=1e-12)


def test_a_query_without_keys_gets_zeros_and_passes_no_gradient():
    args = example() | {"keys": torch.full((2, 2, 5, 3), -1)}
    leaves = {n: args[n].detach().clone().requires_grad_() for n in "qkv"}
    out = sparse_attention(**args | leaves)
    assert out.eq(0).all()
    out.sum().backward()
    assert all(leaf.grad.eq(0).all() for leaf in leaves.values())


def test_all_keys_are_dense_attention_and_a_key_listed_twice_counts_twice():
    args = example()
    every = torch.arange(7).expand(2, 2, 5, 7)
    q, k, v = (args[n].unflatten(2, (2, -1)).transpose(1, 2) for n in "qkv")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(sparse_attention(**args | {"keys": every}), want)
    twice = args | {"keys": torch.cat([every, every], -1)}
    torch.testing.assert_close(sparse_attention(**twice), want)
    once_more = args | {"keys": torch.cat([every, torch.zeros_like(every[..., :1])], -1)}
    assert error(sparse_attention(**once_more), by_hand(**once_more)) < 1e-13
    assert error(sparse_attention(**once_more), want) > 1e-2


def test_the_order_of_the_list_does_not_matter():
    args = example(slots=6)
    shuffled = args | {"keys": args["keys"][..., torch.randperm(6)]}
    torch.testing.assert_close(sparse_attention(**shuffled), sparse_attention(**args))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
def test_lower_precision_stays_within_the_rounding_of_its_inputs_and_outputs(dtype, limit):
    args = example(queries=40, tokens=50, d=32, dv=32, slots=12, dtype=dtype)
    got = sparse_attention(**args)
    assert got.dtype == dtype
    assert error(got, by_hand(**args)) < limit


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}])
def test_nothing_asked_gives_nothing(empty):
    args = example(**empty)
    assert sparse_attention(**args).shape == (args["q"].shape[0], args["q"].shape[1], 6)


def test_first_and_second_derivatives_are_those_of_the_definition():
    args = example(batch=1, queries=3, tokens=4, d=2, dv=1, slots=3)
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(*qkv):
        return sparse_attention(*qkv, args["keys"], 2)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [0, 4])
def test_registrations_pass_opcheck(dtype, slots):
    a = example(dtype=dtype, slots=slots)
    q, k, v = (a[n].detach().clone().requires_grad_() for n in "qkv")
    torch.library.opcheck(OP, (q, k, v, a["keys"], 2, 0.5))


def test_torch_compile_sees_one_graph_forward_and_backward():
    args = example(dtype=torch.float32)
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(*qkv):
        return sparse_attention(*qkv, args["keys"], 2).sin()

    want = torch.autograd.grad(call(*leaves).sum(), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for g, w in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_torch_export_keeps_batch_free(mode):
    class Module(torch.nn.Module):
        def forward(self, x, keys):
            q, k, v = x.chunk(3, -1)
            return sparse_attention(q, k, v, keys, 2)

    x, keys = torch.randn(3, 7, 24), torch.randint(-1, 7, (3, 2, 7, 4))
    batch = torch.export.Dim("batch")
    with use_ops(mode):
        program = torch.export.export(Module(), (x[:2], keys[:2]), dynamic_shapes=({0: batch}, {0: batch}))
    assert any(node.target is OP for node in program.graph.nodes) == (mode == "auto")
    torch.testing.assert_close(program.module()(x, keys), Module()(x, keys))


def test_torchscript_calls_the_operator():
    args = example(dtype=torch.float32)
    torch.testing.assert_close(torch.jit.script(sparse_attention)(*args.values()), sparse_attention(**args))


def test_torch_func_transforms_compose():
    args = example(batch=3)

    def loss(q, k, v, keys):
        return sparse_attention(q[None], k[None], v[None], keys[None], 2).square().sum()

    grad = torch.func.grad(loss, argnums=(0, 1, 2))
    tensors = [args[n] for n in ("q", "k", "v", "keys")]
    per_image = torch.vmap(grad)(*tensors)
    for i in range(3):
        for batched, single in zip(per_image, grad(*(x[i] for x in tensors)), strict=True):
            torch.testing.assert_close(batched[i], single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    args = example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        got = sparse_attention(**args)
    assert got.dtype == dtype
    assert error(got, sparse_attention(**args)) < 2e-2


def test_gradient_checkpointing_gives_the_same_gradients():
    args = example()
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(*qkv):
        return sparse_attention(*qkv, args["keys"], 2).sin().sum()

    want = torch.autograd.grad(call(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False).backward()
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


def test_both_counters_count_the_listed_keys_alone():
    def call(*tensors):
        return sparse_attention(*tensors, 2)

    args = example(dtype=torch.float32)
    tensors = [args[n] for n in ("q", "k", "v", "keys")]
    expected = 2 * 2 * 5 * 4 * (4 + 3)
    assert macs_by_both(call, *tensors) == (expected, expected)
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    with FlopCounterMode(display=False) as counter:
        call(*leaves, tensors[3]).sum().backward()
    assert counter.get_total_flops() == 2 * (expected + 2 * 2 * 5 * 4 * (3 * 4 + 2 * 3))


BAD = {
    "q of rank 4": ({"q": torch.zeros(2, 5, 2, 4)}, ValueError, r"q must have 3 dimensions \(B, N, C\), got shape"),
    "no tensor": ({"v": 1.0}, TypeError, r"v must be a tensor of shape \(B, N, C\), got float"),
    "integer k": ({"k": torch.zeros(2, 7, 8).int()}, TypeError, "k must be float32.*got torch.int32"),
    "mixed dtypes": ({"v": torch.zeros(2, 7, 6)}, TypeError, "v is torch.float32 but q is torch.float64"),
    "mixed devices": ({"k": torch.zeros(2, 7, 8, device="meta").double()}, ValueError, "k is on meta but q is on cpu"),
    "strided channels": ({"q": torch.zeros(2, 8, 5).double().mT}, ValueError, "q must have contiguous channels"),
    "other channels": ({"k": torch.zeros(2, 7, 4).double()}, ValueError, r"q and k must agree in batch and channels, got \(2, 5, 8\) and \(2, 7, 4\)"),
    "other batch": ({"k": torch.zeros(1, 7, 8).double()}, ValueError, "q and k must agree in batch"),
    "fewer values": ({"v": torch.zeros(2, 6, 6).double()}, ValueError, r"same tokens, got \(2, 7, 8\) and \(2, 6, 6\)"),
    "no keys at all": ({"k": torch.zeros(2, 0, 8).double(), "v": torch.zeros(2, 0, 6).double()}, ValueError, "k must hold at least one token"),
    "heads": ({"num_heads": 3}, ValueError, r"num_heads must divide the channels of q \(8\) and of v \(6\), got 3"),
    "float keys": ({"keys": torch.zeros(2, 2, 5, 4)}, TypeError, "keys must be int32 or int64, got torch.float32"),
    "keys' shape": ({"keys": torch.zeros(2, 2, 6, 4).long()}, ValueError, r"keys must have shape \(batch 2, heads 2, queries 5, slots\), got \(2, 2, 6, 4\)"),
    "keys' rank": ({"keys": torch.zeros(2, 5, 4).long()}, ValueError, "keys must have shape"),
    "keys' device": ({"keys": torch.zeros(2, 2, 5, 4, device="meta").long()}, ValueError, "keys is on meta but q is on cpu"),
    "a list": ({"keys": [[1]]}, TypeError, "keys must be a tensor of key numbers, got list"),
    "a key that is not there": ({"keys": torch.full((2, 2, 5, 4), 7)}, IndexError, r"keys\[0, 0, 0, 0\] is 7, but there are 7 keys: allowed are 0 to 6, and -1"),
    "a key below": ({"keys": torch.full((2, 2, 5, 4), -2)}, IndexError, "is -2, but there are 7 keys"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(mode, case):
    change, kind, message = BAD[case]
    with use_ops(mode), pytest.raises(kind, match=message):
        sparse_attention(**example() | change)
