"""Build, test and measure the CUDA kernels on the GPU of this machine; one JSON file says what came of it.

    scripts/gpu_check.sh                      # limited to eight minutes
    scripts/gpu_check.sh --quick              # to three
    scripts/gpu_check.sh --peers ~/peers      # the authors' models beside ours

Phases run one after the other, each in processes of its own and for a limited time. What there was no time for is
named. The exit status is 1 if anything failed, after everything was run and the file was written; without a GPU it is 1
at once.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS, QUICK_SECONDS = 465, 170
_GRACE = 5  # for a process that was told to end
PASSED, FAILED, SKIPPED, CUT_SHORT, LEFT_OUT = "passed", "failed", "skipped", "cut short", "left out"


# --- time -------------------------------------------------------------------------------------------------------------


class Budget:
    """The time that is left of all."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds, never below zero."""
        return max(0.0, self._end - self._clock())

    def grant(self, limit: float, least: float, kept: float) -> float | None:
        """Seconds for a phase that wants up to `limit` and is no use with less than `least`; None if there are fewer.

        Args:
            kept: what later phases need at least.
        """
        seconds = min(limit, self.left() - kept)
        return seconds if seconds >= least else None


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int | None
    """None where it was ended for its time."""
    seconds: float
    output: str


def execute(command: Sequence[str], seconds: float, env: dict[str, str]) -> Ended:
    """Run a command and all that it starts, for so long at most."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                _end(process)
        said.seek(0)
        output = said.read().decode(errors="replace")
    return Ended(status, time.monotonic() - begun, output)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and those that it started, politely first."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


# --- phases -----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a phase."""

    name: str
    outcome: str
    seconds: float = 0.0
    limit: float | None = None
    command: list[str] = field(default_factory=list)
    reason: str = ""
    found: Any = None
    """Checks, rows of a benchmark, and the like."""


@dataclass(frozen=True)
class Phase:
    """A command for one of the phases, and how its result is read."""

    name: str
    command: tuple[str, ...]
    limit: float
    read: Callable[[Ended, Path], tuple[str, str, Any]]
    """From how it ended and the file that it may have written to outcome, reason and findings."""
    least: float = 25.0
    env: tuple[tuple[str, str], ...] = ()
    needs_kernels: bool = True


def fill(command: Sequence[str], seconds: float, target: Path) -> list[str]:
    """The command with its time, less what it takes to begin, to give up and to end, and the file that it writes."""
    inner = f"{max(1.0, seconds - 20):.0f}"
    return [part.replace("{seconds}", inner).replace("{target}", str(target)) for part in command]


def run_phase(phase: Phase, seconds: float, folder: Path, env: dict[str, str]) -> Outcome:
    """Run a phase for so long at most."""
    target = folder / (re.sub(r"\W+", "_", phase.name) + ".json")
    command = fill(phase.command, seconds, target)
    own = {name: value.replace("{target}", str(target)) for name, value in phase.env}
    ended = execute(command, seconds, {**env, **own})
    outcome, reason, found = phase.read(ended, target)
    shown = [Path(part).name if part == sys.executable else part.replace(str(folder), "") for part in command]
    return Outcome(phase.name, outcome, round(ended.seconds, 1), round(seconds, 1), shown, reason, found)


def run_phases(
    phases: Sequence[Phase], budget: Budget, folder: Path, env: dict[str, str], say: Callable[[str], None]
) -> list[Outcome]:
    """All phases for which there is time; without kernels, only those that need none."""
    outcomes: list[Outcome] = []
    built = True
    for i, phase in enumerate(phases):
        granted = budget.grant(phase.limit, phase.least, sum(p.least for p in phases[i + 1 :]))
        if phase.needs_kernels and not built:
            outcomes.append(Outcome(phase.name, LEFT_OUT, reason="the kernels were not built"))
        elif granted is None:
            reason = f"{budget.left():.0f} s were left, too few beside what comes later"
            outcomes.append(Outcome(phase.name, LEFT_OUT, reason=reason))
        else:
            say(f"==> {phase.name} (up to {granted:.0f} s)")
            outcomes.append(run_phase(phase, granted, folder, env))
            built &= phase.needs_kernels or outcomes[-1].outcome == PASSED
        say(line(outcomes[-1]))
    return outcomes


