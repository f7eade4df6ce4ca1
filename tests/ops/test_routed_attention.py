"""routed_attention against its definition, and its place in PyTorch: autograd, compile, vmap, autocast, checks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.ops import routed_attention, use_ops
from vitrail.ops.regions import ceil_div, merge, partition, region_means

OP = torch.ops.vitrail.routed_attention.default


def by_hand(q, k, v, routes, region_size, num_heads, scale=None, kv_region_size=None, weights=None):
    """Token by token, straight from the documentation; slow and independent of the operator's own definition."""
    kv_region_size = kv_region_size or region_size
    (rh, rw), (kh, kw) = region_size, kv_region_size
    d, dv = q.shape[3] // num_heads, v.shape[3] // num_heads
    scale = d**-0.5 if scale is None else scale
    q, k, v = (x.double() for x in (q, k, v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    columns, kv_columns = ceil_div(q.shape[2], rw), ceil_div(k.shape[2], kw)
    for b in range(q.shape[0]):
        for y in range(q.shape[1]):
            for x in range(q.shape[2]):
                region = (y // rh) * columns + x // rw
                keys, values, factors = [], [], []
                for slot, route in enumerate(routes[b, region].tolist()):
                    top, left = route // kv_columns * kh, route % kv_columns * kw
                    for i in range(top, top + kh):
                        for j in range(left, left + kw):
                            inside = i < k.shape[1] and j < k.shape[2]
                            keys.append(k[b, i, j] if inside else k.new_zeros(k.shape[3]))
                            values.append(v[b, i, j] if inside else v.new_zeros(v.shape[3]))
                            factors.append(1.0 if weights is None else float(weights[b, region, slot]))
                keys, values = torch.stack(keys), torch.stack(values)
                factors = torch.tensor(factors, dtype=q.dtype)
                for h in range(num_heads):
                    scores = scale * keys[:, h * d : (h + 1) * d] @ q[b, y, x, h * d : (h + 1) * d] * factors
                    attention = scores.softmax(0) * factors
                    out[b, y, x, h * dv : (h + 1) * dv] = attention @ values[:, h * dv : (h + 1) * dv]
    return out


def example(
    batch=2,
    height=5,
    width=6,
    heads=2,
    d=4,
    dv=4,
    region=(3, 2),
    topk=2,
    weights=False,
    dtype=torch.float64,
    seed=0,
):
    """Arguments with q, k, v as views of one packed projection, as the models pass them."""
    g = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, height, width, heads * (2 * d + dv), generator=g, dtype=torch.float64).to(
        dtype
    )
    q, k, v = packed.split([heads * d, heads * d, heads * dv], -1)
    regions = ceil_div(height, region[0]) * ceil_div(width, region[1])
    routes = torch.randint(regions, (batch, regions, topk), generator=g)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.rand(batch, regions, topk, generator=g, dtype=wide) if weights else None
    return {
        "q": q,
        "k": k,
        "v": v,
        "routes": routes,
        "region_size": list(region),
        "num_heads": heads,
        "weights": w,
    }


def error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("region", [(1, 1), (2, 3), (3, 2), (5, 6), (8, 8)])
def test_every_token_attends_to_the_tokens_of_its_regions_routes(mode, weights, region):
    args = example(region=region, weights=weights)
    with use_ops(mode):
        assert error(routed_attention(**args), by_hand(**args)) < 1e-13


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_keys_may_lie_on_a_coarser_grid_with_regions_of_their_own(mode):
    args = example(height=6, width=6, region=(3, 3))
    args["k"], args["v"] = args["k"][:, :4, :4], args["v"][:, :4, :4]
    with use_ops(mode):
        got = routed_attention(**args, kv_region_size=[2, 2], scale=0.3)
    assert error(got, by_hand(**args, kv_region_size=[2, 2], scale=0.3)) < 1e-13


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 3),
    d=st.integers(1, 9),
    dv=st.integers(1, 9),
    region=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    topk=st.integers(1, 4),
    weights=st.booleans(),
    seed=st.integers(0, 99),
)
def test_operator_and_definition_agree_on_any_shape(**shape):
    args = example(**shape)
    with use_ops("reference"):
        want = routed_attention(**args)
    assert error(routed_attention(**args), want) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
@pytest.mark.parametrize("weights", [False, True])
def test_lower_precision_stays_within_the_rounding_of_its_inputs_and_outputs(dtype, limit, weights):
    args = example(
        height=14, width=14, heads=2, d=32, dv=32, region=(2, 2), topk=16, weights=weights, dtype=dtype
    )
    want = routed_attention(
        **{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in args.items()}
    )
    got = routed_attention(**args)
    assert got.dtype == dtype
    assert error(got, want) < limit


