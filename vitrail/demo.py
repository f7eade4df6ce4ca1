"""Everything at work on one photo: feature pyramid, what the model looks at, cost, speed, and a verified ONNX file."""

import json
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .catalog import create_model
from .explain import View, explain_picture
from .export import ExportReport, Preprocessing, to_onnx
from .export.files import write_atomically
from .export.images import default_size, load_image, sample_photos
from .ops import library, use_ops
from .profiling import ProfileReport, profile
from .zoo.inference import standard_form

STEPS = 6
"""Calls of `begin` in `run_demo`."""

_SEED = 0


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of one image through the whole model."""

    fused_ms: float | None
    """None where nothing is compiled that the model uses."""
    reference_ms: float
    rounds: int
    threads: int
    max_difference: float | None
    """Between the class scores of the two paths, relative to the largest score."""
    reason: str | None
    """Why nothing is."""

    @property
    def ratio(self) -> float | None:
        """How many times faster the fused path is."""
        return self.reference_ms / self.fused_ms if self.fused_ms else None


@dataclass(frozen=True)
class DemoReport:
    """Result of `run_demo`."""

    model: str
    weights: str
    random_weights: bool
    photo: str
    features: list[tuple[int, ...]]
    views: list[View]
    profile: ProfileReport
    speed: Speed
    export: ExportReport
    files: dict[str, str]
    seconds: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether the figures are the paper's; an ONNX file that fails its verification raises before."""
        return self.profile.ok

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "ok": self.ok,
            "model": self.model,
            "weights": self.weights,
            "random_weights": self.random_weights,
            "photo": self.photo,
            "features": [list(shape) for shape in self.features],
            "views": [view.to_dict() for view in self.views],
            "profile": self.profile.to_dict(),
            "speed": asdict(self.speed) | {"ratio": self.speed.ratio},
            "export": self.export.to_dict(),
            "files": self.files,
            "seconds": self.seconds,
        }


def measure_speed(
    model: nn.Module, images: Tensor, seconds: float = 8.0, operators: Collection[str] | None = None
) -> Speed:
    """Time both paths of the operators in turns, so that a busy machine disturbs both alike.

    Args:
        model: in eval mode.
        images: `(B, C, H, W)`.
        seconds: after these no further round begins; there are 3 rounds at least and 15 at most, and one untimed.
        operators: names of the operators that the model uses, where they are known: without a compiled kernel for any
            of them there is nothing to compare.
    """
    reason = _why_not_compiled(operators)
    compiled = reason is None
    modes = ("fused", "reference") if compiled else ("reference",)
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    scores: dict[str, Tensor] = {}
    rounds = 0
    begun = time.perf_counter()
    with torch.inference_mode():
        while rounds <= 3 or (rounds <= 15 and time.perf_counter() - begun < seconds):
            for mode in modes:
                with use_ops(mode):
                    start = time.perf_counter()
                    scores[mode] = model(images)
                    times[mode].append(1e3 * (time.perf_counter() - start))
            rounds += 1
    difference = None
    if compiled:
        difference = float(
            (scores["fused"] - scores["reference"]).abs().max() / scores["reference"].abs().max()
        )
    return Speed(
        fused_ms=statistics.median(times["fused"][1:]) if compiled else None,
        reference_ms=statistics.median(times["reference"][1:]),
        rounds=rounds - 1,
        threads=torch.get_num_threads(),
        max_difference=difference,
        reason=reason,
    )


def _why_not_compiled(operators: Collection[str] | None) -> str | None:
    """None if the library is there and has kernels of these operators (any, if unknown)."""
    if library.mode() == "reference":
        return "VITRAIL_OPS=reference"
    if not library.load():
        return library.status().reason
    if operators is None or any(library.has_kernel(f"vitrail::{name}", "CPU") for name in operators):
        return None
    return f"no kernel yet for {', '.join(sorted(operators)) or 'what the model uses'}"


def run_demo(
    output: str | PathLike[str],
    model_name: str = "biformer_tiny",
    image: str | PathLike[str] | None = None,
    checkpoint: str | None = None,
    begin: Callable[[str], None] = lambda text: None,
    detail: Callable[[str], None] = lambda text: None,
) -> DemoReport:
    """Take one photo through a model and write all results into a folder.

    Writes `picture.png` (see `explain_picture`), `MODEL.onnx` and `report.json`.

    Args:
        output: the folder; it is created.
        model_name: one of vitrail's models.
        image: a photo; default: one that scikit-learn ships.
        checkpoint: weights in our layout or the authors'; default: random ones from a fixed seed.
        begin: called with a line of text when a step begins.
        detail: called with what happens inside a step.

    Raises:
        ValueError: unknown model or one with nothing to look at, unreadable photo.
        ExportError: the ONNX file could not be made or does not compute the same.
        OSError: files that can't be read or written.
    """
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = now - last, now

    source = Path(image) if image is not None else sample_photos()[0]
    photo = load_image(source)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)

    begin("compiling the operators, where that has not been done")
    if library.mode() != "reference":
        library.load()
    lap("operators")

    begin(f"{source.name} through {model_name}")
    torch.manual_seed(_SEED)
    model: Any = create_model(model_name, checkpoint=checkpoint)
    size = default_size(model, None)
    images = Preprocessing.of(model)(photo, size)[None]
    with torch.inference_mode():
        features = [tuple(f.shape) for f in model.forward_intermediates(images, intermediates_only=True)]
    lap("features")

    begin("drawing what the photo's centre looks at")
    note = f"{source.name} at {size[0]}x{size[1]}. "
    if checkpoint is None:
        note += (
            f"Random weights (seed {_SEED}): this shows the mechanism, not what a trained network looks at."
        )
    title = f"{model_name}: what the photo's centre looks at"
    views = explain_picture(model, photo, folder / "picture.png", title=title, note=note)
    lap("picture")

    begin("counting parameters and multiply-accumulates")
    cost = profile(model_name)
    lap("profile")

    begin("timing the fused operators against their definitions")
    ours = {view.operator for view in views} - {"scaled_dot_product_attention"}
    speed = measure_speed(model, images, operators=ours)
    lap("speed")

    begin("exporting to ONNX and verifying")
    weights = Path(checkpoint).name if checkpoint else f"random, seed {_SEED}"
    onnx_file = folder / f"{model_name}.onnx"
    export = to_onnx(model, onnx_file, metadata={"weights": weights}, rewrite=standard_form, progress=detail)
    lap("export")

    files = {"picture": "picture.png", "onnx": onnx_file.name, "report": "report.json"}
    files = {what: str(folder / name) for what, name in files.items()}
    report = DemoReport(
        model_name,
        weights,
        checkpoint is None,
        str(source),
        features,
        views,
        cost,
        speed,
        export,
        files,
        seconds,
    )
    text = json.dumps(report.to_dict(), indent=2, default=str)
    write_atomically(folder / "report.json", text.encode())
    return report
