"""`--device cuda` as far as it goes without a GPU: which rows there are, their tables, clocks and rates, FlexAttention."""

import dataclasses
from dataclasses import asdict, replace
from itertools import count

import pytest
import torch

from harness import device, flex, problems, timing
from vitrail.ops import library, use_ops
from vitrail.ops.flops import moved_bytes

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@needs_no_gpu
@pytest.mark.parametrize("name", ["operators", "models"])
def test_without_a_gpu_it_says_so(run, name, request):
    result = run(request.getfixturevalue(name), "--device", "cuda", "--output", "none.json")
    assert result.code == 2
    assert "--device cuda: this torch" in result.err
    assert "no NVIDIA GPU here" in result.err


def test_a_gpu_has_rows_and_batch_sizes_of_its_own(run, operators):
    listed = run(operators, "--list", "--device", "cuda").out.splitlines()
    for row in (
        *(f"routed_attention, biformer_small 224, stage {i}, batch 64, training" for i in (1, 2, 3, 4)),
        *(f"routed_attention, biformer_small 896, stage {i}, batch 4, forward" for i in (1, 2, 3, 4)),
        "sparse_attention, sparsifiner_small, 16385 tokens, with the choice, batch 1, forward",
        "window_attention, davit_fused_tiny, stage 1, batch 64, forward",
    ):
        assert row in listed
    assert not any(line.startswith("packed_") for line in listed)
    chosen = run(operators, "--list", "--device", "cuda", "--batch", 2, "--only", "16385").out.splitlines()
    assert chosen
    assert all("batch 2" in line for line in chosen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--amp"], "--amp is for --device cuda"),
        (["--device", "cuda", "--amp", "--dtype", "bfloat16"], "--amp is for --device cuda in float32"),
    ],
)
def test_wrong_use_is_explained(run, models, arguments, message):
    result = run(models, *arguments)
    assert result.code == 2
    assert message in result.err


# --- clocks and rates -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, operators):
    """torch's GPU functions on the CPU: an event takes the time of a counter, a graph is a list of calls."""
    ticks = count()

    class Event:
        def __init__(self, enable_timing=False):
            self.at = None

        def record(self):
            self.at = next(ticks)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    class Graph:
        pass

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            self.graph.replay = lambda: next(ticks)

        def __exit__(self, *_):
            pass

    class Stream(Capture):
        def __init__(self, *_):
            pass

        def __enter__(self):
            pass

        def wait_stream(self, other):
            pass

    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
        "Stream": Stream,
        "stream": Stream,
        "current_stream": Stream,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 356,
        "reset_peak_memory_stats": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **{**k, "device": "cpu"}))
    monkeypatch.setattr(device, "_COPIED_BYTES", 1000)
    monkeypatch.setattr(device, "_FLUSHED_BYTES", 1000)
    small = {"cpu": 64, "cuda": 64}
    monkeypatch.setattr(timing, "GEMM_SIDE", small)
    monkeypatch.setattr(operators, "gemm", lambda dtype, _: timing.gemm(dtype))
    monkeypatch.setattr(
        operators.Place,
        "problem",
        lambda self, dtype, _="cpu": self.setting.build(1, operators.options.DTYPES[dtype]),
    )
    monkeypatch.setattr("harness.options.require", lambda _: None)
    load = library.load
    monkeypatch.setattr(library, "load", lambda *_: load("cpu"))
    about = {"name": "pretended", "driver": "1.2", "torch_cuda": "13.0"}
    monkeypatch.setattr(device, "describe", lambda: about)
    monkeypatch.setattr(problems.Setting, "compiled", lambda self, training, where: True)


def test_events_time_blocks_of_calls(gpu):
    calls = []
    assert device.eager_clock(lambda: calls.append(0), 5) == 1.0
    assert len(calls) == 5
    assert device.ColdClock()(lambda: calls.append(0), 3) == 3.0  # each by itself


def test_a_call_that_cannot_be_captured_says_why(monkeypatch, gpu):
    def run():
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(
        device.NotCapturableError, match=r"^RuntimeError: operation not permitted .* capturing$"
    ):
        device.capture(run)


def test_memory_is_the_peak_above_what_was_there(gpu):
    assert device.peak_allocated(lambda: None) == 256


def test_the_slower_of_memory_and_arithmetic_is_the_bound():
    bounds = device.roofline(copy_seconds=2 * device._COPIED_BYTES / 4e12, gemm=50e12, tf32=300e12)
    assert bounds.bytes_per_second == 4e12
    assert bounds.macs_per_second == 100e12  # three TF32 products
    assert bounds.seconds(4 * 10**9, 10**9) == pytest.approx(1e-3)
    assert bounds.bound(4 * 10**9, 10**9) == "memory"
    assert bounds.seconds(10**6, 10**12) == pytest.approx(1e-2)
    assert bounds.bound(10**6, 10**12) == "arithmetic"
    assert device.roofline(1.0, 50e12, None).macs_per_second == 50e12


