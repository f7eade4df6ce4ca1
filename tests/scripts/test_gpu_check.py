"""`scripts/gpu_check.sh` without a GPU: its budget, how it reads results, what it writes; its commands are understood."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Budget, Ended, Outcome, Phase

ROOT = Path(__file__).resolve().parents[2]
FAST = (sys.executable, "-S", "-c")


def ended(output="", status=0, seconds=1.0):
    return Ended(status, seconds, output)


# --- time -------------------------------------------------------------------------------------------------------------


def test_time_is_granted_as_far_as_it_is_there():
    now = [0.0]
    budget = Budget(100, lambda: now[0])
    assert budget.grant(30, 10, kept=20) == 30
    now[0] = 60
    assert budget.grant(30, 10, kept=20) == 20
    now[0] = 71
    assert budget.grant(30, 10, kept=20) is None
    now[0] = 300
    assert budget.left() == 0


def test_a_command_that_takes_too_long_ends_with_all_that_it_started(tmp_path):
    code = f"""
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    print("so far", flush=True)
    time.sleep(60)
    """
    found = gpu_check.execute([*FAST, textwrap.dedent(code)], 8, dict(os.environ))
    assert found.status is None
    assert found.seconds < 40
    assert found.output == "so far\n"
    child = Path("/proc", (tmp_path / "pid").read_text(), "status")
    for _ in range(100):  # told to end, it does so when it next runs
        if not child.exists() or "zombie" in child.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("what it started still runs")


def test_what_a_command_says_and_how_it_ends_is_kept():
    found = gpu_check.execute([*FAST, "import sys; print('out'); sys.exit('err')"], 20, dict(os.environ))
    assert found.status == 1
    assert sorted(found.output.split()) == ["err", "out"]


# --- reading results --------------------------------------------------------------------------------------------------


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(name, outcome, **more):
    return {"id": name, "outcome": outcome, **more}


def test_of_a_test_the_worst_counts():
    text = lines(
        row("a", "begun"),
        row("a", "passed", seconds=1.0),
        row("b", "begun"),
        row("b", "passed", seconds=2.0),
        row("b", "failed", seconds=0.1, reason="in its teardown"),
        row("c", "failed", reason="the GPU was lost"),
        row("c", "begun"),
        row("c", "skipped", reason="failed before"),
        row("d", "skipped", reason="one GPU"),
        row("e", "begun"),
    )
    checks = gpu_check.read_checks(text + '{"id": "f", "outc')
    assert {c["id"]: c["outcome"] for c in checks} == {
        "a": "passed",
        "b": "failed",
        "c": "failed",
        "d": "skipped",
        "e": "unfinished",
    }
    found = gpu_check.gather(checks)
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 1, "unfinished": 1}
    assert found["failed"][1] == {"id": "c", "reason": "the GPU was lost"}
    assert found["skipped"] == {"one GPU": ["d"]}
    assert found["unfinished"] == ["e"]


@pytest.mark.parametrize(
    ("rows", "end", "outcome", "reason"),
    [
        ([row("a", "passed")], ended(), "passed", ""),
        ([row("a", "passed"), row("b", "failed")], ended(status=1), "failed", "1 tests failed, first b"),
        ([row("a", "passed"), row("b", "begun")], ended(status=None), "failed", "not all tests ran"),
        ([row("a", "passed")], ended("no such option", 4), "failed", "pytest ended with 4: no such option"),
        ([row("a", "skipped")], ended(), "failed", "no test ran"),
        ([], ended("broken", 2), "failed", "pytest ended with 2: broken"),
    ],
)
def test_a_run_of_tests_is_read(tmp_path, rows, end, outcome, reason):
    target = tmp_path / "outcomes"
    if rows:
        target.write_text(lines(*rows))
    found = gpu_check.read_tests(end, target)
    assert found[0] == outcome
    assert reason in found[1]


@pytest.mark.parametrize(
    ("written", "end", "outcome", "reason"),
    [
        ({"rows": []}, ended(), "passed", ""),
        ({"rows": [], "left_out": ["x", "y"]}, ended(), "passed", "no time for 2 rows: x, y"),
        ({"rows": [], "failed": ["x: wrong"]}, ended(status=1), "failed", "x: wrong"),
        (None, ended("out of memory", 1), "failed", "out of memory"),
        (None, ended(), "failed", "wrote nothing"),
        (None, ended(status=None), "cut short", "was ended"),
    ],
)
def test_a_benchmark_is_read(tmp_path, written, end, outcome, reason):
    target = tmp_path / "rows.json"
    if written is not None:
        target.write_text(json.dumps(written))
    found = gpu_check.read_benchmark(end, target)
    assert (found[0], found[2]) == (outcome, written)
    assert reason in found[1]


CLEAN = "1 passed\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
INVALID = """
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at vitrail::cuda::attend
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("end", "outcome", "reason"),
    [
        (ended(CLEAN), "passed", ""),
        (ended(RACES), "passed", ""),
        (ended(INVALID, 9), "failed", "Invalid __global__ read of size 16 bytes"),
        (ended(INVALID, None), "failed", "Invalid __global__ read of size 16 bytes"),
        (ended("=== test session starts", None), "cut short", "did not get to the end"),
        (ended("unrecognized option", 1), "failed", "ended with 1, without a finding: unrecognized option"),
        (ended("1 failed\n" + CLEAN, 1), "failed", "without a finding"),
    ],
)
def test_compute_sanitizer_is_read(end, outcome, reason):
    found = gpu_check.read_sanitizer(end, Path("none"))
    assert found[0] == outcome
    assert reason in found[1]


