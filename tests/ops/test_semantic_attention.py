"""semantic_attention against a plain loop over tokens, and its place in PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import semantic_attention, use_ops

from .counting import macs_by_both

OP = torch.ops.vitrail.semantic_attention.default
TENSORS = ("q", "k", "v", "own_k", "own_v")


def by_hand(q, k, v, own_k, own_v, window_size, patch_size, num_heads, scale=None):
    """Token by token, straight from the documentation; slow and independent of the operator's own definition."""
    q, k, v, own_k, own_v = (x.double() for x in (q, k, v, own_k, own_v))
    (b, hs, ws, c), (_, h, w, cv) = q.shape, v.shape
    d, dv = c // num_heads, cv // num_heads
    scale = d**-0.5 if scale is None else scale

    def begin(size, patch, i, n):
        return 0 if n == 1 else i * (size - patch) // (n - 1)

    out = q.new_zeros(b, hs, ws, cv)
    for i, y, x in ((i, y, x) for i in range(b) for y in range(hs) for x in range(ws)):
        m, n = y // window_size[0], x // window_size[1]
        own = [
            (m * window_size[0] + s, n * window_size[1] + t)
            for s in range(window_size[0])
            for t in range(window_size[1])
        ]
        top = begin(h, patch_size[0], m, hs // window_size[0])
        left = begin(w, patch_size[1], n, ws // window_size[1])
        patch = [(top + s, left + t) for s in range(patch_size[0]) for t in range(patch_size[1])]
        keys = torch.stack([own_k[i, s, t] for s, t in own] + [k[i, s, t] for s, t in patch])
        values = torch.stack([own_v[i, s, t] for s, t in own] + [v[i, s, t] for s, t in patch])
        for head in range(num_heads):
            at, at_v = slice(head * d, (head + 1) * d), slice(head * dv, (head + 1) * dv)
            scores = scale * keys[:, at] @ q[i, y, x, at]
            out[i, y, x, at_v] = scores.softmax(0) @ values[:, at_v]
    return out


def example(
    batch=2,
    height=7,
    width=8,
    windows=(2, 3),
    heads=2,
    d=4,
    dv=3,
    window=(2, 1),
    patch=(5, 4),
    dtype=torch.float64,
    seed=0,
):
    """Arguments with keys and values as views of packed projections, as the models pass them."""
    g = torch.Generator().manual_seed(seed)
    own = (batch, windows[0] * window[0], windows[1] * window[1])

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    k, v = draw(batch, height, width, heads * (d + dv)).split([heads * d, heads * dv], -1)
    own_k, own_v = draw(*own, heads * (d + dv)).split([heads * d, heads * dv], -1)
    sizes = {"window_size": list(window), "patch_size": list(patch), "num_heads": heads}
    return {"q": draw(*own, heads * d), "k": k, "v": v, "own_k": own_k, "own_v": own_v, **sizes}


def error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize(
    ("windows", "window", "patch"),
    [((2, 3), (2, 1), (5, 4)), ((1, 1), (1, 1), (1, 1)), ((1, 1), (3, 3), (7, 8)), ((4, 2), (1, 2), (3, 8)), ((9, 9), (1, 1), (7, 2))],
)  # fmt: skip
def test_semantic_tokens_attend_to_their_window_and_its_patch(mode, windows, window, patch):
    args = example(windows=windows, window=window, patch=patch)
    with use_ops(mode):
        assert error(semantic_attention(**args), by_hand(**args)) < 1e-13


@settings(max_examples=40)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    windows=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    heads=st.integers(1, 3),
    d=st.integers(1, 5),
    dv=st.integers(1, 5),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_operator_and_definition_agree_with_the_loop_on_any_shape(data, height, width, **shape):
    patch = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    args = example(height=height, width=width, patch=patch, **shape)
    with use_ops("reference"):
        reference = semantic_attention(**args)
    assert error(semantic_attention(**args), reference) < 1e-12
    assert error(reference, by_hand(**args)) < 1e-12


def test_patches_are_those_of_an_unfolded_map_where_it_divides():
    """Two by two patches of 10 on a map of 14, as the authors cut them: unfolding at stride 4, without padding."""
    torch.manual_seed(0)
    x = torch.randn(2, 14, 14, 6, dtype=torch.float64)
    q, own = torch.randn(2, 2, 6, 6, 6, dtype=torch.float64)
    copies = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), 10, stride=4).unflatten(1, (6, 100))
    copies = copies.permute(0, 3, 2, 1)  # batch, windows, tokens, channels

    def cut(x):
        return x.reshape(2, 2, 3, 2, 3, 6).transpose(2, 3).reshape(2, 4, 9, 6)

    keys = torch.cat([cut(own), copies], 2)
    want = torch.nn.functional.scaled_dot_product_attention(cut(q), keys, keys)
    got = semantic_attention(q, x, x, own, own, [3, 3], [10, 10], 1)
    torch.testing.assert_close(cut(got), want)