def test_what_a_call_moves_is_what_its_arguments_and_results_hold(operators):
    x = torch.zeros(2, 3, 4, dtype=torch.float16)
    assert moved_bytes([x, None, 1.5, [x[:, :1], x[:, :1].expand(2, 9, 4)]], (x,)) == 48 + 16 + 16 + 48
    (setting,) = (s for s in operators.SETTINGS if s.name == "stvit_r_swin_small, semantic tokens")
    with use_ops("fused"):
        library.load()
        problem = setting.build(2, torch.float32)
        run = problems.runs(problem, problems.functions(problem), training=False)[problems.FUSED]
        tokens = 2 * 6 * 6
        # queries, keys, values and the result; a log-sum-exp for each of 12 heads
        assert problems.count_bytes(run) == 4 * tokens * (4 * 384 + 12)


# --- rows -------------------------------------------------------------------------------------------------------------

ONE = ("--device", "cuda", "--only", "semantic tokens", "--min-seconds", 0.01)


def test_a_row_on_a_gpu_says_how_far_it_is_from_the_roofline(run, operators, gpu):
    result = run(operators, *ONE, "--json")
    assert result.code == 0, result.err
    document = result.document
    assert document["gpu"]["name"] == "pretended"
    forward, training = document["rows"]
    assert (forward["kind"], training["kind"]) == ("forward", "training")
    for row in document["rows"]:
        assert {f.name for f in dataclasses.fields(operators.GpuRow)} == set(row)
        assert row["bound"] in ("memory", "arithmetic")
        assert row["roofline"] > 0
        assert set(row["product_gflops"]) == {"product", "TF32"}
        assert list(row["candidates"]) == ["fused", "reference", "partition + SDPA"]
        for candidate in row["candidates"].values():
            assert candidate["allocated_bytes"] == 256
            assert candidate["graph_seconds"] > 0
            assert candidate["error"] < 1e-4
    assert training["bytes"] > forward["bytes"]
    text = run(operators, *ONE, "--passes", "forward").out
    for heading in (
        "pretended, driver 1.2, CUDA 13.0; torch",
        "fused eager",
        "graph",
        "of roofline",
        "bound",
        "peak MiB",
    ):
        assert heading in text