def line(outcome: Outcome) -> str:
    """A phase in a line."""
    numbers = ""
    if isinstance(outcome.found, dict) and "counts" in outcome.found:
        numbers = ", " + ", ".join(f"{count} {what}" for what, count in outcome.found["counts"].items())
    text = f"    {outcome.outcome} after {outcome.seconds:.0f} s{numbers}"
    return f"{text}: {outcome.reason.splitlines()[0]}" if outcome.reason else text


# --- how results are read ---------------------------------------------------------------------------------------------

_WORST = (SKIPPED, PASSED, "begun", FAILED)


def read_checks(text: str) -> list[dict[str, Any]]:
    """Tests by the lines of `outcome_log.py`, each with the worst that was said of it."""
    checks: dict[str, dict[str, Any]] = {}
    for row in text.splitlines():
        try:
            new = json.loads(row)
        except json.JSONDecodeError:  # the last, of a process that was ended while it wrote
            continue
        old = checks.get(new["id"])
        if (
            old is None
            or old["outcome"] == "begun"
            or _WORST.index(new["outcome"]) > _WORST.index(old["outcome"])
        ):
            checks[new["id"]] = new
    for check in checks.values():
        if check["outcome"] == "begun":
            check["outcome"] = "unfinished"
    return list(checks.values())


