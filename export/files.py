"""Writing a result so that it is either there and whole, or not there."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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

    def __init__(self, target: Path, size: int, cause: OSError):
        super().__init__(cause.errno, cause.strerror, os.fspath(target))
        self._message = f"could not write {target}: {cause.strerror or cause}; {_remedy(cause, target, size)}"

    def __str__(self) -> str:
        return self._message


def _remedy(cause: OSError, target: Path, size: int) -> str:
    folder = target.parent
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk" if cause.errno == errno.ENOSPC else "the user's share of the disk"
        return f"{what} of {folder} is full and {size / 1e6:.1f} MB are needed: make room, or write elsewhere"
    if cause.errno == errno.EFBIG:
        return f"a limit on the size of files is below {size / 1e6:.1f} MB: raise it (ulimit -f), or write elsewhere"
    if cause.errno == errno.EROFS:
        return f"{folder} is on a file system that is mounted read-only: write elsewhere"
    if cause.errno in (errno.EACCES, errno.EPERM):
        return f"get the right to write in {folder}, or write elsewhere"
    if cause.errno == errno.EISDIR:
        return "a folder has this name by now: choose another"
    if cause.errno == errno.ENOENT:
        return f"the folder {folder} has gone: create it again"
    return "the storage reports it: write elsewhere, and look after this disk"


@contextlib.contextmanager
def explaining(target: Path, size: int) -> Iterator[None]:
    """Turn what the system has against writing `size` bytes to `target` into a `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(target, size, error) from error


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` beside `target`, then rename: whoever opens `target` sees the old file or the whole new one.

    On any failure the old file, if there was one, is as it was, and nothing is left beside it. A process
    killed while writing can leave a hidden `.NAME.*.tmp`, never a broken `target`; the next write removes it.

    Raises:
        WriteError: an OSError; the disk is full, the folder may not be written, ...
    """
    _remove_leftovers(target)
    with explaining(target, len(data)):
        while not _write(target, data):
            pass


def _write(target: Path, data: bytes) -> bool:
    """Whether it was done: False where another process took the new file for a leftover before it was locked."""
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(scratch, "xb") as file:
            locked = _lock(file)
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


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of this target: hidden files that nobody holds a lock on any more."""
    with contextlib.suppress(OSError):
        for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if _lock(file):
                    path.unlink(missing_ok=True)


def _lock(file: BinaryIO) -> bool | None:
    """Take the lock on an open file; it goes with the process, however that ends.

    Returns:
        False where another process has it, None where there are no locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