def test_every_token_of_the_image_is_a_key_where_the_patches_cover_it():
    """Unlike with a fixed stride, which leaves out the last rows where it is too small for the number of windows."""
    args = example(batch=1, height=16, width=20, windows=(2, 3), window=(1, 1), patch=(10, 8), heads=1, d=2)
    args["v"] = args["v"].detach().clone().requires_grad_()
    semantic_attention(**args).sum().backward()
    assert (args["v"].grad > 0).all()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
def test_lower_precision_stays_within_the_rounding_of_its_inputs_and_outputs(dtype, limit):
    args = example(14, 14, 14, (2, 2), heads=2, d=32, dv=32, window=(3, 3), patch=(10, 10), dtype=dtype)
    want = semantic_attention(**{n: x.double() if torch.is_tensor(x) else x for n, x in args.items()})
    got = semantic_attention(**args)
    assert got.dtype == dtype
    assert error(got, want) < limit


def test_an_empty_batch_gives_an_empty_result():
    args = example()
    assert semantic_attention(**args | {n: args[n][:0] for n in TENSORS}).shape == (0, 4, 3, 6)


def test_results_are_contiguous_whatever_the_strides_of_the_inputs():
    args = example()
    assert not args["k"].is_contiguous()
    flipped = args | {n: args[n].transpose(1, 2).contiguous().transpose(1, 2) for n in TENSORS}
    got = semantic_attention(**flipped)
    assert got.is_contiguous()
    assert torch.equal(got, semantic_attention(**args))


