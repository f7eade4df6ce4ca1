"""How large a model is and what it costs: parameters and multiply-accumulates, counted twice and set beside the paper.

fvcore counts on a trace, `torch.utils.flop_counter` on the operators as they run; both know the operators of vitrail
and attention, which neither counts by itself. A disagreement of the two is a bug in one of them, so it fails.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .catalog import create_model, default_size
from .export.capture import evaluation
from .export.images import pretrained_cfg
from .mhsa import AttentionCost, attention_cost
from .ops import library, use_ops
from .ops.flops import fvcore_handlers, torch_flop_formulas
from .published import Published, published_figures

COUNTER_TOLERANCE = 0.001
"""Largest relative difference between the two counters."""

PAPER_TOLERANCE = 0.02
"""Largest relative difference from a figure that the paper rounded to two digits."""


# --- counting ---------------------------------------------------------------------------------------------------------

# Ops that fvcore has no formula for and that are no multiply-accumulates: sums, selections, copies. Element-wise ops
# and views need no list, torch tags them.
_NO_PRODUCTS = frozenset((
    "amax", "amin", "argmax", "argmin", "argsort", "avg_pool2d", "cumsum", "dropout", "embedding",
    "feature_dropout", "fill_", "hardswish", "index_add", "index_select", "linalg_vector_norm", "log_softmax",
    "logsumexp", "max_pool2d", "max_pool2d_with_indices", "mean", "meshgrid", "norm", "one_hot", "pad", "pixel_shuffle",
    "pixel_unshuffle", "prod", "repeat", "repeat_interleave", "scatter", "scatter_", "scatter_add", "softmax",
    "sort", "std", "sum", "take_along_dim", "tile", "topk", "tril", "triu", "unfold", "upsample_bicubic2d",
    "upsample_nearest1d", "var", "var_mean", "zero_",
))  # fmt: skip


def _carries_products(kind: str) -> bool:
    """Whether an op that fvcore could not count may hide multiply-accumulates."""
    namespace, _, name = kind.partition("::")
    if namespace == "prim" and not name.startswith("PythonOp"):
        return False
    if namespace != "aten":
        return True
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    pointwise = any(torch.Tag.pointwise in op.tags for op in overloads)
    view = any(a.alias_info and not a.alias_info.is_write for op in overloads for a in op._schema.arguments)
    factory = bool(overloads) and not any("Tensor" in str(a.type) for a in overloads[0]._schema.arguments)
    return not (pointwise or view or factory or name in _NO_PRODUCTS)


def _norm_formula(operations_per_element: int) -> Callable[..., int]:
    # torch leaves normalisation out, fvcore and therefore the papers count it: 2 operations are a multiply-accumulate
    def formula(input_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        return 2 * operations_per_element * math.prod(input_shape)

    return formula


def _torch_formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    return {
        aten.native_layer_norm: _norm_formula(5),
        aten.native_group_norm: _norm_formula(5),
        aten.native_batch_norm: _norm_formula(2),
        aten._native_batch_norm_legit_no_training: _norm_formula(2),
        aten.cudnn_batch_norm: _norm_formula(2),
        **torch_flop_formulas(),
    }


def count_with_torch(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of `model(images)` by torch's own counter; works on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_torch_formulas()) as counter:
        model(images)
    return counter.get_total_flops() // 2


@contextmanager
def _quiet() -> Iterator[None]:
    """fvcore and the tracer below it warn about themselves, which tells the reader of a profile nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="vitrail ")
        yield


def _count_with_fvcore(model: nn.Module, images: Tensor) -> Any:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, images)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    for name, handler in fvcore_handlers().items():
        analysis.set_op_handle(name, handler)
    analysis.total()  # the trace happens here, once
    return analysis


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathCount:
    """Multiply-accumulates of the whole batch on one path of the operators, by both counters."""

    path: str
    """`fused` (operators), `reference` (plain PyTorch), or `standard` where a model has none of our operators."""
    fvcore: int
    torch: int
    by_operator: dict[str, int]
    uncounted: dict[str, int]
    """Operators that may carry work and that fvcore has no formula for, with the number of calls."""

    @property
    def difference(self) -> float:
        """Relative difference of the two counters."""
        return abs(self.fvcore - self.torch) / max(self.fvcore, 1)


@dataclass(frozen=True)
class StageCount:
    """One part of the network."""

    name: str
    resolution: tuple[int, ...]
    """Height and width of its output, or the number of tokens, or nothing where neither applies."""
    channels: int | None
    parameters: int
    macs: int
    """Of the whole batch."""
    share: float


