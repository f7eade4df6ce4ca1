"""The compiled libraries: which path the operators take, and how a library is found, built and loaded.

There is one for the CPU and one for NVIDIA GPUs, each loaded when the first tensor comes that lies there, one of
plugins for TensorRT and one of kernels for ONNX Runtime, which these load. They are plain C++ and CUDA without a Python
ABI, the first two on the LibTorch stable ABI. In this order a library is taken from the path
that the environment names, from the package itself (a wheel may carry it), or from the cache, into which it is
compiled at first use; never at import. Where none of that works, one warning says why, and the PyTorch definitions
run instead.

Environment:
    VITRAIL_OPS           `auto` (compiled where possible), `fused` (compiled or an error) or `reference`.
    VITRAIL_BUILD         `0` forbids compiling at first use.
    VITRAIL_LIBRARY       path of a library for the CPU to load instead of any other.
    VITRAIL_CUDA_LIBRARY  the same for GPUs.
    VITRAIL_PLUGIN_LIBRARY  path of a library of plugins for TensorRT to use instead of any other.
    VITRAIL_ONNXRUNTIME_LIBRARY  path of a library of kernels for ONNX Runtime to use instead of any other.
    VITRAIL_CACHE         where libraries are kept; default $XDG_CACHE_HOME/vitrail or ~/.cache/vitrail.
    VITRAIL_LOCK_TIMEOUT  seconds to wait for another process that is compiling; default 300.
    CXX                   the C++ compiler; default: the first of c++, g++, clang++.
    CUDACXX               the CUDA compiler; default: nvcc of CUDA_HOME, on the path, or of /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST  what to compile for, such as `8.0;9.0+PTX`; default: the GPUs of this machine, without
                          any everything that is supported.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

MODES = ("auto", "fused", "reference")
LIBRARY_NAME = "libvitrail.so"
CUDA_LIBRARY_NAME = "libvitrail_cuda.so"
PLUGIN_LIBRARY_NAME = "libvitrail_tensorrt.so"
ONNXRUNTIME_LIBRARY_NAME = "libvitrail_onnxruntime.so"

# --- which path ---------------------------------------------------------------------------------------------

_mode = os.environ.get("VITRAIL_OPS") or "auto"


def mode() -> str:
    """The path in force: `auto`, `fused` or `reference`.

    Raises:
        ValueError: the environment variable `VITRAIL_OPS` holds something else.
    """
    if _mode not in MODES:
        raise ValueError(f"VITRAIL_OPS must be one of {', '.join(MODES)}, got {_mode!r}")
    return _mode


def set_mode(mode: str) -> None:
    """Select the path for the whole process; `use_ops` does so for a block of code."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    _mode = mode


def has_kernel(name: str, key: str) -> bool:
    """Whether an operator (`vitrail::routed_attention`) has a kernel of its own on a device (`CPU`, `CUDA`).

    Compiled kernels do so once their library is loaded; definitions stand behind all devices.
    """
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    return found


@contextlib.contextmanager
def use_ops(mode: str) -> Iterator[None]:
    """Select the path inside a `with` block: `auto`, `fused` or `reference`. Holds for all threads."""
    before = _mode
    set_mode(mode)
    try:
        yield
    finally:
        globals()["_mode"] = before


# --- what is compiled, and how ------------------------------------------------------------------------------

_SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_FOLDERS = {
    "tensorrt": ("tensorrt",),
    "onnxruntime": ("onnxruntime",),
    "standalone": ("tensorrt", "onnxruntime"),
}
"""Folders of sources that concern some of the libraries only: those of these devices."""
_TORCH = Path(torch.__file__).resolve().parent
_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
# The oldest torch whose stable ABI the library asks for: 2.11.
_TORCH_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
_TORCH_FLAGS = (_TORCH_VERSION, f"-isystem{_TORCH / 'include'}")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")

Progress = Callable[[int, int, str], None]


