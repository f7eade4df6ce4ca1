"""The GPU kernels compiled for the host, where csrc/cuda/emulation.h runs them thread by thread."""

from collections.abc import Sequence
from pathlib import Path

from vitrail.ops import library
from vitrail.ops.library import Compiler, Part

FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DVITRAIL_EMULATE",
    "-DVITRAIL_CUDA",
    "-DVITRAIL_ISA=cuda",
    "-DVITRAIL_DEVICE_KEY=CPU",
)


def _commands(
    compiler: Compiler, target: Path, sanitize: Sequence[str] = ()
) -> tuple[list[list[str]], list[str]]:
    sanitizer = [f"-fsanitize={','.join(sanitize)}", "-fno-sanitize-recover=all", "-g"] if sanitize else []
    sources = [*library._sources("cuda", ".cu"), library._SOURCES / "dispatch" / "capability.cpp"]
    compiles, objects = [], []
    for source in sources:
        objects.append(str(target.with_name(f"{source.stem}.o")))
        flags = [*FLAGS, *library._TORCH_FLAGS, "-O1", *sanitizer]
        compiles.append([*compiler.command, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]])
    lib = library._TORCH / "lib"
    libraries = [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    return compiles, [*compiler.command, "-shared", *sanitizer, "-o", str(target), *objects, *libraries]


EMULATED = Part(
    "cpu",
    "libvitrail_emulated.so",
    "VITRAIL_LIBRARY",
    "the GPU kernels for the host with {}",
    library.find_compiler,
    _commands,
    (".cu", ".h"),
)
