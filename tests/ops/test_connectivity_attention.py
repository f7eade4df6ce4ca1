"""connectivity_attention against the operators that it fuses, and its place in PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import connectivity_attention, connectivity_topk, sparse_attention, use_ops
from vitrail.ops.connectivity_attention import connectivity_logits

from .counting import macs_by_both

OP = torch.ops.vitrail.connectivity_attention.default


def example(
    batch=2, tokens=9, heads=2, d=4, dv=3, n=6, alive=None, c=None, dtype=torch.float64, seed=0, **settings
):
    """Arguments with q, k, v as views of one packed projection, as the model passes them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    packed = normal(batch, alive or tokens, heads * (2 * d + dv))
    q, k, v = packed.split([heads * d, heads * d, heads * dv], -1)
    args = {
        "q": q,
        "k": k,
        "v": v,
        "compressed": normal(batch, n, heads * (c or d)),
        "offset": normal(batch, n, heads),
        "basis": normal(tokens, n).t(),
        "num_heads": heads,
        "num_keys": 0 if settings.get("score_threshold") else 4,
        "num_coefficients": 0 if settings.get("coefficient_threshold") else 3,
        "basis_threshold": 0.1,
        **settings,
    }
    if c:
        args["projection"] = normal(c, d)
    if alive:
        lists = [torch.randperm(tokens, generator=g)[:alive].sort().values for _ in range(batch)]
        args["candidates"] = torch.stack(lists)
    return args


def step_by_step(
    q,
    k,
    v,
    compressed,
    offset,
    basis,
    num_heads,
    num_dense=0,
    num_pruned=0,
    scale=None,
    projection=None,
    **choice,
):
    """Choice, sparse attention, and attention of the dense queries, each by itself; all differentiable."""
    scale = (q.shape[2] // num_heads) ** -0.5 if scale is None else scale
    logits = connectivity_logits(q[:, num_dense:].detach(), compressed, offset, projection, num_heads)
    keys = connectivity_topk(logits, basis, **choice)
    rest = sparse_attention(q[:, num_dense:], k, v, keys, num_heads, scale)
    # pruned tokens, as tokens of zeros
    k, v = (torch.cat([x, x.new_zeros(len(x), num_pruned, x.shape[2])], 1) for x in (k, v))
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q[:, :num_dense], k, v))
    dense = ((q * scale) @ k.mT).softmax(-1) @ v
    return torch.cat([dense.transpose(1, 2).flatten(2), rest], 1)


SETTINGS = [
    {},
    {"num_dense": 1},
    {"num_dense": 1, "alive": 6, "num_pruned": 3},
    {"num_dense": 9},
    {"scale": 2.0, "c": 3},
    {"score_threshold": 0.3, "num_dense": 1},
    {"coefficient_threshold": 0.1},
    {"num_coefficients": 0},
]


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_the_choice_and_the_attention_in_one(mode, settings):
    args = example(**settings)
    with use_ops(mode):
        got = connectivity_attention(**args)
    torch.testing.assert_close(got, step_by_step(**args), rtol=0, atol=1e-13)
    assert got.is_contiguous()


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(4, 9),
    heads=st.integers(1, 3),
    d=st.integers(1, 5),
    dv=st.integers(1, 5),
    n=st.integers(1, 6),
    num_dense=st.integers(0, 2),
    num_pruned=st.integers(0, 2),
    c=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
def test_any_shape(**shape):
    args = example(
        **shape, basis_threshold=0.0
    )  # no scores of zero: among equal ones the choice is arbitrary
    want = step_by_step(**args)
    for mode in ("auto", "reference"):
        with use_ops(mode):
            torch.testing.assert_close(connectivity_attention(**args), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str
)
def test_lower_precision_stays_within_the_rounding_of_its_inputs_and_outputs(dtype, limit):
    args = example(tokens=60, d=32, dv=32, num_keys=12, num_dense=1, dtype=dtype)
    got = connectivity_attention(**args)
    assert got.dtype == dtype
    want = step_by_step(
        **{name: x.double() if isinstance(x, torch.Tensor) else x for name, x in args.items()}
    )
    assert (got.double() - want).abs().max() < limit * want.abs().max()


def test_compressed_keys_and_offset_may_be_wider_than_the_queries():
    args = example(dtype=torch.bfloat16)
    wide = args | {name: args[name].float() for name in ("compressed", "offset", "basis")}
    assert torch.equal(connectivity_attention(**wide), connectivity_attention(**args))


