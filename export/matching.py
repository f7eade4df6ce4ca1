"""Which values of two sides belong together, and at which of them they part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .intermediates import Entry, ModuleSource, OnnxSource
from .measure import Figures, measure

_SAMPLES = 1024
_SQUASHING = frozenset(
    [
        "Clip",
        "HardSigmoid",
        "Relu",
        "Sigmoid",
        "Softmax",
        "Tanh",
        "_softmax",
        "clamp",
        "hardsigmoid",
        "relu",
        "sigmoid",
        "tanh",
    ]
)
"""Operators whose results may agree where what they are computed from does not."""
_MOVES = frozenset(
    [
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
        "cat",
        "clone",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "_unsafe_view",
    ]
)
"""Operators that compute nothing."""


@dataclass(frozen=True)
class Match:
    """A value and its counterpart `a`: figures, whether they agree, and whether that tells anything.

    Whole numbers (indices), booleans and values that are nearly all the same agree past a fault, too: a choice may stay
    the same, and the softmax over scores near zero is even. So the error has to be small against the spread as well.
    """

    a: str
    shape: tuple[int, ...]
    figures: Figures
    agrees: bool
    tells: bool = False

    @property
    def error(self) -> float:
        """Relative error, of whole numbers the share that differs; infinite where there are no figures."""
        error = self.figures.max_relative
        return error if error == error else float("inf")


def match(name: str, expected: Tensor, actual: Tensor, rtol: float, atol: float) -> Match:
    """Compare a value with its counterpart, by numbers of one kind and shape."""
    shape = tuple(actual.shape)
    nan = float("nan")
    if expected.shape != actual.shape:
        return Match(name, shape, Figures(nan, nan, nan, nan, nan, ()), False)
    if expected.is_floating_point() or actual.is_floating_point():
        figures = measure(expected, actual)
        agrees = figures.max_error <= atol + rtol * figures.largest
        spread = (expected.max() - expected.min()).item() if expected.numel() else 0.0
        return Match(name, shape, figures, agrees, agrees and figures.max_error < max(rtol, 1e-30) * spread)
    differ = (expected.long() - actual.long()).abs().flatten().double()
    share = (differ > 0).double().mean().item() if len(differ) else 0.0
    worst = differ.max().item() if len(differ) else 0.0
    largest = expected.long().abs().max().item() if len(differ) else 0.0
    return Match(name, shape, Figures(worst, nan, share, 1 - share, largest, ()), share == 0)


def sample(value: Tensor) -> Tensor:
    """Up to 1024 of a tensor's numbers in float64, evenly spaced in the order of its elements."""
    count = value.numel()
    if count <= _SAMPLES:
        return value.flatten().double()
    at = torch.linspace(0, count - 1, _SAMPLES, dtype=torch.float64).long()
    places = []
    for size in reversed(value.shape):  # reading them one by one spares a copy of what is not contiguous
        places.append(at % size)
        at = at // size
    return value[tuple(reversed(places))].double()


class Pool:
    """Samples of all values of a source, to look up similar ones."""

    def __init__(self, source: ModuleSource | OnnxSource):
        self.source = source
        groups: dict[tuple[int, bool], list[tuple[str, Tensor]]] = defaultdict(list)

        def add(key: str, value: Tensor) -> None:
            if value.numel():
                groups[_kind(value)].append((key, sample(value)))

        source.visit(None, add)
        self._groups = {
            kind: ([key for key, _ in group], torch.stack([values for _, values in group]))
            for kind, group in groups.items()
        }

    def nearest(self, value: Tensor) -> str | None:
        """The value of the source with as many elements that is most similar, None where there is none."""
        keys, values = self._groups.get(_kind(value), ([], None))
        if values is None:
            return None
        mine = sample(value)
        if value.is_floating_point():
            distances = (values - mine).abs().amax(1) / values.abs().amax(1).clamp_min(1e-30)
        else:
            distances = (values != mine).double().mean(1)
        return keys[int(distances.nan_to_num(nan=torch.inf).argmin())]


