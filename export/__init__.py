"""From a module to a file that is proven to compute the same.

`to_onnx(model, "model.onnx")` writes and verifies, `verify_onnx` verifies a file that is there, `compare` any two of
modules, files and engines.
The packages behind them (onnx, onnxscript, onnxruntime, Pillow, rich) are imported when they are needed.
"""

from .compare import compare
from .errors import ExportError, VerificationError
from .images import Preprocessing
from .onnx import OPSETS, ExportReport, to_onnx
from .verify import Check, VerificationReport, verify_onnx

__all__ = [
    "OPSETS",
    "Check",
    "ExportError",
    "ExportReport",
    "Preprocessing",
    "VerificationError",
    "VerificationReport",
    "compare",
    "to_onnx",
    "verify_onnx",
]