@pytest.mark.parametrize(("helps", "filtered"), [("--kernel-regex arg", True), ("--filter arg", False)])
def test_compute_sanitizer_looks_at_our_kernels_where_it_can(tmp_path, monkeypatch, helps, filtered):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{helps}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_check.find_sanitizer() == (str(tool), *(("--kernel-regex", "kns=vitrail") if filtered else ()))


def test_compute_sanitizer_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find_sanitizer() == ()


# --- phases -----------------------------------------------------------------------------------------------------------


def phase(name, code, read=gpu_check.read_benchmark, **more):
    return Phase(name, (*FAST, code, "{target}", "{seconds}"), 30, read, **more)


WRITE = "import sys, json; json.dump({'rows': [sys.argv[2]]}, open(sys.argv[1], 'w'))"


def test_phases_run_within_their_time_and_leave_results(tmp_path):
    said = []
    todo = [
        phase("build", "", gpu_check.read_build, needs_kernels=False),
        phase("figures", WRITE),
        phase("more", "import sys; sys.exit('no')"),
        phase("too long", "", least=1000),
    ]
    found = gpu_check.run_phases(todo, Budget(1100), tmp_path, dict(os.environ), said.append)
    assert [o.outcome for o in found] == ["passed", "passed", "failed", "left out"]
    assert found[1].found == {"rows": ["10"]}  # of its 30 seconds, those that a benchmark may begin rows in
    assert found[2].reason == "no"
    assert "few beside what comes later" in found[3].reason
    assert "==> figures (up to 30 s)" in said
    assert not any(str(tmp_path) in part for o in found for part in o.command)


def test_nothing_is_measured_without_kernels(tmp_path):
    todo = [
        phase("build", "import sys; sys.exit('nvcc is missing')", gpu_check.read_build, needs_kernels=False),
        phase("figures", WRITE),
    ]
    found = gpu_check.run_phases(todo, Budget(100), tmp_path, dict(os.environ), lambda _: None)
    assert [(o.outcome, o.reason) for o in found] == [
        ("failed", "nvcc is missing"),
        ("left out", "the kernels were not built"),
    ]


@pytest.fixture
def commands():
    """A function that gives the commands of a run with some options, by phase."""

    def make(*options, sanitizer=()):
        args = gpu_check.parse(options)
        args.sanitizer = sanitizer
        operators, chosen = gpu_check.operators_tested()
        todo = gpu_check.phases(args, operators, chosen, 16)
        return {p.name: gpu_check.fill(p.command, 60, Path("x.json")) for p in todo}

    return make


