"""From a module to a file that is proven to compute the same.

`to_onnx(model, "model.onnx")` writes and verifies, `verify_onnx` verifies a file that is there, `compare` any two of
modules, files and engines, `convert_precision` takes a float32 graph to float16 or bfloat16.
`quantize_onnx("model.onnx", "int8.onnx", calibration="photos")` makes a file of it that multiplies in 8 bits.
`onnxruntime_library()` is the library with which ONNX Runtime runs a file's fused operators by this project's kernels.
`to_tensorrt(model, "model.engine")` builds an engine and reports what is in it, `Engine` runs one.
The packages behind them (onnx, onnxscript, onnxruntime, tensorrt, Pillow, rich) are imported when they are needed.
"""

from ..ops.library import onnxruntime_library
from .capture import FORMS
from .compare import compare
from .engine import Engine, NoGPUError
from .engine_report import EngineReport, Kernel, Timing
from .errors import ExportError, QuantizationError, VerificationError
from .images import Preprocessing
from .measure import TOLERANCES, Check, VerificationReport
from .onnx import DEFAULT_OPSETS, OPSETS, ExportReport, to_onnx
from .precision import DTYPES, convert_precision
from .quantise import QuantizationReport, quantize_onnx
from .tensorrt import to_tensorrt
from .verify import verify_onnx

__all__ = [
    "DEFAULT_OPSETS",
    "DTYPES",
    "FORMS",
    "OPSETS",
    "TOLERANCES",
    "Check",
    "Engine",
    "EngineReport",
    "ExportError",
    "ExportReport",
    "Kernel",
    "NoGPUError",
    "Preprocessing",
    "QuantizationError",
    "QuantizationReport",
    "Timing",
    "VerificationError",
    "VerificationReport",
    "compare",
    "convert_precision",
    "onnxruntime_library",
    "quantize_onnx",
    "to_onnx",
    "to_tensorrt",
    "verify_onnx",
]
