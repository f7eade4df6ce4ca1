"""Calls of the operators that become nodes: tensors and settings of any sizes, for tests of functions and plugins."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from hypothesis import strategies as st
from torch import Tensor

from vitrail.export.functions import DOMAIN, Dim, Signature, Variant, function_of

_FLOATS = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


@dataclass(frozen=True)
class NodeCall:
    """A call of an operator; what an operator has no use for is ignored."""

    operator: str
    grid: tuple[int, int, int] = (2, 6, 5)
    """Batch, height, width."""
    heads: int = 2
    width: int = 4
    """Channels of a head."""
    regions: tuple[int, int] = (3, 2)
    """Size of a region or window."""
    shift: tuple[int, int] = (0, 0)
    topk: int = 2
    axis: int = 2
    options: dict[str, bool] = field(default_factory=dict)
    """Optional tensors that are given."""
    seed: int = 0

    @classmethod
    def example(cls, operator: str) -> "NodeCall":
        """A plain call."""
        return cls(operator)

    @property
    def _counts(self) -> tuple[int, int]:
        return -(-self.grid[1] // self.regions[0]), -(-self.grid[2] // self.regions[1])

    def _arguments(self) -> dict[str, Any]:
        """All arguments by name: shapes of tensors, None for those that are absent, and settings."""
        b, h, w = self.grid
        c, count = self.heads * self.width, self._counts[0] * self._counts[1]
        grid, tokens, regions = (b, h, w, c), (b, h * w, c), list(self.regions)
        attention = {"num_heads": self.heads, "scale": 0.3}

        def option(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
            return shape if self.options.get(name) else None

        qkv = {"q": grid, "k": grid, "v": grid}
        places = regions[0] * regions[1]
        if self.operator == "routed_attention":
            routes = (b, count, min(self.topk, count))
            sizes = {"region_size": regions, "kv_region_size": regions}
            return {**qkv, "routes": routes, "weights": option("weights", routes), **sizes, **attention}
        if self.operator == "region_route":
            sizes = {"region_size": regions, "kv_region_size": regions}
            return {"q": grid, "k": grid, "topk": min(self.topk, count), **sizes}
        if self.operator == "window_attention":
            extra = {"bias": option("bias", (self.heads, places, places))}
            extra |= {name: option(name, (c,)) for name in ("pad_key", "pad_value")}
            shift = [min(s, r - 1) for s, r in zip(self.shift, regions, strict=True)]
            return {**qkv, **extra, "window_size": regions, "shift": shift, **attention}
        if self.operator == "semantic_attention":
            own = (b, 2 * regions[0], regions[1], c)
            patch = [-(-h // 2), -(-w // 2)]
            sizes = {"window_size": regions, "patch_size": patch}
            return {**qkv, "q": own, "own_k": own, "own_v": own, **sizes, **attention}
        if self.operator == "sparse_attention":
            keys = (b, self.heads, h * w, min(self.topk, h * w))
            return {"q": tokens, "k": tokens, "v": tokens, "keys": keys, **attention}
        if self.operator == "channel_attention":
            return {**qkv, **attention}
        if self.operator == "strip_mix":
            length = self.grid[self.axis]
            extra = {"weight": (3, length, length, self.heads), "bias": option("bias", (length, self.heads))}
            return {"x": grid, **extra, "axis": self.axis}
        rows = self.width
        some = max(1, h * w // 2)
        candidates = option("candidates", (b, some))
        numbers = {"num_keys": min(self.topk, some), "num_coefficients": min(2, rows)}
        thresholds = {"coefficient_threshold": 0.0, "basis_threshold": 0.05, "score_threshold": 0.0}
        first = {"logits": (b, self.heads, h * w, rows), "basis": (rows, h * w), "candidates": candidates}
        return {**first, **numbers, **thresholds}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all arguments, in the order of the schema."""
        schema = getattr(torch.ops.vitrail, self.operator).default._schema.arguments
        return tuple(argument.name for argument in schema)

    def _is_tensor(self, name: str) -> bool:
        value = self._arguments()[name]
        return value is None or isinstance(value, tuple)

    @property
    def inputs(self) -> list[str]:
        """Names of the tensors that are given."""
        arguments = self._arguments()
        return [name for name in self.names if isinstance(arguments[name], tuple)]

    @property
    def batched(self) -> list[bool]:
        """Which of them have a batch in front."""
        shared = ("bias", "pad_key", "pad_value", "weight", "basis")
        return [name not in shared for name in self.inputs]

    @property
    def settings(self) -> list[Any]:
        """All that is no tensor."""
        arguments = self._arguments()
        return [arguments[name] for name in self.names if not self._is_tensor(name)]

    def tensors(self, dtype: torch.dtype, batch: int | None = None) -> list[Tensor]:
        """The tensors, numbers in `dtype`."""
        generator = torch.Generator().manual_seed(self.seed)
        arguments, made = self._arguments(), []
        for name, batched in zip(self.inputs, self.batched, strict=True):
            shape = list(arguments[name])
            if batched and batch is not None:
                shape[0] = batch
            if name == "candidates":  # each once, so that no two keys are equal
                rows = [
                    torch.randperm(self.grid[1] * self.grid[2], generator=generator) for _ in range(shape[0])
                ]
                made.append(torch.stack(rows)[:, : shape[1]])
            elif name in ("routes", "keys"):
                least = -1 if name == "keys" else 0
                limit = self._counts[0] * self._counts[1] if name == "routes" else self.grid[1] * self.grid[2]
                made.append(torch.randint(least, limit, shape, generator=generator))
            elif name == "weights":
                made.append(torch.rand(shape, generator=generator))
            else:
                x = torch.randn(shape, generator=generator)
                if name == "logits":  # no two are equal, in any type
                    x = x.argsort(-1) / 4
                if name in ("pad_key", "pad_value", "weight", "bias") or batched:
                    x = x.to(torch.float32 if name == "bias" and self.operator != "strip_mix" else dtype)
                made.append(x)
        return made

    def expected(self, tensors: Sequence[Tensor]) -> Tensor:
        """The definition's result."""
        definition = importlib.import_module(f"vitrail.ops.{self.operator}").reference
        left = dict(zip(self.inputs, tensors, strict=True))
        args = [left.get(name) for name in self.names if self._is_tensor(name)]
        return definition(*args, *self.settings).contiguous()

    def variant(self) -> Variant:
        """What an export would write a function for, with an open batch."""
        arguments, batched = self._arguments(), dict(zip(self.inputs, self.batched, strict=True))
        tensors = [name for name in self.names if self._is_tensor(name)]
        given = dict(zip(self.inputs, self.tensors(torch.float32), strict=True))

        def dims(name: str) -> tuple[Dim, ...]:
            rest = tuple(Dim("number", size) for size in arguments[name][1:])
            if not batched[name]:
                return (Dim("number", arguments[name][0]), *rest)
            return (Dim("own") if name == tensors[0] else Dim("first", axis=0), *rest)

        def setting(value: Any) -> Any:
            return tuple(Dim("number", n) for n in value) if isinstance(value, list) else value

        definition = importlib.import_module(f"vitrail.ops.{self.operator}").reference
        signature = Signature(
            self.operator,
            definition,
            tuple(dims(name) if name in given else None for name in tensors),
            tuple(given[name].dtype if name in given else None for name in tensors),
            tuple(map(setting, self.settings)),
        )
        example = tuple(tuple(given[name].shape) if name in given else None for name in tensors)
        result = torch.int64 if self.operator in ("region_route", "connectivity_topk") else torch.float32
        return Variant(self.operator, signature, self.names, example, result)

    def attributes(self) -> dict[str, Any]:
        """Of the node."""
        return self.variant().attributes


