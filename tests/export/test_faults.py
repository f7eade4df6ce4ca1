"""Whatever writes a file: under every fault the old file is as it was, nothing lies beside it, and one message says why."""

import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vitrail.export.commit import finish, together
from vitrail.export.external import publish, scratch_pair
from vitrail.export.files import WriteError, temporary_folder, write_atomically

from . import writers
from .writers import WRITERS, files_of

OLD = b"the file that was there"
_NOBODY = 65534  # a user without rights


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the writers start from."""
    folder = tmp_path_factory.mktemp("given")
    writers.prepare(folder)
    folder.chmod(0o755)
    folder.parent.chmod(0o755)  # for the user without rights
    return folder


@pytest.fixture(params=WRITERS)
def name(request):
    """The file that a writer writes."""
    return request.param


@pytest.fixture
def write(name, given):
    """Have it write into a folder."""
    return lambda folder: WRITERS[name](folder / name, given, lambda text: None)


@pytest.fixture(params=["new", "existing"])
def folder(request, tmp_path):
    """A folder that must look afterwards as it did before."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if request.param == "existing":
        for name in WRITERS:
            for file in files_of(name):
                (folder / file).write_bytes(OLD)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- the system says no -------------------------------------------------------------------------------------------------

REMEDIES = {
    errno.ENOSPC: "is full and .* MB are needed: make room, or write elsewhere",
    errno.EDQUOT: "share of the disk .* is full .*: make room, or write elsewhere",
    errno.EFBIG: r"raise it \(ulimit -f\), or write elsewhere",
    errno.EIO: "the storage reports it: write elsewhere",
    errno.EACCES: "get the right to write in .*folder, or write elsewhere",
    errno.EROFS: "mounted read-only: write elsewhere",
}


class Refusing:
    """An open file whose writing fails half-way."""

    def __init__(self, file, error):
        self._file, self._error = file, error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        raise self._error


def fail_at(monkeypatch, step, number, place):
    """Let a step of writing below `place` fail, whoever writes: a file or folder is made, written, synced or renamed."""
    error = OSError(number, os.strerror(number))
    real, mkdir = builtins.open, os.mkdir

    def inside(path):
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(str(place))

    def opened(file, mode="r", *args, **kwargs):
        if mode[0] not in "wx" or not inside(file):
            return real(file, mode, *args, **kwargs)
        if step == "open":
            raise error
        return Refusing(real(file, mode, *args, **kwargs), error)

    def made(path, *args, **kwargs):
        if inside(path):
            raise error
        return mkdir(path, *args, **kwargs)

    def refuse(*_, **__):
        raise error

    if step in ("open", "write"):
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
    elif step == "mkdir":
        monkeypatch.setattr(os, "mkdir", made)
    else:
        monkeypatch.setattr(os, step, refuse)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", REMEDIES, ids=errno.errorcode.get)
def test_whatever_the_system_has_against_a_step_of_writing_is_one_message_with_the_remedy(
    folder, monkeypatch, step, number
):
    fail_at(monkeypatch, step, number, folder)
    with pytest.raises(WriteError, match=REMEDIES[number]) as caught:
        write_atomically(folder / "bytes.bin", bytes(5000))
    monkeypatch.undo()
    assert caught.value.errno == number
    assert str(folder / "bytes.bin") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "step"),
    [(name, step) for name in WRITERS for step in ("open", "write", "fsync", "replace")]
    + [("pair.onnx", "mkdir"), ("m.engine", "mkdir")],
    indirect=["name"],
)
def test_a_disk_that_fills_up_changes_nothing_whoever_writes(name, write, folder, monkeypatch, step):
    fail_at(monkeypatch, step, errno.ENOSPC, folder)
    with pytest.raises(WriteError, match=f"could not write {folder}/{name}.*make room, or write elsewhere"):
        write(folder)
    monkeypatch.undo()


@pytest.mark.parametrize("step", ["mkdir", "open", "write"])
@pytest.mark.parametrize("name", ["int8.onnx", "m.engine"], indirect=True)
def test_no_room_for_temporary_files_is_said_to_be_that(write, folder, monkeypatch, step):
    fail_at(monkeypatch, step, errno.ENOSPC, Path(tempfile.gettempdir()) / "vitrail-")
    with pytest.raises(
        WriteError, match="make room, or name another folder for temporary files by TMPDIR"
    ) as caught:
        write(folder)
    monkeypatch.undo()
    assert str(folder) not in str(caught.value)


def test_errors_that_have_nothing_to_do_with_temporary_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), temporary_folder():
        (tmp_path / "absent").read_bytes()
    with pytest.raises(WriteError, match=r"gone has gone"), temporary_folder():
        write_atomically(tmp_path / "gone" / "m.bin", b"x")


