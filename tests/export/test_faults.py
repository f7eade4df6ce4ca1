"""Whatever writes a file: under every fault the old file is as it was, nothing lies beside it, and one message says why."""

import builtins
import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from vitrail.export import to_onnx
from vitrail.export.external import publish, scratch_pair
from vitrail.export.files import WriteError, write_atomically

OLD = b"the file that was there"
_NOBODY = 65534  # a user without rights


def _bytes(target, _model):
    write_atomically(target, bytes(100_000))


def _onnx(target, model):
    to_onnx(model, target, img_size=16, verify=False)


def _pair(target, _model):
    weights = onnx.numpy_helper.from_array(np.zeros(5000, np.float32), "w")
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5000])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [value], [weights]
    )
    with scratch_pair(onnx.helper.make_model(graph), target) as pair:
        publish(pair, target)


WRITERS = {"bytes.bin": _bytes, "model.onnx": _onnx, "pair.onnx": _pair}
"""Every writer by the name of a file that it writes."""


class Tiny(torch.nn.Sequential):
    """The smallest model there is."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Flatten())


@pytest.fixture(params=WRITERS)
def writer(request):
    model = Tiny().eval()
    return lambda target: WRITERS[request.param](target.with_name(request.param), model)


@pytest.fixture(params=["new", "existing"])
def folder(request, tmp_path):
    """A folder that must look afterwards as it did before."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if request.param == "existing":
        for name in WRITERS:
            (folder / name).write_bytes(OLD)
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


def fail_at(monkeypatch, step, error):
    """Let a step of writing fail, whoever writes: opening, writing, syncing or renaming."""

    def refuse(*_, **__):
        raise error

    def half(*args):
        return Refusing(builtins.open(*args), error)

    if step in ("open", "write"):
        for module in ("files", "external"):
            monkeypatch.setattr(
                f"vitrail.export.{module}.open", half if step == "write" else refuse, raising=False
            )
    else:
        monkeypatch.setattr(os, step, refuse)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", REMEDIES, ids=errno.errorcode.get)
