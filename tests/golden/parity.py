"""What the parity tests of all families share: a whole checkpoint, a notebook of feature maps, the comparison."""

from collections.abc import Callable
from typing import Any

import torch
from seeded import check_tap, official_state_dict, relative_error, seeded_image
from torch import Tensor, nn

from vitrail.ops import use_ops

LIMIT = 1e-9

Keep = Callable[..., None]


def authors_checkpoint(case: Any) -> dict[str, Tensor]:
    """A whole state dict in the authors' layout, with the counters and indices that a published file also holds."""
    derived = {
        key: torch.zeros(entry["shape"], dtype=torch.int64)
        for key, entry in case.manifest.items()
        if entry["kind"] == "derived"
    }
    return official_state_dict(case) | derived


def notebook() -> tuple[dict[str, Tensor], Keep]:
    """Feature maps by golden name, and `keep(module, name, view)`, which has a module's output noted, seen as `view`."""
    taps: dict[str, Tensor] = {}

    def keep(module: nn.Module, name: str, view: Callable[[Any], Tensor] = lambda out: out) -> None:
        module.register_forward_hook(lambda module, args, out: taps.__setitem__(name, view(out)))

    return taps, keep


def keep_input(taps: dict[str, Tensor], module: nn.Module, name: str) -> None:
    """Have a module's input noted."""
    module.register_forward_pre_hook(lambda module, args: taps.__setitem__(name, args[0]))


def check_parity(
    case: Any, model: nn.Module, record_taps: Callable[[nn.Module], dict[str, Tensor]], mode: str
) -> None:
    """Parameters, logits and every feature map of a golden case, in float64, on one path of the operators."""
    assert sum(p.numel() for p in model.parameters()) == case.params
    taps = record_taps(model)
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image(case.input_shape, case.input_seed))
    errors = {tap: check_tap(case, tap, taps[tap]) for tap in case.taps}
    assert {tap: e for tap, e in errors.items() if e > LIMIT} == {}
    assert relative_error(logits, case.logits) < LIMIT
