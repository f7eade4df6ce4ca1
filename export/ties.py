"""Choices that came out otherwise: a flip between candidates that tie, or a selection that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .intermediates import ModuleSource, OnnxSource
from .matching import Match

CHOOSERS = ("TopK", "ArgMax", "ArgMin")
ROUNDINGS = 64
"""Scores nearer to each other than this many roundings (of the largest score of their row) tie."""


def explain_choice(
    graph: OnnxSource,
    key: str,
    found: Mapping[str, Match],
    pools: Sequence[ModuleSource | OnnxSource],
) -> list[str]:
    """What is to say of the value `key`, where a TopK, ArgMax or ArgMin computes it; nothing otherwise."""
    node = graph.nodes[key]
    if node.op_type not in CHOOSERS:
        return []
    index = node.output[-1]
    values: dict[str, Tensor] = {}
    graph.visit([name for name in (node.input[0], index) if name in graph.nodes], values.__setitem__)
    if node.input[0] not in values:
        return []
    attributes = {a.name: a.i for a in node.attribute}
    axis = attributes.get("axis", -1 if node.op_type == "TopK" else 0)
    scores = _rows(values[node.input[0]], axis)
    squeezed = node.op_type != "TopK" and not attributes.get("keepdims", 1)
    chosen = values[index].unsqueeze(axis) if squeezed else values[index]
    mine = _rows(chosen, axis)
    eps = torch.finfo(values[node.input[0]].dtype).eps
    theirs = _counterpart(found.get(index), pools)
    if theirs is None or theirs.is_floating_point() or theirs.numel() != chosen.numel():
        return [_closest_call(scores, mine, eps)]
    theirs = _rows(theirs.reshape(chosen.shape), axis)
    return [_compare_choices(scores, mine, theirs, eps)]


def _rows(value: Tensor, axis: int) -> Tensor:
    return value.movedim(axis, -1).flatten(0, -2) if value.dim() > 1 else value[None]


def _counterpart(known: Match | None, pools: Sequence[ModuleSource | OnnxSource]) -> Tensor | None:
    values: list[Tensor] = []
    for pool in pools:
        if known is not None and not values:
            pool.visit([known.a], lambda _, value: values.append(value.clone()))
    return values[0] if values else None


def _masks(scores: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, indices.long(), True)


def _compare_choices(scores: Tensor, mine: Tensor, theirs: Tensor, eps: float) -> str:
    """A sentence on which of the candidates were chosen by one side only."""
    count = scores.shape[1]
    if not ((theirs >= 0) & (theirs < count)).all() or not ((mine >= 0) & (mine < count)).all():
        return (
            f"it chooses indices outside of the {count} candidates on one side: the selection itself is wrong"
        )
    differ = _masks(scores, mine) ^ _masks(scores, theirs)
    rows = differ.any(1)
    if not rows.any():
        return "both sides choose the same candidates, in another order"
    scores, differ = scores[rows].double(), differ[rows]
    highest = scores.masked_fill(~differ, -torch.inf).amax(1)
    lowest = scores.masked_fill(~differ, torch.inf).amin(1)
    scale = scores.masked_fill(~scores.isfinite(), 0).abs().amax(1).clamp_min(1e-30)
    gap, relative = (highest - lowest).max().item(), ((highest - lowest) / scale).max().item()
    text = f"{int(rows.sum())} of {len(rows)} choices differ, between candidates whose scores are {gap:.2g} apart"
    if relative <= ROUNDINGS * eps:
        return (
            f"{text} at most ({relative:.1g} of the largest): they tie to within rounding, and arithmetic in another "
            f"order decides. The choice flipped; look at other images or weights, or raise the tolerance"
        )
    return f"{text} ({relative:.1g} of the largest): no tie, so the selection itself is wrong"


def _closest_call(scores: Tensor, mine: Tensor, eps: float) -> str:
    """A sentence for a choice that the other side doesn't show: how near the nearest was."""
    chosen = _masks(scores, mine)
    if chosen.all():
        return "it chooses every candidate, in some order"
    s = scores.double()
    last = s.masked_fill(~chosen, torch.inf).amin(1)
    after = s.masked_fill(chosen, -torch.inf).amax(1)
    scale = s.masked_fill(~s.isfinite(), 0).abs().amax(1).clamp_min(1e-30)
    relative = ((last - after).abs() / scale).min().item()
    verdict = "which is within rounding" if relative <= ROUNDINGS * eps else "which rounding does not bridge"
    return (
        f"the other side does not show what it chose; the nearest of {len(s)} decisions here was between scores "
        f"{relative:.1g} of the largest apart, {verdict}"
    )
