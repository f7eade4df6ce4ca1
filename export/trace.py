"""Where two sides part: the first intermediate value that differs, and how the error grows from there.

Two graphs with the same names for their values, and two modules with the same submodules, are compared name by
name. Otherwise the values of one side are looked for among the other's: an operator's result counts as found where some
result of the other side holds the same numbers in the same order, whatever its shape. What is not found but has
found values behind it was only computed another way (a folded norm, a fused node); what is not found and has none is
past the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from .capture import plain_operators
from .functions import UNORDERED
from .intermediates import Entry, ModuleSource, OnnxSource, source_of
from .matching import Match, Pool, Search, match
from .measure import Figures, measure
from .runs import open_session
from .subjects import ModuleSubject, OnnxSubject, Subject
from .ties import explain_choice

FLOORS = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-7}
"""Errors that say nothing about where a fault lies: rounding of a single operator."""

Source = ModuleSource | OnnxSource


@dataclass(frozen=True)
class Place:
    """A value of `b` and the value of `a` that it was compared with, None where there is no counterpart.

    `max_relative` is over the largest magnitude; of whole numbers and booleans it is the share that differs.
    """

    a: str | None
    b: str
    shape: tuple[int, ...]
    max_error: float
    max_relative: float
    cosine: float
    agrees: bool


@dataclass(frozen=True)
class Trace:
    """Values compared along the way (`places`), the last that agrees before the first that does not, and why.

    `first_key` is the name of the value at `first`, "" where nothing differs. `how` says how values were matched,
    `between` lists values of `b` that lie between `last` and `first` and have no
    counterpart, `findings` holds sentences on the reason where one could be found.
    """

    source: str
    how: str
    places: tuple[Place, ...] = ()
    last: Place | None = None
    first: Place | None = None
    between: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    first_key: str = ""

    def explain(self) -> list[str]:
        """What was found, a line each."""
        lines = list(self.findings)
        if self.first is not None:
            lines.insert(0, f"first diverging: {_in_words(self.first)}")
            before = _in_words(self.last) if self.last else "the image"
            lines.insert(0, f"last agreeing: {before}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def growth(self, rows: int = 24) -> list[Place]:
        """Some of the places, evenly along the way and all of those around the first that diverges."""
        count = len(self.places)
        if count <= rows:
            return list(self.places)
        kept = {i * (count - 1) // (rows - 8) for i in range(rows - 7)}
        if self.first in self.places:
            at = self.places.index(self.first)
            kept |= set(range(max(0, at - 3), min(count, at + 4)))
        return [self.places[i] for i in sorted(kept)]


def _in_words(place: Place) -> str:
    against = f" against {place.a}" if place.a and place.a != place.b else ""
    error = f"error {place.max_error:.3g}, relative {place.max_relative:.3g}" if place.a else "no counterpart"
    return f"{place.b}{against}: {error}"


def find_divergence(
    a: Subject,
    b: Subject,
    images: tuple[Tensor, Tensor],
    outputs: Sequence[tuple[str, str]],
    *,
    source: str,
    rtol: float,
    atol: float,
    failed: bool = True,
    rewrite: Callable[[nn.Module], nn.Module] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Trace:
    """Run both sides once more and compare what they compute on the way.

    Args:
        a, b: the reference and the other side.
        images: what each takes.
        outputs: pairs of their outputs' names.
        source: what the images are, in words.
        rtol, atol: what counts as agreement of outputs; on the way it is a tenth of it, down to rounding.
        failed: whether the outputs are past it; if not, the same counts on the way.
        rewrite: from a module to the form of it that was traced, for counterparts that only that form has.
        say: called with a line of text before each step.

    Raises:
        Nothing: a side that shows no intermediate values.
    """
    say("looking for the first value that differs")
    if finding := _blame_optimiser(a, b, images, outputs, rtol, atol):
        return Trace(source, "outputs only", findings=(finding,))
    floor = max(FLOORS[a.precision], FLOORS[b.precision])
    if failed:  # values that carry a fault should not pass for agreeing just because the tolerance is wide
        rtol = min(rtol, max(rtol / 10, 64 * floor))
    here, there = source_of(a, images[0]), source_of(b, images[1])
    names = {y: x for x, y in outputs}
    common = _common(here.entries, there.entries, names)
    findings: list[str] = []
    if common is not None:
        found = _by_name(here, there, common, names, rtol, atol)
        pools = [here]
        search = Search(there.entries, found, floor, _results(there, names))
    else:
        swapped = isinstance(there, ModuleSource) and isinstance(here, OnnxSource)
        if swapped:
            here, there, names = there, here, dict(outputs)
        pools = [here]
        if isinstance(there, OnnxSource) and isinstance(here, ModuleSource):
            plain = _plain(b if swapped else a, images[swapped], there.opset, rewrite)
            results = there.visit([], lambda key, value: None)
            agree = [
                all(_agree(measure(side.outputs[x], results[y]), rtol, atol) for y, x in names.items())
                for side in (here, plain)
            ]
            if agree == [False, True]:
                findings.append(
                    "the file agrees with the plain definitions of the model's operators: its compiled operators "
                    "differ from those (VITRAIL_OPS=reference verifies without them)"
                )
            else:
                pools.append(plain)
        found = _by_value(pools, there, rtol, atol)
        search = Search(there.entries, found, floor, _results(there, names), unknown_is_fine=True)
    trace = _trace(source, search, found, pools, there, common is not None)
    if trace.first_key and isinstance(there, OnnxSource):
        findings += explain_choice(there, trace.first_key, found, pools)
    return replace(trace, findings=tuple(findings))


def _results(source: Source, names: Mapping[str, str]) -> set[str]:
    """The values that are the outputs: of a graph by their names, of a module what it computes last."""
    return set(names) if isinstance(source, OnnxSource) else {source.entries[-1].key}


def _agree(figures: Figures, rtol: float, atol: float) -> bool:
    return figures.max_error <= atol + rtol * figures.largest


def _blame_optimiser(
    a: Subject,
    b: Subject,
    images: tuple[Tensor, Tensor],
    outputs: Sequence[tuple[str, str]],
    rtol: float,
    atol: float,
) -> str:
    """A sentence, where a file agrees as it is written and only the runtime's optimisation of it differs."""
    for this, other, mine, others, swap in ((b, a, images[1], images[0], False), (a, b, *images, True)):
        if not isinstance(this, OnnxSubject):
            continue
        expected = other.run(others)

        def agrees(
            level: str,
            this: OnnxSubject = this,
            mine: Tensor = mine,
            swap: bool = swap,
            expected: Mapping[str, Tensor] = expected,
        ) -> bool:
            session = open_session(this.proto.SerializeToString(), this.folder, level, this.kernels)
            got = this.named(this.run_session(session, this.output_names, mine))
            pairs = [(got[x], expected[y]) if swap else (expected[x], got[y]) for x, y in outputs]
            return all(_agree(measure(e, g), rtol, atol) for e, g in pairs)

        if not agrees("all") and agrees("none"):
            level = next((name for name in ("basic", "extended") if not agrees(name)), "all")
            return (
                f"as it is written, {this.name} agrees; it differs once {this.runtime.split(',')[0]} optimises it "
                f"(from level '{level}' on), so the fault is the runtime's and not the file's"
            )
    return ""


