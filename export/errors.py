"""What can go wrong in an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .measure import VerificationReport
    from .quantise import QuantizationReport


class ExportError(RuntimeError):
    """The model could not be turned into a file; no file was written. The message names the remedy."""


class VerificationError(ExportError):
    """The file does not compute what the model computes, so it was not written. `report` holds the figures."""

    def __init__(self, report: VerificationReport):
        self.report = report
        super().__init__(report.explain())


class QuantizationError(ExportError):
    """The file in 8 bits is too far from the model, so it was not written. `report` holds the figures by layer."""

    def __init__(self, message: str, report: QuantizationReport):
        self.report = report
        super().__init__(message)
