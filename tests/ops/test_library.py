"""Finding, building and loading the compiled library; each case in a process of its own where state matters.

A stand-in for the compiler, which copies the library that was really compiled, keeps them quick.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vitrail.ops import library
from vitrail.ops.library import BuildError, Compiler

# The module alone: it needs nothing of the package, whose import would take most of the time.
ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("library", {library.__file__!r})
library = sys.modules["library"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
"""


@pytest.fixture(scope="module")
def real() -> Path:
    """The library as the real compiler makes it."""
    return library.build()


@pytest.fixture
def compiler(tmp_path: Path, real: Path) -> Path:
    """A stand-in compiler: notes each call in `calls`, takes a moment, links by copying the real library."""
    path = tmp_path / "bin" / "compiler"
    path.parent.mkdir()
    path.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        if [ "$1" = --version ]; then cat {tmp_path}/version; exit; fi
        kind=compile
        for argument in "$@"; do
            [ "$argument" = -shared ] && kind=link
            [ "$previous" = -o ] && target=$argument
            previous=$argument
        done
        echo "$kind" >> {tmp_path}/calls
        sleep 0.2
        if [ $kind = link ]; then cp {real} "$target"; else : > "$target"; fi
        """)
    )
    path.chmod(0o755)
    (tmp_path / "version").write_text("stand-in 1.0\n")
    (tmp_path / "calls").touch()
    return path


@pytest.fixture
def environment(tmp_path: Path, compiler: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VITRAIL_")}
    (tmp_path / "tmp").mkdir()
    return {
        **kept,
        "CXX": str(compiler),
        "VITRAIL_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "tmp"),
        "OMP_NUM_THREADS": "1",
    }


def python(code: str, environment: dict[str, str], **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE + textwrap.dedent(code)]
    return subprocess.run(
        command, env={**environment, **changes}, capture_output=True, text=True, timeout=300, check=False
    )


def succeeds(code: str, environment: dict[str, str], **changes: str) -> subprocess.CompletedProcess[str]:
    run = python(code, environment, **changes)
    assert run.returncode == 0, run.stderr
    return run


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().split()


# --- modes --------------------------------------------------------------------------------------------------


def test_use_ops_holds_inside_its_block_only():
    before = library.mode()
    with library.use_ops("reference"):
        assert library.mode() == "reference"
        with library.use_ops("fused"):
            assert library.mode() == "fused"
        assert library.mode() == "reference"
    assert library.mode() == before


def test_use_ops_is_left_when_the_block_raises():
    before = library.mode()
    with pytest.raises(KeyError), library.use_ops("reference"):
        raise KeyError
    assert library.mode() == before


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="auto, fused, reference, got 'fast'"), library.use_ops("fast"):
        pass
    with pytest.raises(ValueError, match="got 'fast'"):
        library.set_mode("fast")


def test_an_unknown_mode_in_the_environment_is_refused_when_an_operator_runs(environment):
    run = python("library.load()", environment, VITRAIL_OPS="quick")
    assert "ValueError: VITRAIL_OPS must be one of auto, fused, reference, got 'quick'" in run.stderr


def test_an_empty_mode_in_the_environment_is_as_none(environment):
    assert succeeds("print(library.mode())", environment, VITRAIL_OPS="").stdout == "auto\n"


def test_reference_mode_neither_compiles_nor_loads(environment, tmp_path):
    run = succeeds("print(library.load(), library.status().loaded)", environment, VITRAIL_OPS="reference")
    assert run.stdout == "False False\n"
    assert run.stderr == ""
    assert calls(tmp_path) == []


# --- building at first use ----------------------------------------------------------------------------------


def test_import_compiles_nothing_and_prints_nothing(environment, tmp_path):
    command = [sys.executable, "-c", "import vitrail"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout + run.stderr == ""
    assert not (tmp_path / "cache").exists()


def test_the_first_call_compiles_with_two_lines_on_stderr(environment, tmp_path):
    run = succeeds(
        "library.load(); s = library.status(); print(s.loaded, s.cached, s.capability is not None)",
        environment,
    )
    assert run.stdout == "True True True\n"
    first, second = run.stderr.splitlines()
    assert first.startswith("vitrail: compiling the CPU operators with stand-in 1.0")
    assert second.startswith("vitrail: compiled in ")
    assert str(tmp_path / "cache") in second
    assert calls(tmp_path).count("link") == 1


def test_the_second_process_finds_what_the_first_compiled(environment, tmp_path):
    succeeds("library.load()", environment)
    before = calls(tmp_path)
    assert succeeds("library.load()", environment, VITRAIL_OPS="fused").stderr == ""
    assert calls(tmp_path) == before


def test_nothing_but_the_library_and_its_lock_is_left_in_the_cache(environment, tmp_path):
    succeeds("library.load()", environment)
    files = {path.name for path in (tmp_path / "cache").rglob("*") if not path.is_dir()}
    assert files <= {"libvitrail.so", ".lock"}


def test_processes_at_once_compile_once(environment, tmp_path):
    command = [sys.executable, "-c", ALONE + "print(library.load())"]
    runs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [run.communicate(timeout=300)[0] for run in runs] == ["True\n"] * 3
    assert calls(tmp_path).count("link") == 1


def test_threads_at_once_compile_once(environment, tmp_path):
    code = """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as pool:
        print([future.result() for future in [pool.submit(library.load) for _ in range(4)]])
    """
    assert succeeds(code, environment).stdout == "[True, True, True, True]\n"
    assert calls(tmp_path).count("link") == 1


def test_a_forked_child_can_load_while_the_parent_was_loading(environment):
    code = """
    import os, threading, time
    thread = threading.Thread(target=library.load)
    thread.start()
    time.sleep(0.3)  # the parent's thread holds the lock, and compiles
    child = os.fork()
    if child == 0:
        os._exit(0 if library.load() else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    thread.join()
    """
    assert succeeds(code, environment).stdout == "0\n"


def test_another_compiler_version_compiles_anew(environment, tmp_path):
    succeeds("library.load()", environment)
    (tmp_path / "version").write_text("stand-in 2.0\n")
    succeeds("library.load()", environment)
    assert calls(tmp_path).count("link") == 2


def test_without_a_compiler_what_is_cached_is_used(environment, tmp_path, compiler):
    succeeds("library.load()", environment)
    del environment["CXX"]
    run = succeeds("print(library.load())", environment, PATH=str(tmp_path / "nowhere"))
    assert run.stdout == "True\n"
    assert run.stderr == ""


def test_a_damaged_library_is_compiled_anew(environment, tmp_path):
    succeeds("library.load()", environment)
    (cached,) = (tmp_path / "cache").rglob("libvitrail.so")
    cached.write_bytes(b"\x7fELF but no more")
    assert succeeds("print(library.load())", environment).stdout == "True\n"
    assert calls(tmp_path).count("link") == 2


def test_the_key_follows_sources_flags_and_torch(monkeypatch, tmp_path):
    keys = {library._source_key(), library._source_key(("address",))}
    (tmp_path / "a.cpp").write_text("int one;")
    monkeypatch.setattr(library, "_SOURCES", tmp_path)
    keys.add(library._source_key())
    (tmp_path / "a.cpp").write_text("int two;")
    keys.add(library._source_key())
    (tmp_path / "a.h").write_text("")
    keys.add(library._source_key())
    monkeypatch.setattr("torch.__version__", "99.0")
    keys.add(library._source_key())
    monkeypatch.setattr("platform.machine", lambda: "other")
    keys.add(library._source_key())
    assert len(keys) == 7
    assert library._source_key() in keys


# --- when it cannot be built --------------------------------------------------------------------------------


def falls_back(environment: dict[str, str], reason: str, **changes: str) -> None:
    """Auto mode: no library and one warning. Fused mode: an error. Both give the reason."""
    code = """
    print(library.load(), library.load(), library.status().loaded)
    library.set_mode("fused")
    library.load()
    """
    run = python(code, environment, **changes)
    assert run.stdout == "False False False\n"
    assert run.stderr.count("RuntimeWarning: vitrail runs without its compiled operators") == 1
    assert "RuntimeError: VITRAIL_OPS is fused, but there are no compiled operators" in run.stderr
    assert run.stderr.count(reason) == 2


def test_the_operator_runs_its_definition_where_there_is_no_library(environment):
    code = """
    import torch
    from vitrail.ops import library, routed_attention, use_ops
    q = torch.randn(1, 4, 4, 8)
    routes = torch.zeros(1, 4, 1, dtype=torch.int64)
    out = routed_attention(q, q, q, routes, (2, 2), 2)
    with use_ops("reference"):
        torch.testing.assert_close(out, routed_attention(q, q, q, routes, (2, 2), 2))
    print(library.status().loaded)
    with use_ops("fused"):
        routed_attention(q, q, q, routes, (2, 2), 2)
    """
    run = python(code, environment, VITRAIL_BUILD="0")
    assert run.stdout == "False\n"
    assert "RuntimeError: VITRAIL_OPS is fused" in run.stderr


def test_no_compiler_falls_back_and_says_what_to_install(environment, tmp_path):
    del environment["CXX"]
    falls_back(environment, "apt install g++", PATH=str(tmp_path / "nowhere"))


def test_a_missing_compiler_named_by_cxx_falls_back(environment):
    falls_back(environment, "'no-such-compiler', named by CXX, was not found", CXX="no-such-compiler -m64")


def test_a_compiler_that_fails_falls_back_with_its_words(environment, compiler):
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\necho "fatal error: no such header" >&2\nexit 3\n'
    )
    falls_back(environment, "exit code 3:\nfatal error: no such header")


def test_a_compiler_that_does_not_run_falls_back(environment, compiler):
    compiler.write_text("#!/no/such/interpreter\n")
    falls_back(environment, "does not run")


def test_a_failed_build_leaves_nothing_behind_and_is_not_tried_again(environment, tmp_path, compiler):
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho compile >> {tmp_path}/calls\nexit 1\n',
    )
    code = f"""
    def count():
        return len(open({str(tmp_path / "calls")!r}).readlines())
    library.load(); first = count(); library.load(); print(first > 0, count() - first)
    """
    assert succeeds(code, environment).stdout == "True 0\n"
    assert not [
        path for path in (tmp_path / "cache").rglob("*") if path.name not in (".lock",) and not path.is_dir()
    ]
    assert not list((tmp_path / "cache").rglob(".build-*"))


def test_building_can_be_forbidden(environment, tmp_path):
    falls_back(environment, "VITRAIL_BUILD=0 forbids compiling them", VITRAIL_BUILD="0")
    assert calls(tmp_path) == []


def test_what_was_built_before_is_used_where_building_is_forbidden(environment):
    succeeds("library.build()", environment)
    assert succeeds("print(library.load())", environment, VITRAIL_BUILD="0").stdout == "True\n"


def test_a_held_lock_is_waited_for_and_then_named(environment, tmp_path):
    code = """
    from filelock import FileLock
    from pathlib import Path
    kept = library._source_key(), library._compiler_key(library.find_compiler())
    target = library.cache_directory().joinpath(*kept)
    target.mkdir(parents=True)
    with FileLock(target / ".lock"):
        print("held", flush=True)
        import time; time.sleep(60)
    """
    command = [sys.executable, "-c", ALONE + textwrap.dedent(code)]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        run = succeeds("library.load()", environment, VITRAIL_LOCK_TIMEOUT="0.5")
    finally:
        holder.kill()
        holder.communicate()
    assert "vitrail: waiting for another process" in run.stderr
    assert "for more than 0.5 s; if none is compiling there, delete that file" in run.stderr
    assert str(tmp_path / "cache") in run.stderr


def test_a_lock_timeout_that_is_no_number_is_named(environment):
    falls_back(
        environment,
        "VITRAIL_LOCK_TIMEOUT must be a number of seconds, got 'soon'",
        VITRAIL_LOCK_TIMEOUT="soon",
    )


def test_an_unusable_cache_gives_way_to_the_temporary_directory(environment, tmp_path):
    (tmp_path / "cache").write_text("a file, so that no directory can be made here, not even by root")
    run = succeeds("library.load(); print(library.status().path)", environment)
    assert run.stdout.startswith(str(tmp_path / "tmp" / f"vitrail-{os.getuid()}"))
    assert succeeds("print(library.load())", environment).stdout == "True\n"
    assert calls(tmp_path).count("link") == 1


@pytest.mark.parametrize("intruder", ["writable", "link"])
def test_a_temporary_directory_that_others_could_write_to_is_not_used(environment, tmp_path, intruder):
    (tmp_path / "cache").touch()
    path = tmp_path / "tmp" / f"vitrail-{os.getuid()}"
    if intruder == "link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir()
        path.chmod(0o777)
    falls_back(environment, "the second does not belong to this user alone")


# --- libraries from elsewhere -------------------------------------------------------------------------------


def test_a_library_named_in_the_environment_is_loaded(environment, tmp_path, real):
    run = succeeds("library.load(); print(library.status().path)", environment, VITRAIL_LIBRARY=str(real))
    assert run.stdout == f"{real}\n"
    assert calls(tmp_path) == []


def test_a_missing_library_named_in_the_environment_falls_back(environment):
    falls_back(
        environment, "which VITRAIL_LIBRARY names; correct or unset it", VITRAIL_LIBRARY="/no/such/library.so"
    )


def test_a_library_beside_the_sources_is_preferred(environment, tmp_path, real):
    code = f"""
    library._SOURCES = __import__("pathlib").Path({str(tmp_path)!r})
    library.load(); print(library.status().path)
    """
    (tmp_path / "libvitrail.so").write_bytes(real.read_bytes())
    assert succeeds(code, environment).stdout == f"{tmp_path}/libvitrail.so\n"
    assert calls(tmp_path) == []


# --- build() ------------------------------------------------------------------------------------------------


def test_build_reports_its_progress_and_then_says_nothing(environment, tmp_path):
    code = """
    steps = []
    path = library.build(progress=lambda done, total, what: steps.append((done, total)))
    total = steps[0][1]
    print([done for done, _ in steps] == list(range(total + 1)), path.is_file())
    library.build(progress=lambda *_: print("again"))
    library.build(force=True, progress=lambda done, *_: print("forced") if done == 0 else None)
    """
    run = succeeds(code, environment)
    assert run.stdout == "True True\nforced\n"
    assert run.stderr == ""


def test_build_into_a_directory(environment, tmp_path):
    run = succeeds(f"print(library.build(directory={str(tmp_path / 'there')!r}))", environment)
    assert run.stdout == f"{tmp_path}/there/libvitrail.so\n"
    assert not (tmp_path / "cache").exists()


def test_build_into_an_impossible_directory_is_a_build_error(environment, tmp_path):
    (tmp_path / "file").touch()
    run = python(f"library.build(directory={str(tmp_path / 'file' / 'there')!r})", environment)
    assert "BuildError: the library could not be written to" in run.stderr


def test_status_neither_compiles_nor_loads_nor_writes(environment, tmp_path):
    run = succeeds(
        "s = library.status(); print(s.loaded, s.cached, s.compiler_version, s.reason)", environment
    )
    assert run.stdout == "False False stand-in 1.0 None\n"
    assert calls(tmp_path) == []
    assert not (tmp_path / "cache").exists()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("part", "source"),
    [
        (library.CPU, "ops/routed_attention.cpp"),
        (library.CPU, "ops/routed_attention_kernel.cpp"),
        (library.ONNXRUNTIME, "onnxruntime/library.cpp"),
        (library.ONNXRUNTIME, "ops/routed_attention.cpp"),
    ],
)
def test_the_sources_compile_without_a_warning(part, source, tmp_path):
    commands, _ = part.commands(library.find_compiler(), tmp_path / part.file, ())
    chosen = [command for command in commands if any(part.endswith(source) for part in command)]
    assert chosen
    for command in chosen:
        run = subprocess.run([*command, "-O0", "-fsyntax-only", "-Werror"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_the_library_needs_no_python():
    """One binary for every Python: neither its symbols nor its libraries."""
    data = library.build().read_bytes()
    assert b"libpython" not in data
    assert b"PyObject" not in data


def test_wide_instructions_stay_in_functions_of_their_own(tmp_path):
    """A function that two instruction sets share could crash a processor that lacks the wider one."""
    commands, _ = library.compile_commands(library.find_compiler(), tmp_path / "libvitrail.so")
    wide = [command for command in commands if "-mavx2" in command]
    for command in wide[:1]:
        subprocess.run([*command, "-O0"], check=True)
        names = subprocess.run(["nm", "-C", command[-1]], capture_output=True, text=True, check=True).stdout
        shared = [
            line for line in names.splitlines() if line[17:18] == "W"
        ]  # weak functions; V and u are data
        assert shared
        assert not [line for line in shared if "vitrail::avx" not in line]


# --- kernels for ONNX Runtime -----------------------------------------------------------------------------------------


def test_kernels_for_onnx_runtime_are_those_of_the_forward_pass_and_know_nothing_of_torch():
    compiles, link = library.onnxruntime_commands(Compiler(("c++",), ""), Path("libvitrail_onnxruntime.so"))
    units = {Path(command[command.index("-o") + 1]).stem for command in compiles}
    hosts = {*library.PLUGINS, "capability", "library", "node", "operators", "widen"}
    kernels = {
        f"{name}_kernel.{instructions}"
        for name in ("attention", *library.PLUGINS)
        for instructions in library._instruction_sets()
    }
    assert units == hosts | kernels
    assert not [part for command in [*compiles, link] for part in command if "torch" in part]


def test_a_library_of_kernels_that_the_environment_names_is_taken_or_missed_by_name(tmp_path, monkeypatch):
    path = tmp_path / "kernels.so"
    monkeypatch.setenv("VITRAIL_ONNXRUNTIME_LIBRARY", str(path))
    with pytest.raises(
        BuildError, match=r"no library at .*kernels\.so, which VITRAIL_ONNXRUNTIME_LIBRARY names"
    ):
        library.onnxruntime_library()
    path.write_bytes(b"")
    assert library.onnxruntime_library() == path
