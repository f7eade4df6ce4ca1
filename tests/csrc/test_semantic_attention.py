"""The compiled kernels of `semantic_attention`: against a float64 definition, and on wrong arguments."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..threads import with_threads
from .kernels import (
    EXAMPLES,
    OTHER_CAPABILITIES,
    TOLERANCE,
    check_gradients,
    check_outputs,
    check_with,
    operator,
)

OP = operator("semantic_attention")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    batch: int = 2
    windows: tuple[int, int] = (2, 3)
    window: tuple[int, int] = (3, 2)
    image: tuple[int, int] = (9, 7)
    patch: tuple[int, int] = (5, 4)
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float32
    scale: float = 0.5

    @property
    def grid(self) -> tuple[int, int]:
        return self.windows[0] * self.window[0], self.windows[1] * self.window[1]

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator; keys and values are strided views of projections."""
        g = torch.Generator().manual_seed(seed)
        qk, cv = self.heads * self.head_dim, self.heads * self.value_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        q, own_k, own_v = normal(self.batch, *self.grid, 2 * qk + cv).split([qk, qk, cv], -1)
        k, v = normal(self.batch, *self.image, qk + cv).split([qk, cv], -1)
        return [q, k, v, own_k, own_v, self.window, self.patch, self.heads, self.scale]


def definition(q, k, v, own_k, own_v, window, patch, heads, scale) -> tuple[Tensor, Tensor]:
    """Window by window, in float64."""
    q, k, v, own_k, own_v = (x.double() for x in (q, k, v, own_k, own_v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_zeros(*q.shape[:3], heads)
    down, across = q.shape[1] // window[0], q.shape[2] // window[1]
    for i in range(down):
        for j in range(across):
            here = (
                slice(None),
                slice(i * window[0], (i + 1) * window[0]),
                slice(j * window[1], (j + 1) * window[1]),
            )
            top = i * (k.shape[1] - patch[0]) // max(down - 1, 1)
            left = j * (k.shape[2] - patch[1]) // max(across - 1, 1)
            there = (slice(None), slice(top, top + patch[0]), slice(left, left + patch[1]))

            def both(own: Tensor, image: Tensor, here=here, there=there) -> Tensor:
                tokens = torch.cat([own[here].flatten(1, 2), image[there].flatten(1, 2)], 1)
                return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)

            queries = q[here].flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
            scores = queries @ both(own_k, k).transpose(-2, -1) * scale
            result = (scores.softmax(-1) @ both(own_v, v)).transpose(1, 2).flatten(2)
            out[here] = result.view(out[here].shape)
            lse[here] = scores.logsumexp(-1).transpose(1, 2).reshape(lse[here].shape)
    return out, lse


def assert_matches(arguments: list, tolerance: float = 1.0) -> None:
    check_outputs(OP(*arguments), definition(*arguments), arguments[2])
    check_gradients("semantic_attention", arguments, range(5), definition, tolerance)


SHAPES = {
    "STViT": Case(2, (2, 2), (3, 3), (14, 14), (10, 10), 3, 32, 32),
    "STViT at 384": Case(1, (3, 3), (4, 4), (12, 12), (6, 7), 2, 32, 32),
    "a window of many blocks": Case(1, (2, 1), (9, 10), (8, 9), (7, 8), 1, 16, 16),
    "one window and one patch": Case(2, (1, 1), (2, 2), (5, 6), (5, 6), 2, 5, 20),
    "patches side by side": Case(1, (3, 2), (1, 2), (9, 8), (3, 4), 2, 20, 5),
    "single tokens": Case(1, (3, 5), (1, 1), (4, 4), (1, 1), 1, 1, 1),
    "few keys": Case(1, (2, 2), (1, 1), (3, 3), (2, 2), 4, 8, 8),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype):
    assert_matches(replace(SHAPES[shape], dtype=dtype).arguments())


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
cases = st.builds(
    lambda patch, room, **sizes: Case(patch=patch, image=(patch[0] + room[0], patch[1] + room[1]), **sizes),
    patch=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    room=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    windows=pairs,
    window=pairs,
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
    scale=st.sampled_from([0.1, 0.5, -0.3]),
)


@settings(max_examples=EXAMPLES)
@given(cases, st.integers(0, 99))
def test_matches_the_definition_for_any_sizes(case, seed):
    assert_matches(case.arguments(seed), 4)


def test_any_strides_are_read_and_only_the_last_must_be_one():
    q, k, v, own_k, own_v, *rest = Case(windows=(2, 2), window=(2, 2)).arguments()
    v = v[:, :1].expand(-1, 9, -1, -1)
    assert_matches(
        [q.transpose(1, 2), k.flip(1), v, own_k.flip(0), own_v[:, :, :1].expand(-1, -1, 4, -1), *rest]
    )


@pytest.mark.parametrize("shape", ["STViT", "a window of many blocks"])
def test_the_number_of_threads_does_not_change_a_bit(shape):
    arguments = replace(SHAPES[shape], batch=3).arguments()
    out, lse = OP(*arguments)
    with_threads(lambda: OP(*arguments))
    with_threads(lambda: operator("semantic_attention_backward")(out, out, lse, *arguments))


@pytest.mark.parametrize("empty", [{"batch": 0}, {"windows": (0, 2)}, {"windows": (2, 0)}], ids=str)
def test_nothing_to_compute_is_no_error(empty):
    case = replace(Case(), **empty)
    arguments = case.arguments()
    out, lse = OP(*arguments)
    assert out.shape == (case.batch, *case.grid, 16)
    assert lse.shape == (case.batch, *case.grid, 2)
    for x, gradient in zip(
        arguments, operator("semantic_attention_backward")(out, out, lse, *arguments), strict=False
    ):
        assert gradient.shape == x.shape
        assert not gradient.any()


# --- wrong arguments --------------------------------------------------------------------------------------------------

WRONG = {
    "q must have 4 dimensions": (0, lambda q: q[0]),
    "k must have the channels of q, 16, got 14": (1, lambda k: k[..., :14]),
    "v must lie on the grid of k, 9 x 7, got 8 x 7": (2, lambda v: v[:, :8]),
    r"own_k must have shape \(2, 6, 6, 16\), got \(2, 5, 6, 16\)": (3, lambda x: x[:, 1:]),
    "own_k must have the dtype of q, float32, got float64": (3, lambda x: x.double()),
    "own_v must have 4 dimensions": (4, lambda x: x[0]),
    "own_v must have the batch size of q, 2, got 1": (4, lambda x: x[:1]),
    "last dimension of own_v must be contiguous": (4, lambda x: x[..., :1].expand(-1, -1, -1, 16)),
    r"window_size must be two positive numbers .*, got \(0, 2\)": (5, lambda _: (0, 2)),
    r"window_size \(4, 2\) must divide the grid of q, 6 x 6": (5, lambda _: (4, 2)),
    r"patch_size must be two positive numbers .*, got \(5\)": (6, lambda _: (5,)),
    r"patch_size \(5, 8\) must not exceed the grid of k, 9 x 7": (6, lambda _: (5, 8)),
    "num_heads must be at least 1, got -1": (7, lambda _: -1),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message):
    arguments = Case().arguments()
    out, lse = OP(*arguments)
    position, change = WRONG[message]
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=f"semantic_attention: .*{message}"):
        OP(*arguments)
    with pytest.raises(RuntimeError, match=f"semantic_attention_backward: .*{message}"):
        operator("semantic_attention_backward")(out, out, lse, *arguments)


@pytest.mark.parametrize("capability", OTHER_CAPABILITIES)
def test_every_instruction_set_matches_the_definition(capability):
    check_with(capability, __file__)
