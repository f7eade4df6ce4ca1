"""Whole networks: ours along both paths and in the form for inference, timm's and the authors' beside them."""

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail import zoo
from vitrail.accounting import repeated_projections
from vitrail.catalog import create_model, default_size
from vitrail.cli.terminal import JobFailed
from vitrail.ops import use_ops
from vitrail.profiling import count_with_torch

from .peers import Checkout, Logits
from .timing import Run

INFERENCE, FUSED, REFERENCE, AUTHORS = "inference form", "fused", "reference", "authors"
NETWORKS: Mapping[str, str | None] = {
    "biformer_tiny": None,
    "biformer_small": None,
    "davit_fused_tiny": "davit_tiny",
    "stripmlp_tiny": None,
    "sparsifiner_small": "deit_small_patch16_224",
    "stvit_deit_small": "deit_small_patch16_224",
    "stvit_r_swin_small": "swin_small_patch4_window7_224",
}
"""What is measured, and timm's model of the same kind or size that one would use instead."""
_SAME = ("davit_tiny",)
"""Of timm's, those that are the very network and not only its trunk."""
_COUNTED_ALIKE = ("rayleizhu/BiFormer", "dingmyu/davit", "Med-Process/Strip_MLP", "changsn/STViT-R")
"""Of the authors', those that do no other arithmetic: Sparsifiner's code attends densely and masks."""
_LOGITS_LIMIT = 1e-9
_LIMITS = {torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.1}
"""Of candidates against the definition, largest error over largest logit. Rounding alone leaves 1e-6 and 1e-2, but more
where it makes Sparsifiner choose another key, or BiFormer another region."""


@dataclass
class Candidate:
    """A model and how it is run."""

    name: str
    model: nn.Module
    mode: str | None = None
    """Path of vitrail's operators, None where there are none."""
    dtype: torch.dtype = torch.float32
    amp: bool = False
    """Whether autocast to bfloat16 is in force."""

    @property
    def ours(self) -> bool:
        """Whether a failure is one of vitrail's."""
        return self.mode is not None

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp)
        with use_ops(self.mode) if self.mode else nullcontext(), autocast:
            return self.model(images)