@pytest.mark.parametrize("empty", [{"batch": 0}])
def test_nothing_asked_gives_nothing(empty):
    assert connectivity_attention(**example(**empty)).shape == (0, 9, 6)


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_queries_keys_and_values_get_the_gradients_of_the_attention_and_the_choice_none(mode, settings):
    args = example(**settings)
    leaves = {
        n: args[n].detach().clone().requires_grad_() for n in ("q", "k", "v", "compressed", "offset", "basis")
    }
    want = torch.autograd.grad(step_by_step(**args | leaves).sin().sum(), [leaves[n] for n in "qkv"])
    with use_ops(mode):
        connectivity_attention(**args | leaves).sin().sum().backward()
    for name, w in zip("qkv", want, strict=True):
        torch.testing.assert_close(leaves[name].grad, w, rtol=0, atol=1e-13)
    assert all(leaves[name].grad is None for name in ("compressed", "offset", "basis"))


def operands(args):
    """Of the operator itself."""
    scale = 0.5 if args.get("scale") is None else args["scale"]
    return (
        *(args[n] for n in ("q", "k", "v", "compressed", "offset")),
        args.get("projection"),
        args["basis"],
        args.get("candidates"),
        args["num_keys"],
        args["num_coefficients"],
        args.get("coefficient_threshold", 0.0),
        args["basis_threshold"],
        args.get("score_threshold", 0.0),
        args.get("num_dense", 0),
        args.get("num_pruned", 0),
        args["num_heads"],
        scale,
    )


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_the_operator_itself_has_derivatives_too(settings):
    args = example(batch=1, tokens=9, d=2, dv=1, **settings)
    leaves = [args[n].detach().clone().requires_grad_() for n in "qkv"]
    rest = operands(args)[3:]
    assert torch.autograd.gradcheck(lambda *qkv: OP(*qkv, *rest), leaves)


def test_gradient_checkpointing_gives_the_same_gradients():
    args = example(num_dense=1)
    leaves = {n: args[n].detach().clone().requires_grad_() for n in "qkv"}

    def call(q, k, v):
        return connectivity_attention(**args | {"q": q, "k": k, "v": v}).sin().sum()

    want = torch.autograd.grad(call(**leaves), list(leaves.values()))
    torch.utils.checkpoint.checkpoint(call, *leaves.values(), use_reentrant=False).backward()
    for leaf, w in zip(leaves.values(), want, strict=True):
        torch.testing.assert_close(leaf.grad, w)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [SETTINGS[2], SETTINGS[4], SETTINGS[5]], ids=str)
def test_registrations_pass_opcheck(dtype, settings):
    args = operands(example(dtype=dtype, **settings))
    wide = [None if x is None else x.float() for x in args[3:6]]
    q, k, v = (x.detach().clone().requires_grad_() for x in args[:3])
    torch.library.opcheck(OP, (q, k, v, *wide, *args[6:]))


class Module(torch.nn.Module):
    def forward(self, packed, compressed, offset, basis):
        q, k, v = packed.chunk(3, -1)
        return connectivity_attention(q, k, v, compressed, offset, basis, 2, 4, 3, num_dense=1).sin()


def module_inputs(batch=3):
    args = example(batch=batch, dv=4, dtype=torch.float32)
    packed = torch.cat([args[n] for n in "qkv"], -1)
    return packed, args["compressed"], args["offset"], args["basis"]


def test_torch_compile_sees_one_graph_with_and_without_gradients():
    inputs = module_inputs()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), Module()(*inputs))
    packed = inputs[0].requires_grad_()
    want = torch.autograd.grad(Module()(*inputs).sum(), packed)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs).sum(), packed), want)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_torch_export_keeps_batch_free(mode):
    inputs, batch = module_inputs(), torch.export.Dim("batch")
    shapes = ({0: batch}, {0: batch}, {0: batch}, None)
    with use_ops(mode), torch.no_grad():
        program = torch.export.export(
            Module(), (*(x[:2] for x in inputs[:3]), inputs[3]), dynamic_shapes=shapes
        )
    assert any(node.target is OP for node in program.graph.nodes) == (mode == "auto")
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))


def test_torchscript_calls_the_operator():
    args = example(dtype=torch.float32, num_dense=1)
    torch.testing.assert_close(
        torch.jit.script(connectivity_attention)(**args), connectivity_attention(**args)
    )


def test_torch_func_transforms_compose():
    packed, compressed, offset, basis = module_inputs()

    def loss(packed, compressed, offset):
        return Module()(packed[None], compressed[None], offset[None], basis).square().sum()

    tensors = (packed, compressed, offset)
    grads = torch.vmap(torch.func.grad(loss))(*tensors)
    for i in range(3):
        single = torch.func.grad(loss)(*(x[i] for x in tensors))
        torch.testing.assert_close(grads[i], single)
    values = torch.vmap(lambda *x: Module()(*(y[None] for y in x), basis)[0])(*tensors)
    torch.testing.assert_close(values, Module()(*tensors, basis))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast_computes_in_its_dtype(dtype, grad):
    args = example(dtype=torch.float32, num_dense=1, num_coefficients=0)
    args["q"] = args["q"].clone().requires_grad_(grad)
    with torch.autocast("cpu", dtype=dtype):
        got = connectivity_attention(**args)
    assert got.dtype == dtype
    assert (got - connectivity_attention(**args)).abs().amax(-1).median() < 2e-2


