"""Proof that a file computes what the model computes: ONNX Runtime against torch, on photos and on noise.

Errors are judged by the largest magnitude that the model itself puts out: an output passes where
`max |file - model| <= atol + rtol * max |model|`, over each batch that is tried, with float32 defaults of 1e-6
and 1e-4. (Graphs of the same float32 arithmetic in another order differ by 1e-7 to 1e-6 of that magnitude; a
wrong graph by 1e-2 and more.) Nothing widens the tolerance by itself. Models that *choose* (top-k routing,
token selection) can differ by more where two candidates tie to within rounding: such a flip shows up as a measured
error and fails, and it is for the caller to look at it and to raise `rtol`, or not.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .capture import Outputs, evaluation, prepared
from .errors import ExportError, VerificationError
from .graph import TensorInfo, summarize
from .images import Preprocessing, find_images, load_image

if TYPE_CHECKING:
    import onnxruntime

RTOL, ATOL = 1e-4, 1e-6
BATCHES = (1, 3)
"""Batch sizes tried where the batch is dynamic. The graph is traced at 2, so that neither is the traced one."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One output compared for one kind of input at one input shape.

    `max_relative` is the largest error over the largest magnitude of the model's output. `top1` is
    how many images get the same class from both, None for outputs that are not class scores; it is reported and
    not judged, since within tolerance only a tie can change a class. `failure` says what is wrong, "" if nothing.
    """

    source: str
    shape: tuple[int, ...]
    output: str
    images: int
    max_error: float
    mean_error: float
    max_relative: float
    cosine: float
    top1: int | None
    failure: str

    @property
    def passed(self) -> bool:
        """Whether the output agrees."""
        return not self.failure


@dataclass(frozen=True)
class VerificationReport:
    """All comparisons of one file with one model."""

    checks: tuple[Check, ...]
    rtol: float
    atol: float
    images: tuple[str, ...]
    preprocessing: Preprocessing
    runtime: str
    seed: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether there are checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def raise_on_failure(self) -> None:
        """Raise `VerificationError` unless everything passed."""
        if not self.passed:
            raise VerificationError(self)

    def explain(self) -> str:
        """One sentence on the outcome, and a line for each failure and note."""
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return f"all {len(self.checks)} comparisons passed"
        lines = [
            f"the file does not compute what the model computes: "
            f"{len(failed)} of {len(self.checks)} comparisons failed"
        ]
        lines += [
            f"  {c.output} on {c.source} {'x'.join(map(str, c.shape))}: {c.failure}" for c in failed[:6]
        ]
        if len(failed) > 6:
            lines.append(f"  and {len(failed) - 6} more")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        checks = [
            {**asdict(check), "shape": list(check.shape), "passed": check.passed} for check in self.checks
        ]
        return {
            **{k: getattr(self, k) for k in ("passed", "rtol", "atol", "runtime", "seed", "seconds")},
            "images": list(self.images),
            "preprocessing": self.preprocessing.to_dict(),
            "checks": _finite(checks),
            "notes": list(self.notes),
        }

    def table(self) -> Any:
        """A rich table of the checks."""
        from .render import checks_table

        return checks_table(self)


def _finite(value: Any) -> Any:
    """NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return None
    return value


