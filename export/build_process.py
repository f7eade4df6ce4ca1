"""The process that builds engines (`builder.py`), as seen by the one that starts it: requests, answers, and reasons."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .errors import ExportError
from .files import WriteError, temporary_folder
from .graph import module_of

NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
TURING = "SM75"
"""The architecture that TensorRT-RTX offers and builds for on request only: it has no kernels for float32 products."""
_SCRIPT = Path(__file__).with_name("builder.py")


class Builder:
    """TensorRT, in processes of their own.

    Args:
        library: `tensorrt` or `tensorrt_rtx`.

    Attributes:
        library: that.
        name: with its version, such as `tensorrt_rtx 1.7.1.116`.
        offered: architectures that it can be asked for; none where it builds for the GPU at hand.

    Raises:
        ExportError: the library is installed and can't be loaded.
    """

    def __init__(self, library: str):
        self.library = library
        described = self._ask({"task": "describe"})
        self.name = f"{library} {described['version']}"
        self.offered: tuple[str, ...] = tuple(described["archs"])

    def architectures(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """What to build for, by the library's names (`SM89`), from names such as `sm_89`; () for the GPU at hand.

        Raises:
            ValueError: an architecture that the library doesn't offer.
            ExportError: it builds for the GPU at hand, and there is none.
        """
        names = tuple(dict.fromkeys(name.upper().replace("_", "") for name in wanted))
        if not self.offered:
            return self._of_this_machine(names)
        if unknown := [name for name in names if name not in self.offered]:
            raise ValueError(
                f"{self.name} does not build for {', '.join(map(arch_text, unknown))}; it offers "
                f"{', '.join(map(arch_text, self.offered))}. For GPUs of data centres use library='tensorrt' there"
            )
        return names or tuple(name for name in self.offered if name != TURING)

    def _of_this_machine(self, names: Sequence[str]) -> tuple[str, ...]:
        if not torch.cuda.is_available():
            raise ExportError(
                f"{self.name} builds for the GPU at hand, and torch sees none; tensorrt_rtx builds without: "
                f"pip install tensorrt-rtx, and library='tensorrt_rtx'"
            )
        here = "SM{}{}".format(*torch.cuda.get_device_capability())
        if other := [name for name in names if name != here]:
            raise ValueError(
                f"{self.name} builds for the GPU at hand, {arch_text(here)}, and not for "
                f"{', '.join(map(arch_text, other))}; library='tensorrt_rtx' builds for others"
            )
        return (here,)

    def build(self, nodes: Mapping[str, Sequence[str]], **request: Any) -> dict[str, Any]:
        """Build an engine as `builder.build` takes it, and say what there is to know of it.

        Args:
            nodes: names of the file's nodes, by type, for errors that give no name.
            request: see `builder.build`.

        Raises:
            ExportError: TensorRT doesn't take the file, or can't build it, or its process died.
            OSError: the engine could not be written.
        """
        archs = request["archs"] if self.offered else ()
        return self._ask({"task": "build", **request, "archs": archs}, nodes)

    def _ask(
        self, request: dict[str, Any], nodes: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, Any]:
        plugins = request.get("plugins", ())
        search = [os.path.abspath(entry) for entry in sys.path]
        with _surroundings(self.library, plugins) as environment, tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [sys.executable, os.fspath(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                start_new_session=True,  # an interrupt is for this process, which then ends that one
            )
            with process:
                try:
                    assert process.stdin is not None
                    assert process.stdout is not None
                    text = json.dumps({**request, "library": self.library, "search": search})
                    process.stdin.write(f"{text}\n".encode())
                    process.stdin.flush()  # and stays open: the process ends when it closes
                    answer = process.stdout.read()
                    process.wait()
                except BaseException:
                    process.kill()
                    raise
            said.seek(0)
            noise = said.read().decode(errors="replace")
        if not answer:
            raise ExportError(_died(process.returncode, noise))
        document: dict[str, Any] = json.loads(answer)
        if "failed" in document:
            raise self._reason(document["failed"], nodes or {})
        result: dict[str, Any] = document["ok"]
        return result

    def _reason(self, failed: Mapping[str, Any], nodes: Mapping[str, Sequence[str]]) -> Exception:
        kind, name = failed["kind"], NAMES[self.library]
        errors = "; ".join(_plain(error) for error in failed.get("errors", ())) or "it gives no reason"
        if kind == "os":
            return OSError(failed["errno"], failed["text"], failed["file"])
        if kind == "write":
            return WriteError(Path(failed["file"]), failed["size"], OSError(failed["errno"], failed["text"]))
        if kind == "library":
            again = f"pip install --force-reinstall {self.library.replace('_', '-')}"
            return ExportError(f"{self.library} is installed and can't be loaded ({failed['text']}): {again}")
        if kind == "plugin":
            return ExportError(f"{name} can't load the plugin library {failed['path']}: {errors}")
        if kind == "memory":
            return ExportError(
                "the engine was built, and memory ran out when it was to be written: free some"
            )
        if kind == "parse":
            return ExportError(_refusal(name, failed["nodes"], nodes))
        return ExportError(f"{name} can't build the engine: {errors}{_remedy(errors)}")


def arch_text(name: str) -> str:
    """`SM89` as `sm_89`."""
    return name.lower().replace("sm", "sm_")


def _refusal(name: str, errors: Sequence[Mapping[str, Any]], nodes: Mapping[str, Sequence[str]]) -> str:
    """Which nodes TensorRT doesn't take, where they come from, and why."""
    if not errors:
        return f"{name} can't read the ONNX file, and gives no reason"
    places = [_place(error, nodes) for error in errors[:6]]
    more = f"; and {len(errors) - 6} more" if len(errors) > 6 else ""
    return (
        f"{name} does not take the file: {'; '.join(places)}{more}. Write these places with other operators, or name "
        f"a library with plugins for them"
    )


