"""What an engine holds: read from the builder's log, which needs no GPU, or from TensorRT's inspector."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .graph import TensorInfo, module_of

if TYPE_CHECKING:
    from .measure import VerificationReport

FUSED_ATTENTION = "_gemm_mha"
"""How TensorRT names the kernels that compute products and softmax of an attention in one."""
_BOOKKEEPING = ("signal", "wait", "shape_call", "allocate")
"""Types of layers that launch nothing."""


@dataclass(frozen=True)
class Kernel:
    """A layer of the finished engine: its name, its type, and the nodes of the ONNX file that it computes."""

    name: str
    type: str
    nodes: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that the nodes come from."""
        return tuple(dict.fromkeys(module for node in self.nodes if (module := module_of(node))))


@dataclass(frozen=True)
class Timing:
    """Time of one batch on the GPU: median, 10th and 90th percentile of `runs`, in milliseconds."""

    shape: tuple[int, ...]
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return self.shape[0] / self.median_ms * 1e3


@dataclass(frozen=True)
class EngineReport:
    """What was built, from what, for what, and how it did where there was a GPU to run it.

    `table()` renders it, `to_dict()` is for JSON, and is what lies beside the engine. `profile` has the input's least,
    best and largest shape, three times the same where nothing is open. `activation_bytes` is what a running engine
    needs on the GPU beside its weights, at the largest shape. `verification` and `timings` are there only if a GPU was.
    """

    path: str
    model: str
    size_bytes: int
    sha256: str
    library: str
    archs: tuple[str, ...]
    dtype: str
    profile: dict[str, tuple[tuple[int, ...], ...]]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    attentions: int
    network_layers: int
    kernels: tuple[Kernel, ...]
    plugins: tuple[str, ...]
    activation_bytes: int | None
    weights_bytes: int | None
    seconds: dict[str, float]
    metadata: dict[str, str]
    verification: VerificationReport | None = None
    timings: tuple[Timing, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def ran(self) -> bool:
        """Whether the engine has run on a GPU."""
        return bool(self.timings)

    @property
    def kernel_types(self) -> dict[str, int]:
        """Layers that launch something, by type, most frequent first."""
        counts = Counter(k.type for k in self.kernels if k.type not in _BOOKKEEPING)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def fused_attentions(self) -> tuple[Kernel, ...]:
        """Kernels that compute a whole attention."""
        return tuple(k for k in self.kernels if k.name.startswith(FUSED_ATTENTION))

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        plain = asdict(self)
        plain["kernels"] = [{**asdict(k), "modules": list(k.modules)} for k in self.kernels]
        plain["verification"] = self.verification.to_dict() if self.verification else None
        plain["timings"] = [{**asdict(t), "images_per_second": t.images_per_second} for t in self.timings]
        counted = {"kernel_types": self.kernel_types, "fused_attentions": len(self.fused_attentions)}
        return {**plain, **counted, "ran": self.ran}

    def table(self) -> Any:
        """Rich tables of the engine, its times and its verification."""
        from .render import engine_table

        return engine_table(self)


def kernels_of_log(lines: Iterable[str]) -> tuple[Kernel, ...]:
    """The layers in the lines `Name: ..., LayerType: ..., Metadata: [ONNX Layer: ...]...` of the builder's log."""
    found = []
    for line in "\n".join(lines).splitlines():
        if match := re.match(r"Name: (.+?), LayerType: (\w+),", line):
            found.append(Kernel(match[1], match[2], _nodes(line.rpartition("Metadata:")[2])))
    return tuple(found)


def kernels_of_inspector(layers: Sequence[Any]) -> tuple[Kernel, ...]:
    """The layers as TensorRT's inspector lists them: objects, or names alone."""
    return tuple(
        Kernel(layer["Name"], str(layer.get("LayerType", "")), _nodes(str(layer.get("Metadata", ""))))
        if isinstance(layer, Mapping)
        else Kernel(str(layer), "")
        for layer in layers
    )


def _nodes(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata)))


def memory_of_log(lines: Iterable[str], what: str) -> int | None:
    """Bytes in the line `Total <what> Memory: N bytes`, None where the log has none."""
    found = re.search(rf"Total {what} Memory: (\d+) bytes", "\n".join(lines))
    return int(found[1]) if found else None
