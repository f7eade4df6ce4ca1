"""The compiled library: which path the operators take, and how the library is found, built and loaded.

The library is plain C++ on the LibTorch stable ABI, without a Python ABI. In this order it is taken from
`VITRAIL_LIBRARY` (a path), from the package itself (a wheel may carry it), or from the cache, into which it
is compiled at first use; never at import. Where none of that works, one warning says why, and the PyTorch
definitions run instead.

Environment:
    VITRAIL_OPS           `auto` (compiled where possible), `fused` (compiled or an error) or `reference`.
    VITRAIL_BUILD         `0` forbids compiling at first use.
    VITRAIL_LIBRARY       path of a library to load instead of any other.
    VITRAIL_CACHE         where libraries are kept; default $XDG_CACHE_HOME/vitrail or ~/.cache/vitrail.
    VITRAIL_LOCK_TIMEOUT  seconds to wait for another process that is compiling; default 300.
    CXX                   the compiler; default: the first of c++, g++, clang++.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
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
from dataclasses import dataclass
from pathlib import Path

import torch

MODES = ("auto", "fused", "reference")
LIBRARY_NAME = "libvitrail.so"

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
_TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{_TORCH / 'include'}")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")

Progress = Callable[[int, int, str], None]


class BuildError(RuntimeError):
    """The library could not be compiled; the message says why and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that runs it and the first line of its `--version`."""

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
        try:
            run = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"the C++ compiler {shlex.join(command)!r} does not run: {error}") from error
        return Compiler(tuple(command), (run.stdout or run.stderr).partition("\n")[0].strip())
    if named:
        raise BuildError(f"the C++ compiler {named[0]!r}, named by CXX, was not found; correct or unset CXX")
    raise BuildError(
        "no C++ compiler was found; install one (Debian, Ubuntu: apt install g++; "
        "Fedora: dnf install gcc-c++; macOS: xcode-select --install; "
        "conda: conda install cxx-compiler) or name it in CXX"
    )


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


def compile_commands(
    compiler: Compiler, target: Path, sanitize: Sequence[str] = ()
) -> tuple[list[list[str]], list[str]]:
    """The commands that compile each unit beside `target`, and the one that links them to `target`.

    `*_kernel.cpp` is compiled once per instruction set, any other source once.
    """
    sanitizer = [f"-fsanitize={','.join(sanitize)}"] if sanitize else []
    extra = [*sanitizer, "-fno-sanitize-recover=all", "-g", "-O1"] if sanitize else ["-O3"]
    compiles, objects = [], []

    def unit(source: Path, name: str, *flags: str) -> None:
        objects.append(str(target.with_name(f"{name}.o")))
        compiles.append([*compiler.command, *_FLAGS, *extra, *flags, "-c", str(source), "-o", objects[-1]])

    sources = sorted(_SOURCES.rglob("*.cpp"))
    for name, flags in _instruction_sets().items():
        for source in sources:
            if source.stem.endswith("_kernel"):
                unit(source, f"{source.stem}.{name}", f"-DVITRAIL_ISA={name}", *flags)
    for source in sources:
        if not source.stem.endswith("_kernel"):
            unit(source, source.stem, *_TORCH_FLAGS)
    lib = _TORCH / "lib"
    libraries = [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
    return compiles, [*compiler.command, "-shared", *sanitizer, "-o", str(target), *objects, *libraries]


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:16]


def _source_key(sanitize: Sequence[str] = ()) -> str:
    """Changes with anything that changes the library, the compiler apart."""
    commands = compile_commands(Compiler((), ""), Path(LIBRARY_NAME), sanitize)
    sources = [path for path in sorted(_SOURCES.rglob("*")) if path.suffix in (".cpp", ".h")]
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


def _cached(compiler: Compiler | None) -> Path | None:
    """A library compiled earlier from these sources; by any compiler where there is none now."""
    key = _source_key()
    for cache in (cache_directory(), _temporary_cache()):
        if cache == _temporary_cache() and not _is_ours(cache):
            continue
        if compiler is not None:
            path = cache / key / _compiler_key(compiler) / LIBRARY_NAME
            if path.is_file():
                return path
        elif found := sorted((cache / key).glob(f"*/{LIBRARY_NAME}")):
            return found[0]
    return None


def _prebuilt() -> Path | None:
    named = os.environ.get("VITRAIL_LIBRARY")
    if named:
        return Path(named).expanduser()
    path = _SOURCES / LIBRARY_NAME
    return path if path.is_file() else None


# --- building -----------------------------------------------------------------------------------------------


def build(
    force: bool = False,
    directory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    sanitize: Sequence[str] = (),
) -> Path:
    """Compile the library, unless that was done before, and return its path.

    Args:
        force: compile even if the library is there.
        directory: put it there rather than into the cache.
        progress: called with (units done, units in all, what happens) instead of lines on stderr.
        sanitize: sanitizers to compile in, such as `("address", "undefined")`; for tests.

    Raises:
        BuildError: no compiler, an error while compiling, no room, or a lock that was held for too long.
    """
    compiler = find_compiler()
    kept = Path(_source_key(sanitize)) / _compiler_key(compiler) / LIBRARY_NAME
    target = cache_directory() / kept if directory is None else Path(directory) / LIBRARY_NAME
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
                _build_locked(compiler, target, sanitize, progress or _say)
    except OSError as error:
        raise BuildError(f"the library could not be written to {target.parent}: {error}") from error
    return target


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


def _build_locked(compiler: Compiler, target: Path, sanitize: Sequence[str], progress: Progress) -> None:
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=target.parent))
    try:
        compiles, link = compile_commands(compiler, work / LIBRARY_NAME, sanitize)
        total = len(compiles) + 1
        progress(0, total, f"compiling the CPU operators with {compiler.version} (once; one to four minutes)")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            for done, _ in enumerate(pool.map(_run, compiles), 1):
                progress(done, total, "compiling")
        _run(link)
        os.replace(work / LIBRARY_NAME, target)
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


_state = _State()
_loading = threading.Lock()


def _forget_lock() -> None:
    """A forked child must not wait for a thread that it does not have."""
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


def load() -> bool:
    """Load the compiled library, compiling it first where needed; at most one attempt per process.

    Returns:
        Whether the compiled operators are there. The first time they are not, a warning says why.

    Raises:
        RuntimeError: they are not there and the mode is `fused`.
    """
    if _state.path is not None:
        return True
    wanted = mode()
    if wanted == "reference":
        return False
    with _loading:
        if _state.path is None and _state.reason is None:
            try:
                _load()
            except (BuildError, OSError, RuntimeError) as error:
                _state.reason = str(error)
                if wanted != "fused":
                    warnings.warn(
                        f"vitrail runs without its compiled operators, slower and with more memory: {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
    if _state.path is None and wanted == "fused":
        raise RuntimeError(f"VITRAIL_OPS is fused, but there are no compiled operators: {_state.reason}")
    return _state.path is not None


def _load() -> None:
    path = _prebuilt()
    if path is not None:
        return _load_from(path)
    try:
        compiler = find_compiler()
    except BuildError:
        compiler = None
    path = _cached(compiler)
    if path is not None:
        try:
            return _load_from(path)
        except OSError as error:
            damage: OSError | None = error
    else:
        damage = None
    if os.environ.get("VITRAIL_BUILD") == "0":
        reason = f"the cached one does not load ({damage})" if damage else "none was built before"
        raise BuildError(f"VITRAIL_BUILD=0 forbids compiling them, and {reason}; run `vitrail build`")
    _load_from(build(force=damage is not None))


def _load_from(path: Path) -> None:
    if not path.is_file():
        raise BuildError(f"there is no library at {path}, which VITRAIL_LIBRARY names; correct or unset it")
    torch.ops.load_library(str(path))
    name = ctypes.CDLL(str(path)).vitrail_cpu_capability
    name.restype = ctypes.c_char_p
    _state.capability = name().decode()
    _state.path = path


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


def status() -> LibraryStatus:
    """The state of the compiled library; neither compiles nor loads it."""
    reason = _state.reason
    compiler = None
    try:
        compiler = find_compiler()
    except BuildError as error:
        reason = reason or (None if _state.path else str(error))
    path = _state.path or _prebuilt() or _cached(compiler)
    return LibraryStatus(
        mode=mode(),
        loaded=_state.path is not None,
        path=path,
        cached=path is not None and path.is_file(),
        compiler=shlex.join(compiler.command) if compiler else None,
        compiler_version=compiler.version if compiler else None,
        torch_version=torch.__version__,
        capability=_state.capability,
        cache_dir=cache_directory(),
        reason=reason,
    )
