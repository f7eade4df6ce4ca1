"""region_route against a plain loop, and its place in PyTorch."""

import pytest
import torch

from vitrail.ops import region_route, use_ops

OP = torch.ops.vitrail.region_route.default


def by_hand(q, k, topk, region_size):
    def means(x):
        rh, rw = region_size
        return torch.stack([
            x[:, y : y + rh, z : z + rw].mean((1, 2))
            for y in range(0, x.shape[1], rh)
            for z in range(0, x.shape[2], rw)
        ], 1)  # fmt: skip

    return torch.einsum("bqc,bkc->bqk", means(q), means(k)).argsort(-1, descending=True)[..., :topk]


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("region_size", [[2, 2], [3, 4], [1, 1]])
def test_regions_choose_the_keys_that_suit_their_mean_query_best(mode, topk, region_size):
    q, k = torch.randn(2, 2, 7, 8, 16, dtype=torch.float64).unbind()
    with use_ops(mode):
        routes = region_route(q, k, topk, region_size)
    assert routes.dtype == torch.int64
    assert torch.equal(routes, by_hand(q, k, topk, region_size))


def test_queries_and_keys_may_have_regions_of_different_size():
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 6, 9, 8)
    routes = region_route(q, k, 3, [2, 2], [3, 3])
    assert routes.shape == (1, 4, 3)
    assert routes.max() < 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    q, k = torch.randn(2, 2, 14, 14, 64).to(dtype).unbind()
    assert torch.equal(region_route(q, k, 4, [2, 2]), region_route(q.float(), k.float(), 4, [2, 2]))


def test_the_choice_carries_no_gradient():
    q = torch.randn(1, 4, 4, 8, requires_grad=True)
    assert not region_route(q, q, 2, [2, 2]).requires_grad


def test_registrations_pass_opcheck_and_compile():
    q, k = torch.randn(2, 2, 6, 6, 8).unbind()
    torch.library.opcheck(OP, (q, k, 2, [2, 2], [2, 2]))
    compiled = torch.compile(lambda q, k: region_route(q, k, 2, [2, 2]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), region_route(q, k, 2, [2, 2]))
    scripted = torch.jit.script(region_route)
    assert torch.equal(scripted(q, k, 2, [2, 2]), region_route(q, k, 2, [2, 2]))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"topk": 0}, ValueError, "topk must lie between 1 and the number of key regions, 9; got 0"),
        ({"topk": 10}, ValueError, "topk must lie between 1 and the number of key regions, 9; got 10"),
        ({"region_size": [0, 1]}, ValueError, "region_size must be positive"),
        ({"k": torch.zeros(2, 6, 6, 4)}, ValueError, "must agree in batch and channels"),
        ({"k": torch.zeros(2, 6, 6, 8).double()}, TypeError, "k is torch.float64 but q is torch.float32"),
        ({"q": torch.zeros(2, 6, 8)}, ValueError, "q must have 4 dimensions"),
    ],
)
def test_bad_arguments_are_named_with_the_rule(change, kind, message):
    args = {"q": torch.zeros(2, 6, 6, 8), "k": torch.zeros(2, 6, 6, 8), "topk": 2, "region_size": [2, 2]}
    with pytest.raises(kind, match=message):
        region_route(**{**args, **change})
