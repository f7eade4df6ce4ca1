"""The compiled kernels of `window_attention`: against a float64 definition, and on wrong arguments."""

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

OP = operator("window_attention")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; the defaults are small and odd enough to reach every tail."""

    batch: int = 2
    grid: tuple[int, int] = (9, 7)
    window: tuple[int, int] = (4, 3)
    shift: tuple[int, int] = (0, 0)
    heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float32
    bias: bool = False
    pads: bool = False
    scale: float = 0.5

    def arguments(self, seed: int = 0) -> list:
        """Arguments of the operator; q, k and v are strided views of one projection."""
        g = torch.Generator().manual_seed(seed)
        qk, cv, tokens = (
            self.heads * self.head_dim,
            self.heads * self.value_dim,
            self.window[0] * self.window[1],
        )

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        q, k, v = normal(self.batch, *self.grid, 2 * qk + cv).split([qk, qk, cv], -1)
        bias = normal(self.heads, tokens, tokens) if self.bias else None
        if bias is not None and self.dtype != torch.float64:
            bias = bias.float()
        pads = [normal(qk), normal(cv)] if self.pads else [None, None]
        return [q, k, v, bias, *pads, self.window, self.shift, self.heads, self.scale]


def borders(tokens: int, size: int, shift: int) -> list[tuple[int, int]]:
    """Begin and end of the windows along one side."""
    length = -(-tokens // size) * size
    starts = sorted({0, *range(shift, length, size)})
    return list(zip(starts, [*starts[1:], length], strict=True))


def definition(q, k, v, bias, pad_key, pad_value, window, shift, heads, scale) -> tuple[Tensor, Tensor]:
    """Window by window, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_zeros(*q.shape[:3], heads)
    pad_key = k.new_zeros(k.shape[3]) if pad_key is None else pad_key.double()
    pad_value = v.new_zeros(v.shape[3]) if pad_value is None else pad_value.double()
    rows, columns = (borders(n, size, s) for n, size, s in zip(q.shape[1:3], window, shift, strict=True))
    for top, bottom in rows:
        for left, right in columns:
            here = (slice(None), slice(top, min(bottom, q.shape[1])), slice(left, min(right, q.shape[2])))
            if q[here].numel() == 0:
                continue
            y, x = torch.meshgrid(torch.arange(top, bottom), torch.arange(left, right), indexing="ij")
            inside = ((y < q.shape[1]) & (x < q.shape[2])).flatten()
            place = ((y - shift[0]) % window[0] * window[1] + (x - shift[1]) % window[1]).flatten()

            def keys(grid: Tensor, pad: Tensor, inside=inside, here=here) -> Tensor:
                """(B, heads, keys, d)"""
                all_keys = pad.repeat(grid.shape[0], len(inside), 1)
                all_keys[:, inside] = grid[here].flatten(1, 2)
                return all_keys.unflatten(-1, (heads, -1)).transpose(1, 2)

            queries = q[here].flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
            scores = queries @ keys(k, pad_key).transpose(-2, -1) * scale
            if bias is not None:
                scores = scores + bias.double()[:, place[inside]][:, :, place]
            result = (scores.softmax(-1) @ keys(v, pad_value)).transpose(1, 2).flatten(2)
            out[here] = result.view(out[here].shape)
            lse[here] = scores.logsumexp(-1).transpose(1, 2).reshape(lse[here].shape)
    return out, lse


def assert_matches(case: Case, arguments: list, tolerance: float = 1.0) -> None:
    check_outputs(OP(*arguments), definition(*arguments), arguments[2])
    check_gradients("window_attention", arguments, range(6), definition, tolerance)


SHAPES = {
    "DaViT": Case(2, (14, 14), (7, 7), heads=3, head_dim=32, value_dim=32, pads=True),
    "Swin": Case(1, (14, 14), (7, 7), (3, 3), 3, 32, 32, bias=True),
    "one window for all": Case(2, (7, 7), (7, 7), heads=2, head_dim=64, value_dim=64),
    "a window of many blocks of queries and keys": Case(1, (15, 14), (15, 14), heads=1, head_dim=16, value_dim=16, bias=True),
    "shifted windows of many blocks": Case(1, (13, 25), (13, 15), (5, 6), 1, 16, 16, bias=True, pads=True),
    "windows that reach past the grid": Case(2, (8, 12), (7, 5), heads=2, head_dim=5, value_dim=20, pads=True, bias=True),
    "and are shifted": Case(2, (8, 12), (7, 5), (6, 4), 2, 20, 5, pads=True, bias=True),
    "single tokens": Case(1, (3, 5), (1, 1), heads=1, head_dim=1, value_dim=1, bias=True),
    "one token in all": Case(1, (1, 1), (1, 1), heads=1, head_dim=3, value_dim=5),
    "a window far larger than the grid": Case(1, (2, 3), (12, 11), (5, 7), 1, 8, 8, pads=True, bias=True),
    "two spare keys": Case(1, (6, 3), (6, 3), heads=2, head_dim=17, value_dim=33, bias=True),
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(shape, dtype):
    case = replace(SHAPES[shape], dtype=dtype)
    assert_matches(case, case.arguments())


windows = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda w: st.tuples(st.just(w), st.tuples(st.integers(0, w[0] - 1), st.integers(0, w[1] - 1)))
)
cases = st.builds(
    lambda window, **sizes: Case(window=window[0], shift=window[1], **sizes),
    window=windows,
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    pads=st.booleans(),
    scale=st.sampled_from([0.1, 0.5, -0.3]),
)