@dataclass(frozen=True)
class Comparison:
    """A figure of the paper beside ours, in the same unit."""

    figure: str
    ours: float
    paper: float
    repeated: float = 0.0
    """What of the paper's is computed there more than once and here once."""

    @property
    def deviation(self) -> float:
        """Relative to the paper's."""
        return self.ours / self.paper - 1

    @property
    def ok(self) -> bool:
        """Whether the difference is one of rounding."""
        return abs((self.ours + self.repeated) / self.paper - 1) <= PAPER_TOLERANCE


@dataclass(frozen=True)
class ProfileReport:
    """Result of `profile`."""

    model: str
    img_size: tuple[int, int]
    batch: int
    parameters: int
    paths: list[PathCount]
    stages: list[StageCount]
    comparisons: list[Comparison] = field(default_factory=list)
    published: Published | None = None
    attention: AttentionCost | None = None
    """Of sparse attention, beside that of the dense trunk."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, by fvcore."""
        return self.paths[0].fvcore // self.batch

    @property
    def failures(self) -> list[str]:
        """What is wrong with the figures, one sentence each; empty when they can be trusted."""
        out = [
            f"the counters disagree on the {path.path} path: fvcore {path.fvcore / 1e9:.3f}, "
            f"torch {path.torch / 1e9:.3f} GMAC ({path.difference:.2%}, at most {COUNTER_TOLERANCE:.1%} allowed)"
            for path in self.paths
            if path.difference > COUNTER_TOLERANCE
        ]
        out += [
            f"{c.figure}: {c.ours:.2f} is {c.deviation:+.1%} from the paper's {c.paper:g} "
            f"(at most {PAPER_TOLERANCE:.0%} allowed)"
            for c in self.comparisons
            if not c.ok
        ]
        return out

    @property
    def ok(self) -> bool:
        """Whether the counters agree and the paper's figures are met."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        document = asdict(self) | {
            "macs": self.macs,
            "gmac": self.macs / 1e9,
            "ok": self.ok,
            "failures": self.failures,
        }
        if self.attention is not None:
            document["attention"] = asdict(self.attention) | {"reduction": self.attention.reduction}
        document["paths"] = [asdict(p) | {"difference": p.difference} for p in self.paths]
        document["comparisons"] = [
            asdict(c) | {"deviation": c.deviation, "ok": c.ok} for c in self.comparisons
        ]
        return document


# --- stages -----------------------------------------------------------------------------------------------------------

_STAGE_CONTAINERS = frozenset({"stages", "layers", "blocks"})


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The network cut into stages: children of the root, containers of stages opened."""
    parts: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or name in _STAGE_CONTAINERS:
            parts.update((f"{name}.{inner}", module) for inner, module in child.named_children())
        else:
            parts[name] = child
    return parts


def _map_layout(
    shape: torch.Size, input_size: tuple[int, int], channels_last: bool
) -> tuple[tuple[int, ...], int]:
    """Resolution and channels of an output: `(B, C, H, W)`, `(B, H, W, C)`, `(B, N, C)` or `(B, C)`."""
    if len(shape) != 4:
        return tuple(shape[1:-1]), shape[-1]

    def distortion(height: int, width: int) -> float:
        return abs(math.log(max(height, 1) * input_size[1] / (max(width, 1) * input_size[0])))

    # a map keeps the aspect ratio of the image; which end the channels are at shows by that
    first, last = distortion(*shape[2:]), distortion(*shape[1:3])
    if last < first or (last == first and channels_last):
        return tuple(shape[1:3]), shape[3]
    return tuple(shape[2:]), shape[1]


