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

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def route(*arguments):
    return torch.ops.vitrail.region_route(*arguments)


def grids(batch, grid, kv_grid, channels, dtype, seed=0):
    """Strided views of one projection where the grids agree."""
    g = torch.Generator().manual_seed(seed)
    if grid == kv_grid:
        return torch.randn(batch, *grid, 2 * channels, generator=g).to(dtype).split(channels, -1)
    return [torch.randn(batch, *size, channels, generator=g).to(dtype) for size in (grid, kv_grid)]


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kv_grid=st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.none(),
    channels=st.integers(1, 70),
    region=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    topk=st.integers(1, 81),
    dtype=st.sampled_from(DTYPES),
)
def test_the_best_regions_come_first(batch, grid, kv_grid, channels, region, topk, dtype):
    q, k = grids(batch, grid, kv_grid or grid, channels, dtype)
    means = [region_means(x.double(), region) for x in (q, k)]
    scores = means[0] @ means[1].transpose(1, 2)
    topk = min(topk, scores.shape[2])
    got = route(q, k, topk, region, region)
    assert got.dtype == torch.int64
    assert got.shape == (*scores.shape[:2], topk)
    best = scores.topk(topk, -1).values
    limit = 1e-13 if dtype == torch.float64 else 2e-6
    assert (scores.gather(2, got) - best).abs().max() <= limit * scores.abs().max()
    assert all(len(set(row)) == topk for row in got.flatten(0, 1).tolist())


def test_float64_chooses_as_the_definition_does():
    q, k = grids(2, (28, 28), (28, 28), 64, torch.float64)
    assert torch.equal(route(q, k, 4, (4, 4), (4, 4)), reference(q, k, 4, [4, 4], [4, 4]))


def test_of_equals_the_first_is_chosen():
    x = torch.ones(1, 4, 4, 3)
    assert route(x, x, 3, (2, 2), (2, 2)).tolist() == [[[0, 1, 2]] * 4]


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


def test_every_instruction_set_matches_the_definition(lesser_instruction_set):
    """The tests above again: the fixture does it."""
