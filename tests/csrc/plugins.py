"""Plugins of TensorRT on the host: the library over emulated kernels, and a stand-in for TensorRT that runs them."""

import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.ops import library
from vitrail.ops.library import Compiler, Part

from .emulation import FLAGS

_HOST = Path(__file__).with_name("plugin_host.cpp")


def _commands(
    compiler: Compiler, target: Path, sanitize: Sequence[str] = ()
) -> tuple[list[list[str]], list[str]]:
    sanitizer = [f"-fsanitize={','.join(sanitize)}", "-fno-sanitize-recover=all", "-g"] if sanitize else []
    command = [
        *compiler.command,
        *FLAGS,
        "-DVITRAIL_STANDALONE",
        "-Wno-psabi",
        "-O1",
        *sanitizer,
        "-x",
        "c++",
    ]
    compiles, objects = library._units(command, [*library.plugin_sources(), _HOST], target)
    return compiles, [*compiler.command, "-shared", *sanitizer, "-o", str(target), *objects]


EMULATED_PLUGINS = Part(
    "tensorrt",
    "libvitrail_plugins_emulated.so",
    "VITRAIL_PLUGIN_LIBRARY",
    "the plugins for the host with {}",
    library.find_compiler,
    _commands,
    (".cu", ".cpp", ".h"),
)

# As TensorRT numbers them.
_TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 3, torch.bfloat16: 7, torch.int64: 8}
_FLOAT32, _FLOAT64, _CHAR, _INT64 = 1, 2, 6, 10


class _Dims(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("d", ctypes.c_int64 * 8)]

    @classmethod
    def of(cls, sizes: Sequence[int]) -> "_Dims":
        return cls(len(sizes), (ctypes.c_int64 * 8)(*sizes))


class _Desc(ctypes.Structure):
    _fields_ = [
        ("dims", _Dims),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


class _Field(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class PluginError(RuntimeError):
    """What a plugin, or the stand-in for TensorRT, has against a run."""


class Plugins:
    """The library, loaded."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.plugin_name.restype = ctypes.c_char_p
        self.workspace = 0
        """Bytes that the last run asked for."""

    def names(self) -> list[str]:
        """Of all plugins."""
        return [self._library.plugin_name(i).decode() for i in range(self._library.plugin_count())]

    def run(
        self,
        name: str,
        attributes: Mapping[str, Any],
        tensors: Sequence[Tensor],
        most: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """The result of the plugin `name` of a node with these attributes and inputs.

        Args:
            name: of the plugin.
            attributes: of the node, as an ONNX file has them.
            tensors: inputs, on the CPU.
            most: sizes for which the engine was built, at least those of the inputs; default: those.
        """
        tensors = [x.contiguous() for x in tensors]
        kept, fields = [], []
        for key, value in attributes.items():
            data, kind, length = _field(value)
            kept.append(data)
            fields.append(_Field(key.encode(), ctypes.cast(data, ctypes.c_void_p), kind, length))
        descs = [_Desc(_Dims.of(x.shape), _TYPES[x.dtype], 0, 1.0) for x in tensors]
        largest = [_Dims.of(x) for x in (most or [x.shape for x in tensors])]
        room = 8 * max(1, 64 * max(x.numel() for x in tensors))
        memory, out = torch.full((room,), 0xFF, dtype=torch.uint8), _Desc()
        workspace, message = ctypes.c_int64(), ctypes.create_string_buffer(1024)
        failed = self._library.run_plugin(
            name.encode(),
            (_Field * len(fields))(*fields),
            len(fields),
            (_Desc * len(descs))(*descs),
            (_Dims * len(largest))(*largest),
            len(descs),
            (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors)),
            ctypes.c_void_p(memory.data_ptr()),
            ctypes.c_int64(room),
            ctypes.byref(out),
            ctypes.byref(workspace),
            message,
            len(message),
        )
        if failed:
            raise PluginError(message.value.decode())
        self.workspace = workspace.value
        dtype = next(dtype for dtype, number in _TYPES.items() if number == out.type)
        shape = list(out.dims.d[: out.dims.count])
        return memory.view(dtype)[: torch.Size(shape).numel()].view(shape).clone()


def _field(value: Any) -> tuple[Any, int, int]:
    if isinstance(value, (str, bytes)):
        text = value.encode() if isinstance(value, str) else value
        return ctypes.create_string_buffer(text, len(text)), _CHAR, len(text)
    if isinstance(value, float):
        return (ctypes.c_float * 1)(value), _FLOAT32, 1
    numbers = [value] if isinstance(value, int) else list(value)
    return (ctypes.c_int64 * len(numbers))(*numbers), _INT64, len(numbers)


def operator_of(name: str) -> str:
    """`routed_attention` of `routed_attention_2`."""
    return re.sub(r"_\d+$", "", name)