def test_whatever_the_system_has_against_a_step_of_writing_is_one_message_with_the_remedy(
    folder, monkeypatch, step, number
):
    fail_at(monkeypatch, step, OSError(number, os.strerror(number)))
    with pytest.raises(WriteError, match=REMEDIES[number]) as caught:
        write_atomically(folder / "bytes.bin", bytes(5000))
    monkeypatch.undo()
    assert caught.value.errno == number
    assert str(folder / "bytes.bin") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_disk_that_fills_up_changes_nothing_whoever_writes(writer, folder, monkeypatch, step):
    fail_at(monkeypatch, step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(OSError, match="make room, or write elsewhere"):
        writer(folder / "target")
    monkeypatch.undo()


def test_a_real_limit_on_the_size_of_files_changes_nothing_whoever_writes(writer, folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="ulimit -f"):
            writer(folder / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_without_the_right_to_write_is_refused_whoever_writes(writer):
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
                    writer(Path(folder) / "target")
                status = 0
            os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert os.listdir(folder) == []


def test_a_folder_that_has_gone_meanwhile_is_named(tmp_path):
    with pytest.raises(WriteError, match=r"the folder .*gone has gone: create it again"):
        write_atomically(tmp_path / "gone" / "m.bin", b"x")


def test_a_folder_that_has_taken_the_name_meanwhile_is_kept(tmp_path):
    (tmp_path / "m.bin").mkdir()
    with pytest.raises(WriteError, match="a folder has this name by now"):
        write_atomically(tmp_path / "m.bin", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"]


# --- leftovers ------------------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    (tmp_path / ".m.bin.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".other.bin.0123456789abcdef.tmp").write_bytes(b"somebody else's")
    write_atomically(tmp_path / "m.bin", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.bin.0123456789abcdef.tmp",
        "m.bin",
    ]


def test_what_another_process_is_writing_just_now_is_left_alone(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    scratch = tmp_path / ".m.bin.0123456789abcdef.tmp"
    with open(scratch, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomically(tmp_path / "m.bin", b"whole")
        assert scratch.exists()


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    write_atomically(tmp_path / "m.bin", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["m.bin"]


# --- killed half-way --------------------------------------------------------------------------------------------------------

_FORKS = """\
import json, os, signal, sys
from pathlib import Path

import torch
from vitrail import cli
from vitrail.export import to_onnx
from vitrail.export.external import publish, scratch_pair
from vitrail.export.files import write_atomically
import onnxscript.optimizer, onnxruntime  # what an export imports on its way

torch.set_num_threads(1)


class Tiny(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Flatten())


MODEL = Tiny().eval()


def job(kind, folder, moment, say):
    if kind == "bytes.bin":
        say("writing the file")
        write_atomically(Path(folder) / kind, bytes(20_000_000))
    else:
        to_onnx(MODEL, Path(folder) / kind, img_size=16, verify="Runtime" in moment, progress=say)


def child(kind, folder, moment, number):
    # as a command does: cli.main turns the signal to terminate into an exception
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background has it ignored
    def strike():
        os.kill(os.getpid(), number)

    def say(text):
        if text == moment:
            strike()

    if moment in ("fsync", "replace"):
        real = getattr(os, moment)
        setattr(os, moment, lambda *args: (strike(), real(*args)))

    def run(argv):
        job(kind, folder, moment, say)
        return 0

    cli._run = run
    return cli.main([])


print("ready", flush=True)
for line in sys.stdin:
    kind, folder, moment, number = json.loads(line)
    pid = os.fork()
    if not pid:
        os.close(2)
        os.open(os.devnull, os.O_WRONLY)
        code = 99
        try:
            code = child(kind, folder, moment, number)
        finally:
            os._exit(code)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Forks:
    """A process that has imported everything and starts a job in a fork of its own in no time."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_FORKS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout.readline() == "ready\n"

    def start(self, kind, folder, moment="", number=signal.SIGKILL):
        """Start a job that gets the signal at a moment of its own; returns its process."""
        self._process.stdin.write(json.dumps([kind, str(folder), moment, int(number)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def forks():
    process = Forks()
    yield process
    process.close()


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
MOMENTS = ["tracing the model", "optimising the graph", "loading the file into ONNX Runtime"]
MOMENTS += ["writing the file", "fsync", "replace"]


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name not in WRITERS]


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (moment, number)
        for i, moment in enumerate(MOMENTS)
        for number in (list(CODES) if i > 3 else [list(CODES)[i % 3]])
    ],
)
def test_an_export_that_is_killed_at_this_moment_leaves_the_old_file_and_nothing_else(
    forks, tmp_path, moment, number
):
    target = tmp_path / "model.onnx"
    target.write_bytes(OLD)
    forks.start("model.onnx", tmp_path, moment, number)
    assert forks.wait() == CODES[number]
    assert target.read_bytes() == OLD
    rest = leftovers(tmp_path)
    if number == signal.SIGKILL and moment in ("fsync", "replace"):
        assert all(name.startswith(".model.onnx.") and name.endswith(".tmp") for name in rest)
        write_atomically(target, b"the next one")
        rest = leftovers(tmp_path)
    assert rest == []


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_write_that_is_killed_at_any_moment_leaves_a_whole_file(forks, tmp_path, number):
    target = tmp_path / "bytes.bin"
    chance = random.Random(0)
    for _ in range(12):
        target.write_bytes(OLD)
        process = forks.start("bytes.bin", tmp_path)
        time.sleep(chance.uniform(0, 0.04))
        with contextlib.suppress(ProcessLookupError):  # it was done already, and is waited for
            os.kill(process, number)
        code = forks.wait()
        assert code in (0, CODES[number], -number)  # -number: before the command could see to it
        assert len(target.read_bytes()) in (len(OLD), 20_000_000)
        if code == 0:
            assert len(target.read_bytes()) == 20_000_000
        rest = leftovers(tmp_path)
        if code != -number:
            assert rest == []
        for name in rest:
            assert name.startswith(".bytes.bin.")
    write_atomically(target, b"the next one")
    assert leftovers(tmp_path) == []