@contextmanager
def _output_shapes(parts: dict[str, nn.Module], shapes: dict[str, torch.Size]) -> Iterator[None]:
    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, list | tuple) and output:
                output = output[0]
            if isinstance(output, Tensor):
                shapes[name] = output.shape

        return hook

    handles = [part.register_forward_hook(hook_for(name)) for name, part in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stages(
    model: nn.Module, analysis: Any, shapes: dict[str, torch.Size], img_size: tuple[int, int]
) -> list[StageCount]:
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    total, by_module = analysis.total(), analysis.by_module()
    rows = []
    for name, part in _parts(model).items():
        parameters = sum(p.numel() for p in part.parameters())
        macs = int(by_module[name])
        if not parameters and not macs:
            continue
        resolution, channels = (
            _map_layout(shapes[name], img_size, channels_last) if name in shapes else ((), None)
        )
        rows.append(StageCount(name, resolution, channels, parameters, macs, macs / max(total, 1)))
    own_parameters = sum(p.numel() for p in model.parameters()) - sum(row.parameters for row in rows)
    own_macs = int(total) - sum(row.macs for row in rows)
    if own_parameters or own_macs:
        rows.append(StageCount("(rest)", (), None, own_parameters, own_macs, own_macs / max(total, 1)))
    return rows


# --- the public function ----------------------------------------------------------------------------------------------


def _has_our_operators(by_operator: dict[str, int]) -> bool:
    ours = {name.split("::")[1] for name in fvcore_handlers() if name.startswith("vitrail::")}
    return not ours.isdisjoint(by_operator)


def profile(
    model: str | nn.Module, img_size: int | tuple[int, int] | None = None, batch: int = 1, in_chans: int = 3
) -> ProfileReport:
    """Parameters and multiply-accumulates of a model, per stage, by two counters, beside the paper's figures.

    A multiply-accumulate counts once, as in the papers; normalisation counts as fvcore counts it (5 operations per
    element, 2 for a batch norm in eval mode). Models with operators of vitrail's are counted on both paths, as fused
    operators and as their definition in plain PyTorch (on the latter only with `VITRAIL_OPS=reference`).

    Args:
        model: a model name that timm knows, or a module on a real device (not meta) that takes
            `(batch, in_chans, height, width)` images. A module is counted in eval mode and left as it came.
        img_size: input size, one number or (height, width); default: what the model is meant for.
        batch: images in the batch.
        in_chans: channels of the images, where `model` is a module.

    Returns:
        The report; `report.ok` is False where the counters disagree by more than 0.1% or, at the paper's input size,
        a figure of the paper is missed by more than 2%.

    Raises:
        ValueError: unknown name (with the nearest ones), a size that the model does not take, or a batch below 1.
    """
    if isinstance(img_size, int):
        img_size = (img_size, img_size)
    if img_size is not None and min(img_size) < 1:
        raise ValueError(f"img_size must be at least 1x1, got {img_size[0]}x{img_size[1]}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if isinstance(model, str):
        name = model
        size = img_size or default_size(name)
        module = create_model(name, img_size)
    else:
        module = model
        cfg = pretrained_cfg(module)
        name = cfg.get("architecture") or type(module).__name__
        size = img_size or tuple(cfg.get("input_size") or (3, 224, 224))[-2:]
    parameter = next(module.parameters(), torch.empty(0))
    if parameter.is_meta:
        raise ValueError(
            "the model is on the meta device, which cannot be traced; pass its name or a real copy"
        )
    images = torch.zeros(batch, in_chans, *size, device=parameter.device, dtype=parameter.dtype)

    paths: list[PathCount] = []
    shapes: dict[str, torch.Size] = {}
    with evaluation(module), _quiet():
        for path in ("reference",) if library.mode() == "reference" else ("fused", "reference"):
            with use_ops("auto" if path == "fused" else "reference"):
                with _output_shapes(_parts(module), shapes):
                    by_torch = count_with_torch(module, images)
                analysis = _count_with_fvcore(module, images)
            if not paths:
                stages = _stages(module, analysis, shapes, size)
                by_module = analysis.by_module()
            by_operator = {op: int(macs) for op, macs in analysis.by_operator().most_common()}
            uncounted = {op: n for op, n in analysis.unsupported_ops().items() if _carries_products(op)}
            one_path = path == "fused" and not _has_our_operators(by_operator)
            label = "standard" if one_path else path
            paths.append(PathCount(label, int(analysis.total()), by_torch, by_operator, uncounted))
            if one_path:
                break

    parameters = sum(p.numel() for p in module.parameters())
    # a module may have been given other classes, widths, ...: only a name stands for what the paper measured
    published = published_figures(name) if isinstance(model, str) else None
    comparisons = []
    if published and size == (published.img_size, published.img_size):
        ours = {"params": parameters / 1e6, "gmac": paths[0].fvcore / batch / 1e9}
        labels = {"params": "parameters (M)", "gmac": "GMAC"}
        repeated = {"gmac": published.repeated}
        comparisons = [
            Comparison(labels[key], value, getattr(published, key), repeated.get(key, 0.0))
            for key, value in ours.items()
            if getattr(published, key) is not None
        ]
    attention = attention_cost(module, by_module, batch, published.mhsa_reduction if published else None)
    return ProfileReport(name, size, batch, parameters, paths, stages, comparisons, published, attention)
