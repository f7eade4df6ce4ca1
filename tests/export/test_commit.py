import os
import shutil
import signal
import subprocess
import sys

import pytest

from vitrail.export.commit import finish, together
from vitrail.export.files import write_atomically

OLD = {"m.engine": b"old engine", "m.engine.json": b"old report"}
NEW = {"m.engine": b"new engine", "m.engine.json": b"new report"}


def write(folder, files=NEW):
    with together([folder / name for name in files]) as scratch:
        for path, data in zip(scratch, files.values(), strict=True):
            path.write_bytes(data)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["new", "existing"])
def folder(request, tmp_path):
    if request.param == "existing":
        write(tmp_path, OLD)
    return tmp_path


def test_files_appear_together_and_nothing_stays_beside_them(folder):
    write(folder)
    assert content(folder) == NEW


def test_replaced_files_keep_their_permissions(tmp_path):
    write(tmp_path, OLD)
    (tmp_path / "m.engine").chmod(0o640)
    write(tmp_path)
    assert (tmp_path / "m.engine").stat().st_mode & 0o777 == 0o640
    assert content(tmp_path) == NEW


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failure_while_they_are_written_changes_nothing(folder, error):
    before = content(folder)

    def interrupted():
        with together([folder / name for name in NEW]) as scratch:
            scratch[0].write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert content(folder) == before


def test_a_file_that_was_not_written_stops_all(folder):
    before = content(folder)
    with pytest.raises(FileNotFoundError), together([folder / name for name in NEW]) as scratch:
        scratch[0].write_bytes(b"new engine")
    assert content(folder) == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_before_they_count_changes_nothing(folder, monkeypatch, step):
    before = content(folder)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write(folder)
    assert content(folder) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from vitrail.export.commit import together

step, at, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
real, calls = getattr(os, step), 0

def killed(*args):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

setattr(os, step, killed)
with together([folder / "m.engine", folder / "m.engine.json"]) as scratch:
    scratch[0].write_bytes(b"new engine")
    scratch[1].write_bytes(b"new report")
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Kill a process at its n-th call of a function of `os`, without the imports of the whole package."""
    package = tmp_path_factory.mktemp("package") / "vitrail" / "export"
    package.mkdir(parents=True)
    for function in (finish, write_atomically):
        shutil.copy(function.__code__.co_filename, package)

    def run(step, at, folder):
        command = [sys.executable, "-c", KILLED, step, str(at), str(folder)]
        environment = os.environ | {"PYTHONPATH": str(package.parents[1]), "PYTHONSAFEPATH": "1"}
        return subprocess.run(command, env=environment, capture_output=True).returncode

    return run


@pytest.mark.parametrize(
    ("step", "at", "outcome"),
    [
        ("fsync", 1, "old"),
        ("fsync", 2, "old"),
        ("fsync", 3, "old"),
        ("replace", 1, "old"),
        ("replace", 2, "new"),
        ("replace", 3, "new"),
        ("fsync", 4, "new"),
    ],
)
def test_a_process_killed_at_any_step_leaves_the_old_files_or_the_new_ones(folder, killed, step, at, outcome):
    before = content(folder)
    assert killed(step, at, folder) == -signal.SIGKILL
    finish(folder / "m.engine")
    left = [path for path in folder.iterdir() if path.is_dir()]
    assert len(left) == (outcome == "old")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path not in left} == (
        NEW if outcome == "new" else before
    )
    write(folder, OLD)
    assert content(folder) == OLD


def test_a_folder_that_was_carried_out_but_not_removed_does_no_harm(tmp_path):
    (tmp_path / ".m.engine.commit").mkdir()
    write(tmp_path)
    assert content(tmp_path) == NEW


def test_what_another_process_commits_meanwhile_is_carried_out_first(tmp_path, monkeypatch):
    real = os.replace

    def late(source, target):
        """Another one is killed half-way, just before this one commits."""
        monkeypatch.setattr(os, "replace", real)
        other = tmp_path / ".m.engine.commit"
        other.mkdir()
        for name, data in OLD.items():
            (other / name).write_bytes(data)
        real(source, target)

    monkeypatch.setattr(os, "replace", late)
    write(tmp_path)
    assert content(tmp_path) == NEW