@settings(max_examples=EXAMPLES)
@given(cases, st.integers(0, 99))
def test_matches_the_definition_for_any_sizes(case, seed):
    assert_matches(case, case.arguments(seed), 4)


def test_any_strides_are_read_and_only_the_last_must_be_one():
    case = Case(grid=(8, 8), window=(4, 4), bias=True, pads=True)
    q, k, v, bias, pad_key, pad_value, *rest = case.arguments()
    q = q.transpose(1, 2)
    k = k[:, :, :1].expand(-1, -1, 8, -1)
    v = v.flip(0)[:, ::2].repeat_interleave(2, 1)
    bias = bias.transpose(1, 2)
    pad_key = pad_key.repeat(2, 1).t().contiguous().t()[0]
    assert_matches(case, [q, k, v, bias, pad_key, pad_value[:1].expand(16), *rest])


def test_a_bias_of_minus_infinity_hides_a_key():
    case = Case(1, (3, 3), (3, 3), bias=True)
    arguments = case.arguments()
    arguments[3][:, :, 4:] = -torch.inf
    out, lse = OP(*arguments)
    want, want_lse = definition(*arguments)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)
    grads = operator("window_attention_backward")(out, out, lse, *arguments)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][0].flatten(0, 1)[4:].any()


@pytest.mark.parametrize("shape", ["DaViT", "Swin", "and are shifted", "shifted windows of many blocks"])
def test_the_number_of_threads_does_not_change_a_bit(shape):
    arguments = replace(SHAPES[shape], batch=3).arguments()
    out, lse = OP(*arguments)
    with_threads(lambda: OP(*arguments))
    with_threads(lambda: operator("window_attention_backward")(out, out, lse, *arguments))


@pytest.mark.parametrize("empty", [{"batch": 0}, {"grid": (0, 7)}, {"grid": (3, 0)}], ids=str)
def test_nothing_to_compute_is_no_error(empty):
    case = replace(Case(bias=True, pads=True, shift=(1, 1)), **empty)
    arguments = case.arguments()
    out, lse = OP(*arguments)
    assert out.shape == (case.batch, *case.grid, 16)
    assert lse.shape == (case.batch, *case.grid, 2)
    for x, gradient in zip(
        arguments, operator("window_attention_backward")(out, out, lse, *arguments), strict=False
    ):
        assert gradient.shape == x.shape
        assert not gradient.any()


# --- wrong arguments --------------------------------------------------------------------------------------------------

WRONG = {
    "q must have 4 dimensions": (0, lambda q: q[0]),
    "k must have the dtype of q, float32, got float64": (1, lambda k: k.double()),
    "k must have the channels of q, 16, got 14": (1, lambda k: k[..., :14]),
    "v must lie on the grid of k, 9 x 7, got 8 x 7": (2, lambda v: v[:, :8]),
    "k must have the batch size of q, 2, got 1": (1, lambda k: k[:1]),
    r"bias must have shape \(2, 12, 12\), got \(2, 12, 11\)": (3, lambda b: b[..., 1:]),
    "bias must be float32, got float64": (3, lambda b: b.double()),
    r"pad_key must have shape \(16\), got \(15\)": (4, lambda p: p[1:]),
    "pad_value must be float32, got bfloat16": (5, lambda p: p.bfloat16()),
    r"window_size must be two positive numbers .*, got \(0, 3\)": (6, lambda _: (0, 3)),
    r"window_size .*, got \(4, 3, 2\)": (6, lambda _: (4, 3, 2)),
    r"window_size .*, got \(65536, 65536\)": (6, lambda _: (2**16, 2**16)),
    r"shift must be two numbers from 0 to below window_size \(4, 3\), got \(4, 0\)": (7, lambda _: (4, 0)),
    r"shift .*, got \(0, -1\)": (7, lambda _: (0, -1)),
    r"shift .*, got \(1, 1, 1\)": (7, lambda _: (1, 1, 1)),
    "num_heads must be at least 1, got 0": (8, lambda _: 0),
    "q must have a positive multiple of num_heads = 3 channels, got 16": (8, lambda _: 3),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message):
    arguments = Case(bias=True, pads=True).arguments()
    out, lse = OP(*arguments)
    position, change = WRONG[message]
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=f"window_attention: {message}"):
        OP(*arguments)
    with pytest.raises(RuntimeError, match=f"window_attention_backward: {message}"):
        operator("window_attention_backward")(out, out, lse, *arguments)


def test_q_and_k_must_share_a_grid():
    q, k, v, *rest = Case().arguments()
    with pytest.raises(RuntimeError, match="k must lie on the grid of q, 9 x 7, got 8 x 7"):
        OP(q, k[:, 1:], v[:, 1:], *rest)


@pytest.mark.parametrize("capability", OTHER_CAPABILITIES)
def test_every_instruction_set_matches_the_definition(capability):
    check_with(capability, __file__)
