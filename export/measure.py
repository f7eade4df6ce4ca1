"""How two results differ, and whether that is too much: the one place where verification measures and judges.

Errors are judged by the largest magnitude that the reference itself puts out: an output passes where
`max |b - a| <= atol + rtol * max |a|`, over each batch that is tried. (Graphs of the same float32 arithmetic in another
order differ by 1e-7 to 1e-6 of that magnitude; a wrong graph by 1e-2 and more.) Nothing widens the tolerance by
itself. Models that *choose* (top-k routing, token selection) can differ by more where two candidates tie to within
rounding: such a flip shows up as a measured error and fails, and it is for the caller to look at it and to raise
`rtol`, or not.

Half precision flips such choices often, so there a file that fails is run again with the choices of the float32 file
that it was made from, where that is given. It passes if all else agrees: the outputs, and the scores that the file
itself would have chosen by. The report then says how many choices differ, and how far that takes the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import VerificationError
from .images import Preprocessing

if TYPE_CHECKING:
    from .trace import Trace

TOLERANCES = {
    "float32": (1e-4, 1e-6),
    "float16": (1e-2, 1e-6),
    "bfloat16": (8e-2, 1e-6),
    "int8": (0.15, 1e-6),
}
"""rtol and atol by the less precise side, from the more to the less precise. In 8 bits no error tells a coarse file
from a wrong one by itself: look at the cosine and at the classes as well."""

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_EXACT = 1 << 22  # values from which on percentiles are those of evenly spaced ones


@dataclass(frozen=True)
class Check:
    """One output compared for one kind of input at one input shape.

    Errors are absolute; `relative` values are errors over `largest`, the largest magnitude of the reference's
    output. `percentiles` are those of `PERCENTILES`. `top1` is how many images get the same class from both, `top5` how
    many get the same five best classes in whatever order, None for outputs that are not class scores (of five
    classes and more); they are reported and not judged, since within tolerance only a tie can change a
    class. `failure` says what is wrong, "" if nothing. Where the file ran with the choices of its float32 original,
    `flipped` of `choices` would have been other ones.
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
    largest: float = float("nan")
    percentiles: tuple[float, ...] = ()
    top5: int | None = None

    @classmethod
    def failed(cls, source: str, shape: tuple[int, ...], output: str, images: int, reason: str) -> Check:
        """A comparison that could not be made."""
        nan = float("nan")
        return cls(source, shape, output, images, nan, nan, nan, nan, None, reason)

    @property
    def passed(self) -> bool:
        """Whether the output agrees."""
        return not self.failure

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        named = {f"p{p:g}": value for p, value in zip(PERCENTILES, self.percentiles, strict=False)}
        return {
            **asdict(self),
            "shape": list(self.shape),
            "percentiles": named,
            "relative_percentiles": {name: _over(value, self.largest) for name, value in named.items()},
            "mean_relative": _over(self.mean_error, self.largest),
            "passed": self.passed,
        }