def test_a_formulation_that_fails_is_named_and_the_others_measured(run, operators, gpu, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")

    monkeypatch.setattr(operators.attention, "_window_sdpa", fail)
    result = run(operators, *ONE, "--passes", "forward", "--json")
    (row,) = result.document["rows"]
    assert "partition + SDPA" not in row["candidates"]
    assert "CUDA out of memory" in row["missing"]["partition + SDPA"]


def test_a_formulation_that_computes_something_else_is_not_timed(run, operators, gpu, monkeypatch):
    monkeypatch.setattr(operators.attention, "_window_sdpa", lambda qkv, **_: qkv[..., :384])
    (row,) = run(operators, *ONE, "--passes", "forward", "--json").document["rows"]
    assert list(row["candidates"]) == ["fused", "reference"]
    assert "partition + SDPA computes something else" in row["missing"]["partition + SDPA"]


def test_an_operator_that_computes_something_else_fails_and_the_others_are_measured(
    run, operators, gpu, monkeypatch
):
    def wrong(problem, *args):
        if problem.leaves[0].shape[1:3] == (6, 6) and len(problem.leaves) == 1:
            raise problems.Disagreement("fused", "computes something else")
        return right(problem, *args)

    right = problems.check
    monkeypatch.setattr(operators, "check", wrong)
    result = run(operators, *ONE, "--only", "semantic tokens", "semantic_attention", "--json")
    assert result.code == 1
    document = result.document
    assert {row["operator"] for row in document["rows"]} == {"semantic_attention"}
    assert len(document["failed"]) == 2
    assert "fused computes something else" in document["failed"][0]


def test_what_cannot_be_a_graph_is_measured_eagerly(run, operators, gpu, monkeypatch):
    def refuse(_):
        raise device.NotCapturableError("it waits")

    monkeypatch.setattr(device, "capture", refuse)
    result = run(operators, *ONE, "--passes", "forward")
    assert "no graph of fused: it waits" in result.out


def test_a_definition_that_does_not_fit_leaves_the_others_to_compare(operators):
    (setting,) = (s for s in operators.SETTINGS if s.name == "stvit_r_swin_small, semantic tokens")
    problem = setting.build(1, torch.float32)
    todo = problems.runs(problem, problems.functions(problem), training=False)
    without = {name: run for name, run in todo.items() if name != problems.REFERENCE}
    assert problems.check(problem, without, training=False)["fused"] < 1e-4
    assert problems.check(problem, {"fused": todo["fused"]}, training=False) == {}


def test_a_row_that_takes_too_long_is_given_up_and_the_others_are_kept(run, operators, gpu, monkeypatch):
    monkeypatch.setattr(operators.options.TimeLimit, "GRACE", 0.0)
    right = operators.measure_on_gpu

    def slow(place, *args):
        while place.training:
            pass
        return right(place, *args)

    monkeypatch.setattr(operators, "measure_on_gpu", slow)
    document = run(operators, *ONE, "--time-limit", 6, "--json").document
    assert [row["kind"] for row in document["rows"]] == ["forward"]
    assert document["left_out"] == [
        "window_attention, stvit_r_swin_small, semantic tokens, batch 64, training"
    ]


def test_a_model_that_takes_too_long_is_given_up(run, models, monkeypatch):
    monkeypatch.setattr(models.options.TimeLimit, "GRACE", 0.0)

    def slow(*_):
        while True:
            pass

    monkeypatch.setattr(models, "build_group", slow)
    document = run(models, "--models", "biformer_pico", "--time-limit", 1, "--json").document
    assert (document["rows"], document["left_out"]) == ([], ["biformer_pico"])


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_on_a_gpu_has_a_peak_and_may_run_under_autocast(run, models, gpu, monkeypatch):
    monkeypatch.setattr(models, "gemm", lambda dtype, _: timing.gemm(dtype))
    build = models.build_group

    def on_cpu(*args):
        *most, where, amp = args
        assert (where, amp) == ("cuda", True)
        return build(*most, "cpu", amp)

    monkeypatch.setattr(models, "build_group", on_cpu)
    options = (
        "--device",
        "cuda",
        "--amp",
        "--models",
        "biformer_pico",
        "--min-seconds",
        0.01,
        "--min-rounds",
        2,
    )
    document = run(models, *options, "--batch", 2, "--json").document
    rows = {row["candidate"]: row for row in document["rows"]}
    assert {"fused", "reference"} <= set(rows)
    for row in rows.values():
        assert (row["amp"], row["peak_bytes"]) == (True, 256)
    assert "peak MiB" in run(models, *options, "--batch", 2).out


# --- FlexAttention ----------------------------------------------------------------------------------------------------

FLEXIBLE = (
    "biformer_small 224, stage 2",
    "biformer_small 224, stage 3",
    "davit_fused_tiny, stage 3",
    "stvit_r_swin_small, stage 2, shifted",
    "stvit_r_swin_small, stage 3",
    "stvit_r_swin_small, semantic tokens",
    "sparsifiner_small, 197 tokens",
)


@pytest.mark.parametrize("name", FLEXIBLE)
def test_flex_attention_computes_the_same(operators, name):
    with use_ops("fused"):
        library.load()
        setting = next(s for s in operators.SETTINGS if s.name == name and s.operator.endswith("_attention"))
        problem = setting.build(1, torch.float32)
        assert problem.flex
        todo = problems.runs(problem, problems.functions(problem, with_flex=True), training=False)
        errors = problems.check(problem, todo, training=False)
        assert set(problem.flex) <= set(errors)


def test_regions_of_whole_blocks_are_blocks_of_the_mask():
    routes = torch.tensor([[[2, 0], [1, 3], [0, 1], [3, 2]]])
    mask = flex.RegionMask(routes, 128).make()
    assert mask.BLOCK_SIZE == (128, 128)
    dense = torch.zeros(1, 1, 4, 4).scatter_(3, routes.unsqueeze(1), 1)
    assert torch.equal(mask.to_dense().float(), dense)
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    visible = dense.bool().repeat_interleave(128, 2).repeat_interleave(128, 3)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=mask), want)


def test_a_mask_follows_the_routes():
    routes = torch.tensor([[[0], [0]]])
    mask = flex.RegionMask(routes, 4)
    first = mask.make()
    routes.fill_(1)
    q = torch.randn(1, 1, 8, 16)
    for made in (first, mask.make()):  # the table is one, so that nothing is compiled again
        out = flex.flex_attention(q, q, q, block_mask=made)
        want = torch.nn.functional.scaled_dot_product_attention(q, q[:, :, 4:], q[:, :, 4:])
        torch.testing.assert_close(out, want)


def test_settings_stay_what_they_were_on_a_cpu(operators):
    setting = replace(operators.SETTINGS[0], gpu_batch=None, on_cpu=True)
    assert [str(p) for p in operators.places([setting], [1, 8], ["forward"])] == [
        "routed_attention, biformer_small 224, stage 1, batch 1, forward",
        "routed_attention, biformer_small 224, stage 1, batch 8, forward",
    ]
    assert not list(operators.places([setting], None, ["forward"], "cuda"))
    assert asdict(setting)["largest_batch"] == 8
