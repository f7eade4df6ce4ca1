"""Several files that belong together, written so that all of them are there, or none."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def together(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Scratch files beside `targets`, all of one folder, which take their places when the block has filled them.

    On any failure the old files are as they were and nothing is left beside them. A file system renames one file at a
    time; what is to be renamed is therefore noted beforehand, in a hidden file, and a process that is killed between
    two renames leaves that note: `finish` carries it out, and is called here, and by whatever reads the files.

    Raises:
        FileNotFoundError: the block left one of the scratch files out.
        OSError: a file can't be written or renamed.
    """
    finish(targets[0])
    token = secrets.token_hex(4)
    scratch = [target.with_name(f".{target.name}.{token}.tmp") for target in targets]
    try:
        yield scratch
        for path, target in zip(scratch, targets, strict=True):
            with contextlib.suppress(FileNotFoundError):  # a replaced file keeps its permissions
                os.chmod(path, stat.S_IMODE(os.stat(target).st_mode))
            _sync(path)
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a directory by now; name another file")
        note = _note(targets[0])
        draft = scratch[0].with_name(f"{scratch[0].name}.note")
        scratch.append(draft)
        names = {path.name: target.name for path, target in zip(scratch, targets, strict=False)}
        draft.write_text(json.dumps(names))
        _sync(draft)
        os.replace(draft, note)  # from here on the new files are the ones that count
    except BaseException:
        for path in scratch:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    finish(targets[0])


def finish(target: Path) -> None:
    """Carry out what a killed process had noted for the files that begin with `target`; nothing where it noted nothing.

    Raises:
        OSError: a file can't be renamed; the note stays for another attempt.
    """
    note = _note(target)
    try:
        names = json.loads(note.read_text())
    except FileNotFoundError:
        return
    for scratch, final in names.items():
        with contextlib.suppress(FileNotFoundError):  # renamed already
            os.replace(note.with_name(scratch), note.with_name(final))
    _sync(note.parent)
    note.unlink(missing_ok=True)


def _note(target: Path) -> Path:
    return target.with_name(f".{target.name}.commit")


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