@dataclass(frozen=True)
class VerificationReport:
    """All comparisons of two sides: `a`, the reference, and `b`, what claims to compute the same.

    `problems` are failures that belong to no single comparison, such as sides that prepare photographs differently.
    """

    checks: tuple[Check, ...]
    rtol: float
    atol: float
    images: tuple[str, ...]
    preprocessing: Preprocessing
    runtime: str
    seed: int
    seconds: float
    notes: tuple[str, ...] = field(default=())
    a: str = "the model"
    b: str = "the file"
    precision: str = "float32"
    problems: tuple[str, ...] = ()
    trace: Trace | None = None

    @property
    def title(self) -> str:
        """What was compared with what."""
        if (self.a, self.b) == ("the model", "the file"):
            return f"{self.runtime} against torch"
        return f"{self.b} ({self.runtime}) against {self.a}"

    @property
    def passed(self) -> bool:
        """Whether there are checks, all of them passed, and there is no other problem."""
        return bool(self.checks) and not self.problems and all(check.passed for check in self.checks)

    def raise_on_failure(self) -> None:
        """Raise `VerificationError` unless everything passed."""
        if not self.passed:
            raise VerificationError(self)

    def explain(self) -> str:
        """One sentence on the outcome, and a line for each failure and note."""
        failed = [check for check in self.checks if not check.passed]
        if self.passed:
            return f"all {len(self.checks)} comparisons passed"
        lines = [
            f"{self.b} does not compute what {self.a} computes: "
            f"{len(failed)} of {len(self.checks)} comparisons failed"
        ]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [
            f"  {c.output} on {c.source} {'x'.join(map(str, c.shape))}: {c.failure}" for c in failed[:6]
        ]
        if len(failed) > 6:
            lines.append(f"  and {len(failed) - 6} more")
        if self.trace is not None:
            lines += [f"  {line}" for line in self.trace.explain()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        names = ("passed", "a", "b", "precision", "rtol", "atol", "runtime", "seed", "seconds")
        return {
            **{name: getattr(self, name) for name in names},
            "images": list(self.images),
            "preprocessing": self.preprocessing.to_dict(),
            "checks": finite([check.to_dict() for check in self.checks]),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "trace": finite(self.trace.to_dict()) if self.trace else None,
        }

    def table(self) -> Any:
        """A rich table of the checks."""
        from .render import checks_table

        return checks_table(self)


def finite(value: Any) -> Any:
    """NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return None
    return value


def _over(error: float, largest: float) -> float:
    return error / largest if largest else (0.0 if error == 0 else float("inf"))


@dataclass(frozen=True)
class Figures:
    """How far tensors lie apart."""

    max_error: float
    mean_error: float
    max_relative: float
    cosine: float
    largest: float
    percentiles: tuple[float, ...]
    norm_error: float = float("nan")
    """Norm of the difference over the norm of what was expected."""


def measure(expected: Tensor, actual: Tensor) -> Figures:
    """Figures of two tensors of one shape, computed in float64."""
    e, a = expected.flatten().double(), actual.flatten().double()
    if not len(e):
        return Figures(0.0, 0.0, 0.0, 1.0, 0.0, (0.0,) * len(PERCENTILES), 0.0)
    error = (e - a).abs()
    worst, largest = error.max().item(), e.abs().max().item()
    norms = e.norm() * a.norm()
    cosine = (e @ a / norms).item() if norms > 0 else float(bool((e == a).all()))
    norm_error = _over(error.norm().item(), e.norm().item())
    some = error[:: -(-len(error) // _EXACT)]
    ranks = torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64, device=some.device)
    percentiles = tuple(some.quantile(ranks).tolist()) if some.isfinite().all() else (float("nan"),) * 4
    return Figures(
        worst, error.mean().item(), _over(worst, largest), cosine, largest, percentiles, norm_error
    )


def judge(
    source: str,
    shape: tuple[int, ...],
    name: str,
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    rtol: float,
    atol: float,
    sides: tuple[str, str],
    classes: bool,
    same_dtype: bool = True,
) -> Check:
    """Compare one output over the batches of one kind of input.

    Args:
        source, shape, name: what is compared; shape is that of the input.
        expected, actual: a tensor for each batch.
        rtol, atol: tolerances.
        sides: what the two are called.
        classes: whether the output holds scores of classes.
        same_dtype: whether another precision is a failure by itself.
    """
    count = shape[0] * len(expected)
    for e, a in zip(expected, actual, strict=True):
        if reason := _mismatch(e, a, sides, classes, same_dtype):
            return Check.failed(source, shape, name, count, reason)
    figures = measure(torch.cat([x.flatten() for x in expected]), torch.cat([x.flatten() for x in actual]))
    allowed = atol + rtol * figures.largest
    top1, top5 = best_classes(expected, actual) if classes else (None, None)
    failure = ""
    if not all(x.isfinite().all() for x in expected):
        failure = f"{sides[0]}'s own output holds NaN or infinity"
    elif not all(x.isfinite().all() for x in actual):
        failure = f"{sides[1]}'s output holds NaN or infinity"
    elif figures.max_error > allowed:
        failure = (
            f"max error {figures.max_error:.3g} exceeds {allowed:.3g} "
            f"(atol {atol:g} + rtol {rtol:g} x {figures.largest:.3g})"
        )
    return Check(
        source=source,
        shape=shape,
        output=name,
        images=count,
        max_error=figures.max_error,
        mean_error=figures.mean_error,
        max_relative=figures.max_relative,
        cosine=figures.cosine,
        top1=top1,
        failure=failure,
        largest=figures.largest,
        percentiles=figures.percentiles,
        top5=top5,
    )


def _mismatch(e: Tensor, a: Tensor, sides: tuple[str, str], classes: bool, same_dtype: bool) -> str:
    """Why two outputs can't be compared value by value, "" if they can."""
    if classes and e.ndim == a.ndim == 2 and e.shape[0] == a.shape[0] and e.shape[1] != a.shape[1]:
        return f"{sides[0]} has {e.shape[1]} classes and {sides[1]} {a.shape[1]}; compare models of the same classes"
    both_float = e.is_floating_point() and a.is_floating_point()
    if e.shape != a.shape or (e.dtype != a.dtype and (same_dtype or not both_float)):
        return f"expected {e.dtype} {tuple(e.shape)}, got {a.dtype} {tuple(a.shape)}"
    return ""


def best_classes(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[int, int | None]:
    """Images with the same best class, and with the same five best (None for fewer than five classes)."""
    pairs = list(zip(expected, actual, strict=True))
    top1 = sum(int((e.argmax(1) == a.argmax(1)).sum()) for e, a in pairs)
    if expected[0].shape[1] < 5:
        return top1, None
    best = [(e.topk(5).indices.sort().values, a.topk(5).indices.sort().values) for e, a in pairs]
    return top1, sum(int((e == a).all(1).sum()) for e, a in best)
