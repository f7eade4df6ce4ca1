"""Several files that belong together, written so that all of them are there, or none."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .files import explaining, keep_permissions, scratch_folder


@contextlib.contextmanager
def together(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Files to fill, in a hidden folder beside `targets`, all of one folder; after the block they take their places.

    On any failure the old files are as they were and nothing is left beside them. A file system renames one file at a
    time, but a folder with all that is in it: that takes the name `.NAME.commit`, after the first target, and from
    then on the new files are the ones that count. A process that is killed before they have all moved out of it leaves
    that folder: `finish` carries it out, and is called here, and by whatever reads the files.

    Raises:
        FileNotFoundError: the block left one of the files out.
        WriteError: an OSError; a file can't be written or renamed. What the block itself raises stays as it is.
    """
    with contextlib.ExitStack() as stack:
        with explaining(targets[0], None):
            finish(targets[0])
            folder = stack.enter_context(scratch_folder(targets[0]))
        scratch = [folder / target.name for target in targets]
        yield scratch
        if missing := [path.name for path in scratch if not path.exists()]:
            raise FileNotFoundError(f"{missing[0]} was not written")
        for path, target in zip(scratch, targets, strict=True):
            with explaining(target, path.stat().st_size):
                keep_permissions(target, path)
                _sync(path)
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with explaining(targets[0], sum(path.stat().st_size for path in scratch)):
            _sync(folder)
            _commit(folder, targets[0])
            try:
                finish(targets[0])
            except KeyboardInterrupt:
                finish(targets[0])  # they count already, and are some renames away
                raise


def _commit(folder: Path, target: Path) -> None:
    """Let the files in `folder` be the ones that count."""
    while True:
        try:
            os.replace(folder, _committed(target))
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            finish(target)  # another process was quicker, and ended half-way


def finish(target: Path) -> None:
    """Carry out what a killed process had left to do for the files that begin with `target`, if it left anything.

    Raises:
        OSError: a file can't be renamed; the rest stays for another attempt.
    """
    folder = _committed(target)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # renamed already
            os.replace(folder / name, target.with_name(name))
    _sync(target.parent)
    with contextlib.suppress(
        OSError
    ):  # empty it does no harm; another process may have put its own in this place
        folder.rmdir()


def _committed(target: Path) -> Path:
    return target.with_name(f".{target.name}.commit")


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