def _common(a: Sequence[Entry], b: Sequence[Entry], names: Mapping[str, str]) -> list[str] | None:
    """Keys of `b` that mean the same in `a`, None where the two name their values independently."""
    operators = {entry.key: entry.op for entry in a}
    found = [entry for entry in b if names.get(entry.key, entry.key) in operators]
    same = [entry.key for entry in found if operators[names.get(entry.key, entry.key)] == entry.op]
    enough = 2 * len(same) >= min(len(a), len(b)) and 10 * len(same) >= 8 * len(found)
    return [entry.key for entry in found] if enough and same else None


def _values(source: Source, keys: Sequence[str]) -> dict[str, Tensor]:
    """Copies of values, since a module may overwrite its own."""
    held: dict[str, Tensor] = {}

    def see(key: str, value: Tensor) -> None:
        held[key] = value.clone()

    source.visit(keys, see)
    return held


def _by_name(
    a: Source, b: Source, keys: Sequence[str], names: Mapping[str, str], rtol: float, atol: float
) -> dict[str, Match]:
    """Values of the same name, compared; lists that are sets without their order."""
    found: dict[str, Match] = {}
    sets = {entry.key for entry in b.entries if entry.op.startswith(UNORDERED)}
    for chunk in b.chunks(set(keys)):
        held = _values(b, chunk)
        wanted = {names.get(key, key): key for key in chunk}

        def see(
            key: str, value: Tensor, wanted: Mapping[str, str] = wanted, held: Mapping[str, Tensor] = held
        ) -> None:
            mine, other = value, held[wanted[key]]
            if wanted[key] in sets:
                mine, other = mine.sort(-1).values, other.sort(-1).values
            found[wanted[key]] = match(key, mine, other, rtol, atol)

        a.visit(wanted.keys(), see)
    return found


