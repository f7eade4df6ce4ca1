"""`benchmarks/operators.py`: its command line, its results, and what it refuses to time."""

import json

import pytest
import torch

from harness import problems
from vitrail.ops import library, use_ops

QUICK = ("--batch", 1, "--min-seconds", 0.01)
SMALL = ("--only", "stage 4, rows", *QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "'0' is no whole number of at least 1"),
        (["--threads", "none"], "'none' is no whole number"),
        (["--min-seconds", "0"], "'0' is no number above zero"),
        (["--dtype", "float16"], "--dtype float16 is for --device cuda"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--flex"], "--flex is for --device cuda"),
        (["--time-limit", "0"], "'0' is no number above zero"),
        (["--passes", "backward"], "invalid choice: 'backward'"),
        (["--only", "nothing"], "no row contains that; --list shows them"),
        (["--output", "no/such/folder/x.json"], "does not exist; create it first"),
        (["--output", "results.txt"], "must end with .json"),
        (["--check", "--dtype", "bfloat16"], "--check is in float32"),
        (["--check", "--compile"], "without --compile"),
    ],
)
def test_wrong_use_is_explained(run, operators, arguments, message):
    result = run(operators, *arguments)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_there_is_nothing_to_compare_along_the_reference_path(run, operators):
    with use_ops("reference"):
        result = run(operators, *SMALL)
    assert result.code == 2
    assert "VITRAIL_OPS=reference leaves nothing to compare; unset it" in result.err


def test_every_operator_is_listed(run, operators):
    listed = run(operators, "--list").out.splitlines()
    names = {
        name.removeprefix("vitrail::").removesuffix("_backward")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vitrail::")
    }
    assert names == {call for setting in operators.SETTINGS for call in setting.calls}
    assert "routed_attention, biformer_small 896, stage 3, batch 1, training" in listed
    assert not any("region_route" in line and "training" in line for line in listed)


def test_a_run_is_written_and_says_where_it_was_made(run, operators, tmp_path):
    target = tmp_path / "results.json"
    result = run(operators, *SMALL, "--threads", 1, "--output", target)
    assert result.code == 0, result.err
    document = json.loads(target.read_text())
    assert {"date", "command", "versions", "machine", "compiler", "instruction_set", "gemm_gflops"} <= set(
        document
    )
    assert {"torch", "timm", "vitrail"} <= set(document["versions"])
    assert document["machine"]["threads"] == 1
    assert document["machine"]["cpu"]
    forward, training = document["rows"]
    assert (forward["kind"], training["kind"]) == ("forward", "training")
    assert training["macs"] == 3 * forward["macs"] == 3 * 7 * 7 * 320 * 3 * 7
    for row in document["rows"]:
        assert row["setting"] == "stripmlp_tiny, stage 4, rows"
        assert row["efficiency"] > 0
        assert list(row["candidates"]) == ["fused", "reference", "conv2d", "matmul"]
        for candidate in row["candidates"].values():
            assert candidate["seconds"] > 0
            assert candidate["rounds"] >= 3
            assert candidate["error"] < 1e-4
            assert candidate["allocated_bytes"] >= 7 * 7 * 320 * 4
    for text in ("strip_mix, float32: milliseconds", "peak MiB", "of GEMM", "conv2d"):
        assert text in result.out


def test_a_part_of_the_rows_is_not_written_over_the_results_of_all(run, operators, monkeypatch, tmp_path):
    monkeypatch.setattr("harness.options.RESULTS", tmp_path)
    assert run(operators, *SMALL, "--no-memory").code == 0
    assert not list(tmp_path.iterdir())


def test_markdown_and_json(run, operators):
    result = run(operators, *SMALL, "--no-memory", "--passes", "forward", "--markdown")
    assert "| layer | pass | batch | fused ms |" in result.out
    document = run(
        operators, *SMALL, "--no-memory", "--passes", "forward", "--json", "--dtype", "bfloat16"
    ).document
    assert [row["dtype"] for row in document["rows"]] == ["bfloat16"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_formulations_of_the_quick_rows_agree(operators, dtype, training):
    with use_ops("auto"):
        library.load()
        for place in operators.places(
            [s for s in operators.SETTINGS if s.quick], [1], [operators.PASSES[training]]
        ):
            problem = place.problem(dtype)
            runs = problems.runs(problem, problems.functions(problem), training)
            errors = problems.check(problem, runs, training)
            assert set(errors) == {"fused", "reference", *problem.stock}, place


def test_rows_that_there_is_no_time_for_are_named(run, operators):
    document = run(operators, *SMALL, "--no-memory", "--time-limit", 1e-9, "--json").document
    assert document["rows"] == []
    assert document["left_out"] == [
        f"strip_mix, stripmlp_tiny, stage 4, rows, batch 1, {kind}" for kind in operators.PASSES
    ]


def test_what_computes_something_else_is_not_timed(run, operators, monkeypatch):
    right = operators.strips._matmul
    monkeypatch.setattr(operators.strips, "_matmul", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    result = run(operators, *SMALL)
    assert result.code == 1
    assert (
        "strip_mix, stripmlp_tiny, stage 4, rows, batch 1, forward: matmul computes something else"
        in result.err
    )


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(operators, monkeypatch):
    """Every measurement finds the ratios given, one after the other; all operators count as compiled."""

    def prepare(*ratios):
        left = list(ratios)

        def measure(place, args, seconds):
            candidates = {
                name: operators.Candidate(1.0, 0.0, 5, ratio, 0.0)
                for name, ratio in (("fused", 1.0), ("reference", left.pop(0)))
            }
            names = (place.setting.operator, place.setting.name, place.batch, "forward", "float32")
            return operators.Row(*names, 1, 1, True, 1.0, 1.0, 0.0, candidates)

        monkeypatch.setattr(operators, "measure", measure)
        monkeypatch.setattr(problems.Setting, "compiled", lambda self, training, device: True)
        return left

    return prepare


CHECK = ("--check", "--only", "semantic_attention", "--passes", "forward", "--json")


def test_the_check_passes_where_fused_is_faster(run, operators, pretend):
    left = pretend(1.5, 0.1)
    assert run(operators, *CHECK).code == 0
    assert left == [0.1]  # once was enough


def test_a_slow_measurement_is_repeated(run, operators, pretend):
    left = pretend(0.9, 0.8, 1.1)
    assert run(operators, *CHECK).code == 0
    assert not left


def test_the_check_fails_where_fused_is_slower_three_times(run, operators, pretend):
    pretend(0.9, 0.8, 0.95)
    result = run(operators, *CHECK)
    assert result.code == 1
    assert result.document["slower"] == ["semantic_attention, stvit_r_swin_small, stage 3, batch 1, forward"]
    assert "slower than its definition: semantic_attention" in result.err


def test_operators_without_a_kernel_are_named_and_not_checked(run, operators, monkeypatch):
    monkeypatch.setattr(problems.Setting, "compiled", lambda self, training, device: False)
    result = run(operators, *CHECK)
    assert result.code == 0
    assert "forward not checked, without a compiled kernel: semantic_attention" in result.err