def _place(error: Mapping[str, Any], nodes: Mapping[str, Sequence[str]]) -> str:
    """A node, or where the parser names none, those of the type that it was at."""
    operator, names = error["operator"], [error["name"]] if error["name"] else []
    if not operator:
        operator = re.sub("^(import|check)", "", error["by"])
        names = list(nodes.get(operator, ()))
    modules = list(dict.fromkeys(filter(None, map(module_of, names))))
    shown = ", ".join(map(repr, names[:2])) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    origin = f" in module {', '.join(modules[:2])}" if modules else ""
    inside = f" (in function {' > '.join(error['functions'])})" if error["functions"] else ""
    code = error["code"].lower().replace("_", " ")
    reason = code if error["text"] == "false" else f"{code}, {_plain(error['text'])}"
    return f"{operator} {shown}{origin}{inside}: {reason}"


def _plain(error: str) -> str:
    """A message of the log without what speaks of TensorRT's own sources."""
    text = re.sub(r"\.?\s*In \w+ at [^\s)]+", "", error)
    text = re.sub(r"\[\w+\.cpp:\d+: \w+\] ", "", text)
    return re.sub(r"^\w+::\w+: Error Code \d+: ", "", text).strip(" .")


def _remedy(errors: str) -> str:
    if "Turing" in errors:
        return ". Leave sm_75 out of the architectures, or give it a file that has no float32 products"
    if "workspace" in errors:
        return ". Allow more workspace, or leave the limit out"
    if "K exceeds" in errors:
        return ". Choose fewer elements: a smaller image, or a smaller k"
    if "emory" in errors or "bad_alloc" in errors:
        return ". Free some memory, or build for a smaller largest batch"
    return ""


def _died(code: int, noise: str) -> str:
    """Why a process that left no answer may have ended."""
    lines = [line.strip() for line in noise.splitlines() if line.strip()]
    last = f" Its last words: {' | '.join(lines[-3:])}" if lines else ""
    if code == -signal.SIGKILL:
        return (
            f"the process that builds the engine was killed, most likely as memory ran out: free some.{last}"
        )
    if "bad_alloc" in noise or "MemoryError" in noise:
        return f"the process that builds the engine ran out of memory: free some, or raise its limit.{last}"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"the process that builds the engine ended without an answer ({how}).{last}"


@contextmanager
def _surroundings(library: str, plugins: Sequence[str]) -> Iterator[dict[str, str]]:
    """The environment of the process.

    With a plugin in the graph TensorRT-RTX's parser asks for `libtensorrt_rtx.so`, where its wheel has a versioned name
    alone, and ends the process when there is none: then a folder with a link of that name is searched first.
    """
    environment = dict(os.environ)
    spec = find_spec("tensorrt_rtx_libs") if plugins and library == "tensorrt_rtx" else None
    found = (
        sorted(Path(next(iter(spec.submodule_search_locations or ()))).glob("libtensorrt_rtx.so*"))
        if spec
        else []
    )
    with temporary_folder() as folder:
        if found and found[0].name != "libtensorrt_rtx.so":
            (folder / "libtensorrt_rtx.so").symlink_to(found[0])
            before = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(
                [os.fspath(folder), *([before] if before else [])]
            )
        yield environment