class BuildError(RuntimeError):
    """The library could not be compiled; the message says why and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A compiler: the command that runs it, and what its `--version` says of it in one line."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """The compiler that `CXX` names, or the first of c++, g++, clang++.

    Raises:
        BuildError: there is none, or it does not run.
    """
    if os.name == "nt":
        raise BuildError("compiling the operators is not supported on Windows; use WSL for the compiled path")
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]) is None:
            continue
        said = _version(command, "C++")
        return Compiler(tuple(command), said.partition("\n")[0].strip())
    if named:
        raise BuildError(f"the C++ compiler {named[0]!r}, named by CXX, was not found; correct or unset CXX")
    raise BuildError(
        "no C++ compiler was found; install one (Debian, Ubuntu: apt install g++; "
        "Fedora: dnf install gcc-c++; macOS: xcode-select --install; "
        "conda: conda install cxx-compiler) or name it in CXX"
    )


def _version(command: Sequence[str], language: str) -> str:
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the {language} compiler {shlex.join(command)!r} does not run: {error}") from error
    return run.stdout or run.stderr


def find_cuda_compiler() -> Compiler:
    """The compiler that `find_nvcc` finds, which has to suit torch.

    Raises:
        BuildError: there is none, it does not run, or torch is for another major version of CUDA, or for none.
    """
    if torch.version.cuda is None:
        raise BuildError(
            "this torch is without CUDA; install one for your GPU: https://pytorch.org/get-started"
        )
    compiler = find_nvcc()
    release = compiler.version.removeprefix("nvcc ")
    if release.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        raise BuildError(
            f"{compiler.command[0]} is of CUDA {release}, torch of {torch.version.cuda}: their major versions must "
            "agree; name another nvcc in CUDACXX, or install another torch"
        )
    return compiler


def find_nvcc() -> Compiler:
    """The compiler that `CUDACXX` names, or nvcc of `CUDA_HOME`, on the path, or of /usr/local/cuda.

    Raises:
        BuildError: there is none, or it does not run.
    """
    named = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (
        [named] if named else [*([f"{home}/bin/nvcc"] if home else ()), "nvcc", "/usr/local/cuda/bin/nvcc"]
    )
    found = next((path for x in candidates if (path := shutil.which(x))), None)
    if found is None:
        if named:
            raise BuildError(
                f"the CUDA compiler {named!r}, named by CUDACXX, was not found; correct or unset CUDACXX"
            )
        raise BuildError(
            f"no CUDA compiler was found; install the CUDA toolkit {(torch.version.cuda or '13').partition('.')[0]} "
            "(https://developer.nvidia.com/cuda-downloads; conda: conda install cuda-nvcc) or name its nvcc in CUDACXX"
        )
    release = re.search(r"release (\d+)\.(\d+)", _version([found], "CUDA"))
    if release is None:
        raise BuildError(f"{found} does not say which release of CUDA it is; CUDACXX must name an nvcc")
    return Compiler((found, "-ccbin", *find_compiler().command[:1]), f"nvcc {release[1]}.{release[2]}")


def _instruction_sets() -> dict[str, tuple[str, ...]]:
    """The namespaces that kernels are compiled into, with their flags; slowest to compile first."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return {
            "avx512_bf16": (*_AVX512, "-mavx512bf16"),
            "avx512": _AVX512,
            "avx2": _AVX2,
            "portable": (),
        }
    return {"portable": ()}


def _sources(device: str, suffix: str) -> list[Path]:
    """All sources that concern the library for a device."""
    return [path for path in sorted(_SOURCES.rglob(f"*{suffix}")) if _concerns(path, device)]


def _concerns(path: Path, device: str) -> bool:
    return device in _FOLDERS.get(path.parent.name, (device,))