def verify_onnx(
    path: str | os.PathLike[str] | bytes,
    model: nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    rtol: float = RTOL,
    atol: float = ATOL,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare an ONNX file with the module that it claims to be.

    ONNX Runtime's CPU provider (as many threads as torch, not spinning) runs against the module in eager mode:
    photos, prepared as the model wants them, and seeded noise; at two batch sizes where the file's batch is dynamic
    and at two image sizes where its height or width is.

    Args:
        path: the file, or its content.
        model: the module, any mode; it is left as it was.
        img_size: height and width to try where the file leaves them open; default: the model's own, else 224.
        images: photos (files, folders); default: scikit-learn's two.
        preprocessing: overrides of what the model's `pretrained_cfg` says; see `Preprocessing`.
        rtol, atol: tolerances, see the module's text.
        seed: of the noise.
        progress: called with a line of text before each step.

    Returns:
        the report; a file that differs is a report with `passed` False, not an exception.

    Raises:
        ExportError: the file can't be loaded.
        ImportError: onnx or onnxruntime is missing.
        ValueError, TypeError: wrong images, preprocessing or model.
    """
    started = time.perf_counter()
    say = progress or (lambda text: None)
    content = path if isinstance(path, bytes) else Path(path).read_bytes()
    photos = find_images(images)
    prepare = Preprocessing.of(model, preprocessing)
    model = prepared(model)
    say("loading the file into ONNX Runtime")
    session = open_session(content)
    image_input, outputs, meta = _interface(content)
    channels = image_input.shape[1]
    if not isinstance(channels, int):
        raise ExportError(f"the file's input {image_input} has an open number of channels")
    batches = BATCHES if isinstance(image_input.shape[0], str) else (int(image_input.shape[0]),)
    sizes = _sizes(image_input, default_size(model, img_size), meta)
    module = Outputs(model, features=outputs[0].name == "stage0")
    loaded = [load_image(photo) for photo in photos]

    checks: list[Check] = []
    with evaluation(module):
        sizes += _small(module, sizes[0], channels, batches[-1], meta)
        steps = [(size, batch) for size in sizes for batch in (batches if size == sizes[0] else batches[-1:])]
        for size, batch in steps:
            for source in ("photos", "noise"):
                say(f"comparing on {source}, {batch} x {channels} x {size[0]} x {size[1]}")
                if source == "photos":
                    many = max(1, -(-len(loaded) // batch)) * batch
                    stack = torch.stack([prepare(p, size, channels) for p in islice(cycle(loaded), many)])
                else:
                    stack = noise(batch, channels, *size, seed=seed + batch)
                checks += _compare(session, module, image_input, outputs, stack, batch, source, rtol, atol)
        notes = _notes(module, checks, channels, sizes[0], batches[0])
    return VerificationReport(
        checks=tuple(checks),
        rtol=rtol,
        atol=atol,
        images=tuple(photo.name for photo in photos),
        preprocessing=prepare,
        runtime=_runtime_name(),
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def noise(*shape: int, seed: int) -> Tensor:
    """Seeded normal noise, float32 on the CPU whatever torch's defaults are."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def default_size(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width from the argument, else from the model's `pretrained_cfg`, else 224.

    Raises:
        TypeError, ValueError: not a positive whole number or a pair of them.
    """
    from .images import pretrained_cfg

    if img_size is None:
        input_size = pretrained_cfg(model).get("input_size")
        return (int(input_size[-2]), int(input_size[-1])) if input_size else (224, 224)
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
        raise TypeError(f"img_size must be a whole number or (height, width), got {img_size!r}")
    if min(pair) < 1:
        raise ValueError(f"img_size must be positive, got {img_size!r}")
    return pair[0], pair[1]


def open_session(content: bytes) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU with torch's number of threads, which do not spin while they wait."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Spinning workers would slow down torch, which runs in between.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common base
        raise ExportError(f"ONNX Runtime can't load the file: {error}") from error


def _runtime_name() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} CPU, {torch.get_num_threads()} threads"


def _interface(content: bytes) -> tuple[TensorInfo, tuple[TensorInfo, ...], dict[str, str]]:
    """The file's image input, its outputs, and its metadata."""
    import onnx

    proto = onnx.load_from_string(content)
    summary = summarize(proto)
    if len(summary.inputs) != 1 or len(summary.inputs[0].shape) != 4:
        raise ExportError(
            f"expected a file with one (B, C, H, W) input, got {', '.join(map(str, summary.inputs))}"
        )
    meta = {entry.key: entry.value for entry in proto.metadata_props}
    return summary.inputs[0], summary.outputs, meta


def _sizes(info: TensorInfo, wanted: tuple[int, int], meta: Mapping[str, str]) -> list[tuple[int, int]]:
    """Image sizes to try: the wanted one, and where an axis is open a second one that is odd if it may be."""
    first, second = [], []
    for axis, size, want, shift in zip(("height", "width"), info.shape[2:], wanted, (37, -13), strict=True):
        if isinstance(size, int):
            first.append(size)
            second.append(size)
            continue
        step = int(meta.get(f"vitrail.{axis}_multiple", 1))
        first.append(max(step, want // step * step))
        second.append(first[-1] + (step if step > 1 else max(shift, 1 - first[-1])))
    sizes = [(first[0], first[1]), (second[0], second[1])]
    return list(dict.fromkeys(sizes))


def _small(
    module: Outputs, usual: tuple[int, int], channels: int, batch: int, meta: Mapping[str, str]
) -> list[tuple[int, int]]:
    """A size below what the export could prove (`vitrail.height_proven_from`), as far as the model takes one."""
    size = list(usual)
    for i, axis in enumerate(("height", "width")):
        lowest = int(meta.get(f"vitrail.{axis}_proven_from", 1))
        for smaller in dict.fromkeys((lowest // 4, lowest // 2)):
            tried = [smaller if j == i else n for j, n in enumerate(size)]
            with contextlib.suppress(Exception):
                if smaller > 0:
                    module(noise(batch, channels, *tried, seed=0))
                    size = tried
                    break
    return [(size[0], size[1])] if tuple(size) != usual else []


def _compare(
    session: onnxruntime.InferenceSession,
    module: Outputs,
    image_input: TensorInfo,
    outputs: Sequence[TensorInfo],
    stack: Tensor,
    batch: int,
    source: str,
    rtol: float,
    atol: float,
) -> list[Check]:
    """Run both on `stack`, `batch` images at a time."""
    shape = (batch, *stack.shape[1:])

    def failed(reason: str) -> list[Check]:
        nan = float("nan")
        return [Check(source, shape, o.name, len(stack), nan, nan, nan, nan, None, reason) for o in outputs]

    expected, actual = [], []
    for images in stack.split(batch):
        try:
            expected.append([value.detach() for value in module(images)])
        except Exception as error:
            return failed(f"the model itself refuses this size, which the file claims to take: {error}")
        try:
            actual.append(session.run(None, {image_input.name: images.numpy()}))
        except Exception as error:  # the runtime's exceptions have no common base
            return failed(f"ONNX Runtime fails: {error}")
    if module.names != [output.name for output in outputs]:
        return failed(f"the model's outputs are {module.names}")
    return [
        _judge(source, shape, outputs[i].name, [e[i] for e in expected], [a[i] for a in actual], rtol, atol)
        for i in range(len(outputs))
    ]


def _judge(
    source: str,
    shape: tuple[int, ...],
    name: str,
    expected: Sequence[Tensor],
    actual: Sequence[Any],
    rtol: float,
    atol: float,
) -> Check:
    nan = float("nan")
    got = [torch.from_numpy(value) for value in actual]
    count = shape[0] * len(expected)
    for e, a in zip(expected, got, strict=True):
        if e.shape != a.shape or e.dtype != a.dtype:
            reason = f"expected {e.dtype} {tuple(e.shape)}, got {a.dtype} {tuple(a.shape)}"
            return Check(source, shape, name, count, nan, nan, nan, nan, None, reason)
    e, a = torch.cat([x.flatten() for x in expected]).double(), torch.cat([x.flatten() for x in got]).double()
    error = (e - a).abs()
    worst, largest = (error.max().item(), e.abs().max().item()) if len(e) else (0.0, 0.0)
    allowed = atol + rtol * largest
    norms = e.norm() * a.norm()
    cosine = (e @ a / norms).item() if norms > 0 else float(bool((e == a).all()))
    top1 = None
    if name == "logits" and expected[0].ndim == 2:
        top1 = sum(int((x.argmax(1) == y.argmax(1)).sum()) for x, y in zip(expected, got, strict=True))
    failure = ""
    if not e.isfinite().all():
        failure = "the model's own output holds NaN or infinity"
    elif not a.isfinite().all():
        failure = "the file's output holds NaN or infinity"
    elif worst > allowed:
        failure = (
            f"max error {worst:.3g} exceeds {allowed:.3g} (atol {atol:g} + rtol {rtol:g} x {largest:.3g})"
        )
    relative = worst / largest if largest else (0.0 if worst == 0 else float("inf"))
    mean = error.mean().item() if len(e) else 0.0
    return Check(source, shape, name, count, worst, mean, relative, cosine, top1, failure)


def _notes(
    module: Outputs, checks: Sequence[Check], channels: int, size: tuple[int, int], batch: int
) -> list[str]:
    """What the reader of the figures should know: randomness in the model, or outputs that ignore the input."""
    a, b = (noise(batch, channels, *size, seed=seed) for seed in (0, 1))
    try:
        first, other = module(a), module(b)
        again = module(a) if any(not check.passed for check in checks) else first
    except Exception:  # the checks have said so already
        return []
    notes = []
    if not all(torch.equal(x, y) for x, y in zip(first, again, strict=True)):
        worst = max((x - y).abs().max().item() for x, y in zip(first, again, strict=True))
        notes.append(f"the model does not repeat itself: two runs on one input differ by {worst:.3g}")
    deaf = [n for n, x, y in zip(module.names, first, other, strict=True) if torch.equal(x, y)]
    if deaf:
        notes.append(
            f"{', '.join(deaf)} does not depend on the image (weights of zero?), so agreement there proves little"
        )
    return notes
