"""From a module to a file that is proven to compute the same.

`to_onnx(model, "model.onnx")` writes and verifies, `verify_onnx` verifies a file that is there,
`quantize_onnx("model.onnx", "int8.onnx", calibration="photos")` makes one of it that multiplies in 8 bits.
The packages behind them (onnx, onnxscript, onnxruntime, Pillow, rich) are imported when they are needed.
"""

from .errors import ExportError, QuantizationError, VerificationError
from .images import Preprocessing
from .onnx import OPSETS, ExportReport, to_onnx
from .quantise import QuantizationReport, quantize_onnx
from .verify import Check, VerificationReport, verify_onnx

__all__ = [
    "OPSETS",
    "Check",
    "ExportError",
    "ExportReport",
    "Preprocessing",
    "QuantizationError",
    "QuantizationReport",
    "VerificationError",
    "VerificationReport",
    "quantize_onnx",
    "to_onnx",
    "verify_onnx",
]
