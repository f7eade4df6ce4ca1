"""Proof that a file computes what the model computes: ONNX Runtime against torch, on photos and on noise.

Errors are judged by the largest magnitude that the model itself puts out: an output passes where
`max |file - model| <= atol + rtol * max |model|`, over each batch that is tried, with float32 defaults of 1e-6
and 1e-4. (Graphs of the same float32 arithmetic in another order differ by 1e-7 to 1e-6 of that magnitude; a
wrong graph by 1e-2 and more.) Files in half precision have tolerances of their own (`TOLERANCES`). Nothing widens a
tolerance by itself. Models that *choose* (top-k routing, token selection) can differ by more where two candidates tie
to within rounding: such a flip shows up as a measured error and fails, and it is for the caller to look at it and to
raise `rtol`, or not.

Half precision flips such choices often, so there a file that fails is run again with the choices of the float32 file
that it was made from, where that is given. It passes if all else agrees: the outputs, and the scores that the file
itself would have chosen by. The report then says how many choices differ, and how far that takes the outputs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Outputs, evaluation, form_of, prepared
from .errors import ExportError, VerificationError
from .graph import TensorInfo, precision_of
from .images import Preprocessing, find_images, load_image
from .runs import Reference, Run, interface, load, open_runs, runtime_name

TOLERANCES = {"float32": (1e-4, 1e-6), "float16": (1e-2, 1e-6), "bfloat16": (8e-2, 1e-6)}
"""rtol and atol by the precision of the file."""
BATCHES = (1, 3)
"""Batch sizes tried where the batch is dynamic. The graph is traced at 2, so that neither is the traced one."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One output compared for one kind of input at one input shape.

    `max_relative` is the largest error over the largest magnitude of the model's output. `top1` is
    how many images get the same class from both, None for outputs that are not class scores; it is reported and
    not judged, since within tolerance only a tie can change a class. `failure` says what is wrong, "" if nothing.
    Where the file ran with the choices of its float32 original, `flipped` of `choices` would have been other ones.
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
    flipped: int | None = None
    choices: int | None = None

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
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    original: str | os.PathLike[str] | bytes | None = None,
    progress: Progress | None = None,
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
        rtol, atol: tolerances, see the module's text; default: `TOLERANCES` of the file's precision.
        seed: of the noise.
        original: the float32 file that a file in half precision was made from, or its content; see the module's text.
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
    source = path if isinstance(path, bytes) else Path(path)
    photos = find_images(images)
    prepare = Preprocessing.of(model, preprocessing)
    model = prepared(model)
    say("loading the file into ONNX Runtime")
    runs, notes = open_runs(source)
    graph = load(source, weights=False)
    image_input, outputs, meta = interface(graph)
    usual = TOLERANCES[precision_of(graph)]
    rtol, atol = usual[0] if rtol is None else rtol, usual[1] if atol is None else atol
    reference = (
        None
        if original is None
        else Reference(load(original if isinstance(original, bytes) else Path(original)))
    )
    takes_pixels = image_input.dtype == "uint8"
    shape = [image_input.shape[i] for i in ((0, 3, 1, 2) if takes_pixels else (0, 1, 2, 3))]
    channels = shape[1]
    if not isinstance(channels, int):
        raise ExportError(f"the file's input {image_input} has an open number of channels")
    batches = BATCHES if isinstance(shape[0], str) else (int(shape[0]),)
    sizes = _sizes(shape[2:], default_size(model, img_size), meta)
    module = Outputs(model, form_of([output.name for output in outputs]))
    loaded = [load_image(photo) for photo in photos]
    judge = _Judge(module, outputs, rtol, atol, reference)

    checks: list[Check] = []
    with evaluation(module):
        sizes += _small(module, sizes[0], channels, batches[-1], meta)
        steps = [(size, batch) for size in sizes for batch in (batches if size == sizes[0] else batches[-1:])]
        for size, batch in steps:
            for kind in ("photos", "noise"):
                say(f"comparing on {kind}, {batch} x {channels} x {size[0]} x {size[1]}")
                if kind == "photos":
                    many = max(1, -(-len(loaded) // batch)) * batch
                    stack = torch.stack(
                        [prepare.pixels(p, size, channels) for p in islice(cycle(loaded), many)]
                    )
                elif takes_pixels:
                    stack = pixel_noise(batch, channels, *size, seed=seed + batch)
                else:
                    stack = noise(batch, channels, *size, seed=seed + batch)
                for_model = stack if stack.is_floating_point() else prepare.normalise(stack)
                for_file = stack.permute(0, 2, 3, 1).contiguous() if takes_pixels else for_model
                checks += judge(runs, for_model, for_file, batch, kind)
        notes += judge.notes
        notes += _notes(module, checks, channels, sizes[0], batches[0])
    return VerificationReport(
        checks=tuple(checks),
        rtol=rtol,
        atol=atol,
        images=tuple(photo.name for photo in photos),
        preprocessing=prepare,
        runtime=runtime_name(),
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def pixel_noise(*shape: int, seed: int) -> Tensor:
    """Seeded uint8 noise, each value as likely as another."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu")


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


def _sizes(
    sides: Sequence[int | str], wanted: tuple[int, int], meta: Mapping[str, str]
) -> list[tuple[int, int]]:
    """Image sizes to try: the wanted one, and where an axis is open a second one that is odd if it may be."""
    first, second = [], []
    for axis, size, want, shift in zip(("height", "width"), sides, wanted, (37, -13), strict=True):
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


class _Judge:
    """Compares what a file puts out with what the module does; `notes` gathers what is to be said of it."""

    def __init__(
        self,
        module: Outputs,
        outputs: Sequence[TensorInfo],
        rtol: float,
        atol: float,
        reference: Reference | None,
    ):
        self.module, self.outputs = module, outputs
        self.tolerance = rtol, atol
        self.reference = reference if reference is not None and reference.choices else None
        self.notes: list[str] = []

    def __call__(
        self, runs: Sequence[Run], for_model: Tensor, for_file: Tensor, batch: int, kind: str
    ) -> list[Check]:
        """Rows for a stack of images, as the module and as the file takes them, `batch` at a time."""
        shape = (batch, *for_model.shape[1:])
        expected = []
        for images in for_model.split(batch):
            try:
                expected.append([value.detach() for value in self.module(images)])
            except Exception as error:
                reason = f"the model itself refuses this size, which the file claims to take: {error}"
                return self._failed(kind, shape, len(for_model), reason)
        checks = []
        for run in runs:
            rows = self._rows(run, expected, for_file, shape, kind + run.label)
            held = None
            if self.reference and not all(row.passed for row in rows):
                held = self._held_rows(run, rows, expected, for_file, shape, kind + run.label)
            checks += held or rows
        return checks

    def _failed(self, source: str, shape: tuple[int, ...], count: int, reason: str) -> list[Check]:
        nan = float("nan")
        return [Check(source, shape, o.name, count, nan, nan, nan, nan, None, reason) for o in self.outputs]

    def _rows(
        self,
        run: Run,
        expected: Sequence[Sequence[Tensor]],
        images: Tensor,
        shape: tuple[int, ...],
        source: str,
    ) -> list[Check]:
        actual = []
        for some in images.split(shape[0]):
            try:
                actual.append(run(some))
            except Exception as error:  # the runtime's exceptions have no common base
                return self._failed(source, shape, len(images), f"ONNX Runtime fails: {error}")
        if self.module.names != [output.name for output in self.outputs]:
            reason = f"the model's outputs are {self.module.names}"
            return self._failed(source, shape, len(images), reason)
        return self._judged(source, shape, expected, actual)

    def _judged(
        self, source: str, shape: tuple[int, ...], expected: Sequence[Sequence[Tensor]], actual: Sequence[Any]
    ) -> list[Check]:
        return [
            _judge(
                source, shape, output.name, [e[i] for e in expected], [a[i] for a in actual], *self.tolerance
            )
            for i, output in enumerate(self.outputs)
        ]

    def _held_rows(
        self,
        run: Run,
        free: Sequence[Check],
        expected: Sequence[Sequence[Tensor]],
        images: Tensor,
        shape: tuple[int, ...],
        source: str,
    ) -> list[Check] | None:
        """The rows when the file runs with the choices of its original; None where it chooses as that does."""
        assert self.reference is not None
        try:
            held = [run.held_to(self.reference, some) for some in images.split(shape[0])]
        except Exception:  # it can't be run so; the rows stand as they are
            return None
        differ, count = sum(h.flipped for h in held), sum(h.choices for h in held)
        if not differ:
            return None
        source += ", choices of float32"
        rows = self._judged(source, shape, expected, [h.outputs for h in held])
        for h in held:
            for theirs, ours in h.scores:
                # masks are infinite in both
                pair = [torch.from_numpy(x).nan_to_num(0.0, 0.0, 0.0) for x in (theirs, ours)]
                scores = _judge(source, shape, "scores", pair[:1], [pair[1].numpy()], *self.tolerance)
                if not scores.passed:
                    reason = f"the scores it would choose by differ: {scores.failure}"
                    rows = [replace(row, failure=row.failure or reason) for row in rows]
                    break
        worst = max((row.max_relative for row in free), key=lambda x: (x != x, x))
        self.notes.append(
            f"{source}: {differ} of {count} choices ({differ / count:.2%}) are other ones in this precision; with "
            f"its own the file is off by up to {worst:.2g} of the largest value"
        )
        return [replace(row, flipped=differ, choices=count) for row in rows]


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
