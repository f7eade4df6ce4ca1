"""Proof that a file computes what the model computes: ONNX Runtime against torch, on photos and on noise.

`verify_onnx` is `compare` for an ONNX file and the module that it claims to be: the names and dtypes of the
outputs have to be the module's, too. `measure` says how errors are judged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .compare import Comparison, plan_for, reference_of
from .images import Preprocessing, default_size
from .measure import TOLERANCES, VerificationReport
from .subjects import ModuleSubject, OnnxSubject

BATCHES = (1, 3)
"""Batch sizes tried where the batch is dynamic. The graph is traced at 2, so that neither is the traced one."""


def verify_onnx(
    path: str | os.PathLike[str] | bytes,
    model: nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    original: str | os.PathLike[str] | bytes | None = None,
    kernels: bool = False,
    progress: Callable[[str], None] | None = None,
) -> VerificationReport:
    """Compare an ONNX file with the module that it claims to be.

    ONNX Runtime's CPU provider (as many threads as torch, not spinning) runs against the module in eager mode:
    photos, prepared as the model wants them, and seeded noise; at two batch sizes where the file's batch is dynamic
    and at two image sizes where its height or width is. A file that takes uint8 pixels gets pixels. A file in half
    precision also runs as a copy that rounds where a GPU would; one in bfloat16, for which the provider has no
    arithmetic, as that copy alone.

    Args:
        path: the file, or its content. Weights in a file of their own are found beside it.
        model: the module, any mode, in float32; it is left as it was.
        img_size: height and width to try where the file leaves them open; default: the model's own, else 224.
        images: photos (files, folders); default: scikit-learn's two.
        preprocessing: overrides of what the model's `pretrained_cfg` says; see `Preprocessing`.
        rtol, atol: tolerances, see `measure`; default: `TOLERANCES` of the file's precision.
        seed: of the noise.
        original: the float32 file that a file in half precision was made from, or its content; see `measure`.
        kernels: run the nodes of a file with fused operators by this project's kernels; see `compare`.
        progress: called with a line of text before each step.

    Returns:
        the report; a file that differs is a report with `passed` False, not an exception.

    Raises:
        ExportError: the file can't be loaded; it has no nodes for kernels, or these can't be built.
        ImportError: onnx or onnxruntime is missing.
        ValueError, TypeError: wrong images, preprocessing or model.
    """
    started = time.perf_counter()
    say = progress or (lambda text: None)
    prepare = Preprocessing.of(model, preprocessing)
    say("loading the file into ONNX Runtime")
    file = OnnxSubject(path, kernels)
    module = ModuleSubject(model, file.form)
    usual = TOLERANCES[file.precision]
    comparison = Comparison(
        module,
        file,
        plan=plan_for(module, file, default_size(model, img_size), BATCHES),
        prepare=prepare,
        rtol=usual[0] if rtol is None else rtol,
        atol=usual[1] if atol is None else atol,
        seed=seed,
        progress=say,
        strict=True,
        original=reference_of(original),
    )
    return replace(comparison.report(images), seconds=time.perf_counter() - started)