@pytest.mark.parametrize("options", [(), ("--quick",), ("--peers", ".")], ids=str)
def test_the_benchmarks_understand_what_they_are_told(commands, options, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import models
    import operators

    measured = 0
    for name, command in commands(*options).items():
        for module in (operators, models):
            if command[1] == f"benchmarks/{module.__name__}.py":
                _, args = module.parse(command[2:])
                measured += 1
                assert (args.device, args.output, args.time_limit) == ("cuda", "x.json", 40)
                for text in getattr(args, "only", None) or ():
                    rows = [
                        s for s in operators.SETTINGS if text in f"{s.operator}, {s.name}" and s.gpu_batch
                    ]
                    assert rows, f"{name}: {text}"
                assert set(getattr(args, "models", None) or ()) <= set(models.NETWORKS)
    assert measured == (2 if "--quick" in options else 6)


def test_the_tests_that_are_run_are_there(commands):
    named = [
        word
        for command in commands(sanitizer=("cs",)).values()
        for word in command
        if word.startswith("tests/")
    ]
    assert "tests/gpu" in named
    assert "tests/csrc/test_window_attention.py" in named
    assert all((ROOT / word).exists() for word in named)
    assert any("racecheck" in command for command in commands(sanitizer=("cs",)).values())
    assert not any("racecheck" in command for command in commands().values())


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """A GPU, and phases that a test names."""

    def prepare(*todo):
        monkeypatch.setattr(gpu_check, "why_not", lambda: None)
        monkeypatch.setattr(gpu_check, "phases", lambda *_: list(todo))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
        monkeypatch.setattr(gpu_check, "execute", real_or_described)

    real = gpu_check.execute

    def real_or_described(command, seconds, env):
        if "--describe" in command:
            return ended(json.dumps({"gpu": {"name": "NVIDIA H200"}, "kernels": {"strip_mix": False}}))
        return real(command, seconds, env)

    return prepare


BUILD = phase("build", "", gpu_check.read_build, needs_kernels=False)


def test_everything_is_written_in_one_file(pretend, tmp_path, capsys):
    pretend(BUILD, phase("figures", WRITE))
    target = tmp_path / "gpu.json"
    assert gpu_check.main(["--out", str(target), "--seed", "7"]) == 0
    found = json.loads(target.read_text())
    assert found["benchmark"] == "gpu_check"
    assert (found["passed"], found["seed"], found["gpu"]["name"]) == (True, 7, "NVIDIA H200")
    assert len(found["commit"]) == 40
    assert [p["name"] for p in found["phases"]][:2] == ["build", "figures"]
    assert found["phases"][1]["found"] == {"rows": ["10"]}
    said = capsys.readouterr().out
    assert "without a kernel, so run by their definitions: strip_mix" in said
    assert "all passed" in said
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_failure_is_the_exit_status_after_the_rest_has_run(pretend, tmp_path, capsys):
    pretend(BUILD, phase("first", "import sys; sys.exit('wrong')"), phase("second", WRITE))
    target = tmp_path / "gpu.json"
    assert gpu_check.main(["--out", str(target)]) == 1
    found = json.loads(target.read_text())
    assert not found["passed"]
    assert [p["outcome"] for p in found["phases"]][:3] == ["passed", "failed", "passed"]
    assert "FAILED first: wrong" in capsys.readouterr().out


def test_what_was_left_out_is_named(pretend, tmp_path, capsys):
    pretend(BUILD, phase("figures", WRITE, least=1e6))
    assert gpu_check.main(["--out", str(tmp_path / "gpu.json")]) == 0
    assert "not done: figures: " in capsys.readouterr().out
    assert "figures" in json.loads((tmp_path / "gpu.json").read_text())["not_done"]


def test_a_library_that_is_named_need_not_be_built(pretend, tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_CUDA_LIBRARY", "some.so")
    pretend(
        phase("build", "raise SystemExit(1)", gpu_check.read_build, needs_kernels=False),
        phase("figures", WRITE),
    )
    assert gpu_check.main(["--out", str(tmp_path / "gpu.json")]) == 0
    first, second, *_ = json.loads((tmp_path / "gpu.json").read_text())["phases"]
    assert (first["name"], first["outcome"]) == ("build", "skipped")
    assert second["outcome"] == "passed"


def test_a_file_that_cannot_be_written_is_named_before_anything_runs(pretend, capsys):
    pretend(phase("figures", "raise SystemExit('ran')"))
    assert gpu_check.main(["--out", "no/such/folder/x.json"]) == 2
    assert "--out: the folder" in capsys.readouterr().err


def test_the_old_file_stays_whole_where_the_new_one_fails(tmp_path, monkeypatch):
    target = tmp_path / "gpu.json"
    target.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        gpu_check.write(target, {"x": float("nan")})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        gpu_check.write(target, {"x": 1})
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_description_is_found_among_what_else_was_said():
    assert gpu_check.described_in('a warning\n{"gpu": 1}\nanother {\n') == {"gpu": 1}
    assert gpu_check.described_in("{broken\n") is None


def test_a_gpu_has_a_file_of_its_own():
    assert gpu_check.slug("NVIDIA H200") == "h200"
    assert gpu_check.slug("NVIDIA GeForce RTX 4090") == "geforce_rtx_4090"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert "sees no NVIDIA GPU" in capsys.readouterr().err


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert gpu_check.why_not() == "Tesla T4 has compute capability 7.5; 8.0 is needed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--peers", "no/such"], "there is no folder"), (["--seconds", "0"], "must be above zero, got 0")],
)
def test_wrong_use_is_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_shell_script_finds_its_python(tmp_path):
    script = ROOT / "scripts" / "gpu_check.sh"
    named = subprocess.run(
        [script, "--help"], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert named.returncode == 0, named.stderr
    assert "usage: scripts/gpu_check.sh" in named.stdout
    none = subprocess.run([script], env={**os.environ, "PYTHON": "no-python"}, capture_output=True, text=True)
    assert none.returncode == 1
    assert "no no-python here: make env makes it" in none.stderr


# --- the log of outcomes ----------------------------------------------------------------------------------------------

TESTS = """
import pytest

@pytest.mark.parametrize("i", range(6))
def test_it(i):
    assert i != 2, "two is wrong"

def test_other():
    pytest.skip("has a reason")
"""
LOST = "import outcome_log\noutcome_log.gpu_answers = lambda: False\n"


@pytest.mark.long
@pytest.mark.parametrize("lost", [False, True], ids=["a failure", "the GPU is lost"])
def test_outcomes_are_written_as_they_come(tmp_path, lost):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(LOST if lost else "")
    env = {
        **os.environ,
        "VITRAIL_OUTCOMES": str(tmp_path / "outcomes"),
        "PYTHONPATH": str(ROOT / "scripts"),
        "PYTEST_ADDOPTS": "",
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "outcome_log", "-n", "2", "--max-worker-restart", "5"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "."], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stdout + run.stderr
    found = gpu_check.gather(gpu_check.read_checks((tmp_path / "outcomes").read_text()))
    assert found["counts"] == {"passed": 5, "failed": 1, "skipped": 1}
    assert found["failed"][0]["id"] == "test_some.py::test_it[2]"
    assert list(found["skipped"]) == ["has a reason"]
    if not lost:
        assert "two is wrong" in found["failed"][0]["reason"]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_tests_are_skipped_with_the_reason():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/gpu"]
    env = {**os.environ, "VITRAIL_TEST_DEVICE": "cuda"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" not in run.stdout
    assert "VITRAIL_TEST_DEVICE is cuda, but torch sees no GPU" in run.stdout


def test_a_phase_in_a_line():
    found = {"counts": {"passed": 3, "failed": 1}}
    text = gpu_check.line(Outcome("tests", "failed", 12.3, reason="first\nsecond", found=found))
    assert text == "    failed after 12 s, 3 passed, 1 failed: first"
