"""Running a TensorRT engine: images in, outputs by name, and how long that takes. All of it needs a GPU."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .commit import finish
from .compare import Comparison, Plan
from .engine_report import Timing
from .errors import ExportError
from .graph import TensorInfo
from .images import Preprocessing
from .measure import VerificationReport
from .subjects import EngineSubject, ModuleSubject, images_shape

LIBRARIES = ("tensorrt", "tensorrt_rtx")
"""Python modules that build and run engines; an engine runs in the one that built it."""

NOT_RUN = "torch sees no GPU here: the engine is built, and has not run"

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types by TensorRT's names for them."""


class NoGPUError(ExportError):
    """There is no GPU to run an engine on."""


def choose_library(wanted: str | None = None, built_by: str | None = None) -> str:
    """The module to use: the wanted one, else the one that built the engine, else `tensorrt` where there is a GPU.

    Raises:
        ValueError: `wanted` is neither `tensorrt` nor `tensorrt_rtx`.
        ImportError: it is not installed, or none is.
    """
    if wanted not in (None, *LIBRARIES):
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, got {wanted!r}")
    present = [name for name in LIBRARIES if find_spec(name)]
    if not present:
        raise ImportError(
            "TensorRT engines need a library that is not installed: pip install 'vitrail[tensorrt]' (TensorRT-RTX, "
            "which builds without a GPU), or NVIDIA's tensorrt"
        )
    needed = wanted or built_by
    if needed and needed not in present:
        raise ImportError(f"{needed} is not installed: pip install {needed.replace('_', '-')}")
    if needed:
        return needed
    return "tensorrt_rtx" if "tensorrt_rtx" in present and not torch.cuda.is_available() else present[0]