def gather(checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every test by its outcome, skipped ones by their reason."""
    skipped: dict[str, list[str]] = {}
    for check in checks:
        if check["outcome"] == SKIPPED:
            skipped.setdefault(check.get("reason", ""), []).append(check["id"])
    names = {what: [c["id"] for c in checks if c["outcome"] == what] for what in (PASSED, "unfinished")}
    failed = [{"id": c["id"], "reason": c.get("reason", "")} for c in checks if c["outcome"] == FAILED]
    slowest = sorted(checks, key=lambda c: -c.get("seconds", 0.0))[:5]
    counts = {PASSED: len(names[PASSED]), FAILED: len(failed), SKIPPED: sum(map(len, skipped.values()))}
    counts |= {"unfinished": len(names["unfinished"])} if names["unfinished"] else {}
    return {
        "counts": counts,
        FAILED: failed,
        "unfinished": names["unfinished"],
        SKIPPED: skipped,
        PASSED: names[PASSED],
        "slowest": {c["id"]: round(c["seconds"], 1) for c in slowest if "seconds" in c},
    }


def read_tests(ended: Ended, target: Path) -> tuple[str, str, Any]:
    """A run of pytest. One that takes too long has failed: a kernel that hangs looks like that."""
    found = gather(read_checks(target.read_text(encoding="utf-8") if target.exists() else ""))
    counts = found["counts"]
    if ended.status is None:
        return FAILED, f"took longer than {ended.seconds:.0f} s; not all tests ran", found
    if counts[FAILED]:
        return FAILED, f"{counts[FAILED]} tests failed, first {found[FAILED][0]['id']}", found
    if ended.status != 0:
        return FAILED, f"pytest ended with {ended.status}: {tail(ended.output)}", found
    if not counts[PASSED]:
        return FAILED, "no test ran", found
    return PASSED, "", found


def read_benchmark(ended: Ended, target: Path) -> tuple[str, str, Any]:
    """A run of a benchmark, whose file is there or not."""
    found = json.loads(target.read_text(encoding="utf-8")) if target.exists() else None
    if ended.status is None:
        return CUT_SHORT, f"took longer than {ended.seconds:.0f} s and was ended", found
    if ended.status != 0:
        failed = (found or {}).get("failed")
        said = json.dumps(failed)[:600] if failed else tail(ended.output)
        return FAILED, said, found
    if found is None:
        return FAILED, f"wrote nothing: {tail(ended.output)}", found
    left = found.get("left_out", [])
    return PASSED, f"no time for {len(left)} rows: {', '.join(left)}" if left else "", found


def read_build(ended: Ended, target: Path) -> tuple[str, str, Any]:
    """A run of `vitrail build`."""
    if ended.status == 0:
        return PASSED, "", tail(ended.output)
    why = f"took longer than {ended.seconds:.0f} s" if ended.status is None else tail(ended.output, 20)
    return FAILED, why, None


_SUMMARY = re.compile(r"=+ (ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)(.*)")


def read_sanitizer(ended: Ended, target: Path) -> tuple[str, str, Any]:
    """A run under compute-sanitizer. It is slow: what it had no time for is no failure."""
    summary = _SUMMARY.findall(ended.output)
    finding = first_finding(ended.output)
    if finding or any(int(count) for _, count, _ in summary):
        return FAILED, finding or str(summary), tail(ended.output, 60)
    if ended.status is None:
        return CUT_SHORT, f"found nothing in {ended.seconds:.0f} s, but did not get to the end", None
    if not summary or ended.status != 0:
        return FAILED, f"ended with {ended.status}, without a finding: {tail(ended.output)}", None
    return PASSED, "", tail(ended.output, 3)


def first_finding(output: str) -> str:
    """The first thing that compute-sanitizer reports."""
    marks = (
        "Invalid ",
        "Error: ",
        "Race reported",
        "Warning: ",
        "hazard detected",
        "Misaligned ",
        "Barrier error",
    )
    for row in output.splitlines():
        text = row.removeprefix("=========").strip()
        if row.startswith("=========") and text.startswith(marks):
            return text
    return ""


def tail(text: str, lines: int = 8) -> str:
    """The last lines."""
    return "\n".join(text.strip().splitlines()[-lines:])[-3000:]


# --- what is run ------------------------------------------------------------------------------------------------------


def operators_tested() -> tuple[tuple[str, ...], str]:
    """Operators whose own tests run over GPU kernels, and which of those tests do, as the emulated ones say."""
    sys.path.insert(0, str(ROOT))
    from tests.csrc.test_emulated_kernels import CHOSEN, OPERATORS

    return OPERATORS, CHOSEN


def phases(args: argparse.Namespace, operators: Sequence[str], chosen: str, cores: int) -> list[Phase]:
    """Everything, in the order of its worth."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "outcome_log")
    gpu = (("VITRAIL_TEST_DEVICE", "cuda"), ("VITRAIL_OUTCOMES", "{target}"))
    single = (*gpu, ("OMP_NUM_THREADS", "1"))
    workers = ("--max-worker-restart", "200", "-n")

    def benchmark(name: str, *options: str) -> tuple[str, ...]:
        common = ("--device", "cuda", "--time-limit", "{seconds}", "--output", "{target}")
        return (python, f"benchmarks/{name}.py", *common, *options)

    quick_tests = ("-k", "tiny or captured or stream or host or logits") if args.quick else ()
    files = [f"tests/csrc/test_{name}.py" for name in operators]
    many = min(cores, 12)
    found = [
        Phase("build", (python, "-m", "vitrail", "build", "--device", "cuda"), 240, read_build, 20, (), False),
        Phase(
            "tests on the GPU", (*pytest, *workers, str(min(cores, 8)), *quick_tests, "tests/gpu"),
            60 if args.quick else 120, read_tests, env=single,
        ),
    ]  # fmt: skip
    if not args.quick:
        found.append(
            Phase(
                "operators' own tests", (*pytest, *workers, str(min(many, len(files))), "-k", chosen, *files),
                130, read_tests, env=single,
            )
        )  # fmt: skip
    fast = ("--min-seconds", "0.1")
    passes = ("--passes", "forward") if args.quick else ()
    found.append(
        Phase(
            "operators, bfloat16", benchmark("operators", "--dtype", "bfloat16", *fast, *passes),
            40 if args.quick else 90, read_benchmark,
        )
    )  # fmt: skip
    peers = ("--peers", str(args.peers)) if args.peers else ()
    amp = ("--amp", "--min-seconds", "0.5", "--min-rounds", "3", *peers)
    main = ("--models", "biformer_small")
    found.append(Phase("biformer_small, inference", benchmark("models", *amp, *main), 45, read_benchmark))
    if args.quick:
        return found
    found += [
        Phase(
            "biformer_small, training", benchmark("models", *amp, "--training", *main), 45, read_benchmark
        ),
        Phase(
            "operators, float32", benchmark("operators", *fast, "--passes", "forward"), 50, read_benchmark
        ),
        Phase(
            "FlexAttention and torch.compile",
            benchmark("operators", "--dtype", "bfloat16", "--flex", "--compile", *fast, "--only", *FLEX),
            90, read_benchmark,
        ),
        Phase("all models, inference", benchmark("models", *amp), 60, read_benchmark),
    ]  # fmt: skip
    if args.sanitizer:
        for tool in ("memcheck", "racecheck"):
            command = (
                *args.sanitizer, "--tool", tool, "--error-exitcode", "9",
                *pytest, "-n0", "-k", "tiny", "tests/gpu/test_operators.py",
            )  # fmt: skip
            # so that every tensor is an allocation of its own
            alone = (*single, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"))
            found.append(Phase(f"compute-sanitizer, {tool}", command, 60, read_sanitizer, 20, alone))
    return found


FLEX = (
    "routed_attention, biformer_small 224, stage 1",
    "routed_attention, biformer_small 896, stage 2",
    "stvit_r_swin_small, stage 1, shifted",
    "sparse_attention, sparsifiner_small, 1025 tokens",
)


# --- what it says of itself -------------------------------------------------------------------------------------------


def why_not() -> str | None:
    """Why nothing can be checked here; None where it can."""
    import torch

    driver = shutil.which("nvidia-smi")
    if not torch.cuda.is_available():
        seen = "nvidia-smi is there, so that there is a driver" if driver else "nvidia-smi is not on the path"
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        return f"torch {torch.__version__} ({built}) sees no NVIDIA GPU; {seen}. See https://pytorch.org/get-started"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    return None


def describe() -> dict[str, Any]:
    """The GPU and which operators have kernels on it; run in a process of its own, as it takes the GPU."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch

    from harness.device import describe as describe_gpu
    from harness.report import machine
    from vitrail.ops import library

    with contextlib.suppress(RuntimeError):
        library.load("cuda")
    names = sorted(x for x in torch._C._dispatch_get_all_op_names() if x.startswith("vitrail::"))
    kernels = {name.removeprefix("vitrail::"): library.has_kernel(name, "CUDA") for name in names}
    about = machine()
    return {
        "gpu": describe_gpu(),
        "versions": about["versions"],
        "machine": about["machine"],
        "kernels": kernels,
    }


def described_in(output: str) -> dict[str, Any] | None:
    """What `describe` found, in what its process said."""
    for row in reversed(output.splitlines()):
        if row.startswith("{"):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(row)
                return found
    return None


def commit() -> dict[str, Any]:
    """Of the code that ran; None where git does not tell."""

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(ROOT), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


def document(
    about: dict[str, Any], outcomes: Sequence[Outcome], seed: int, arguments: Sequence[str], seconds: float
) -> dict[str, Any]:
    """All that is written."""
    return {
        "benchmark": "gpu_check",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": ["gpu_check.sh", *arguments],
        **commit(),
        **about,
        "seed": seed,
        "seconds": round(seconds, 1),
        "passed": not any(o.outcome == FAILED for o in outcomes),
        "not_done": {o.name: o.reason or o.outcome for o in outcomes if o.outcome in (LEFT_OUT, CUT_SHORT)},
        "phases": [asdict(o) for o in outcomes],
    }


def output(given: str | None, gpu: str) -> Path:
    """The file to write.

    Raises:
        ValueError, OSError: it cannot be written.
    """
    from vitrail.export.files import check_target

    if given is None:
        RESULTS.mkdir(exist_ok=True)
    return check_target(given or RESULTS / f"gpu_{slug(gpu)}.json", ".json")


def slug(gpu: str) -> str:
    """A GPU's name as a part of a file's."""
    return re.sub(r"\W+", "_", gpu.lower()).strip("_").removeprefix("nvidia_")


def write(target: Path, found: dict[str, Any]) -> None:
    """Whole or not at all."""
    from vitrail.export.files import write_atomically

    write_atomically(target, f"{json.dumps(found, indent=1, allow_nan=False, default=str)}\n".encode())


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a part of the tests and figures")
    parser.add_argument(
        "--out", metavar="FILE.json", help="default: benchmarks/results/gpu_NAME.json, by the GPU's"
    )
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="checkouts of the authors' repositories")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"time for all (default: {SECONDS}; quick: {QUICK_SECONDS})",
    )
    parser.add_argument("--seed", type=int, help="of the tests' sizes and values (default: a new one)")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.peers is not None:
        args.peers = args.peers.expanduser().resolve()
        if not args.peers.is_dir():
            parser.error(f"--peers: there is no folder '{args.peers}'")
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds must be above zero, got {args.seconds:g}")
    args.seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    args.sanitizer = find_sanitizer()
    return args


def find_sanitizer() -> tuple[str, ...]:
    """compute-sanitizer, where CUDA's toolkit has it, and what makes it look at our kernels alone, where it can."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidates = ("compute-sanitizer", f"{home}/bin/compute-sanitizer")
    path = next((path for x in candidates if (path := shutil.which(x))), None)
    if path is None:
        return ()
    helped = execute([path, "--help"], 20, dict(os.environ))
    return (path, "--kernel-regex", "kns=vitrail") if "--kernel-regex" in helped.output else (path,)


def environment(seed: int) -> dict[str, str]:
    """Of all that is run: nothing else is compiled on the way, and no library picks what is not deterministic."""
    paths = [str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {
        "VITRAIL_TEST_SEED": str(seed),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return {**os.environ, **added}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    args = parse(arguments)
    if args.describe:
        print(json.dumps(describe(), default=str))
        return 0
    reason = why_not()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    import torch

    budget, begun = Budget(args.seconds), time.monotonic()
    try:
        target = output(args.out, torch.cuda.get_device_name())
    except (ValueError, OSError) as error:
        print(f"error: --out: {error}", file=sys.stderr)
        return 2
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    operators, chosen = operators_tested()
    env = environment(seed)

    def say(text: str) -> None:
        print(text, flush=True)

    say(f"{torch.cuda.get_device_name()}, {cores} cores, seed {seed}")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        todo = phases(args, operators, chosen, cores)
        outcomes = []
        if os.environ.get("VITRAIL_CUDA_LIBRARY"):
            todo = [phase for phase in todo if phase.needs_kernels]
            outcomes.append(Outcome("build", SKIPPED, reason="VITRAIL_CUDA_LIBRARY names a library"))
        outcomes += run_phases(todo, budget, Path(folder), env, say)
        if not args.sanitizer and not args.quick:
            outcomes.append(Outcome("compute-sanitizer", SKIPPED, reason="it is not installed"))
        described = execute([sys.executable, __file__, "--describe"], 60, {**env, "VITRAIL_BUILD": "0"})
    about = described_in(described.output) or {
        "gpu": {"name": torch.cuda.get_device_name()}, "versions": {"torch": torch.__version__},
        "not_described": tail(described.output),
    }  # fmt: skip
    found = document(about, outcomes, seed, list(arguments or sys.argv[1:]), time.monotonic() - begun)
    write(target, found)
    say(summary(found, outcomes))
    say(f"written to {target}")
    return 0 if found["passed"] else 1


def summary(found: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """What failed, and what was not done."""
    rows = [f"{found['seconds']:.0f} s in all"]
    for outcome in outcomes:
        if outcome.outcome == FAILED:
            rows.append(f"FAILED {outcome.name}: {outcome.reason}")
            failed = outcome.found.get(FAILED, []) if isinstance(outcome.found, dict) else []
            rows += [f"  {x['id']}" for x in failed[:20] if isinstance(x, dict)]
    rows += [f"not done: {name}: {reason}" for name, reason in found["not_done"].items()]
    without = [name for name, there in found.get("kernels", {}).items() if not there]
    if without:
        rows.append(f"without a kernel, so run by their definitions: {', '.join(without)}")
    rows.append("all passed" if found["passed"] else "something failed")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
