"""From a module to a file that is proven to compute the same.

`to_onnx(model, "model.onnx")` writes and verifies, `verify_onnx` verifies a file that is there, `compare` any two of
modules, files and engines, `convert_precision` takes a float32 graph to float16 or bfloat16.
The packages behind them (onnx, onnxscript, onnxruntime, Pillow, rich) are imported when they are needed.
"""

from .capture import FORMS
from .compare import compare
from .errors import ExportError, VerificationError
from .images import Preprocessing
from .onnx import DEFAULT_OPSETS, OPSETS, ExportReport, to_onnx
from .precision import DTYPES, convert_precision
from .verify import TOLERANCES, Check, VerificationReport, verify_onnx

__all__ = [
    "DEFAULT_OPSETS",
    "DTYPES",
    "FORMS",
    "OPSETS",
    "TOLERANCES",
    "Check",
    "ExportError",
    "ExportReport",
    "Preprocessing",
    "VerificationError",
    "VerificationReport",
    "compare",
    "convert_precision",
    "to_onnx",
    "verify_onnx",
]