def test_a_real_limit_on_the_size_of_files_changes_nothing_whoever_writes(name, write, folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # of an engine that is larger than all that comes before it, what is written in the process that builds it
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if name == "m.engine" else 500, hard))
    try:
        with pytest.raises(WriteError, match="ulimit -f") as caught:
            write(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    if name == "m.engine":
        assert f"could not write {folder / name}: File too large; a limit" in str(caught.value)


def test_a_folder_without_the_right_to_write_is_refused_whoever_writes(write):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        child = os.fork()
        if child == 0:  # root may write everywhere, so this is somebody else
            status = 1
            with contextlib.suppress(BaseException):
                if os.geteuid() == 0:
                    os.setgid(_NOBODY)
                    os.setuid(_NOBODY)
                with pytest.raises(OSError, match=r"right to write|not writable"):
                    write(Path(folder))
                status = 0
            os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert os.listdir(folder) == []


def test_a_folder_that_has_gone_meanwhile_is_named(tmp_path):
    with pytest.raises(WriteError, match=r"the folder .*gone has gone: create it again"):
        write_atomically(tmp_path / "gone" / "m.bin", b"x")


@pytest.mark.parametrize("taken", ["m.engine", "m.engine.json"])
def test_a_folder_that_has_taken_the_name_meanwhile_is_kept(tmp_path, taken):
    (tmp_path / taken).mkdir()
    with pytest.raises(WriteError, match=f"could not write .*{taken}: .*a folder has this name by now"):
        several(tmp_path / "m.engine")
    if taken == "m.engine":
        with pytest.raises(WriteError, match="a folder has this name by now"):
            write_atomically(tmp_path / taken, b"x")
    assert [path.name for path in tmp_path.iterdir()] == [taken]


# --- leftovers ------------------------------------------------------------------------------------------------------------


def single(target):
    write_atomically(target, b"whole")


def pair(target):
    with scratch_pair(writers.weight(), target):
        pass


def several(target):
    with together([target, target.with_name(f"{target.name}.json")]) as scratch:
        for path in scratch:
            path.write_bytes(b"whole")


@pytest.fixture(params=["a file", "a folder"])
def leftover(request, tmp_path):
    """What a process that was killed while it wrote `m.bin` has left."""
    path = tmp_path / ".m.bin.0123456789abcdef.tmp"
    if request.param == "a file":
        path.write_bytes(b"half")
    else:
        path.mkdir()
        (path / "m.bin").write_bytes(b"half")
    return path


@pytest.fixture(params=[single, pair, several])
def next_write(request, tmp_path):
    return lambda: request.param(tmp_path / "m.bin")


def test_what_a_killed_process_left_is_removed_by_the_next_write_and_nothing_else(
    leftover, next_write, tmp_path
):
    others = {".other.bin.0123456789abcdef.tmp", ".m.bin.notes.tmp", ".m.bin.x.0123456789abcdef.tmp"}
    for other in others:
        (tmp_path / other).write_bytes(b"somebody else's")
    next_write()
    assert not leftover.exists()
    assert others <= {path.name for path in tmp_path.iterdir()} <= others | {"m.bin", "m.bin.json"}


def test_what_another_process_is_writing_just_now_is_left_alone(leftover, next_write):
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(leftover, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    next_write()
    assert leftover.exists()
    os.close(handle)
    next_write()
    assert not leftover.exists()


def test_a_folder_that_is_being_filled_is_locked(tmp_path):
    with together([tmp_path / "m.bin"]) as (first,), together([tmp_path / "m.bin"]) as (second,):
        single(tmp_path / "m.bin")
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert (tmp_path / "m.bin").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"]


def test_a_file_system_without_locks_is_written_to_all_the_same(next_write, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    next_write()
    assert {path.name for path in tmp_path.iterdir()} <= {"m.bin", "m.bin.json"}


# --- killed half-way --------------------------------------------------------------------------------------------------------


class Forks:
    """A process that has imported everything and starts a job in a fork of its own in no time."""

    def __init__(self, given):
        script = Path(__file__).with_name("killed_writers.py")
        self._process = subprocess.Popen(
            [sys.executable, script, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout.readline() == "ready\n"

    def start(self, name, folder, moment="", number=signal.SIGKILL):
        """Start a job that gets the signal at a moment of its own; returns its process."""
        self._process.stdin.write(json.dumps([name, str(folder), moment, int(number)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def forks(given):
    process = Forks(given)
    yield process
    process.close()


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
STEPS = {
    "verified.onnx": ["fsync:1", "replace:1"],
    "pair.onnx": ["fsync:1", "fsync:2", "replace:1", "replace:2", "replace:3"],
    "int8.onnx": ["fsync:1", "replace:1"],
    "m.engine": ["fsync:1", "fsync:2", "fsync:3", "replace:1"],
}
"""Calls before which the old files are the ones that count."""
LATE = {"m.engine": ["replace:2", "replace:3", "fsync:4"]}
"""Those after which the new ones count, whatever happens."""
SAID = {
    "verified.onnx": [
        "tracing the model",
        "optimising the graph",
        "loading the file into ONNX Runtime",
        "writing the file",
    ],
    "int8.onnx": [
        "calibrating (minmax)",
        "measuring the error of all layers together",
        "comparing the file in 8 bits, 1 at a time",
    ],
    "m.engine": ["building the engine with tensorrt_rtx 0", "writing the engine and its report"],
}
"""Moments in between; one signal each, as they come round."""
KILLS = [
    (name, moment, number)
    for name in STEPS
    for i, moment in enumerate((*SAID.get(name, ()), *STEPS[name], *LATE.get(name, ())))
    for number in (CODES if ":" in moment else [list(CODES)[i % 3]])
]


@pytest.mark.parametrize(("name", "moment", "number"), KILLS, ids=lambda x: getattr(x, "name", x))
def test_a_writer_that_is_killed_at_this_moment_leaves_the_old_files_or_the_new_ones_and_nothing_else(
    forks, tmp_path, name, moment, number
):
    target, files = tmp_path / name, files_of(name)
    if name == "pair.onnx":
        with scratch_pair(writers.weight(1), target) as made:
            publish(made, target)
    else:
        for file in files:
            (tmp_path / file).write_bytes(OLD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    forks.start(name, tmp_path, moment, number)
    assert forks.wait() == CODES[number]
    rest = {path.name for path in tmp_path.iterdir()} - set(before)
    if number != signal.SIGKILL:
        assert rest == set()
    finish(target)
    if moment in LATE.get(name, ()):
        report = json.loads((tmp_path / files[1]).read_text())
        assert hashlib.sha256(target.read_bytes()).hexdigest() == report["sha256"]
    else:
        assert {file: (tmp_path / file).read_bytes() for file in before} == before
        if ":" in moment and number == signal.SIGKILL:
            assert rest  # so that there is something to sweep up
    if name == "pair.onnx":
        WRITERS[name](target, None, lambda text: None)
        assert len(list(tmp_path.iterdir())) == 2
    else:
        (several if len(files) > 1 else single)(target)
        assert {path.name for path in tmp_path.iterdir()} == set(files)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["many_bytes.bin", "m.engine"])
def test_a_writer_that_is_killed_at_any_moment_leaves_whole_files(forks, tmp_path, name, number):
    target, files = tmp_path / name, files_of(name)
    chance = random.Random(0)
    for _ in range(8):
        for file in files:
            (tmp_path / file).write_bytes(OLD)
        process = forks.start(name, tmp_path)
        time.sleep(chance.uniform(0, 0.3 if name == "m.engine" else 0.04))
        with contextlib.suppress(ProcessLookupError):  # it was done already, and is waited for
            os.kill(process, number)
        code = forks.wait()
        # the last two: before the command could see to it, or when it had ended
        assert code in (0, CODES[number], -number, 99)
        rest = {path.name for path in tmp_path.iterdir()} - {*files, f"{name}.building"}
        if code != -number:
            assert rest == set()
        assert all(name.startswith(f".{target.name}.") for name in rest)
        finish(target)
        old = [(tmp_path / file).read_bytes() == OLD for file in files]
        assert all(old) or not any(old)
        if code == 0:
            assert not any(old)
    (several if len(files) > 1 else single)(target)
    assert {path.name for path in tmp_path.iterdir()} - {f"{name}.building"} == set(files)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_an_engine_whose_build_is_killed_leaves_nothing_and_no_process(forks, tmp_path, number):
    folder = tmp_path / "folder"
    folder.mkdir()
    process = forks.start("real.engine", folder)
    late = time.monotonic() + 60
    while not Path(f"{folder}.building").exists() and time.monotonic() < late:
        time.sleep(0.02)
    children = []
    while not children and time.monotonic() < late:
        listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
        children = listed.stdout.split()
    assert len(children) == 1
    os.kill(process, number)
    assert forks.wait() == CODES[number]
    gone = time.monotonic() + 30
    while os.path.exists(f"/proc/{children[0]}") and time.monotonic() < gone:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{children[0]}")
    if number == signal.SIGKILL:
        several(folder / "real.engine")
        assert sorted(path.name for path in folder.iterdir()) == files_of("real.engine")
    else:
        assert list(folder.iterdir()) == []