@dataclass
class Group:
    """The candidates for one network at one size, with the same weights where it is the same network."""

    name: str
    size: int
    candidates: list[Candidate]
    macs: dict[str, int]
    """Multiply-accumulates of one image, by candidate."""
    parameters: dict[str, int]
    """By candidate; of the form for inference those of the model that it was made from."""
    same: dict[str, dict[str, Any]]
    """What shows that a candidate of others is the same network: parameters, MACs, error of the logits in float64."""
    missing: dict[str, str]
    """Candidates that could not be made, and why."""
    device: str = "cpu"

    def images(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Random images."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, self.size, self.size, generator=generator).to(self.device, dtype)


# --- building ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights under which every branch counts: fresh networks have some that are zero or next to it."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter.shape[1:].numel() if parameter.dim() > 1 else 100
        noise = torch.empty(parameter.shape).normal_(0, 0.5 * fan_in**-0.5, generator=generator)
        parameter.add_(noise.to(parameter.dtype))


def load_weights(ours: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict of the authors' or timm's layout through the family's own filter.

    Raises:
        JobFailed: it does not fit.
    """
    filter_fn: Callable[..., dict[str, Tensor]] = sys.modules[type(ours).__module__].checkpoint_filter_fn
    try:
        ours.load_state_dict(filter_fn(state, ours))
    except (RuntimeError, ValueError) as error:
        raise JobFailed(f"{what} is another network: {' '.join(str(error).split())[:300]}") from error


def same_network(
    ours: nn.Module, theirs: nn.Module, images: Tensor, what: str, count_alike: bool
) -> dict[str, Any]:
    """Parameters, MACs and logits of both, which hold the same weights.

    Raises:
        JobFailed: it is another network.
    """
    found: dict[str, Any] = {"parameters": [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]}
    with use_ops("fused"), torch.no_grad():
        found["macs"] = [count_with_torch(ours, images), count_with_torch(theirs, images)]
        repeated = repeated_projections(ours, images)
        logits = [copy.deepcopy(m).double()(images.double()) for m in (ours, theirs)]
    found["error"] = float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())
    if found["parameters"][0] != found["parameters"][1]:
        raise JobFailed(f"{what} has another number of parameters: ours and theirs {found['parameters']}")
    difference = abs(found["macs"][0] + repeated - found["macs"][1]) / found["macs"][1]
    if count_alike and difference > 1e-3:
        raise JobFailed(
            f"{what} does another number of multiply-accumulates: ours and theirs {found['macs']}"
        )
    if not found["error"] < _LOGITS_LIMIT:
        raise JobFailed(f"{what} computes something else: logits differ by {found['error']:.1e} in float64")
    return found


def inference_form(model: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """The model as one would deploy it, None where this version of vitrail has no such form."""
    fuse = getattr(zoo, "fuse_for_inference", None)
    if fuse is None:
        return None
    model = copy.deepcopy(model)
    return fuse(model) if dtype == torch.float32 else fuse(model, dtype=dtype)


def _pair(
    name: str, size: int, checkout: Checkout | None, stock: str | None, device: str, compare: bool = True
) -> tuple[nn.Module, dict[str, nn.Module], dict[str, dict[str, Any]]]:
    """Ours, the others with the same weights where they are the same network, and what shows that they are."""
    torch.manual_seed(0)
    # the CPU's kernels need not be there for what runs elsewhere
    with nullcontext() if device == "cpu" else use_ops("reference"):
        ours = create_model(name, (size, size))
    others: dict[str, nn.Module] = {}
    if stock is not None:
        others[f"timm {stock}"] = create_model(stock, (size, size))
    if checkout is not None:
        others[AUTHORS] = Logits(checkout.build(name, size)).eval()
    twin = AUTHORS if checkout is not None else f"timm {stock}" if stock in _SAME else None
    randomise(ours if twin is None else others[twin])
    ours = ours.to(device)
    others = {what: model.to(device) for what, model in others.items()}
    if twin is None:
        return ours, others, {}
    source = others[twin]
    state = source.model.state_dict() if isinstance(source, Logits) else source.state_dict()
    load_weights(ours, state, f"{name}, {twin}")
    if not compare:
        return ours, others, {}
    alike = checkout is None or checkout.peer.repository in _COUNTED_ALIKE
    image = torch.randn(1, 3, size, size).to(device)
    return ours, others, {twin: same_network(ours, source, image, f"{name}, {twin}", alike)}


def build_group(
    name: str,
    size: int,
    dtype: torch.dtype,
    checkout: Checkout | None = None,
    stock: str | None = None,
    compiled: bool = False,
    training: bool = False,
    device: str = "cpu",
    amp: bool = False,
) -> Group:
    """All candidates for one network.

    Raises:
        JobFailed: a network of others that should be the same is not.
        PeerError: the authors' cannot be built.
        UnknownModelError, SizeError: there is no such model, or not at this size.
    """
    group = Group(name, size, [], {}, {}, {}, {}, device)
    if size != default_size(name)[0]:
        # what is the same network at one size is at another, where float64 or all that the authors keep may not fit
        group.same = _pair(name, default_size(name)[0], checkout, stock, device)[2]
        ours, others, _ = _pair(name, size, checkout, stock, device, compare=False)
    else:
        ours, others, group.same = _pair(name, size, checkout, stock, device)
    image = group.images(1, torch.float32)
    with use_ops("fused"), torch.no_grad():
        own = count_with_torch(ours, image)
        macs = {other: count_with_torch(model, image) for other, model in others.items()}
    parameters = {what: sum(p.numel() for p in model.parameters()) for what, model in others.items()}
    own_parameters = sum(p.numel() for p in ours.parameters())
    _add_ours(group, ours, dtype, training)
    for other, model in others.items():
        model = model.to(dtype)
        group.candidates.append(Candidate(other, model, dtype=dtype))
        if compiled:
            compiled_model = torch.compile(copy.deepcopy(model))
            group.candidates.append(Candidate(f"{other}, compiled", compiled_model, dtype=dtype))
    for candidate in group.candidates:
        candidate.amp = amp
        what = candidate.name.removesuffix(", compiled")
        group.macs[candidate.name] = macs.get(what, own)
        group.parameters[candidate.name] = parameters.get(what, own_parameters)
    return group


def _add_ours(group: Group, ours: nn.Module, dtype: torch.dtype, training: bool) -> None:
    if training:
        # each has weights of its own, which change
        for mode in (FUSED, REFERENCE):
            group.candidates.append(Candidate(mode, copy.deepcopy(ours).to(dtype), mode, dtype))
        return
    kinds = [("", dtype)] if dtype == torch.float32 else [("", dtype), (", float32", torch.float32)]
    for suffix, kind in kinds:
        try:
            model = inference_form(ours, kind)
        except Exception as error:  # whatever its author did not think of
            group.missing[f"{INFERENCE}{suffix}"] = f"{type(error).__name__}: {error}"
            model = None
        if model is not None:
            group.candidates.append(Candidate(f"{INFERENCE}{suffix}", model, FUSED, kind))
        plain = copy.deepcopy(ours).to(kind)
        group.candidates.append(Candidate(f"{FUSED}{suffix}", plain, FUSED, kind))
        if not suffix:
            group.candidates.append(Candidate(REFERENCE, plain, REFERENCE, kind))


# --- running ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _infer(candidate: Candidate, images: Tensor) -> Tensor:
    return candidate.forward(images)


class Trainer:
    """One step of training after another on the same images: forward, backward, SGD."""

    def __init__(self, candidate: Candidate, images: Tensor, keep_grads: bool = False) -> None:
        self.candidate, self.images = candidate, images
        self.keep_grads = keep_grads
        candidate.model.train()
        self.optimizer = torch.optim.SGD(candidate.model.parameters(), lr=1e-4)
        self.labels: Tensor | None = None

    def __call__(self) -> Tensor:
        """The loss."""
        self.optimizer.zero_grad(set_to_none=not self.keep_grads)
        logits = self.candidate.forward(self.images)
        if self.labels is None:
            self.labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def runs(group: Group, batch: int, training: bool) -> tuple[dict[str, Run], dict[str, float]]:
    """The candidates that run, as calls without arguments, and their errors against the definition.

    Others that compute something else by design have no error. Those that fail join `group.missing`.

    Raises:
        JobFailed: one computes something else that should not.
    """
    found: dict[str, Run] = {}
    first: dict[str, Tensor] = {}
    for candidate in group.candidates:
        images = group.images(batch, candidate.dtype)
        run: Run = Trainer(candidate, images) if training else partial(_infer, candidate, images)
        try:
            first[candidate.name] = run().double()  # type: ignore[attr-defined]
        except Exception as error:  # code of others, in a version of torch that they did not know
            text = " ".join(str(error).split())[:300]
            group.missing[candidate.name] = f"{type(error).__name__}: {text}"
            continue
        found[candidate.name] = run
    if REFERENCE not in first:
        raise JobFailed(f"{group.name} does not run by its definitions: {group.missing[REFERENCE]}")
    expected = first[REFERENCE]
    errors = {}
    for candidate in group.candidates:
        name = candidate.name
        if name in first and (candidate.ours or name.removesuffix(", compiled") in group.same):
            errors[name] = float((first[name] - expected).abs().max() / expected.abs().max())
            dtypes = (torch.bfloat16 if candidate.amp else candidate.dtype, _dtype(group, REFERENCE))
            limit = max(_LIMITS[dtype] for dtype in dtypes)
            if not errors[name] <= limit:
                raise JobFailed(
                    f"{group.name}, {name}: what it computes differs from the definition by {errors[name]:.1e}"
                )
    return found, errors


def _dtype(group: Group, name: str) -> torch.dtype:
    return next(c.dtype for c in group.candidates if c.name == name)
