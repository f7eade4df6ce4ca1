"""Operators as nodes of one file: each with its definition as a model-local function, and with what finds a plugin.

A call of an operator in the model becomes one node of the domain `vitrail`. ONNX Runtime inlines the function of that
name, TensorRT takes a plugin of that name where one is registered (`plugin_namespace`, `plugin_version`) and the
function where none is. The function is traced from the operator's definition in torch, open in the sizes that are open
in the model, so that an inlined file is the file of standard operators.

Functions are told apart by their names: TensorRT's parser looks at nothing else, not at the domain and not at an
overload. So calls that need other functions, because a size or a setting differs, have names of their own,
`routed_attention`, `routed_attention_2`, ...
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .downgrade import TRANSLATED, to_opset_17
from .errors import ExportError

if TYPE_CHECKING:
    import onnx

DOMAIN = "vitrail"
VERSION = 1
"""Of the domain, and of the plugins."""

CHOOSERS = ("region_route", "connectivity_topk")
"""Operators whose result is a choice: they compute in float32, whatever the type of their inputs."""

NODES = (
    "routed_attention",
    "window_attention",
    "semantic_attention",
    "sparse_attention",
    "channel_attention",
    "strip_mix",
    *CHOOSERS,
)
"""Operators that are worth a node: standard operators gather, permute or store what their kernels never do. The layers
of the inference form (`packed_linear`, `depthwise_conv`, ...) are not: engines have products and convolutions of their
own, and join to them what surrounds them. `connectivity_attention` is a product and two of these."""

UNORDERED = ("connectivity_topk",)
"""Operators whose result is a set: a kernel lists its members in another order than the definition."""

MOST_VARIANTS = 32
"""Names that a plugin library knows for an operator."""

_SAME = "same"  # a node that gives its input a shape that is written in the sizes of another


def has_nodes(path: str | os.PathLike[str]) -> bool:
    """Whether an ONNX file has nodes that plugins can take; False where it can't be read as one."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError:
        raise
    except Exception:  # protobuf's errors have no public base
        return False
    return any(node.domain == DOMAIN for node in model.graph.node)


# --- calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dim:
    """A size of a tensor: a number, or which open size it is.

    `kind` is `number` (`value`), `first` (that of the first tensor at `axis`), `regions` (how many of the size
    `setting` cover its grid), `own` (open, and like no other); of a setting `pieces` (`value` of it cover
    the first tensor's grid along `axis`) or `most` (`value`, or the number of regions where that is smaller).
    """

    kind: str
    value: int = 0
    axis: int = 0
    setting: str = ""


@dataclass(frozen=True)
class Signature:
    """What calls have in common that share a function."""

    operator: str
    definition: Callable[..., Any]
    shapes: tuple[tuple[Dim, ...] | None, ...]
    dtypes: tuple[torch.dtype | None, ...]
    settings: tuple[Any, ...]


