"""The compiled kernel of `region_route`: against the definition, and on wrong arguments.

The operator is called directly, past the checks of the public function: what is tested is what the library does when
nothing protects it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.ops.region_route import reference
from vitrail.ops.regions import region_means

from .kernels import EXAMPLES, GPU_KERNELS, TOLERANCE, operator

route = operator("region_route")


def grids(batch, grid, kv_grid, channels, dtype, seed=0):
    """Strided views of one projection where the grids agree."""
    g = torch.Generator().manual_seed(seed)
    if grid == kv_grid:
        return torch.randn(batch, *grid, 2 * channels, generator=g).to(dtype).split(channels, -1)
    return [torch.randn(batch, *size, channels, generator=g).to(dtype) for size in (grid, kv_grid)]


@settings(max_examples=EXAMPLES * 3 // 2)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kv_grid=st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.none(),
    channels=st.integers(1, 70),
    region=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    topk=st.integers(1, 81),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_the_best_regions_come_first(batch, grid, kv_grid, channels, region, topk, dtype):
    q, k = grids(batch, grid, kv_grid or grid, channels, dtype)
    assert_best_come_first(q, k, topk, region, region)


def assert_best_come_first(q, k, topk, region, kv_region):
    means = [region_means(x.double(), size) for x, size in ((q, region), (k, kv_region))]
    scores = means[0] @ means[1].transpose(1, 2)
    topk = min(topk, scores.shape[2])
    got = route(q, k, topk, region, kv_region)
    assert got.dtype == torch.int64
    assert got.shape == (*scores.shape[:2], topk)
    best = scores.topk(topk, -1).values
    limit = 1e-13 if q.dtype == torch.float64 else 2e-6
    assert (scores.gather(2, got) - best).abs().max() <= limit * scores.abs().max()
    assert all(len(set(row)) == topk for row in got.flatten(0, 1).tolist())


@pytest.mark.skipif(GPU_KERNELS, reason="GPU kernels know no float64")
def test_float64_chooses_as_the_definition_does():
    q, k = grids(2, (28, 28), (28, 28), 64, torch.float64)
    assert torch.equal(route(q, k, 4, (4, 4), (4, 4)), reference(q, k, 4, [4, 4], [4, 4]))


# Where a block of threads, a tile of key regions or a step of the products ends on a GPU, and where scores no longer
# fit into its shared memory.
EDGES = {
    "a whole tile of keys": ((3, 3), (8, 8), 32, (1, 1), 64),
    "a key more than a tile": ((8, 1), (13, 5), 64, (1, 1), 3),
    "a query region more than a block": ((9, 3), (6, 6), 33, (1, 3), 4),
    "more key regions than are kept": ((1, 2), (33, 65), 5, (1, 1), 40),
    "one large region": ((30, 41), (60, 7), 24, (30, 41), 2),
    "narrow regions": ((16, 12), (16, 12), 40, (16, 1), 5),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", EDGES)
def test_the_best_regions_come_first_at_the_edges_of_blocks_and_tiles(case, dtype):
    grid, kv_grid, channels, region, topk = EDGES[case]
    q, k = grids(2, grid, kv_grid, channels, dtype)
    assert_best_come_first(q, k, topk, region, region)


def test_queries_and_keys_may_have_regions_of_different_size():
    q, k = grids(2, (7, 9), (12, 5), 16, torch.float32)
    assert_best_come_first(q, k, 4, (2, 3), (4, 2))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_strides_and_addresses_give_the_same_choice(dtype):
    q, k = (x.contiguous() for x in grids(3, (6, 8), (6, 8), 32, dtype))
    want = route(q, k, 5, (2, 2), (2, 2))
    shifted = torch.empty(q.numel() + 1, dtype=dtype)[1:].view(q.shape).copy_(q)
    for other in (
        torch.cat([q, q[..., :3]], -1)[..., :32],
        q.transpose(1, 2).contiguous().transpose(1, 2),
        q.repeat_interleave(2, 2)[:, :, ::2],
        shifted,
    ):
        assert torch.equal(route(other, k, 5, (2, 2), (2, 2)), want)
    assert torch.equal(route(q[:1].expand(3, -1, -1, -1), k, 5, (2, 2), (2, 2))[0], want[0])


def test_an_image_chooses_the_same_alone_and_in_a_batch():
    q, k = grids(5, (9, 9), (9, 9), 40, torch.float32)
    want = route(q, k, 7, (3, 2), (3, 2))
    for b in range(5):
        assert torch.equal(route(q[b : b + 1], k[b : b + 1], 7, (3, 2), (3, 2))[0], want[b])


def test_of_equals_the_first_is_chosen():
    x = torch.ones(1, 4, 4, 3)
    assert route(x, x, 3, (2, 2), (2, 2)).tolist() == [[[0, 1, 2]] * 4]
    zeros = torch.tensor([0.0, -0.0]).repeat(20).view(1, 1, 40, 1)
    assert route(x[:, :1, :1, :1], zeros, 40, (1, 1), (1, 1)).tolist() == [[list(range(40))]]


def test_what_is_no_number_is_chosen_first_as_torch_does():
    x = torch.ones(1, 1, 4, 1)
    k = torch.tensor([1.0, torch.nan, 3.0, -torch.inf]).view(1, 1, 4, 1)
    assert route(x, k, 4, (1, 1), (1, 1))[0, 0].tolist() == [1, 2, 0, 3]


def test_the_number_of_threads_does_not_change_a_choice(assert_same_bits_on_any_number_of_threads):
    q, k = grids(3, (56, 56), (56, 56), 64, torch.float32)
    assert_same_bits_on_any_number_of_threads(lambda: (route(q, k, 7, (8, 8), (8, 8)),))


def test_no_images_and_no_queries_give_no_routes():
    q, k = grids(2, (4, 4), (4, 4), 8, torch.float32)
    assert route(q[:0], k[:0], 2, (2, 2), (2, 2)).shape == (0, 4, 2)
    assert route(q[:, :0], k, 2, (2, 2), (2, 2)).shape == (2, 0, 2)


WRONG = {
    "dtype": (
        {0: torch.zeros(1, 4, 4, 8).int()},
        "q must be float32, float64, bfloat16 or float16, got int32",
    ),
    "other dtype": (
        {1: torch.zeros(1, 4, 4, 8).double()},
        "k must have the dtype of q, float32, got float64",
    ),
    "rank": ({1: torch.zeros(4, 4, 8)}, r"k must have 4 dimensions \(B, H, W, C\), got shape \(4, 4, 8\)"),
    "channels": ({1: torch.zeros(1, 4, 4, 9)}, "k must have the channels of q, 8, got 9"),
    "batch": ({1: torch.zeros(2, 4, 4, 8)}, "k must have the batch size of q, 1, got 2"),
    "stride": ({0: torch.zeros(1, 8, 4, 4).transpose(1, 3)}, "the last dimension of q must be contiguous"),
    "region": (
        {3: (0, 2)},
        r"region_size must be two positive numbers whose product is at most \d+, got \(0, 2\)",
    ),
    "too many": ({2: 5}, "topk must lie between 1 and the number of key regions, 4; got 5"),
    "none": ({2: 0}, "topk must lie between 1 and the number of key regions, 4; got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_with_the_rule(case):
    change, message = WRONG[case]
    arguments = [torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 8), 2, (2, 2), (2, 2)]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(RuntimeError, match=message):
        route(*arguments)


@pytest.mark.skipif(not GPU_KERNELS, reason="the CPU takes float64")
def test_float64_is_refused():
    q, k = grids(1, (4, 4), (4, 4), 8, torch.float64)
    with pytest.raises(
        RuntimeError, match=r"q must be .* on a GPU, got float64; VITRAIL_OPS=reference takes it"
    ):
        route(q, k, 2, (2, 2), (2, 2))


def test_every_instruction_set_matches_the_definition(lesser_instruction_set):
    """The tests above again: the fixture does it."""