def _cpu_units(
    compiler: Compiler,
    target: Path,
    sources: Sequence[Path],
    flags: Sequence[str],
    host_flags: Sequence[str] = (),
    sanitize: Sequence[str] = (),
) -> tuple[list[list[str]], list[str]]:
    """The commands that compile sources beside `target`, and the beginning of the one that links them.

    `*_kernel.cpp` is compiled once per instruction set, any other source once.
    """
    sanitizer = [f"-fsanitize={','.join(sanitize)}"] if sanitize else []
    extra = [*sanitizer, "-fno-sanitize-recover=all", "-g", "-O1"] if sanitize else ["-O3"]
    compiles, objects = [], []

    def unit(source: Path, name: str, *more: str) -> None:
        objects.append(str(target.with_name(f"{name}.o")))
        command = [*compiler.command, *_FLAGS, *extra, *flags, *more]
        compiles.append([*command, "-c", str(source), "-o", objects[-1]])

    for name, instructions in _instruction_sets().items():
        for source in sources:
            if source.stem.endswith("_kernel"):
                unit(source, f"{source.stem}.{name}", f"-DVITRAIL_ISA={name}", *instructions)
    for source in sources:
        if not source.stem.endswith("_kernel"):
            unit(source, source.stem, *host_flags)
    return compiles, [*compiler.command, "-shared", *sanitizer, "-o", str(target), *objects]


def compile_commands(
    compiler: Compiler, target: Path, sanitize: Sequence[str] = ()
) -> tuple[list[list[str]], list[str]]:
    """The commands that compile each unit beside `target`, and the one that links them to `target`.

    `*_kernel.cpp` is compiled once per instruction set, any other source once.
    """
    sources = _sources("cpu", ".cpp")
    compiles, link = _cpu_units(compiler, target, sources, (), _TORCH_FLAGS, sanitize)
    lib = _TORCH / "lib"
    return compiles, [*link, f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]


# Every architecture that has what the kernels use, the newest also as PTX, for those to come.
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
_CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xptxas=-v",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-psabi",
    "-DVITRAIL_CUDA",
    "-DVITRAIL_ISA=cuda",
    "-DVITRAIL_DEVICE_KEY=CUDA",
)


