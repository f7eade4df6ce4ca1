"""Writing a result so that it is either there and whole, or not there."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
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


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` beside `target`, then rename: whoever opens `target` sees the old file or the whole new one.

    On any failure the old file, if there was one, is as it was, and nothing is left beside it. A process
    killed while writing can leave a hidden `.NAME.*.tmp`, never a broken `target`.
    """
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(scratch, "xb") as file:
            keep_permissions(target, scratch)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