class Engine:
    """An engine on the GPU, ready to run, in one thread at a time.

    Attributes:
        path: the file.
        device: the GPU.
        library: the module that runs it.
        input, outputs: names, element types and shapes; open dimensions are -1.
        profile: the least, best and largest shape of the input.
        report: what `to_tensorrt` noted beside the engine, {} where there is no such file.

    Args:
        path: an engine, written by `to_tensorrt` or by NVIDIA's own tools.
        library: `tensorrt` or `tensorrt_rtx`; default: the one that built it, by the report beside it.
        host_code: run code that lies in the engine, its plugins; default: where the report says that it has some.
            Engines of unknown origin should not get this right.

    Raises:
        FileNotFoundError: no such file.
        NoGPUError: torch sees no GPU.
        ImportError: the library is not installed.
        ExportError: the library can't load the engine, or the engine has not one image input.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, library: str | None = None, host_code: bool | None = None
    ):
        self.path = Path(os.path.realpath(path))
        finish(self.path)
        data = self.path.read_bytes()
        self.report = _report_beside(self.path)
        self.device = _gpu(self.path)
        self.library = choose_library(library, str(self.report.get("library", "")).partition(" ")[0] or None)
        trt: Any = importlib.import_module(self.library)
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        allowed = bool(self.report.get("plugins")) if host_code is None else host_code
        self._runtime.engine_host_code_allowed = allowed
        self._engine = self._runtime.deserialize_cuda_engine(data)
        self._context: Any = None
        if self._engine is not None:
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ExportError(
                f"{self.library} {trt.__version__} can't load {self.path} on {_gpu_name(self.device)}: an engine "
                f"runs in the version that built it{self._built()}; build it here, with `vitrail export tensorrt`"
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = trt.TensorIOMode.INPUT
        inputs = [self._info(name) for name in names if self._engine.get_tensor_mode(name) == mode]
        if len(inputs) != 1:
            raise ExportError(f"{self.path} has {len(inputs)} inputs; one image tensor is expected")
        self.input = inputs[0]
        self.outputs = tuple(self._info(name) for name in names if name != self.input.name)
        shapes = self._engine.get_tensor_profile_shape(self.input.name, 0)
        self.profile = tuple(tuple(int(n) for n in shape) for shape in shapes)

    @property
    def runtime(self) -> str:
        """The library and the GPU."""
        return f"{self.library} on {_gpu_name(self.device)}"

    def _built(self) -> str:
        if not self.report:
            return ""
        return (
            f" ({self.report['library']}), for the GPUs it was built for ({', '.join(self.report['archs'])})"
        )

    def _info(self, name: str) -> TensorInfo:
        shape = tuple(int(n) for n in self._engine.get_tensor_shape(name))
        return TensorInfo(name, str(self._dtype(name)).removeprefix("torch."), shape)

    def _dtype(self, name: str) -> torch.dtype:
        kind = str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]
        if kind not in _TYPES:
            raise ExportError(f"{self.path} has a tensor {name} of {kind}, which torch has no type for")
        return _TYPES[kind]

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """Run on images, on whatever device.

        Args:
            images: in the input's element type and within the profile: (B, C, H, W) float32, or (B, H, W, C) uint8
                where the preprocessing is part of the engine.

        Returns:
            the outputs by name, on the device of `images`.

        Raises:
            TypeError: the wrong element type.
            ValueError: a shape outside the profile.
            ExportError: the engine fails.
        """
        results = self._launch(self._checked(images))
        _wait(self.device)
        return {name: value.to(images.device) for name, value in results.items()}

    def _checked(self, images: Tensor) -> Tensor:
        if str(images.dtype).removeprefix("torch.") != self.input.dtype:
            raise TypeError(f"{self.path} takes {self.input.dtype} images, got {images.dtype}")
        least, _, largest = self.profile
        inside = len(images.shape) == len(least) and all(
            low <= n <= high for low, n, high in zip(least, images.shape, largest, strict=True)
        )
        if not inside:
            raise ValueError(
                f"{self.path} takes shapes from {_times(least)} to {_times(largest)}, got {_times(images.shape)}; "
                f"build it with a wider --batch or --size"
            )
        return images.to(self.device).contiguous()

    def _launch(self, images: Tensor) -> dict[str, Tensor]:
        """Queue one run; what it returns is filled once the stream gets there."""
        context = self._context
        context.set_input_shape(self.input.name, tuple(images.shape))
        context.set_tensor_address(self.input.name, images.data_ptr())
        results = {}
        for info in self.outputs:
            shape = tuple(int(n) for n in context.get_tensor_shape(info.name))
            results[info.name] = torch.empty(shape, dtype=self._dtype(info.name), device=self.device)
            context.set_tensor_address(info.name, results[info.name].data_ptr())
        if not context.execute_async_v3(_stream(self.device)):
            raise ExportError(f"{self.path} failed on a {_times(images.shape)} input: see the log above")
        return results

    def time(self, shape: Sequence[int], runs: int = 100, seconds: float = 1.0) -> Timing:
        """Time of one run, by events on the GPU.

        Args:
            shape: of the input, within the profile. What it holds does not matter.
            runs: at least so many, after ten that do not count.
            seconds: and for at least so long.
        """
        images = self._checked(torch.zeros(tuple(shape), dtype=getattr(torch, self.input.dtype)))
        for _ in range(10):
            self._launch(images)
        _wait(self.device)
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < runs or time.perf_counter() - started < seconds:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            self._launch(images)
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after))
        low, median, high = torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        return Timing(tuple(shape), median, low, high, len(times))


def verify_engine(
    engine: Engine,
    model: nn.Module,
    *,
    precision: str,
    images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    rtol: float,
    atol: float,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> VerificationReport:
    """Compare an engine with the module that it was built from, at the ends and in the middle of its profile.

    The module runs on the CPU in float32. `precision` is the engine's, the other arguments are those of `verify_onnx`.
    An engine can't be made to take another's choices: one in half precision whose model chooses (top-k routing) may
    need a higher `rtol`. An engine that fails is a report that has not passed.

    Raises:
        ValueError, TypeError: wrong images, preprocessing or model.
    """
    started = time.perf_counter()
    side = EngineSubject(engine)
    side.precision = precision
    shapes = [images_shape(shape, side.pictures) for shape in engine.profile]
    comparison = Comparison(
        ModuleSubject(model, side.form),
        side,
        plan=Plan(
            sizes=tuple(dict.fromkeys((height, width) for _, _, height, width in shapes)),
            batches=tuple(dict.fromkeys(batch for batch, *_ in shapes)),
            channels=shapes[0][1],
        ),
        prepare=Preprocessing.of(model, preprocessing),
        rtol=rtol,
        atol=atol,
        seed=seed,
        progress=progress or (lambda text: None),
    )
    return replace(comparison.report(images), seconds=time.perf_counter() - started)


def _report_beside(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_text())
        return report
    except (FileNotFoundError, ValueError):
        return {}


def _gpu(path: Path) -> torch.device:
    """The current GPU.

    Raises:
        NoGPUError: there is none.
    """
    if not torch.cuda.is_available():
        raise NoGPUError(
            f"{path} runs on an NVIDIA GPU and torch sees none here: run it on a machine with one and a CUDA build of "
            f"torch. What can be said without is in {path.name}.json, and the ONNX file runs on any processor"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _wait(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