@dataclass
class Variant:
    """A function to be: its name, and an example of its calls."""

    name: str
    signature: Signature
    names: tuple[str, ...]
    """Of all arguments, in the order of the schema."""
    example: tuple[tuple[int, ...] | None, ...]
    """Sizes of the tensors in the trace."""
    result: torch.dtype

    @property
    def inputs(self) -> list[str]:
        """Names of the tensors that are given."""
        return [
            name for name, shape in zip(self.names, self.signature.shapes, strict=False) if shape is not None
        ]

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the node: settings, which inputs there are, and what finds a plugin."""
        settings = zip(self.names[len(self.signature.shapes) :], self.signature.settings, strict=True)
        return {
            "inputs": ",".join(self.inputs),
            **{name: _attribute(value) for name, value in settings},
            "plugin_namespace": DOMAIN,
            "plugin_version": str(VERSION),
        }


def _attribute(value: Any) -> Any:
    """Numbers as they are; one that follows from the grid as its negative number of pieces, or negative limit."""
    if isinstance(value, tuple):
        return [_attribute(item) for item in value]
    if isinstance(value, Dim):
        return value.value if value.kind == "number" else -value.value
    return value


@dataclass
class Nodes:
    """Writes a node for each call of an operator, and remembers the functions that these need."""

    variants: dict[Signature, Variant] = field(default_factory=dict)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Calls of operators are nodes inside this block."""
        from ..ops._operator import replaced

        with replaced(self._call):
            yield

    def _call(self, name: str, definition: Callable[..., Any], args: Sequence[Any], result: Any) -> Tensor:
        if name not in NODES:
            plain: Tensor = definition(*args)
            return plain
        tensors = [x for x in args if isinstance(x, Tensor)]
        try:
            variant = self._variant(name, definition, args, result.dtype)
        except _Unsayable:
            stated: Tensor = definition(*args)
            return stated
        node: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{variant.name}",
            tensors,
            variant.attributes,
            dtype=result.dtype,
            shape=result.shape,
            version=VERSION,
        )
        return node

    def _variant(
        self, name: str, definition: Callable[..., Any], args: Sequence[Any], result: torch.dtype
    ) -> Variant:
        schema = getattr(torch.ops.vitrail, name).default._schema.arguments
        count = sum("Tensor" in str(argument.type) for argument in schema)
        names = tuple(argument.name for argument in schema)
        first = args[0]
        given = dict(zip(names, args, strict=True))
        signature = Signature(
            name,
            definition,
            tuple(None if x is None else _shape_of(x, first, given) for x in args[:count]),
            tuple(None if x is None else x.dtype for x in args[:count]),
            tuple(_setting_of(x, first, given) for x in args[count:]),
        )
        if signature not in self.variants:
            number = 1 + sum(known.operator == name for known in self.variants)
            if number > MOST_VARIANTS:
                raise ExportError(
                    f"{name} is called with more than {MOST_VARIANTS} combinations of sizes and settings, which is how "
                    f"many names plugins have for it; export with operators='standard'"
                )
            example = tuple(None if x is None else tuple(map(_hint, x.shape)) for x in args[:count])
            self.variants[signature] = Variant(
                name if number == 1 else f"{name}_{number}", signature, names, example, result
            )
        return self.variants[signature]

    def attach(self, model: onnx.ModelProto, opset: int) -> None:
        """Give `model` the functions that its nodes call, in place."""
        called = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
        for variant in self.variants.values():
            if variant.name in called:
                model.functions.append(function_of(variant, opset))


def _hint(size: Any) -> int:
    hint: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(hint)


