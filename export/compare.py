"""Any two sides, compared: modules, ONNX files (quantised ones among them), engines."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExportError
from .images import Preprocessing, default_size, find_images, load_image
from .intermediates import Nothing
from .measure import TOLERANCES, Check, VerificationReport, judge
from .runs import Reference, load
from .subjects import Axis, ModuleSubject, OnnxSubject, Subject, Way, subject
from .trace import Trace, find_divergence

BATCHES = (1, 2, 3, 5)
"""Batch sizes tried where the batch is open."""

Side = nn.Module | str | os.PathLike[str] | bytes | Subject
Progress = Callable[[str], None]


def compare(
    a: Side,
    b: Side,
    *,
    img_size: int | tuple[int, int] | None = None,
    batches: Sequence[int] = BATCHES,
    images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    form: str | None = None,
    original: str | os.PathLike[str] | bytes | None = None,
    trace: bool | None = None,
    rewrite: Callable[[nn.Module], nn.Module] | None = None,
    kernels: bool = False,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare `b` with the reference `a`: photographs and seeded noise, several batch and image sizes.

    A side is a module (eager mode, CPU), an ONNX file (a path that ends in .onnx, or its content; ONNX Runtime's CPU
    provider, as many threads as torch) or an engine (.engine, .plan; TensorRT on the GPU). A side with a fixed batch
    is run as often as the other's batch asks for, so that a file for one image at a time can stand for the truth.
    Outputs are matched by name, else by order, which is noted.

    Args:
        a, b: the sides.
        img_size: height and width where the sides leave them open; default: what `a`, else `b`, is meant for, else 224.
        batches: batch sizes to try where the batch is open.
        images: photos (files, folders); default: scikit-learn's two.
        preprocessing: how photos are prepared, for both; default: what the sides say, and where they say
            different things that is a failure.
        rtol: largest error over the largest magnitude of the output; default: by the less precise side, see
            `vitrail.export.TOLERANCES`.
        atol: absolute tolerance on top; default likewise.
        seed: of the noise.
        form: what modules are to put out, see `FORMS`; default: what the file beside them does.
        original: the float32 file that a `b` in half precision was made from; see `vitrail.export.measure`.
        trace: look for the first value on the way that differs; default: where a comparison fails.
        rewrite: from a module to the form that was exported, such as `vitrail.zoo.inference.standard_form`;
            the trace then knows the values that only that form has.
        kernels: run the nodes of `b`, an ONNX file with fused operators, by this project's kernels
            (`onnxruntime_library`, which is built where there is none) and not by the functions that it holds.
        progress: called with a line of text before each step.

    Returns:
        the report; a difference is a report with `passed` False, not an exception.

    Raises:
        ExportError: a side can't be loaded or run, or no input fits both.
        ImportError: onnx, onnxruntime or tensorrt is missing.
        ValueError, TypeError: wrong sides, images, preprocessing or sizes.
        OSError: a file can't be read.
    """
    say = progress or (lambda text: None)
    say("loading both sides")
    sides = _load(a, b, form, kernels)
    if not batches or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batches):
        raise ValueError(f"batches must be whole numbers of at least 1, got {batches!r}")
    plan = plan_for(*sides, _wanted(*sides, img_size), batches)
    prepare, problems, notes = _agree_on_preprocessing(*sides, preprocessing)
    precision = max((side.precision for side in sides), key=list(TOLERANCES).index)
    comparison = Comparison(
        *sides,
        plan=plan,
        prepare=prepare,
        rtol=TOLERANCES[precision][0] if rtol is None else rtol,
        atol=TOLERANCES[precision][1] if atol is None else atol,
        original=reference_of(original),
        seed=seed,
        progress=say,
        problems=problems,
        notes=notes,
    )
    report = comparison.report(images)
    if trace or (trace is None and not report.passed):
        report = replace(report, trace=comparison.trace(rewrite), notes=tuple(comparison.notes))
    return report


