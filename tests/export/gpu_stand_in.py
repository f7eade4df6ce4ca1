"""A stand-in for TensorRT's runtime and its GPU: the calls of the real one, carried out by ONNX Runtime on the CPU."""

import ctypes
import enum
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import onnxruntime
import torch

from vitrail.export import engine as module

TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64", "UINT8", "FP8"])
KINDS = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(uint8)": DataType.UINT8}
ARRAYS = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.UINT8: np.uint8}


class Context:
    def __init__(self, engine):
        self.engine = engine
        self.shapes, self.addresses = {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        ((_, given),) = self.shapes.items()
        value = self.engine.tensors[name]
        return [given[i] if isinstance(n, str) else n for i, n in enumerate(value.shape)]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == 7
        ((name, shape),) = self.shapes.items()
        kind = ARRAYS[self.engine.get_tensor_dtype(name)]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        images = np.frombuffer(ctypes.string_at(self.addresses[name], size), kind).reshape(shape)
        names = [value.name for value in self.engine.session.get_outputs()]
        for output, value in zip(names, self.engine.session.run(names, {name: images}), strict=True):
            value = np.ascontiguousarray(value * self.engine.runtime.error)
            ctypes.memmove(self.addresses[output], value.tobytes(), value.nbytes)
        return not self.engine.runtime.fails


class CudaEngine:
    def __init__(self, runtime, session):
        self.runtime, self.session = runtime, session
        inputs, outputs = session.get_inputs(), session.get_outputs()
        self.tensors = {value.name: value for value in (*inputs, *outputs)}
        self.inputs = {value.name for value in inputs}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, i):
        return list(self.tensors)[i]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self.runtime.kind or KINDS[self.tensors[name].type]

    def get_tensor_shape(self, name):
        return [-1 if isinstance(n, str) else n for n in self.tensors[name].shape]

    def get_tensor_profile_shape(self, name, index):
        own = self.tensors[name].shape
        return [[n if i == 0 and isinstance(own[0], str) else own[i] for i in range(4)] for n in (1, 2, 4)]

    def create_execution_context(self):
        return Context(self)


class Runtime:
    """Runs the file `onnx`, whatever it is told to load; `error` is what it multiplies outputs by."""

    onnx, error, fails, kind, refuses = None, 1.0, False, None, False

    def __init__(self, logger):
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data):
        assert len(data) > 0
        if self.refuses:
            return None
        return CudaEngine(self, onnxruntime.InferenceSession(self.onnx, providers=["CPUExecutionProvider"]))


class Logger:
    ERROR = 1

    def __init__(self, severity):
        pass


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 2.0


@contextmanager
def gpu(monkeypatch, onnx, **flaws):
    """A machine with a GPU, on which any engine computes what the file `onnx` does, but for its flaws."""
    runtime = type("Runtime", (Runtime,), {"onnx": onnx, **flaws})
    trt = SimpleNamespace(
        Runtime=runtime, Logger=Logger, TensorIOMode=TensorIOMode, DataType=DataType, __version__="0"
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(module, "_gpu", lambda path: torch.device("cpu"))
        patch.setattr(module, "_gpu_name", lambda device: "stand-in")
        patch.setattr(module, "_stream", lambda device: 7)
        patch.setattr(module, "_wait", lambda device: None)
        patch.setattr(module.importlib, "import_module", lambda name: trt)
        yield runtime
