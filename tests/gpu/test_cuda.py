"""What only a GPU has: streams, graphs, a host that does not wait, a second device, compiled kernels beside ours."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .cases import CASES, ON_GPU, SEED, Case, Draw, gradient_for, has_kernels, run

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: VITRAIL_TEST_DEVICE=cuda")

each_operator = pytest.mark.parametrize("name", CASES)
each_pass = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
# Of the GPU's clock: a tenth of a second or more, which no launch takes.
_SLEEP = 300_000_000


def prepared(name: str, key: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Case, tuple[Tensor, ...]]:
    case = CASES[name](Draw(f"{name} {key}", 8, 16))
    return case, case.arguments(dtype, "packed")


def call_of(name: str, case: Case, backward: bool) -> Callable[..., list[Tensor]]:
    """Forward, or forward and backward; skipped where the definition would run, which may do what a kernel must not."""
    if backward and not case.differentiable:
        pytest.skip(f"{name} has no backward")
    if not has_kernels(name, backward):
        pytest.skip(f"{name} runs by its definition on the GPU")

    def call(*arguments: Tensor) -> list[Tensor]:
        grad = torch.ones_like(run(case, arguments)[0]) if backward else None
        return run(case, arguments, grad)

    return call


def equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def others_of(case: Case, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """Other values for the floats; numbers that name something stay."""
    count = len(case.floats)
    return [x.roll(1, 0) * 0.5 if i < count else x.clone() for i, x in enumerate(arguments)]


@each_pass
@each_operator
def test_a_captured_call_replays_with_new_inputs(name, backward):
    case, arguments = prepared(name, "graph")
    call = call_of(name, case, backward)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*arguments)
    for values in ([x.clone() for x in arguments], others_of(case, arguments)):
        want = call(*values)
        for x, value in zip(arguments, values, strict=True):
            x.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert equal(results, want), f"seed {SEED}"


@each_pass
@each_operator
def test_it_runs_on_the_stream_that_is_current(name, backward):
    case, arguments = prepared(name, "stream")
    call = call_of(name, case, backward)
    want = call(*arguments)
    late = [torch.zeros_like(x) for x in arguments]
    call(*late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_SLEEP)
        for x, value in zip(late, arguments, strict=True):
            x.copy_(value)
        got = call(*late)
    stream.synchronize()
    assert equal(got, want), f"seed {SEED}"


@each_pass
@each_operator
def test_the_host_does_not_wait(name, backward):
    case, arguments = prepared(name, "host")
    call = call_of(name, case, backward)
    for _ in range(3):  # what is allocated or loaded once
        call(*arguments)
    torch.cuda.synchronize()
    marker = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(_SLEEP)
        marker.record()
        call(*arguments)
        waited = marker.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert not waited, "the call returned only after all that was queued before it had run"


@each_operator
def test_it_runs_on_the_second_gpu(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    case, arguments = prepared(name, "second")
    (want,) = run(case, arguments)
    other = [x.to("cuda:1") for x in arguments]
    got = run(case, other, gradient_for(want.to("cuda:1")) if case.differentiable else None)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got)
    if case.comparable is None and not case.may_differ:
        torch.testing.assert_close(got[0].to("cuda:0"), want)


@pytest.mark.parametrize("name", ["routed_attention", "window_attention", "depthwise_conv"])
def test_it_compiles_with_triton_around_it(name):
    case, arguments = prepared(name, "triton", torch.float32)

    def model(*tensors: Tensor) -> Tensor:
        return case.call(*tensors).sin() + 1

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), model(*arguments))


def test_numbers_that_lie_beyond_two_to_the_31_are_reached():
    """A batch whose tensors hold more elements than 32 bits count; the last image is as if it were alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free memory, there are {free / 2**30:.0f}")
    from vitrail.ops import window_attention

    qkv = torch.randn(1, 112, 112, 192, device="cuda", dtype=torch.bfloat16)
    batch = 2**31 // qkv.numel() + 2
    many = qkv.new_zeros(batch, *qkv.shape[1:])
    many[-1:] = qkv
    with torch.no_grad():
        got = window_attention(*many.chunk(3, -1), [7, 7], 2)
        assert torch.equal(got[-1:], window_attention(*qkv.chunk(3, -1), [7, 7], 2))
        assert not got[:-1].any()