def _kind(value: Tensor) -> tuple[int, bool]:
    return value.numel(), value.is_floating_point()


class Search:
    """Looks for the first value that differs, among those that the outputs come from.

    Args:
        entries: of the side that is looked at, each after what it is computed from.
        found: its values' matches.
        floor: relative error that says nothing.
        outputs: those that differ.
        unknown_is_fine: whether a value without an agreeing counterpart is fine where an agreeing one depends on it
            (values are looked for), or a value that differs is at fault by itself (values are known by name).
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        found: Mapping[str, Match],
        floor: float,
        outputs: Collection[str],
        unknown_is_fine: bool = False,
    ):
        self._entries, self._found, self._floor = entries, found, floor
        self._looks = unknown_is_fine
        self._by_key = {entry.key: entry for entry in entries}
        self._order = {entry.key: i for i, entry in enumerate(entries)}
        self._leads = self._before(outputs)
        self._fine = {key for key, known in found.items() if known.agrees}
        if unknown_is_fine:
            squashed = self._squashed()
            telling = (key for key, known in found.items() if known.tells and key not in squashed)
            self._fine |= self._before(telling)
        self._incoming: dict[str, float] = {}
        for entry in entries:
            self._incoming[entry.key] = max((self._outgoing(key) for key in entry.inputs), default=0.0)

    def _before(self, keys: Iterable[str]) -> set[str]:
        """These values and all that they are computed from."""
        seen: set[str] = set()
        stack = [key for key in keys if key in self._by_key]
        while stack:
            key = stack.pop()
            if key not in seen:
                seen.add(key)
                stack += [name for name in self._by_key[key].inputs if name in self._by_key]
        return seen

    def _squashed(self) -> set[str]:
        """Values that may agree where what they are computed from does not, and those that only move their numbers."""
        found: set[str] = set()
        for entry in self._entries:
            moved = entry.op in _MOVES and bool(entry.inputs) and found.issuperset(entry.inputs)
            if entry.op in _SQUASHING or moved:
                found.add(entry.key)
        return found

    def _outgoing(self, key: str) -> float:
        """Error of a value, or of what it was computed from where it has no counterpart."""
        if self.comparable(key):
            return self._found[key].error
        return self._incoming.get(key, 0.0)

    def comparable(self, key: str) -> bool:
        """Whether the value's match says something: not where only another order of computation hides it."""
        return key in self._found and (self._found[key].agrees or not self._looks or key not in self._fine)

    def first(self) -> str | None:
        """The first that differs, None where none does.

        Of all values up to the first past tolerance, it is the one at which the error grows by the largest factor: a
        small fault grows past the tolerance only later.
        """
        past = next((e.key for e in self._entries if e.key in self._leads and self._is_past(e.key)), None)
        if past is None:
            return None
        before = self._before([past])
        growth = {past: self._growth(past, self._found[past].error if past in self._found else float("inf"))}
        for entry in self._entries:
            if entry.key in before and self.comparable(entry.key):
                growth[entry.key] = self._growth(entry.key, self._found[entry.key].error)
        return max(growth, key=lambda key: (growth[key], -self._order[key]))

    def _is_past(self, key: str) -> bool:
        if self._looks:
            return key not in self._fine
        return key in self._found and not self._found[key].agrees

    def _growth(self, key: str, error: float) -> float:
        return error / max(self._incoming[key], self._floor) if error > 16 * self._floor else 0.0

    def last_before(self, key: str) -> tuple[str | None, list[str]]:
        """The latest agreeing value that `key` is computed from, and the values between that have no counterpart."""
        agreeing: set[str] = set()
        between: set[str] = set()
        stack = [name for name in self._by_key[key].inputs if name in self._by_key]
        while stack:
            name = stack.pop()
            if self.comparable(name) and self._found[name].agrees:
                agreeing.add(name)
            elif name not in between:
                between.add(name)
                stack += [source for source in self._by_key[name].inputs if source in self._by_key]
        last = max(agreeing, key=self._order.__getitem__, default=None)
        return last, sorted(between, key=self._order.__getitem__)