def _same(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def _shape_of(x: Tensor, first: Tensor, given: dict[str, Any]) -> tuple[Dim, ...]:
    return tuple(_dim_of(size, axis, x is first, first, given) for axis, size in enumerate(x.shape))


def _dim_of(size: Any, axis: int, is_first: bool, first: Tensor, given: dict[str, Any]) -> Dim:
    from ..ops.regions import region_count

    if not isinstance(size, torch.SymInt):
        return Dim("number", int(size))
    if is_first:
        return Dim("own")
    for place, other in enumerate(first.shape):
        if isinstance(other, torch.SymInt) and _same(size, other):
            return Dim("first", axis=place)
    for name in ("region_size", "window_size"):
        if name in given and _same(size, region_count(first, given[name])):
            return Dim("regions", setting=name)
    return Dim("own", axis=axis)


_MOST_PIECES = 64


class _Unsayable(Exception):
    """A setting follows from an open size in a way that no attribute says."""


def _setting_of(value: Any, first: Tensor, given: dict[str, Any]) -> Any:
    from ..ops.regions import ceil_div, region_count

    def size_of(size: Any, axis: int) -> Dim:
        if not isinstance(size, torch.SymInt):
            return Dim("number", int(size))
        extent = first.shape[axis]
        return _guess("pieces", size, lambda n: (ceil_div(extent, n), -(-extent // n)), axis)

    if isinstance(value, (list, tuple)):
        return tuple(size_of(size, axis) for axis, size in enumerate(value, 1))
    if isinstance(value, torch.SymInt) and "region_size" in given:
        count = region_count(first, given["region_size"])
        return _guess("most", value, lambda n: (torch.sym_min(n, count),))
    if isinstance(value, torch.SymInt):
        raise _Unsayable
    return value


def _guess(kind: str, size: torch.SymInt, formulas: Callable[[int], tuple[Any, ...]], axis: int = 0) -> Dim:
    """The number for which one of the ways to write a formula gives a size."""
    for number in range(1, _MOST_PIECES + 1):
        if any(_same(size, formula) for formula in formulas(number)):
            return Dim(kind, number, axis)
    raise _Unsayable


# --- functions --------------------------------------------------------------------------------------------------------


class _Body(nn.Module):
    """A definition, whose arguments after the first have sizes written in those of the first."""

    def __init__(self, variant: Variant):
        super().__init__()
        self.variant = variant

    def forward(self, *tensors: Tensor) -> Tensor:
        signature, names = self.variant.signature, self.variant.names
        first, count = tensors[0], len(self.variant.signature.shapes)
        given: dict[str, Any] = {}
        for name, value in sorted(zip(names[count:], signature.settings, strict=True), key=_after_sizes):
            given[name] = _valued(value, first, given)
        settings = [given[name] for name in names[count:]]
        left = iter(tensors)
        args = [
            None if shape is None else _shaped(next(left), shape, first, given) for shape in signature.shapes
        ]
        out: Tensor = self.variant.signature.definition(*args, *settings)
        return out


def _after_sizes(setting: tuple[str, Any]) -> bool:
    return isinstance(setting[1], Dim)


def _valued(value: Any, first: Tensor, given: dict[str, Any]) -> Any:
    from ..ops.regions import ceil_div, region_count

    if isinstance(value, tuple):
        return [_valued(item, first, given) for item in value]
    if not isinstance(value, Dim):
        return value
    if value.kind == "pieces":
        return ceil_div(first.shape[value.axis], value.value)
    if value.kind == "most":
        return torch.sym_min(value.value, region_count(first, given["region_size"]))
    return value.value


def _shaped(x: Tensor, shape: tuple[Dim, ...], first: Tensor, given: dict[str, Any]) -> Tensor:
    from ..ops.regions import region_count

    if x is first or not any(dim.kind in ("first", "regions") for dim in shape):
        return x
    sizes: list[Any] = []
    for place, dim in enumerate(shape):
        if dim.kind == "first":
            sizes.append(first.shape[dim.axis])
        elif dim.kind == "regions":
            sizes.append(region_count(first, given[dim.setting]))
        else:
            sizes.append(x.shape[place])
    same: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{_SAME}", (x,), dtype=x.dtype, shape=sizes, version=1)
    return same


def _traced(variant: Variant, opset: int) -> onnx.ModelProto:
    """The definition as a graph of standard operators, but for nodes that say of a size which one it is."""
    from .optimise import optimise

    signature = variant.signature
    tensors = [
        torch.zeros(size, dtype=dtype)
        for size, dtype in zip(variant.example, signature.dtypes, strict=True)
        if size is not None
    ]
    open_sizes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(shape) if dim.kind == "own"}
        for shape in signature.shapes
        if shape is not None
    )
    more = sum(map(len, open_sizes)) > 1
    plain = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), plain if more else contextlib.nullcontext():
        program = torch.export.export(
            _Body(variant).eval(), tuple(tensors), dynamic_shapes=(open_sizes,), strict=False
        )
    translated = torch.onnx.export(
        program,
        (),
        input_names=variant.inputs,
        opset_version=max(opset, TRANSLATED),
        optimize=False,
        verbose=False,
    )
    assert translated is not None
    optimise(translated.model, ["out"])
    model: onnx.ModelProto = translated.model_proto
    if opset < TRANSLATED:
        to_opset_17(model)
    return model


def function_of(variant: Variant, opset: int) -> onnx.FunctionProto:
    """A variant's definition as a function for float32, float16 and bfloat16 alike.

    Sums of products are in the type of the first input, as they are in a converted file of standard operators; softmax,
    scattered sums, all of a chooser, and convolutions before opset 22, which know no bfloat16, are in float32.

    Raises:
        ExportError: torch can't trace or translate the definition.
    """
    import onnx

    from .capture import quiet

    try:
        with quiet():
            graph = _traced(variant, opset).graph
    except Exception as error:
        raise ExportError(f"the function of {variant.name} could not be made: {error}") from error
    nodes = _without_same(graph)
    body = _Typed(variant.inputs[0], variant.signature.operator in CHOOSERS, opset)
    function = onnx.helper.make_function(
        DOMAIN,
        variant.name,
        variant.inputs,
        ["out"],
        body.of(graph, nodes),
        [onnx.helper.make_opsetid("", opset)],
        list(variant.attributes),
    )
    function.doc_string = f"vitrail.ops.{variant.signature.operator}"
    return function


def _without_same(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes, of which those that only name a size are gone."""
    source = {node.output[0]: node.input[0] for node in graph.node if node.domain == DOMAIN}
    kept = [node for node in graph.node if node.domain != DOMAIN]
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = source.get(name, name)
        node.doc_string = ""
        del node.metadata_props[:]
    return kept


_BFLOAT16_CONV = 22
"""From this operator set on, a convolution may be in bfloat16."""


class _Typed:
    """Rewrites nodes that were traced in float32 so that they hold for any type of `like`."""

    def __init__(self, like: str, wide: bool, opset: int):
        self.like = like
        self.wide = wide
        self._in_float32 = {"Softmax", "ScatterElements", *(() if opset >= _BFLOAT16_CONV else ("Conv",))}

    def of(self, graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Nodes of a function: constants, and what `graph` computes."""
        import onnx

        made = []
        floats = [v.name for v in graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
        given = {name: f"{name}_typed" for name in floats if self.wide or name != self.like}
        for name, typed in given.items():
            made.append(self._cast(name, typed))
        for tensor in graph.initializer:
            made += self._typed_output(onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
        for node in nodes:
            for i, name in enumerate(node.input):
                node.input[i] = given.get(name, name)
            made += self._typed_output(node)
        return made

    def _cast(self, name: str, to: str) -> onnx.NodeProto:
        """To float32 for a chooser, else to the type of `like`."""
        import onnx

        if self.wide:
            return onnx.helper.make_node("Cast", [name], [to], to=onnx.TensorProto.FLOAT)
        return onnx.helper.make_node("CastLike", [name, self.like], [to])

    def _typed_output(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The node, and casts around it where its output would be float32 in any case, or should be."""
        import onnx

        if self.wide:
            return [node]
        if node.op_type == "Cast" and _integer(node, "to") == onnx.TensorProto.FLOAT:
            return [self._cast(node.input[0], node.output[0])]
        if node.op_type in self._in_float32:
            out, widened = node.output[0], []
            for i, name in enumerate(node.input):
                if node.op_type == "ScatterElements" and i == 1:
                    continue  # indices
                node.input[i] = f"{out}_of_{i}"
                widened.append(
                    onnx.helper.make_node("Cast", [name], [node.input[i]], to=onnx.TensorProto.FLOAT)
                )
            node.output[0] = f"{out}_wide"
            return [*widened, node, self._cast(node.output[0], out)]
        if node.op_type in ("Constant", "ConstantOfShape") and _holds_floats(node):
            out = node.output[0]
            node.output[0] = f"{out}_float"
            return [node, self._cast(node.output[0], out)]
        return [node]


def _integer(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _holds_floats(node: onnx.NodeProto) -> bool:
    import onnx

    value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
    return value is None or value.data_type == onnx.TensorProto.FLOAT
