"""Kernels for ONNX Runtime, compiled quickly: for one instruction set, with little optimisation."""

import os
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from vitrail.ops import library
from vitrail.ops.library import Compiler, Part


def _commands(
    compiler: Compiler, target: Path, sanitize: Sequence[str] = ()
) -> tuple[list[list[str]], list[str]]:
    sanitizer = [f"-fsanitize={','.join(sanitize)}", "-fno-sanitize-recover=all", "-g"] if sanitize else []
    flags = ["-DVITRAIL_STANDALONE", "-DVITRAIL_PORTABLE", "-DVITRAIL_ISA=portable", "-O1", *sanitizer]
    command = [*compiler.command, *library._FLAGS, *flags]
    compiles, objects = library._units(command, library.onnxruntime_sources(), target)
    return compiles, [*compiler.command, "-shared", *sanitizer, "-o", str(target), *objects, "-pthread"]


PORTABLE_KERNELS = Part(
    "onnxruntime",
    "libvitrail_onnxruntime_portable.so",
    "VITRAIL_ONNXRUNTIME_LIBRARY",
    "kernels for ONNX Runtime with {}",
    library.find_compiler,
    _commands,
    (".cpp", ".h"),
)


def portable_kernels() -> Path:
    """The library, compiled once and kept in the cache; or what the environment names, with sanitizers in it."""
    named = os.environ.get(PORTABLE_KERNELS.variable)
    return Path(named) if named else library.build(part=PORTABLE_KERNELS, progress=lambda *_: None)


def session(
    content: bytes, kernels: Path | None, threads: int = 1, profile: str = ""
) -> onnxruntime.InferenceSession:
    """A session that runs nodes by the kernels; without, by their functions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if kernels is not None:
        options.register_custom_ops_library(str(kernels))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