def cuda_architectures(archs: Sequence[str] = ()) -> tuple[str, ...]:
    """What is compiled for: `archs`, or `TORCH_CUDA_ARCH_LIST`, or the GPUs of this machine, or everything supported.

    Args:
        archs: such as `sm_89`.

    Raises:
        BuildError: the list names something that is not an architecture, or one that is too old.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if archs:
        chosen = tuple(re.sub(r"^sm_(\d+)(\d)$", r"\1.\2", name) for name in archs)
    elif named:
        chosen = tuple(named.replace(";", " ").split())
    elif torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        chosen = tuple(f"{major}.{minor}" for major, minor in sorted(capabilities))
    else:
        chosen = CUDA_ARCHITECTURES
    for architecture in chosen:
        match = re.fullmatch(r"(\d+)\.(\d+)(\+PTX)?", architecture)
        if match is None:
            raise BuildError(
                f"architectures must be such as sm_89, got {architecture!r}"
                if archs
                else f"TORCH_CUDA_ARCH_LIST must hold versions such as 8.0;9.0+PTX, got {architecture!r} in {named!r}"
            )
        if int(match[1]) < 8:
            raise BuildError(
                f"the CUDA operators need compute capability 8.0 (Ampere) or newer, got {architecture}; "
                "older GPUs run their definitions in PyTorch: VITRAIL_OPS=reference"
            )
    return chosen


def _cuda_codes(archs: Sequence[str] = ()) -> list[str]:
    """What nvcc makes for the architectures that are asked for."""
    architectures = cuda_architectures(archs)
    chosen = [x.removesuffix("+PTX").replace(".", "") for x in architectures]
    # The front end runs once for all: no kernel uses what only a newer architecture has.
    codes = [f"-gencode=arch=compute_80,code=[{','.join(f'sm_{number}' for number in chosen)}]"]
    return codes + [
        f"-gencode=arch=compute_{number},code=compute_{number}"
        for number, name in zip(chosen, architectures, strict=True)
        if name.endswith("+PTX")
    ]


def _units(
    command: Sequence[str], sources: Sequence[Path], target: Path
) -> tuple[list[list[str]], list[str]]:
    """Commands that compile sources beside `target`, and the objects that they make."""
    objects = [str(target.with_name(f"{source.stem}.o")) for source in sources]
    pairs = zip(sources, objects, strict=True)
    return [[*command, "-c", str(source), "-o", unit] for source, unit in pairs], objects


def cuda_commands(
    compiler: Compiler, target: Path, sanitize: Sequence[str] = ()
) -> tuple[list[list[str]], list[str]]:
    """The same as `compile_commands` for the kernels of GPUs, which no sanitizer of the host knows."""
    # torch's shims for CUDA stand behind USE_CUDA
    flags = (*_CUDA_FLAGS, *_cuda_codes(), "-DUSE_CUDA", _TORCH_VERSION, f"-isystem={_TORCH / 'include'}")
    sources = _sources("cuda", ".cu")
    compiles, objects = _units([*compiler.command, *flags], sources, target)
    lib = _TORCH / "lib"
    libraries = [f"-L{lib}", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-Xlinker", f"-rpath={lib}"]
    return compiles, [*compiler.command, "-shared", "-o", str(target), *objects, *libraries]


# Operators that are nodes of fused files; other runtimes have layers of their own in place of the rest.
PLUGINS = (
    "channel_attention",
    "connectivity_topk",
    "region_route",
    "routed_attention",
    "semantic_attention",
    "sparse_attention",
    "strip_mix",
    "window_attention",
)


def plugin_sources() -> list[Path]:
    """The plugin class, and the kernels that plugins run: those of the forward pass."""
    kernels = [_SOURCES / "cuda" / "attention.cu", *(_SOURCES / "ops" / f"{name}.cu" for name in PLUGINS)]
    return [*kernels, *_standalone_sources("tensorrt")]


def _standalone_sources(device: str) -> list[Path]:
    """What stands between the operators and a runtime without torch."""
    folders = (_SOURCES / "standalone", _SOURCES / device)
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".cpp", ".cu")]


def plugin_commands(
    compiler: Compiler, target: Path, sanitize: Sequence[str] = (), archs: Sequence[str] = ()
) -> tuple[list[list[str]], list[str]]:
    """The same for plugins of TensorRT, which know nothing of torch."""
    command = [*compiler.command, *_CUDA_FLAGS, *_cuda_codes(archs), "-DVITRAIL_STANDALONE"]
    compiles, objects = _units(command, plugin_sources(), target)
    return compiles, [*compiler.command, "-shared", "-cudart=static", "-o", str(target), *objects]


def onnxruntime_sources() -> list[Path]:
    """The custom operators of ONNX Runtime, and the kernels that they run: those of the forward pass."""
    units = [name for operator in PLUGINS for name in (f"{operator}.cpp", f"{operator}_kernel.cpp")]
    shared = [_SOURCES / "core" / "attention_kernel.cpp", _SOURCES / "dispatch" / "capability.cpp"]
    return [*shared, *(_SOURCES / "ops" / name for name in units), *_standalone_sources("onnxruntime")]


def onnxruntime_commands(
    compiler: Compiler, target: Path, sanitize: Sequence[str] = ()
) -> tuple[list[list[str]], list[str]]:
    """The same as `compile_commands` for kernels of ONNX Runtime, which know nothing of torch."""
    compiles, link = _cpu_units(
        compiler, target, onnxruntime_sources(), ("-DVITRAIL_STANDALONE",), (), sanitize
    )
    return compiles, [*link, "-pthread"]


@dataclass(frozen=True)
class Part:
    """One of the libraries: the device it is for, and how it is made."""

    device: str
    """As a tensor's `device.type` says it, or the runtime: `tensorrt`, `onnxruntime`."""
    file: str
    variable: str
    """Of the environment: names a library to load instead."""
    what: str
    find_compiler: Callable[[], Compiler]
    commands: Callable[[Compiler, Path, Sequence[str]], tuple[list[list[str]], list[str]]]
    suffixes: tuple[str, ...]
    """Of sources that it is made of."""