def reference_of(original: str | os.PathLike[str] | bytes | None) -> Reference | None:
    """The float32 file whose choices a file in half precision may take; None where it chooses nothing."""
    if original is None:
        return None
    reference = Reference(load(original if isinstance(original, bytes) else Path(original)))
    return reference if reference.choices else None


def pixel_noise(*shape: int, seed: int) -> Tensor:
    """Seeded uint8 noise, each value as likely as another."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu")


def noise(*shape: int, seed: int) -> Tensor:
    """Seeded normal noise, float32 on the CPU whatever torch's defaults are."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _load(a: Side, b: Side, form: str | None, kernels: bool) -> tuple[Subject, Subject]:
    """Both sides; a module beside a file gives what the file does."""
    if kernels and isinstance(b, (nn.Module, Subject)):
        raise ValueError(f"kernels=True runs the nodes of an ONNX file, but b is a {type(b).__name__}")
    pairs = ((a, False), (b, kernels))
    files = [subject(side, kernels=own) for side, own in pairs if not isinstance(side, nn.Module)]
    found = form or next((f for file in files if (f := getattr(file, "form", None))), "classifier")
    rest = iter(files)
    first, second = (subject(s, found) if isinstance(s, nn.Module) else next(rest) for s in (a, b))
    return first, second


@dataclass(frozen=True)
class Plan:
    """What is tried: image sizes, batch sizes, channels."""

    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    channels: int
    proven_from: tuple[int, int] = (1, 1)


def plan_for(a: Subject, b: Subject, wanted: tuple[int, int], batches: Sequence[int]) -> Plan:
    """What can be tried with both sides.

    Args:
        a, b: the sides.
        wanted: height and width where they are open.
        batches: batch sizes where the batch is.

    Raises:
        ExportError: no image fits both.
    """
    channels = {n for n in (a.channels, b.channels) if n is not None}
    if len(channels) > 1:
        raise ExportError(
            f"{a.name} takes {a.channels} channels and {b.name} {b.channels}: no image fits both"
        )
    height, width = _joined("height", a, b), _joined("width", a, b)
    sizes = open_sizes((height, width), wanted)
    lowest = (height.proven_from, width.proven_from)
    batch = _joined("batch", a, b)
    return Plan(tuple(sizes), _batches(a, b, batch, batches), channels.pop() if channels else 3, lowest)


