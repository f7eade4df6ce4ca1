"""A pytest plugin for `gpu_check.py`: outcomes as they come, a line of JSON each, so that a run that is cut short says
what it did; and a worker whose GPU takes no more work, which an error of a kernel ends, makes way for another.

`VITRAIL_OUTCOMES` names the file.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def gpu_answers() -> bool:
    """Whether the GPU still takes work from this process."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class OutcomeLog:
    """Writes where tests are reported, watches the GPU where they run."""

    def __init__(self, path: Path, is_worker: bool) -> None:
        self._path, self._is_worker = path, is_worker
        self._lost_list = path.with_suffix(".lost")
        self._lost = False

    def _write(self, **line: Any) -> None:
        if not self._is_worker:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """It has begun."""
        self._write(id=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Its outcome, where there is one: a test that passes has three reports, of which the second is that of it."""
        if report.outcome == "passed" and report.when != "call":
            return
        reason = ""
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.outcome == "failed":
            reason = last_lines(report.longreprtext)
        self._write(id=report.nodeid, outcome=report.outcome, seconds=report.duration, reason=reason)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """After a failure, ask the GPU."""
        report: Any = yield
        if report.failed and not gpu_answers():
            self._lost = True
        return report

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """A test that took a worker with it is not tried again."""
        if self._lost_list.exists() and item.nodeid in self._lost_list.read_text().splitlines():
            pytest.skip("failed before, and took the GPU's context with it")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """The reports are sent: a worker that lost the GPU ends, and xdist starts another."""
        if self._lost and self._is_worker:
            with self._lost_list.open("a", encoding="utf-8") as file:
                file.write(f"{nodeid}\n")
            os._exit(3)


def last_lines(text: str) -> str:
    """What an error says, without the code around it."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return "\n".join(lines or text.strip().splitlines()[-6:])[:1500]


def pytest_configure(config: pytest.Config) -> None:
    """Takes part where a file is named."""
    path = os.environ.get("VITRAIL_OUTCOMES")
    if path:
        config.pluginmanager.register(OutcomeLog(Path(path), hasattr(config, "workerinput")))