CPU = Part(
    "cpu",
    LIBRARY_NAME,
    "VITRAIL_LIBRARY",
    "the CPU operators with {} (once; one to four minutes)",
    find_compiler,
    compile_commands,
    (".cpp", ".h"),
)
CUDA = Part(
    "cuda",
    CUDA_LIBRARY_NAME,
    "VITRAIL_CUDA_LIBRARY",
    "the CUDA operators with {} (once; some minutes)",
    find_cuda_compiler,
    cuda_commands,
    (".cu", ".h"),
)
PLUGIN = Part(
    "tensorrt",
    PLUGIN_LIBRARY_NAME,
    "VITRAIL_PLUGIN_LIBRARY",
    "the plugins for TensorRT with {} (once; some minutes)",
    find_nvcc,
    plugin_commands,
    (".cu", ".cpp", ".h"),
)
ONNXRUNTIME = Part(
    "onnxruntime",
    ONNXRUNTIME_LIBRARY_NAME,
    "VITRAIL_ONNXRUNTIME_LIBRARY",
    "the kernels for ONNX Runtime with {} (once; one to two minutes)",
    find_compiler,
    onnxruntime_commands,
    (".cpp", ".h"),
)
PARTS = {part.device: part for part in (CPU, CUDA, PLUGIN, ONNXRUNTIME)}


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:16]


def _source_key(sanitize: Sequence[str] = (), part: Part = CPU) -> str:
    """Changes with anything that changes the library, the compiler apart."""
    commands = part.commands(Compiler((), ""), Path(part.file), sanitize)
    sources = [
        path
        for path in sorted(_SOURCES.rglob("*"))
        if path.suffix in part.suffixes and _concerns(path, part.device)
    ]
    contents = [(path.relative_to(_SOURCES).as_posix(), path.read_bytes()) for path in sources]
    torch_key = (torch.__version__, torch.compiled_with_cxx11_abi())
    return _digest(contents, commands, torch_key, platform.system(), platform.machine())


def _compiler_key(compiler: Compiler) -> str:
    return _digest(compiler.command, compiler.version)


