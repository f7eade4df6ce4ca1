"""What runs here, and why: versions, machine, the path of every operator, and what would make it faster."""

import contextlib
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .ops import library
from .ops.library import LibraryStatus

_PACKAGES = ("vitrail", "torch", "timm", "numpy", "onnx", "onnxscript", "onnxruntime", "fvcore")


@dataclass(frozen=True)
class OperatorPath:
    """Which implementation of an operator runs on a device, `cpu` or `cuda`."""

    name: str
    device: str
    compiled: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`."""

    versions: dict[str, str]
    machine: dict[str, Any]
    library: LibraryStatus
    cuda_library: LibraryStatus
    onnxruntime_library: LibraryStatus
    operators: list[OperatorPath]
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _system() -> str:
    """Like `platform.platform()`, without what a host's own build adds to the kernel's version."""
    kernel = re.match(r"[\d.]*", platform.release())
    version = kernel.group() if kernel else ""
    parts = (platform.system(), version, platform.machine(), "".join(platform.libc_ver()))
    return "-".join(part for part in parts if part)


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "system": _system(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "torch_cuda": torch.version.cuda,
    }


def _names() -> list[str]:
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vitrail::"))


def _operators(status: LibraryStatus, device: str) -> list[OperatorPath]:
    paths = []
    for name in _names():
        compiled = library.has_kernel(name, device.upper()) and status.mode != "reference"
        if compiled:
            reason = status.capability or "compiled"
        elif status.mode == "reference":
            reason = "VITRAIL_OPS=reference"
        elif status.loaded:
            reason = "has no compiled kernel"
        else:
            reason = status.reason or "the library is not built yet"
        paths.append(OperatorPath(name.removeprefix("vitrail::").split(".")[0], device, compiled, reason))
    return paths


def _advice(status: LibraryStatus, cuda: LibraryStatus, machine: dict[str, Any]) -> list[str]:
    advice = []
    if status.mode == "reference":
        advice.append("VITRAIL_OPS=reference is set: unset it to use compiled operators")
    elif not status.loaded and status.reason:
        advice.append(status.reason)
    elif not status.loaded:
        advice.append("run `vitrail build`: it compiles the operators now, instead of at their first use")
    if machine["threads"] < machine["cores"]:
        cause = "OMP_NUM_THREADS is set" if "OMP_NUM_THREADS" in os.environ else "torch was told or chose so"
        advice.append(f"torch uses {machine['threads']} of {machine['cores']} cores ({cause})")
    if machine["cuda"] and status.mode != "reference" and not cuda.loaded:
        advice.append(
            f"on the GPU: {cuda.reason}"
            if cuda.reason
            else "run `vitrail build`: it compiles the operators for the GPU now, instead of at their first use"
        )
    if shutil.which("nvidia-smi") and not machine["cuda"]:
        advice.append(
            "there is an NVIDIA driver, but this torch cannot use it: see https://pytorch.org/get-started"
        )
    return advice


def diagnose() -> Diagnosis:
    """Look at this installation. Loads the compiled operators where they are built; builds nothing."""
    machine = _machine()
    devices = ("cpu", "cuda") if machine["cuda"] else ("cpu",)
    for device in devices:
        status = library.status(device)
        if status.cached and not status.loaded and status.mode != "reference":
            with contextlib.suppress(RuntimeError):  # in mode `fused`; the status has the reason
                library.load(device)
    cpu, cuda = library.status("cpu"), library.status("cuda")
    paths = [path for device in devices for path in _operators(cpu if device == "cpu" else cuda, device)]
    runtime = library.status("onnxruntime")
    return Diagnosis(_versions(), machine, cpu, cuda, runtime, paths, _advice(cpu, cuda, machine))