@pytest.mark.parametrize("c", [None, 3])
def test_both_counters_count_the_choice_and_the_chosen_keys_alone(c):
    def call(*tensors):
        return connectivity_attention(**args | dict(zip(names, tensors, strict=True)))

    args = example(dtype=torch.float32, num_dense=1, alive=6, num_pruned=3, c=c)
    names = ("q", "k", "v", "compressed", "offset", "basis", "candidates", *(["projection"] if c else []))
    tensors = tuple(args[n] for n in names)
    logits = 2 * 5 * 2 * (3 * 4 + 6 * 3 if c else 6 * 4)
    choice = 2 * 5 * 2 * 3 * 6
    pairs = 2 * 2 * (5 * 4 + 6)
    expected = logits + choice + pairs * (4 + 3)
    assert macs_by_both(call, *tensors) == (expected, expected)
    leaf = args["q"].detach().clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        OP(leaf, *operands(args)[1:]).sum().backward()
    assert counter.get_total_flops() == 2 * (expected + logits + choice + pairs * (3 * 4 + 2 * 3))


BAD = {
    "q of rank 4": ({"q": torch.zeros(2, 9, 2, 4)}, ValueError, r"q must have 3 dimensions \(B, N, C\), got shape"),
    "no tensor": ({"v": 1.0}, TypeError, r"v must be a tensor of shape \(B, N, C\), got float"),
    "mixed dtypes": ({"v": torch.zeros(2, 9, 6)}, TypeError, "v is torch.float32 but q is torch.float64"),
    "other channels": ({"k": torch.zeros(2, 9, 4).double()}, ValueError, r"q and k must agree in batch and channels"),
    "fewer values": ({"v": torch.zeros(2, 8, 6).double()}, ValueError, r"same tokens, got \(2, 9, 8\) and \(2, 8, 6\)"),
    "heads": ({"num_heads": 3}, ValueError, r"num_heads must divide the channels of q \(8\) and of v \(6\), got 3"),
    "compressed of rank 2": ({"compressed": torch.zeros(6, 8)}, ValueError, "compressed must have 3 dimensions"),
    "compressed channels": ({"compressed": torch.zeros(2, 6, 6)}, ValueError, r"compressed must have shape \(2, 6, 8\), got \(2, 6, 6\)"),
    "projection": ({"projection": torch.zeros(3, 5)}, ValueError, r"projection must have shape \(3, 4\), got \(3, 5\)"),
    "projection of rank 3": ({"projection": torch.zeros(1, 3, 4)}, ValueError, r"projection must have shape \(c, 4\), got \(1, 3, 4\)"),
    "compressed after projection": ({"projection": torch.zeros(3, 4)}, ValueError, r"compressed must have shape \(2, 6, 6\), got \(2, 6, 8\)"),
    "offset": ({"offset": torch.zeros(2, 6, 3)}, ValueError, r"offset must have shape \(2, 6, 2\), got \(2, 6, 3\)"),
    "no offset": ({"offset": None}, TypeError, r"offset must be a tensor of shape \(2, 6, 2\), got NoneType"),
    "offset elsewhere": ({"offset": torch.zeros(2, 6, 2, device="meta")}, ValueError, "offset is on meta but q is on cpu"),
    "rows": ({"basis": torch.zeros(5, 9)}, ValueError, r"basis must have one row per logit, 6 \(at least 1\)"),
    "tokens of the basis": ({"basis": torch.zeros(6, 8)}, ValueError, "basis must have the tokens of k, 9, got 8"),
    "tokens of the candidates": ({"candidates": torch.zeros(2, 8).long()}, ValueError, "candidates must have the tokens of k, 9, got 8"),
    "more keys than tokens": ({"num_keys": 10}, ValueError, "num_keys must lie between 1 and the number of candidates, 9; got 10"),
    "two rules": ({"score_threshold": 0.1}, ValueError, "keys are kept by number or by threshold"),
    "dense queries": ({"num_dense": 10}, ValueError, "num_dense must lie between 0 and the number of queries, 9, got 10"),
    "pruned tokens": ({"num_pruned": -1}, ValueError, "num_pruned must not be negative, got -1"),
    "a token that is not there": ({"candidates": torch.full((2, 9), 9)}, IndexError, r"candidates\[0, 0\] is 9, but the basis has 9 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(mode, case):
    change, kind, message = BAD[case]
    with use_ops(mode), pytest.raises(kind, match=message):
        connectivity_attention(**example() | change)