def test_first_and_second_derivatives_are_those_of_the_definition():
    args = example(batch=1, height=3, width=4, windows=(2, 1), d=2, dv=1, window=(1, 2), patch=(2, 3))
    leaves = [args[n].detach().clone().requires_grad_() for n in TENSORS]

    def call(*tensors):
        return semantic_attention(**{**args, **dict(zip(TENSORS, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registrations_pass_opcheck(dtype):
    args = example(dtype=dtype)
    leaves = [args[n].detach().clone().requires_grad_() for n in TENSORS]
    torch.library.opcheck(OP, (*leaves, [2, 1], [5, 4], 2, 0.5))


def test_torch_compile_sees_one_graph_forward_and_backward():
    args = example(dtype=torch.float32)
    leaves = [args[n].detach().clone().requires_grad_() for n in TENSORS]

    def call(*tensors):
        return semantic_attention(**{**args, **dict(zip(TENSORS, tensors, strict=True))}).sin()

    want = torch.autograd.grad(call(*leaves).sum(), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for g, w in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_torch_export_keeps_batch_free(mode):
    class Module(torch.nn.Module):
        def forward(self, x, own):
            return semantic_attention(own, x, x, own, own, [2, 2], [3, 4], 2)

    x, own = torch.randn(3, 5, 6, 8), torch.randn(3, 4, 4, 8)
    batch = torch.export.Dim("batch")
    with use_ops(mode):
        program = torch.export.export(Module(), (x[:2], own[:2]), dynamic_shapes=({0: batch}, {0: batch}))
    assert any(node.target is OP for node in program.graph.nodes) == (mode == "auto")
    torch.testing.assert_close(program.module()(x, own), Module()(x, own))


def test_torchscript_calls_the_operator():
    args = example(dtype=torch.float32)
    scripted = torch.jit.script(semantic_attention)
    positional = [args[n] for n in (*TENSORS, "window_size", "patch_size", "num_heads")]
    torch.testing.assert_close(scripted(*positional), semantic_attention(*positional))


def test_torch_func_transforms_compose():
    args = example(batch=3)

    def loss(*tensors):
        mapped = {n: x[None] for n, x in zip(TENSORS, tensors, strict=True)}
        return semantic_attention(**{**args, **mapped}).square().sum()

    grad = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))
    tensors = [args[n] for n in TENSORS]
    for i in range(3):
        alone = grad(*(x[i] for x in tensors))
        for batched, single in zip(torch.vmap(grad)(*tensors), alone, strict=True):
            torch.testing.assert_close(batched[i], single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    args = example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        got = semantic_attention(**args)
    assert got.dtype == dtype
    assert error(got, semantic_attention(**args)) < 2e-2


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_both_counters_count_two_products_per_pair_of_tokens_that_meet(mode):
    def call(*grids):
        return semantic_attention(*grids, [2, 1], [5, 4], 2)

    args = example(dtype=torch.float32)
    tensors = [args[n] for n in TENSORS]
    macs = 2 * 4 * 3 * (2 * 1 + 5 * 4) * (8 + 6)
    with use_ops(mode):
        assert macs_by_both(call, *tensors) == (macs, macs)
    with FlopCounterMode(display=False) as counter:
        call(*(x.detach().requires_grad_() for x in tensors)).sum().backward()
    assert counter.get_total_flops() == 2 * (macs + macs // 14 * (3 * 8 + 2 * 6))


def test_gradient_checkpointing_gives_the_same_gradients():
    args = example()
    leaves = [args[n].detach().clone().requires_grad_() for n in TENSORS]

    def call(*tensors):
        return semantic_attention(*tensors, [2, 1], [5, 4], 2).sin().sum()

    want = torch.autograd.grad(call(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False).backward()
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


BAD = {
    "q of rank 3": ({"q": torch.zeros(4, 3, 8)}, ValueError, r"q must have 4 dimensions .* got shape \(4, 3, 8\)"),
    "integer k": ({"k": torch.zeros(2, 7, 8, 8).int()}, TypeError, "k must be float32.*got torch.int32"),
    "no tensor": ({"own_v": 1.0}, TypeError, r"own_v must be a tensor of shape \(B, H, W, C\), got float"),
    "mixed dtypes": ({"own_k": torch.zeros(2, 4, 3, 8)}, TypeError, "own_k is torch.float32 but q is torch.float64"),
    "mixed devices": ({"k": torch.zeros(2, 7, 8, 8, device="meta").double()}, ValueError, "k is on meta but q is on cpu"),
    "strided channels": ({"own_k": torch.zeros(2, 4, 8, 3).double().transpose(2, 3)}, ValueError, "own_k must have contiguous channels"),
    "batches differ": ({"q": torch.zeros(1, 4, 3, 8).double()}, ValueError, r"q and k must agree in batch and channels, got \(1, 4, 3, 8\)"),
    "grids differ": ({"v": torch.zeros(2, 7, 7, 6).double()}, ValueError, "k and v must lie on the same grid"),
    "own keys elsewhere": ({"own_k": torch.zeros(2, 3, 4, 8).double()}, ValueError, r"own_k must lie on the grid of q and have the channels of k: shape \(2, 4, 3, 8\), got \(2, 3, 4, 8\)"),
    "own values' width": ({"own_v": torch.zeros(2, 4, 3, 8).double()}, ValueError, r"own_v must lie .* channels of v: shape \(2, 4, 3, 6\), got \(2, 4, 3, 8\)"),
    "heads": ({"num_heads": 3}, ValueError, r"num_heads must divide the channels of q \(8\) and of v \(6\), got 3"),
    "window": ({"window_size": [0, 1]}, ValueError, r"window_size must be positive, got \(0, 1\)"),
    "window's rank": ({"window_size": [2]}, ValueError, r"window_size must be \(height, width\)"),
    "part of a window": ({"window_size": [3, 1]}, ValueError, r"window_size \(3, 1\) must divide the grid of q, \(4, 3\)"),
    "patch": ({"patch_size": [5, -1]}, ValueError, r"patch_size must be positive, got \(5, -1\)"),
    "patch too large": ({"patch_size": [8, 4]}, ValueError, r"patch_size \(8, 4\) must not exceed the grid of k, \(7, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(mode, case):
    change, kind, message = BAD[case]
    with use_ops(mode), pytest.raises(kind, match=message):
        semantic_attention(**example() | change)
