"""Writing a result so that it is either there and whole, or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_target(path: str | os.PathLike[str], suffix: str) -> Path:
    """The real path that a result is to be written to, checked before the long work starts.

    Links are followed, so that a linked file is replaced and not the link.

    Raises:
        ValueError: the name does not end with `suffix` (which also keeps a slip of the keyboard from
            replacing a checkpoint).
        IsADirectoryError, FileNotFoundError, NotADirectoryError, PermissionError: the file can't be
            written there.
    """
    target = Path(os.path.realpath(path))
    if target.suffix.lower() != suffix:
        raise ValueError(f"the output's name must end with {suffix}, got {os.fspath(path)!r}")
    if target.is_dir():
        raise IsADirectoryError(
            f"{path} is a directory; name a file in it, such as {Path(path) / 'model'}{suffix}"
        )
    folder = target.parent
    if not folder.exists():
        raise FileNotFoundError(f"the folder {folder} does not exist; create it first")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {folder} is not writable")
    return target


def keep_permissions(target: Path, scratch: Path) -> None:
    """Give `scratch`, which is to replace `target`, the permissions of the file that is there, if one is."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod(scratch, stat.S_IMODE(os.stat(target).st_mode))


class WriteError(OSError):
    """A file could not be written; nothing of it is there. The message names the file, the reason and the remedy."""

    def __init__(self, target: Path, size: int | None, cause: OSError, elsewhere: str = "write elsewhere"):
        super().__init__(cause.errno, cause.strerror, os.fspath(target))
        self.size = size
        self._message = (
            f"could not write {target}: {cause.strerror or cause}; {_remedy(cause, target, size, elsewhere)}"
        )

    def __str__(self) -> str:
        return self._message


def _remedy(cause: OSError, target: Path, size: int | None, elsewhere: str) -> str:
    folder = target.parent
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk" if cause.errno == errno.ENOSPC else "the user's share of the disk"
        needed = "" if size is None else f" and {size / 1e6:.1f} MB are needed"
        return f"{what} of {folder} is full{needed}: make room, or {elsewhere}"
    if cause.errno == errno.EFBIG:
        needed = "what is needed" if size is None else f"{size / 1e6:.1f} MB"
        return f"a limit on the size of files is below {needed}: raise it (ulimit -f), or {elsewhere}"
    if cause.errno == errno.EROFS:
        return f"{folder} is on a file system that is mounted read-only: {elsewhere}"
    if cause.errno in (errno.EACCES, errno.EPERM):
        return f"get the right to write in {folder}, or {elsewhere}"
    if cause.errno == errno.EISDIR:
        return "a folder has this name by now: choose another"
    if cause.errno == errno.ENOENT:
        return f"the folder {folder} has gone: create it again"
    return f"the storage reports it: {elsewhere}, and look after this disk"


@contextlib.contextmanager
def explaining(target: Path, size: int | None) -> Iterator[None]:
    """Turn what the system has against writing `size` bytes to `target` into a `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(target, size, error) from error


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for what nobody keeps, gone afterwards.

    Raises:
        WriteError: something in it, or the folder itself, can't be written; the message names TMPDIR.
    """
    place = Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryDirectory(prefix="vitrail-") as name:
            place = Path(name)
            yield place
    except OSError as error:
        # a full disk is reported without the file's name
        nameless = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not nameless and not str(error.filename).startswith(os.fspath(place)):
            raise
        file = place / "file" if error.filename is None else Path(error.filename)
        size = error.size if isinstance(error, WriteError) else None
        raise WriteError(file, size, error, "name another folder for temporary files by TMPDIR") from error


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` beside `target`, then rename: whoever opens `target` sees the old file or the whole new one.

    On any failure the old file, if there was one, is as it was, and nothing is left beside it. A process
    killed while writing can leave a hidden `.NAME.*.tmp`, never a broken `target`; the next write removes it.

    Raises:
        WriteError: an OSError; the disk is full, the folder may not be written, ...
    """
    remove_leftovers(target)
    with explaining(target, len(data)):
        while not _write(target, data):
            pass


def _write(target: Path, data: bytes) -> bool:
    """Whether it was done: False where another process took the new file for a leftover before it was locked."""
    scratch = _scratch_name(target)
    try:
        with open(scratch, "xb") as file:
            locked = _lock(file.fileno())
            if locked is False or not scratch.exists():
                return False
            keep_permissions(target, scratch)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if locked is None:
                file.close()  # there, an open file may have to keep its name
            os.replace(scratch, target)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    return True


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to make files in that are then moved to where they belong; gone afterwards.

    It is locked as long as this process lives and uses it: what a killed one leaves is removed by the next write.

    Raises:
        OSError: it can't be made.
    """
    remove_leftovers(target)
    while True:
        with contextlib.ExitStack() as stack:
            folder = _scratch_name(target)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir()
            if _hold(folder, stack):
                yield folder
                return


def _hold(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a new folder until `stack` closes; False where another process took it for a leftover before that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:  # here, folders can't be opened
        return True
    stack.callback(os.close, handle)
    return _lock(handle) is not False and folder.exists()


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of this target: hidden files and folders that nobody holds a lock on any more.

    Errors are not reported: whatever is in the way of removing them is in the way of the write that follows, too.
    """
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError):
        for path in list(target.parent.iterdir()):
            if ours.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        if not _lock(handle):
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _scratch_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")


def _lock(handle: int) -> bool | None:
    """Take the lock on an open file or folder; it goes with the process, however that ends.

    Returns:
        False where another process has it, None where there are no locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