def function_model(call: NodeCall, dtype: torch.dtype = torch.float32, opset: int = 20) -> onnx.ModelProto:
    """A file of one node with its function; numbers in `dtype`."""
    variant, tensors = call.variant(), call.tensors(dtype)
    result = torch.int64 if variant.result == torch.int64 else dtype
    values = [
        onnx.helper.make_tensor_value_info(name, _FLOATS[x.dtype], [None] * x.dim())
        for name, x in zip(call.inputs, tensors, strict=True)
    ]
    node = onnx.helper.make_node(call.operator, call.inputs, ["result"], domain=DOMAIN)
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in variant.attributes.items())
    out = onnx.helper.make_tensor_value_info("result", _FLOATS[result], [None] * call.expected(tensors).dim())
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "call", values, [out]),
        functions=[function_of(variant, opset)],
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def calls(operator: str) -> st.SearchStrategy[NodeCall]:
    """Calls of any sizes and settings."""
    options = {
        "routed_attention": ["weights"],
        "window_attention": ["bias", "pad_key", "pad_value"],
        "strip_mix": ["bias"],
        "connectivity_topk": ["candidates"],
    }.get(operator, [])
    return st.builds(
        NodeCall,
        st.just(operator),
        grid=st.tuples(st.integers(2, 3), st.integers(2, 9), st.integers(2, 9)),
        heads=st.integers(1, 3),
        width=st.integers(1, 9),
        regions=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        shift=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        topk=st.integers(1, 5),
        axis=st.sampled_from([1, 2]),
        options=st.fixed_dictionaries({name: st.booleans() for name in options}),
        seed=st.integers(0, 99),
    )