def _by_value(pools: Sequence[Source], graph: Source, rtol: float, atol: float) -> dict[str, Match]:
    """For each value of `graph` the most similar value of the pools, compared."""
    prints = [Pool(source) for source in pools]
    found: dict[str, Match] = {}
    for chunk in graph.chunks({entry.key for entry in graph.entries}):
        held = _values(graph, chunk)
        for pool in prints:
            nearest = {key: pool.nearest(value) for key, value in held.items()}
            readers: dict[str, list[str]] = {}
            for key, name in nearest.items():
                if name is not None and not (key in found and found[key].agrees):
                    readers.setdefault(name, []).append(key)

            def see(
                name: str,
                value: Tensor,
                readers: Mapping[str, list[str]] = readers,
                held: Mapping[str, Tensor] = held,
            ) -> None:
                for key in readers[name]:
                    new = match(name, value.reshape(held[key].shape), held[key], rtol, atol)
                    if key not in found or new.error < found[key].error:
                        found[key] = new

            pool.source.visit(readers.keys(), see)
    return found


def _plain(
    subject: Subject, images: Tensor, opset: int, rewrite: Callable[[nn.Module], nn.Module] | None
) -> ModuleSource:
    """The module once more as it was traced: rewritten, its operators as their plain definitions."""
    assert isinstance(subject, ModuleSubject)
    model = subject.model if rewrite is None else rewrite(subject.model)
    traced = ModuleSubject(model, subject.module.form)
    return ModuleSource(traced, images, lambda: plain_operators(opset))


def _trace(
    source: str,
    search: Search,
    found: Mapping[str, Match],
    pools: Sequence[Source],
    graph: Source,
    named: bool,
) -> Trace:
    labels = {entry.key: str(entry) for pool in pools for entry in pool.entries}
    entries = {entry.key: entry for entry in graph.entries}

    def place(key: str) -> Place:
        known = found.get(key)
        if known is None:
            return Place(None, str(entries[key]), (), float("nan"), float("nan"), float("nan"), False)
        f = known.figures
        label = labels.get(known.a, known.a)
        return Place(label, str(entries[key]), known.shape, f.max_error, known.error, f.cosine, known.agrees)

    first = search.first()
    last, between = search.last_before(first) if first else (None, [])
    return Trace(
        source=source,
        how="by name" if named else "by value",
        places=tuple(place(key) for key in entries if search.comparable(key)),
        last=place(last) if last else None,
        first=place(first) if first else None,
        between=tuple(str(entries[key]) for key in between),
        first_key=first or "",
    )