# --- where it is kept ---------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where compiled libraries are kept; it need not exist yet."""
    if os.environ.get("VITRAIL_CACHE"):
        return Path(os.environ["VITRAIL_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vitrail"


def _temporary_cache() -> Path:
    """The cache of last resort."""
    return Path(tempfile.gettempdir()) / f"vitrail-{os.getuid()}"


def _is_ours(path: Path) -> bool:
    """Whether nobody else can put a library there: the temporary directory is everybody's."""
    with contextlib.suppress(OSError):
        info = path.lstat()
        return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
    return False


def _writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _cached(part: Part, compiler: Compiler | None) -> Path | None:
    """A library compiled earlier from these sources; by any compiler where there is none now."""
    key = _source_key(part=part)
    for cache in (cache_directory(), _temporary_cache()):
        if cache == _temporary_cache() and not _is_ours(cache):
            continue
        if compiler is not None:
            path = cache / key / _compiler_key(compiler) / part.file
            if path.is_file():
                return path
        elif found := sorted((cache / key).glob(f"*/{part.file}")):
            return found[0]
    return None


def _prebuilt(part: Part) -> Path | None:
    named = os.environ.get(part.variable)
    if named:
        return Path(named).expanduser()
    path = _SOURCES / part.file
    return path if path.is_file() else None


# --- building -----------------------------------------------------------------------------------------------


def build(
    force: bool = False,
    directory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    sanitize: Sequence[str] = (),
    part: Part = CPU,
) -> Path:
    """Compile a library, unless that was done before, and return its path.

    Args:
        force: compile even if the library is there.
        directory: put it there rather than into the cache.
        progress: called with (units done, units in all, what happens) instead of lines on stderr.
        sanitize: sanitizers to compile in, such as `("address", "undefined")`; for tests.
        part: which one; default: that for the CPU.

    Raises:
        BuildError: no compiler, an error while compiling, no room, or a lock that was held for too long.
    """
    compiler = part.find_compiler()
    kept = Path(_source_key(sanitize, part)) / _compiler_key(compiler) / part.file
    target = cache_directory() / kept if directory is None else Path(directory) / part.file
    if directory is None and not target.is_file() and not _writable(target.parent):
        cache = _temporary_cache()
        with contextlib.suppress(OSError):
            cache.mkdir(mode=0o700)
        if not _is_ours(cache):
            raise BuildError(
                f"neither {cache_directory()} nor {cache} can be used: the first is not writable, "
                "the second does not belong to this user alone; set VITRAIL_CACHE to a writable directory"
            )
        target = cache / kept
    if target.is_file() and not force and directory is None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(".lock"), progress is None):
            if not target.is_file() or force or directory is not None:
                _build_locked(part, compiler, target, sanitize, progress or _say)
    except OSError as error:
        raise BuildError(f"the library could not be written to {target.parent}: {error}") from error
    return target


def plugin_library(archs: Sequence[str] = (), progress: Progress | None = None) -> Path:
    """The library of plugins for TensorRT, which is built where there is none yet.

    Args:
        archs: GPU architectures such as `sm_89`; default: as for the CUDA operators.
        progress: see `build`.

    Raises:
        BuildError: see `build`; or `VITRAIL_PLUGIN_LIBRARY` names no file.
    """
    commands = functools.partial(plugin_commands, archs=tuple(archs))
    return _named(PLUGIN) or build(progress=progress, part=replace(PLUGIN, commands=commands))


def onnxruntime_library(progress: Progress | None = None) -> Path:
    """The library of kernels for ONNX Runtime, which is built where there is none yet.

    A session in whose options it is registered runs the nodes of domain `vitrail` of a fused file by these kernels:

        options.register_custom_ops_library(str(onnxruntime_library()))

    Args:
        progress: see `build`.

    Raises:
        BuildError: see `build`; or `VITRAIL_ONNXRUNTIME_LIBRARY` names no file.
    """
    return _named(ONNXRUNTIME) or build(progress=progress, part=ONNXRUNTIME)


def _named(part: Part) -> Path | None:
    """A library that was built elsewhere."""
    named = _prebuilt(part)
    if named is not None and not named.is_file():
        raise BuildError(f"there is no library at {named}, which {part.variable} names; correct or unset it")
    return named


def _say(done: int, total: int, what: str) -> None:
    if done in (0, total):
        print(f"vitrail: {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _lock(path: Path, announce: bool) -> Iterator[None]:
    from filelock import FileLock, Timeout

    text = os.environ.get("VITRAIL_LOCK_TIMEOUT") or "300"
    try:
        patience = float(text)
    except ValueError:
        raise BuildError(f"VITRAIL_LOCK_TIMEOUT must be a number of seconds, got {text!r}") from None
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if announce:
            print(f"vitrail: waiting for another process to compile the operators ({path})", file=sys.stderr)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise BuildError(
                f"another process has held {path} for more than {text} s; "
                "if none is compiling there, delete that file"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _build_locked(
    part: Part, compiler: Compiler, target: Path, sanitize: Sequence[str], progress: Progress
) -> None:
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=target.parent))
    try:
        compiles, link = part.commands(compiler, work / part.file, sanitize)
        total = len(compiles) + 1
        progress(0, total, f"compiling {part.what.format(compiler.version)}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            for done, _ in enumerate(pool.map(_run, compiles), 1):
                progress(done, total, "compiling")
        _run(link)
        os.replace(work / part.file, target)
        progress(total, total, f"compiled in {time.monotonic() - started:.0f} s, kept as {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str]) -> None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if run.returncode != 0:
        output = (run.stderr or run.stdout).strip().splitlines()
        first = next((i for i, line in enumerate(output) if "error" in line.lower()), 0)
        raise BuildError(
            f"{command[0]} failed with exit code {run.returncode}:\n"
            + "\n".join(output[first : first + 12])
            + f"\nThe command was: {shlex.join(command)}\n"
            "A C++17 compiler is needed (GCC 9 or newer, or Clang 12 or newer); CXX names another one"
        )


# --- loading ------------------------------------------------------------------------------------------------


@dataclass
class _State:
    path: Path | None = None
    capability: str | None = None
    reason: str | None = None


_states = {part.device: _State() for part in PARTS.values()}
_loading = threading.Lock()


def _forget_lock() -> None:
    """A forked child must not wait for a thread that it does not have."""
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


def load(device: str = "cpu") -> bool:
    """Load the compiled library for a device, compiling it first where needed; at most one attempt per process.

    Args:
        device: as a tensor's `device.type` says it; there are libraries for `cpu` and `cuda`.

    Returns:
        Whether the compiled operators are there. The first time they are not, a warning says why.

    Raises:
        RuntimeError: they are not there and the mode is `fused`.
    """
    if device not in (CPU.device, CUDA.device):
        return False
    part, state = PARTS[device], _states[device]
    if state.path is not None:
        return True
    wanted = mode()
    if wanted == "reference":
        return False
    with _loading:
        if state.path is None and state.reason is None:
            try:
                _load(part)
            except (BuildError, OSError, RuntimeError) as error:
                state.reason = str(error)
                if wanted != "fused":
                    where = "" if part is CPU else " on the GPU"
                    warnings.warn(
                        f"vitrail runs without its compiled operators{where}, slower and with more memory: {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
    if state.path is None and wanted == "fused":
        raise RuntimeError(f"VITRAIL_OPS is fused, but there are no compiled operators: {state.reason}")
    return state.path is not None


def _load(part: Part) -> None:
    path = _prebuilt(part)
    if path is not None:
        return _load_from(part, path)
    try:
        compiler = part.find_compiler()
    except BuildError:
        compiler = None
    path = _cached(part, compiler)
    if path is not None:
        try:
            return _load_from(part, path)
        except OSError as error:
            damage: OSError | None = error
    else:
        damage = None
    if os.environ.get("VITRAIL_BUILD") == "0":
        reason = f"the cached one does not load ({damage})" if damage else "none was built before"
        raise BuildError(f"VITRAIL_BUILD=0 forbids compiling them, and {reason}; run `vitrail build`")
    _load_from(part, build(force=damage is not None, part=part))


def _load_from(part: Part, path: Path) -> None:
    if not path.is_file():
        raise BuildError(f"there is no library at {path}, which {part.variable} names; correct or unset it")
    torch.ops.load_library(str(path))
    state = _states[part.device]
    if part is CPU:
        name = ctypes.CDLL(str(path)).vitrail_cpu_capability
        name.restype = ctypes.c_char_p
        state.capability = name().decode()
    else:
        state.capability = "compiled"
    state.path = path


@dataclass(frozen=True)
class LibraryStatus:
    """What `vitrail doctor` reports about the compiled operators."""

    mode: str
    loaded: bool
    path: Path | None  # of the library that is, or would be, loaded
    cached: bool  # whether that library exists, so that nothing need be compiled
    compiler: str | None
    compiler_version: str | None
    torch_version: str
    capability: str | None  # instruction set in use, once loaded: default, avx2, avx512 or avx512_bf16
    cache_dir: Path
    reason: str | None  # why the compiled operators are not available, if that is known


def status(device: str = "cpu") -> LibraryStatus:
    """The state of the compiled library for a device or runtime, see `PARTS`; neither compiles nor loads it."""
    part, state = PARTS[device], _states[device]
    reason = state.reason
    compiler = None
    path = state.path or _prebuilt(part)
    try:
        compiler = part.find_compiler()
        path = path or _cached(part, compiler)
    except BuildError as error:
        reason = reason or (None if state.path else str(error))
        with contextlib.suppress(BuildError):
            path = path or _cached(part, None)
    return LibraryStatus(
        mode=mode(),
        loaded=state.path is not None,
        path=path,
        cached=path is not None and path.is_file(),
        compiler=shlex.join(compiler.command) if compiler else None,
        compiler_version=compiler.version if compiler else None,
        torch_version=torch.__version__,
        capability=state.capability,
        cache_dir=cache_directory(),
        reason=reason,
    )
