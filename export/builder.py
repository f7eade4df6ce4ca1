"""Builds a TensorRT engine in a process of its own: `python builder.py`, a request on stdin, the answer on stdout.

TensorRT ends the process where it runs out of memory or meets an error in a plugin, holds a Python signal back until it
is done, and reads the search path for its libraries once, at the start; none of that should be the caller's. Here no
more is imported than the standard library and TensorRT, by the name that the request gives (`tensorrt` or
`tensorrt_rtx`, which have one interface). Request and answer are a line of JSON each; the answer is
`{"ok": ...}` or `{"failed": ...}`. The process ends with the one that started it.
"""

import importlib
import json
import os
import re
import sys
import threading
import time
from typing import Any


class Failed(Exception):
    """The build failed: the kind of reason, and what there is to say about it."""

    def __init__(self, kind: str, **facts: Any):
        super().__init__(kind)
        self.answer = {"kind": kind, **facts}


def main() -> int:
    """Read the request, carry it out, answer."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.loads(sys.stdin.readline())
    sys.path[:] = request["search"]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = {"ok": {"describe": describe, "build": build}[request["task"]](request)}
    except Failed as failure:
        answer = {"failed": failure.answer}
    except OSError as error:
        answer = {
            "failed": {"kind": "os", "errno": error.errno, "text": error.strerror, "file": error.filename}
        }
    except MemoryError:
        answer = {"failed": {"kind": "memory"}}
    print(json.dumps(answer), file=out, flush=True)
    return 0 if "ok" in answer else 1


def _end_with_parent() -> None:
    """Stop when the other end of stdin closes, which it does however the parent ends."""
    os.read(0, 1)
    os._exit(1)


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """The library's version and the architectures that it can be asked for, none where it takes the GPU at hand.

    Raises:
        Failed: the library can't be loaded.
    """
    trt = _library(request["library"])
    members = trt.ComputeCapability.__members__ if request["library"] == "tensorrt_rtx" else {}
    archs = [name for name in members if re.fullmatch(r"SM\d+", name)]
    return {"version": trt.__version__, "archs": sorted(archs, key=lambda name: int(name[2:]))}


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse the ONNX file, build the engine, write it. Returns what there is to know of it.

    Raises:
        Failed: the library can't be loaded, doesn't take the file or the request, or can't build it; or the engine
            can't be written.
        OSError: the timing cache can't be read.
    """
    trt = _library(request["library"])
    log = _log(trt)
    for path in request["plugins"]:
        if trt.get_plugin_registry().load_library(path) is None:
            raise Failed("plugin", path=path, errors=log.errors)
    try:
        builder = trt.Builder(log)
    except Exception as error:  # the bindings' own, where there is no driver
        raise Failed("build", errors=[*log.errors, str(error)]) from error
    builder.max_threads = request["threads"]
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["onnx"]):
        raise Failed("parse", nodes=[_refused(parser.get_error(i)) for i in range(parser.num_errors)])
    config, cache = _config(trt, request, builder)
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        raise Failed("build", errors=log.errors)
    write(request["engine"], memoryview(plan), request["target"])
    if cache is not None:
        write(request["new_cache"], memoryview(cache.serialize()), request["new_cache"])
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return {
        "seconds": seconds,
        "network_layers": len(layers),
        "plugins": [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3],
        "warnings": log.warnings,
        "lines": log.lines,
        "inspected": _inspected(trt, request, log, plan),
    }


def write(path: str, data: memoryview, target: str) -> None:
    """Write a file that is on its way to `target`.

    Raises:
        Failed: it can't be written.
    """
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        facts = {"errno": error.errno, "text": error.strerror, "file": target}
        raise Failed("write", size=data.nbytes, **facts) from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a wheel without its libraries fails in many ways
        raise Failed("library", text=f"{type(error).__name__}: {error}") from error


def _log(trt: Any) -> Any:
    """A logger that keeps errors, warnings, and the lines that describe the engine."""
    telling = re.compile(r"Layers:|Total (Activation|Weights) Memory: ")

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif telling.match(message):
                self.lines.append(message)

    return Log()


def _config(trt: Any, request: dict[str, Any], builder: Any) -> tuple[Any, Any]:
    """The builder's configuration, and the timing cache in it, None without one."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not request["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request["workspace"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    if request["archs"]:
        config.num_compute_capabilities = len(request["archs"])
        for i, name in enumerate(request["archs"]):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], i)
    if request["plugins"]:
        config.plugins_to_serialize = request["plugins"]
    cache = None
    if request["timing_cache"]:
        known = b""
        if os.path.exists(request["timing_cache"]):
            with open(request["timing_cache"], "rb") as file:
                known = file.read()
        cache = config.create_timing_cache(known)
        config.set_timing_cache(cache, ignore_mismatch=False)
    if request["profile"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["profile"].items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    return config, cache


def _refused(error: Any) -> dict[str, Any]:
    return {
        "name": error.node_name(),
        "operator": error.node_operator(),
        "code": str(error.code()).rpartition(".")[2],
        "text": error.desc(),
        "by": error.func(),
        "functions": [str(name) for name in error.local_function_stack()],
    }


def _inspected(trt: Any, request: dict[str, Any], log: Any, plan: Any) -> Any:
    """What the engine says of itself, where the log has no list of its layers; that takes a GPU."""
    if any(line.startswith("Layers:") for line in log.lines):
        return None
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = bool(request["plugins"])
    engine = runtime.deserialize_cuda_engine(memoryview(plan))
    if engine is None:
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"layers": json.loads(text)["Layers"], "activation": engine.device_memory_size_v2}


if __name__ == "__main__":
    sys.exit(main())