@pytest.mark.parametrize("routes_dtype", [torch.int32, torch.int64])
def test_routes_may_be_int32_or_int64(routes_dtype):
    args = example()
    want = routed_attention(**args)
    assert torch.equal(routed_attention(**{**args, "routes": args["routes"].to(routes_dtype)}), want)


def test_an_empty_batch_gives_an_empty_result():
    args = {k: v[:0] if torch.is_tensor(v) else v for k, v in example().items()}
    assert routed_attention(**args).shape == (0, 5, 6, 8)


def test_results_are_contiguous_whatever_the_strides_of_the_inputs():
    args = example()
    assert not args["q"].is_contiguous()
    flipped = {
        k: v.transpose(1, 2).contiguous().transpose(1, 2) if k in "qkv" else v for k, v in args.items()
    }
    got = routed_attention(**flipped)
    assert got.is_contiguous()
    assert torch.equal(got, routed_attention(**args))


@pytest.mark.parametrize("weights", [False, True])
def test_first_and_second_derivatives_are_those_of_the_definition(weights):
    args = example(batch=1, height=4, width=3, d=2, dv=3, region=(2, 2), weights=weights)
    names = ["q", "k", "v"] + ["weights"] * weights
    leaves = [args[n].detach().clone().requires_grad_() for n in names]

    def call(*tensors):
        return routed_attention(**{**args, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_lower_precision_follow_the_float64_ones(dtype):
    args = example(height=8, width=8, d=16, dv=16, region=(2, 2), topk=3, weights=True, dtype=dtype)
    names = ["q", "k", "v", "weights"]

    def gradients(args):
        leaves = {n: args[n].detach().clone().requires_grad_() for n in names}
        routed_attention(**{**args, **leaves}).double().square().sum().backward()
        return [leaves[n].grad for n in names]

    want = gradients(
        {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in args.items()}
    )
    got = gradients(args)
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for name, g, w in zip(names, got, want, strict=True):
        assert g.dtype == args[name].dtype
        assert error(g, w) < limit, name


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_registrations_pass_opcheck(weights, dtype):
    a = example(weights=weights, dtype=dtype)
    q, k, v = (a[n].detach().clone().requires_grad_() for n in "qkv")
    torch.library.opcheck(OP, (q, k, v, a["routes"], a["weights"], [3, 2], [3, 2], 2, 0.5))


def test_torch_compile_sees_one_graph_forward_and_backward():
    args = example(dtype=torch.float32)
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(q, k, v):
        return routed_attention(q, k, v, args["routes"], [3, 2], 2).sin()

    want = torch.autograd.grad(call(*leaves).sum(), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_torch_export_keeps_the_operator_with_a_dynamic_batch():
    class Module(torch.nn.Module):
        def forward(self, x, routes):
            q, k, v = x.chunk(3, -1)
            return routed_attention(q, k, v, routes, [3, 2], 2)

    a = example(dtype=torch.float32)
    x = torch.cat([a["q"], a["k"], a["v"]], -1)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Module(), (x, a["routes"]), dynamic_shapes=({0: batch}, {0: batch}))
    assert any(node.target is OP for node in program.graph.nodes)
    x3, routes3 = torch.cat([x, x[:1]]), torch.cat([a["routes"], a["routes"][:1]])
    torch.testing.assert_close(program.module()(x3, routes3), Module()(x3, routes3))


def test_torchscript_calls_the_operator():
    args = example(dtype=torch.float32)
    scripted = torch.jit.script(routed_attention)
    positional = [args[n] for n in ("q", "k", "v", "routes", "region_size", "num_heads")]
    torch.testing.assert_close(scripted(*positional), routed_attention(*positional))


def test_torch_func_transforms_compose():
    a = example(batch=3)
    q, k, v, routes = (a[n] for n in ("q", "k", "v", "routes"))

    def loss(q, k, v, routes):
        return routed_attention(q[None], k[None], v[None], routes[None], [3, 2], 2).square().sum()

    per_image = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v, routes)
    for i in range(3):
        alone = torch.func.grad(loss, argnums=(0, 1, 2))(q[i], k[i], v[i], routes[i])
        for batched, single in zip(per_image, alone, strict=True):
            torch.testing.assert_close(batched[i], single)
    shared = torch.vmap(lambda q: routed_attention(q[None], k[:1], v[:1], routes[:1], [3, 2], 2))(q)
    torch.testing.assert_close(shared[1], routed_attention(q[1:2], k[:1], v[:1], routes[:1], [3, 2], 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    args = example(dtype=torch.float32, weights=True)
    with torch.autocast("cpu", dtype=dtype):
        got = routed_attention(**args)
    assert got.dtype == dtype
    assert error(got, routed_attention(**args)) < 2e-2


def test_gradient_checkpointing_gives_the_same_gradients():
    args = example()
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]

    def call(*qkv):
        return routed_attention(*qkv, args["routes"], [3, 2], 2).sin().sum()

    want = torch.autograd.grad(call(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False).backward()
    for leaf, w in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


BAD = {
    "q of rank 3": (lambda a: a | {"q": a["q"][0]}, ValueError, r"q must have 4 dimensions .* got shape \(5, 6, 8\)"),
    "integer q": (lambda a: a | {"q": a["q"].int()}, TypeError, "q must be float32.*got torch.int32"),
    "no tensor": (lambda a: a | {"k": [1.0]}, TypeError, "k must be a tensor .*got list"),
    "mixed dtypes": (lambda a: a | {"v": a["v"].float()}, TypeError, "v is torch.float32 but q is torch.float64"),
    "mixed devices": (lambda a: a | {"k": a["k"].to("meta")}, ValueError, "k is on meta but q is on cpu"),
    "strided channels": (
        lambda a: a | {"k": a["k"].transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, "k must have contiguous channels.*contiguous()",
    ),
    "batches differ": (lambda a: a | {"k": a["k"][:1]}, ValueError, "q and k must agree in batch"),
    "channels differ": (lambda a: a | {"k": a["k"][..., :4]}, ValueError, "q and k must agree in batch and channels"),
    "grids differ": (lambda a: a | {"v": a["v"][:, :3]}, ValueError, "k and v must lie on the same grid"),
    "heads": (lambda a: a | {"num_heads": 3}, ValueError, "num_heads must divide the channels of q .8."),
    "no heads": (lambda a: a | {"num_heads": 0}, ValueError, "num_heads must divide"),
    "region size": (lambda a: a | {"region_size": [0, 2]}, ValueError, r"region_size must be positive, got \(0, 2\)"),
    "region rank": (lambda a: a | {"region_size": [2]}, ValueError, "region_size must be .height, width."),
    "float routes": (lambda a: a | {"routes": a["routes"].double()}, TypeError, "routes must be int32 or int64"),
    "routes' shape": (lambda a: a | {"routes": a["routes"][:, :3]}, ValueError, r"routes must have shape .batch 2, regions 6"),
    "no routes": (lambda a: a | {"routes": a["routes"][..., :0]}, ValueError, "at least one region"),
    "route too large": (lambda a: a | {"routes": a["routes"] + 100}, IndexError, r"routes\[0, 0, 0\] is 10[0-9], but there are 6 key regions: allowed are 0 to 5"),
    "negative route": (lambda a: a | {"routes": a["routes"] - 50}, IndexError, r"routes\[0, 0, 0\] is -"),
    "weights' shape": (lambda a: a | {"weights": torch.ones(2, 6, 3).double()}, ValueError, "weights must have the shape of routes"),
    "weights' dtype": (lambda a: a | {"weights": torch.ones(2, 6, 2)}, TypeError, "weights must be torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(mode, case):
    change, kind, message = BAD[case]
    with use_ops(mode), pytest.raises(kind, match=message):
        routed_attention(**change(example()))


@pytest.mark.parametrize("bad_route", [-1, 6, 2**31 - 1, -(2**31), 2**40])
def test_the_bare_operator_never_reads_past_the_regions(bad_route):
    a = example(dtype=torch.float32)
    routes = a["routes"].clone()
    routes[1, 5, 1] = bad_route
    with pytest.raises(IndexError, match=r"routes\[1, 5, 1\] is"):
        OP(a["q"], a["k"], a["v"], routes, None, [3, 2], [3, 2], 2, 0.5)


@settings(max_examples=40)
@given(h=st.integers(1, 12), w=st.integers(1, 12), rh=st.integers(1, 5), rw=st.integers(1, 5))
def test_partition_and_merge_are_inverse_and_means_leave_padding_out(h, w, rh, rw):
    x = torch.randn(2, h, w, 3, dtype=torch.float64)
    regions = partition(x, [rh, rw])
    assert torch.equal(merge(regions, [rh, rw], h, w), x)
    means = region_means(x, [rh, rw])
    columns = ceil_div(w, rw)
    for r in range(means.shape[1]):
        y, z = r // columns * rh, r % columns * rw
        torch.testing.assert_close(means[:, r], x[:, y : y + rh, z : z + rw].mean((1, 2)))