def _wanted(a: Subject, b: Subject, img_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width to compare at.

    Raises:
        ValueError: `img_size` contradicts a fixed size.
    """
    if img_size is None:
        return a.size or b.size or (224, 224)
    size = default_size(nn.Identity(), img_size)
    for name, want in zip(("height", "width"), size, strict=True):
        fixed = _joined(name, a, b).fixed
        if fixed not in (None, want):
            raise ValueError(
                f"the {name} is fixed at {fixed}, so img_size can't make it {want}; leave img_size out"
            )
    return size


def _joined(name: str, a: Subject, b: Subject) -> Axis:
    """The sizes that both sides take."""
    x, y = a.axes.get(name, Axis()), b.axes.get(name, Axis())
    fixed = [n for n in (x.fixed, y.fixed) if n is not None]
    multiple = math.lcm(x.multiple, y.multiple)
    lowest = max(x.proven_from, y.proven_from)
    least, most = max(x.least, y.least), min((n for n in (x.most, y.most) if n is not None), default=None)
    if name == "batch":  # whoever has a fixed one can run several times
        return Axis(math.lcm(*fixed) if fixed else None, least=least, most=most)
    if len(set(fixed)) > 1:
        raise ExportError(
            f"{a.name} takes a {name} of {x.fixed} only and {b.name} of {y.fixed}: no image fits both. Compare "
            f"files of one size, or with an open {name}"
        )
    return Axis(fixed[0] if fixed else None, multiple, lowest, least, most)


def _batches(a: Subject, b: Subject, joined: Axis, wanted: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes to try: where a file claims an open batch (or both sides are modules) several."""
    is_open = [side for side in (a, b) if side.axes.get("batch", Axis()).fixed is None]
    claimed = [side for side in is_open if not side.loose]
    if not claimed and len(is_open) < 2:
        return (joined.fixed or 1,)
    step = joined.fixed or 1
    tried = [step * n for n in (wanted if step == 1 else (1, 2))]
    most = joined.most or max(tried)
    if joined.most is None and joined.least == 1:
        return tuple(dict.fromkeys(tried))
    inside = [n for n in tried if joined.least <= n <= most]
    return tuple(dict.fromkeys([*inside, joined.least, most]))


def open_sizes(axes: tuple[Axis, Axis], wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """Image sizes to try: the wanted one, and where an axis is open a second one that is odd if it may be."""
    first, second = [], []
    for axis, want, shift in zip(axes, wanted, (37, -13), strict=True):
        if axis.fixed is not None:
            first.append(axis.fixed)
            second.append(axis.fixed)
            continue
        step, most = axis.multiple, axis.most or math.inf
        first.append(int(min(max(step, axis.least, want // step * step), most)))
        other = first[-1] + (step if step > 1 else max(shift, 1 - first[-1]))
        second.append(other if axis.least <= other <= most else axis.least)
    return list(dict.fromkeys([(first[0], first[1]), (second[0], second[1])]))


def _agree_on_preprocessing(
    a: Subject, b: Subject, given: Preprocessing | Mapping[str, Any] | None
) -> tuple[Preprocessing, list[str], list[str]]:
    """How photos are prepared, what is wrong about it, and what is to be noted."""
    said = [side.preprocessing for side in (a, b)]
    fallback = next((p for p in said if p is not None), Preprocessing())
    if given is not None:
        prepared = given if isinstance(given, Preprocessing) else replace(fallback, **dict(given))
        return prepared, [], []
    problems, notes = [], []
    if said[0] is None and said[1] is None:
        notes.append(
            "neither side says how photos are to be prepared; they are as ImageNet's models want them"
        )
    elif None in said:
        silent = (a, b)[said.index(None)]
        notes.append(
            f"{silent.name} does not say how photos are to be prepared; they are as the other side wants them"
        )
    elif differences := _differences(*said):
        problems.append(
            f"the two prepare photos differently: {'; '.join(differences)}. Here both got them as {a.name} wants them; "
            f"mend the metadata, or say how with preprocessing"
        )
    return fallback, problems, notes


def _differences(a: Preprocessing | None, b: Preprocessing | None) -> list[str]:
    assert a is not None
    assert b is not None
    found = []
    for name in Preprocessing.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if x != y and not (isinstance(x, (float, tuple)) and _close(x, y)):
            found.append(f"{name} {x} and {y}")
    return found


def _close(x: float | tuple[float, ...], y: float | tuple[float, ...]) -> bool:
    x, y = ((v,) if isinstance(v, float) else v for v in (x, y))
    return len(x) == len(y) and all(math.isclose(p, q, abs_tol=1e-6) for p, q in zip(x, y, strict=True))


@dataclass
class Comparison:
    """Two sides, what is tried with them, and what has come out so far.

    `original` is the file whose choices `b` may take in half precision. `strict` asks for the same names of outputs and
    the same dtypes, as a file has them that was exported from `a`.
    """

    a: Subject
    b: Subject
    plan: Plan
    prepare: Preprocessing
    rtol: float
    atol: float
    seed: int
    progress: Progress
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    strict: bool = False
    original: Reference | None = None
    _pairs: list[tuple[str, str]] = field(default_factory=list)
    _suspect: tuple[str, tuple[Tensor, Tensor], bool] | None = None

    def report(
        self, images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None
    ) -> VerificationReport:
        """Run everything that the plan holds."""
        started = time.perf_counter()
        photos = find_images(images)
        loaded = [load_image(photo) for photo in photos]
        checks: list[Check] = []
        sizes = [*self.plan.sizes, *self._small()]
        for size in sizes:
            for batch in self.plan.batches if size == sizes[0] else self.plan.batches[-1:]:
                for source in ("photos", "noise"):
                    self.progress(
                        f"comparing on {source}, {batch} x {self.plan.channels} x {size[0]} x {size[1]}"
                    )
                    checks += self._compare(self._stack(source, loaded, batch, size), batch, source)
        self.notes += [*self.a.remarks, *self.b.remarks, *self._remarks(checks, sizes[0])]
        self.notes = list(dict.fromkeys(self.notes))
        return VerificationReport(
            checks=tuple(checks),
            rtol=self.rtol,
            atol=self.atol,
            images=tuple(photo.name for photo in photos),
            preprocessing=self.prepare,
            runtime=self.b.runtime,
            seed=self.seed,
            seconds=time.perf_counter() - started,
            notes=tuple(self.notes),
            a=self.labels[0],
            b=self.labels[1],
            precision=max((self.a.precision, self.b.precision), key=list(TOLERANCES).index),
            problems=tuple(self.problems),
        )

    @property
    def labels(self) -> tuple[str, str]:
        """What the sides are called: the model, the file, ..."""
        if self.a.noun != self.b.noun:
            return f"the {self.a.noun}", f"the {self.b.noun}"
        return f"the first {self.a.noun}", f"the second {self.b.noun}"

    def trace(self, rewrite: Callable[[nn.Module], nn.Module] | None) -> Trace | None:
        """The way to the first difference, at the input where one was found (else at the first that was tried)."""
        if self._suspect is None:
            return None
        source, images, failed = self._suspect
        one = (_one_run(self.a, images[0]), _one_run(self.b, images[1]))
        if len(one[0]) != len(one[1]):
            self.notes.append(
                "no trace: the sides have different fixed batches, so their values are not those of the same images"
            )
            return None
        try:
            return find_divergence(
                self.a,
                self.b,
                one,
                self._pairs,
                source=source,
                rtol=self.rtol,
                atol=self.atol,
                failed=failed,
                rewrite=rewrite,
                say=self.progress,
            )
        except Nothing as reason:
            self.notes.append(f"no trace: {reason}")
        except Exception as error:  # the comparison stands without it
            self.notes.append(f"no trace: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None

    def _stack(self, source: str, photos: Sequence[Any], batch: int, size: tuple[int, int]) -> Tensor:
        """Inputs (B, C, H, W): pixels in uint8 where a side takes such, else normalised float32."""
        pictures = self.a.pictures or self.b.pictures
        channels = self.plan.channels
        if source == "photos":
            count = max(1, -(-len(photos) // batch)) * batch
            some = islice(cycle(photos), count)
            pixels = torch.stack([self.prepare.pixels(photo, size, channels) for photo in some])
            return pixels if pictures else self.prepare.normalise(pixels)
        draw = pixel_noise if pictures else noise
        return draw(batch, channels, *size, seed=self.seed + batch)

    def _inputs(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """What each side gets of a stack."""
        if stack.dtype != torch.uint8:
            return stack, stack
        normal, pictures = self.prepare.normalise(stack), stack.permute(0, 2, 3, 1).contiguous()
        return pictures if self.a.pictures else normal, pictures if self.b.pictures else normal

    def _small(self) -> list[tuple[int, int]]:
        """A size below what the export could prove (`vitrail.height_proven_from`), where the reference takes one."""
        usual = self.plan.sizes[0]
        size = list(usual)
        for i, lowest in enumerate(self.plan.proven_from):
            for smaller in dict.fromkeys((lowest // 4, lowest // 2)):
                tried = (smaller, size[1]) if i == 0 else (size[0], smaller)
                with contextlib.suppress(Exception):
                    if smaller > 0:
                        _run(self.a, self._inputs(self._stack("noise", (), self.plan.batches[-1], tried))[0])
                        size = list(tried)
                        break
        return [(size[0], size[1])] if tuple(size) != usual else []

    def _compare(self, stack: Tensor, batch: int, source: str) -> list[Check]:
        """Run both on `stack`, `batch` images at a time, `b` in all of its ways."""
        shape = (batch, *stack.shape[1:])
        chunks = [self._inputs(chunk) for chunk in stack.split(batch)]
        try:
            expected = [_run(self.a, mine) for mine, _ in chunks]
        except Exception as error:  # the runtimes' exceptions have no common base
            if (
                self.a.loose
                and self.b.loose
                and shape[2:] != self.plan.sizes[0]
                and self._refuses(chunks[0][1])
            ):
                self.notes.append(f"neither side takes images of {' x '.join(map(str, shape[2:]))}")
                return []
            return self._failed(source, shape, len(stack), self._refusal(self.a, error))
        checks = []
        for way in self.b.ways():
            rows = self._rows(way, expected, chunks, shape, source + way.label)
            if self.original is not None and not all(row.passed for row in rows):
                rows = self._held_rows(way, rows, expected, chunks, shape, source + way.label) or rows
            checks += rows
        return checks

    def _refuses(self, images: Tensor) -> bool:
        try:
            _run(self.b, images)
        except Exception:  # whatever it says
            return True
        return False

    def _rows(
        self,
        way: Way,
        expected: Sequence[Mapping[str, Tensor]],
        chunks: Sequence[tuple[Tensor, Tensor]],
        shape: tuple[int, ...],
        source: str,
    ) -> list[Check]:
        count = shape[0] * len(chunks)
        try:
            actual = [_run(self.b, others, way.run) for _, others in chunks]
        except Exception as error:  # the runtimes' exceptions have no common base
            return self._failed(source, shape, count, self._refusal(self.b, error))
        if reason := self._match_outputs(expected[0], actual[0]):
            return self._failed(source, shape, count, reason)
        rows = self._judged(source, shape, expected, actual)
        self._remember(rows, chunks, expected, actual, f"{source} {'x'.join(map(str, shape))}")
        return rows

    def _judged(
        self,
        source: str,
        shape: tuple[int, ...],
        expected: Sequence[Mapping[str, Tensor]],
        actual: Sequence[Mapping[str, Tensor]],
    ) -> list[Check]:
        checks = []
        for x, y in self._pairs:
            e, g = [values[x] for values in expected], [values[y] for values in actual]
            classes = self._holds_classes(y, e[0])
            tolerance = self.rtol, self.atol
            checks.append(judge(source, shape, y, e, g, *tolerance, self.labels, classes, self.strict))
            if e[0].dtype != g[0].dtype and not self.strict:
                self.notes.append(
                    f"{y} is {e[0].dtype} in {self.labels[0]} and {g[0].dtype} in {self.labels[1]}"
                )
        return checks

    def _held_rows(
        self,
        way: Way,
        free: Sequence[Check],
        expected: Sequence[Mapping[str, Tensor]],
        chunks: Sequence[tuple[Tensor, Tensor]],
        shape: tuple[int, ...],
        source: str,
    ) -> list[Check] | None:
        """The rows when the file runs with the choices of its original; None where it chooses as that does."""
        if way.source is None or self.original is None or not isinstance(self.b, OnnxSubject):
            return None
        try:
            held = [way.source.held_to(self.original, others) for _, others in chunks]
        except Exception:  # it can't be run so; the rows stand as they are
            return None
        differ, count = sum(h.flipped for h in held), sum(h.choices for h in held)
        if not differ:
            return None
        source += ", choices of float32"
        rows = self._judged(source, shape, expected, [self.b.named(h.outputs) for h in held])
        for theirs, ours in (pair for h in held for pair in h.scores):
            # masks are infinite in both
            pair = [torch.from_numpy(x).nan_to_num(0.0, 0.0, 0.0) for x in (theirs, ours)]
            scores = judge(
                source, shape, "scores", pair[:1], pair[1:], self.rtol, self.atol, self.labels, False
            )
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

    def _refusal(self, side: Subject, error: Exception) -> str:
        if side is self.a and side.loose and not self.b.loose:
            return f"the model itself refuses this size, which {self.labels[1]} claims to take: {error}"
        return f"{side.runs} fails on {self.labels[side is self.b]}: {error}"

    def _failed(self, source: str, shape: tuple[int, ...], count: int, reason: str) -> list[Check]:
        names = self.b.output_names or ["output"]
        return [Check.failed(source, shape, name, count, reason) for name in names]

    def _match_outputs(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str:
        """Pair the outputs, or say why they can't be."""
        if self.strict and list(a) != list(b):
            return f"the model's outputs are {list(a)}"
        common = [name for name in a if name in b]
        if common:
            self._pairs = [(name, name) for name in common]
            rest = [name for name in (*a, *b) if name not in common]
            if rest:
                self.notes.append(f"only one side has {', '.join(rest)}; that is not compared")
        elif len(a) == len(b):
            self._pairs = list(zip(a, b, strict=True))
            pairs = ", ".join(f"{x} with {y}" for x, y in self._pairs)
            self.notes.append(f"the outputs have different names and are compared in their order: {pairs}")
        else:
            return f"the outputs can't be matched: {', '.join(a)} on one side, {', '.join(b)} on the other"
        return ""

    def _holds_classes(self, name: str, value: Tensor) -> bool:
        known = name == "logits" or value.shape[-1] in (self.a.classes, self.b.classes)
        return value.ndim == 2 and value.shape[1] > 0 and known

    def _remember(
        self,
        checks: Sequence[Check],
        chunks: Sequence[tuple[Tensor, Tensor]],
        expected: Sequence[Mapping[str, Tensor]],
        actual: Sequence[Mapping[str, Tensor]],
        source: str,
    ) -> None:
        """Keep the first images at which the sides differ, for the trace."""
        failed = any(not check.passed for check in checks)
        if self._suspect is not None and (self._suspect[2] or not failed):
            return

        def error(i: int) -> float:
            pairs = [(expected[i][x], actual[i][y]) for x, y in self._pairs]
            errors = [(e.double() - g.double()).abs() for e, g in pairs if e.shape == g.shape]
            return max((e.nan_to_num(torch.inf).max().item() for e in errors if e.numel()), default=0.0)

        self._suspect = source, chunks[max(range(len(chunks)), key=error)], failed

    def _remarks(self, checks: Sequence[Check], size: tuple[int, int]) -> list[str]:
        """What the reader of the figures should know: randomness in the model, or outputs that ignore the input."""
        if not isinstance(self.a, ModuleSubject):
            return []
        a, b = (noise(self.plan.batches[0], self.plan.channels, *size, seed=seed) for seed in (0, 1))
        try:
            first, other = self.a.run(a), self.a.run(b)
            again = self.a.run(a) if any(not check.passed for check in checks) else first
        except Exception:  # the checks have said so already
            return []
        notes = []
        if not all(torch.equal(first[name], again[name]) for name in first):
            worst = max((first[name] - again[name]).abs().max().item() for name in first)
            notes.append(f"the model does not repeat itself: two runs on one input differ by {worst:.3g}")
        deaf = [name for name in first if torch.equal(first[name], other[name])]
        if deaf:
            notes.append(
                f"{', '.join(deaf)} does not depend on the image (weights of zero?), so agreement there proves little"
            )
        return notes


def _run(
    side: Subject, images: Tensor, run: Callable[[Tensor], dict[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """Run a side (in a way of its own), as often as its fixed batch asks for."""
    run = run or side.run
    fixed = side.axes["batch"].fixed if "batch" in side.axes else None
    if fixed is None or fixed == len(images):
        return run(images)
    results = [run(chunk) for chunk in images.split(fixed)]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def _one_run(side: Subject, images: Tensor) -> Tensor:
    """The first images of a stack that the side takes in one run."""
    fixed = side.axes["batch"].fixed if "batch" in side.axes else None
    return images if fixed is None else images[:fixed]
