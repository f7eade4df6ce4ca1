"""Measurement itself: the order of the runs, statistics, memory, tables; and the commands that documents show."""

import json
import re
import shlex
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.benchmark import Measurement

from harness import memory, report, timing
from vitrail.cli.terminal import Terminal

MIB = 2**20


def test_candidates_run_in_turn():
    order = []
    found = timing.alternate(
        {"a": lambda: (order.append("a"), threading.Event().wait(0.005)), "b": lambda: order.append("b")},
        min_seconds=0,
        min_rounds=4,
        warm_up=1,
    )
    assert list(found) == ["a", "b"]
    assert all(isinstance(m, Measurement) and len(m.times) == 4 for m in found.values())
    del order[:2]  # to warm up
    runs = "".join(order)
    assert runs.count("ab") == 4  # whatever the number of b's in a block
    assert runs.startswith("a")
    assert runs.endswith("b")


def test_a_block_holds_as_many_runs_as_the_clock_needs():
    (found,) = timing.alternate({"nothing": lambda: None}, 0, 3).values()
    assert found.number_per_run > 100
    assert found.median < 1e-4


def test_what_is_slower_than_the_whole_time_is_measured_three_times():
    event = threading.Event()
    found = timing.alternate({"slow": lambda: event.wait(0.02), "fast": lambda: None}, 0.01, min_rounds=6)
    assert {name: len(m.times) for name, m in found.items()} == {"slow": 3, "fast": 6}


def test_the_peak_is_that_of_the_allocations_that_live_together():
    def run():
        a = torch.ones(4 * MIB)  # 16 MiB
        b = a + 1
        del a
        return b, torch.ones(8 * MIB)

    found = memory.peak(run)
    assert found.allocated == pytest.approx(48 * MIB, rel=0.01)
    # what the C++ runtime keeps comes on top; tests that ran before leave it with room
    assert found.resident is None or found.resident < 120 * MIB


def test_the_peak_of_a_backward_pass_is_seen_too():
    x = torch.ones(MIB, requires_grad=True)

    def run():
        x.sin().sin().sin().sum().backward()
        x.grad = None

    # three results and what their gradients need
    assert memory.peak(run).allocated >= 4 * 4 * MIB


def test_memory_beyond_the_limit_is_an_error_and_not_the_end(monkeypatch):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        memory.limit_to_free_memory()
        with pytest.raises(RuntimeError, match="memory"):
            torch.ones(2**42)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_tables_speak_markdown():
    table = report.Table("title", ["layer", "ms"], [["a", "1.5"], ["b", "12"]], notes=["a note"])
    lines = table.markdown().splitlines()
    assert lines[:6] == ["**title**", "", "| layer | ms |", "| --- | ---: |", "| a | 1.5 |", "| b | 12 |"]
    assert "a note" in lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report.milliseconds(0.0012345), "1.23"),
        (report.milliseconds(0.012345), "12.3"),
        (report.milliseconds(1.2345), "1234"),
        (report.ratio(0.5), "0.50x"),
        (report.ratio(12.34), "12.3x"),
        (report.mebibytes(8 * MIB, 8 * MIB), "8.0"),
        (report.mebibytes(8 * MIB, 16 * MIB), "8.0 to 16.0"),
        (report.mebibytes(8 * MIB, None), "8.0"),
    ],
)
def test_numbers_have_three_digits(text, expected):
    assert text == expected


def test_results_are_written_beside_the_file_and_renamed(tmp_path, monkeypatch, capsys):
    target = tmp_path / "results.json"
    target.write_text("old")
    document = {"benchmark": "x", **report.machine(), "rows": [{"gemm_gflops": 3.0}]}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report.publish(Terminal(as_json=False), document, [], False, target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    monkeypatch.undo()
    report.publish(Terminal(as_json=True), document, [], False, target)
    written = json.loads(target.read_text())
    assert written["gemm_gflops"] == 3.0
    assert written == json.loads(capsys.readouterr().out)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["operators", "models"])
def test_the_commands_shown_are_understood(name, request):
    module = request.getfixturevalue(name)
    text = "\n".join(
        path.read_text() for path in (*ROOT.glob("docs/*.md"), ROOT / ".ci" / "run", Path(module.__file__))
    )
    commands = re.findall(rf"python benchmarks/{name}\.py(.*)", text)
    assert len(commands) >= 4
    for command in commands:
        _, args = module.parse(shlex.split(command, comments=True))
        for model in getattr(args, "models", None) or ():
            assert model in module.NETWORKS
