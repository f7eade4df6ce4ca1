"""From a float32 graph to the same graph in float16 or bfloat16, with float32 where rounding would do harm.

Each node gets one of two types. In the half type: products, convolutions, activations, residuals, and whatever only
moves values. In float32:

- norms, softmax and reductions (`_WIDE`), and what follows from them alone;
- scaling and masks between a product and its softmax, so that masks may hold what float16 has no room for;
- choices (TopK, ArgMax, comparisons: any node from numbers to indices or truth values) with all that is computed for
  them alone: a choice reads the half-type activations, and no rounding comes after that (one that a function makes
  reads them as they are, and its function computes in float32);
- what was computed from sizes or pixels, whole numbers that a half type can't hold;
- nodes with a constant that the half type has no number for, or that ONNX does not define for the half type (Conv in
  bfloat16 before opset 22), or TensorRT does not take in it (HardSwish in bfloat16).

A value is cast at most once to each type, next to where it is first needed, and never there and back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from .errors import ExportError
from .graph import STANDARD_DOMAINS, opset_of

if TYPE_CHECKING:
    import onnx

DTYPES = ("float32", "float16", "bfloat16")
FLOAT, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16  # onnx.TensorProto's numbers
FLOATS = (FLOAT, FLOAT16, DOUBLE, BFLOAT16)
_NUMBERS = {"float16": FLOAT16, "bfloat16": BFLOAT16}
_SMALL = (2, 3, 9)  # uint8, int8, bool: each has a number in every float type
_ROOM = {FLOAT16: 65504.0, BFLOAT16: 3.3895e38}
"""The largest finite number of each type."""

_WIDE = frozenset((
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
    "LpNormalization", "MeanVarianceNormalization", "LRN", "Softmax", "LogSoftmax", "Hardmax", "ReduceMean",
    "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "CumSum",
    "GlobalAveragePool", "GlobalLpPool", "AveragePool", "Exp", "Log", "Pow", "Softplus", "RandomNormal",
    "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli",
))  # fmt: skip
"""Sums of many terms, and what overflows soon."""
_ELEMENTWISE = frozenset((
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Reciprocal", "Max", "Min", "Clip", "Where", "Sum", "Mean",
))  # fmt: skip
MOVES = frozenset((
    "Reshape", "Transpose", "Slice", "Gather", "GatherElements", "GatherND", "Concat", "Split", "Squeeze",
    "Unsqueeze", "Expand", "Pad", "Identity", "Flatten", "Tile", "Compress", "DepthToSpace", "SpaceToDepth",
    "ReverseSequence", "Dropout", "Trilu",
))  # fmt: skip
"""Operators whose results are numbers of their inputs."""
_NO_BFLOAT16 = frozenset(("HardSwish",))
"""Operators that TensorRT takes in float32 and float16 alone, though ONNX has them in bfloat16."""
_OF_SIZES = frozenset(("Floor", "Ceil", "Round", "ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin"))
_SIZES = frozenset(("Shape", "Size"))


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless `dtype` is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def convert_precision(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """The graph of `model` in another precision; inputs and outputs of the file stay float32.

    Args:
        model: a float32 graph, with its weights inside. Nodes of other domains are converted where the model has a
            function for them, whose body must then serve any float type, and choose in float32 whatever it reads;
            without one they stay float32.
        dtype: 'float16', 'bfloat16', or 'float32' for a plain copy.

    Returns:
        a new model; `model` is left as it was. Names of values and weights stay; a weight that is needed in two
        types has the second under a name of its own.

    Raises:
        ValueError: an unknown dtype.
        ExportError: a weight that has no place in float16, or a node whose results have no known type.
    """
    import onnx

    check_dtype(dtype)
    if dtype == "float32":
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy
    plan = _Plan(model, _NUMBERS[dtype])
    return _Writer(model, plan).write()


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The ONNX element type of every value of the main graph, as far as it is known.

    Large weights stay out of what the inference sees, so that models beyond protobuf's 2 GiB can be asked, too.
    """
    import onnx

    graph = model.graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    known.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    inferred = onnx.shape_inference.infer_shapes(skeleton(model)).graph
    for value in (*inferred.value_info, *inferred.output):
        if value.type.tensor_type.elem_type:
            known[value.name] = value.type.tensor_type.elem_type
    return {name: number for name, number in known.items() if number}


def skeleton(model: onnx.ModelProto, largest: int = 1024) -> onnx.ModelProto:
    """`model` with every weight of more than `largest` values as an input in its place."""
    import onnx

    bare = without_weights(model)
    given = {value.name for value in bare.graph.input}
    for tensor in model.graph.initializer:
        size = 1
        for n in tensor.dims:
            size *= n
        if size <= largest:
            bare.graph.initializer.append(tensor)
        elif tensor.name not in given:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return bare


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of all but the initializers."""
    import onnx

    copy, graph = onnx.ModelProto(), model.graph
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(copy, name, getattr(model, name))
    for name in ("opset_import", "metadata_props", "functions"):
        getattr(copy, name).extend(getattr(model, name))
    copy.graph.name, copy.graph.doc_string = graph.name, graph.doc_string
    for name in ("node", "input", "output", "value_info", "metadata_props"):
        getattr(copy.graph, name).extend(getattr(graph, name))
    return copy


def _tensor(source: onnx.TensorProto, name: str, number: int) -> onnx.TensorProto:
    """A float32 tensor under a name, in a type, rounded to the nearest."""
    import onnx
    import torch
    from onnx import numpy_helper

    if number == FLOAT:
        copy = onnx.TensorProto()
        copy.CopyFrom(source)
        copy.name = name
        return copy
    values = torch.from_numpy(numpy_helper.to_array(source).copy())
    room = _ROOM[number]
    values = torch.where(values.isfinite(), values.clamp(-room, room), values)
    half = values.to(torch.float16 if number == FLOAT16 else torch.bfloat16)
    return onnx.TensorProto(
        name=name,
        data_type=number,
        dims=source.dims,
        raw_data=half.contiguous().view(torch.int16).numpy().tobytes(),
    )


def chooses(node: onnx.NodeProto, types: Mapping[str, int]) -> bool:
    """Whether a node makes indices or truth values of numbers."""
    if node.op_type in _SIZES or not any(types.get(name) in FLOATS for name in node.input):
        return False
    return any(name and types.get(name, FLOAT) not in FLOATS for name in node.output)


def captured(node: onnx.NodeProto) -> set[str]:
    """Names that a node's branches or body read."""
    from .graph import walk

    bodies = [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    return {name for body in bodies for inner in walk(body) for name in inner.input} | {
        value.name for body in bodies for value in body.output
    }


def _accumulates(node: onnx.NodeProto) -> bool:
    """Whether a scatter adds up what meets in one place."""
    reduction = [a.s for a in node.attribute if a.name == "reduction"]
    return node.op_type in ("ScatterElements", "ScatterND") and reduction not in ([], [b"none"])


class _Plan:
    """Which nodes of a graph stay in float32."""

    def __init__(self, model: onnx.ModelProto, number: int):
        self.model, self.number = model, number
        self.opset = opset_of(model)
        self.nodes = list(model.graph.node)
        self.types = element_types(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.functions = {(f.domain, f.name) for f in model.functions}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            for name in {*node.input, *captured(node)}:
                self.readers[name].append(i)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        for node in self.nodes:
            for name in node.output:
                if name and name not in self.types:
                    raise ExportError(
                        f"{node.domain or 'ONNX'}::{node.op_type} puts out {name!r} of unknown type, so the graph "
                        f"can't be converted; give the node a function, or its outputs a value_info"
                    )
        self.wide: set[int] = set()
        self._decide()

    def floats(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are float32."""
        return [name for name in names if self.types.get(name) == FLOAT]

    def varying(self, node: onnx.NodeProto) -> list[str]:
        """The distinct float32 inputs of a node that are no constants."""
        return list(dict.fromkeys(n for n in self.floats(node.input) if n not in self.constants))

    def users(self, node: onnx.NodeProto) -> list[int]:
        """The nodes that read a node's float32 results, other than for their shape."""
        found = {i for name in self.floats(node.output) for i in self.readers[name]}
        return sorted(i for i in found if self.nodes[i].op_type not in _SIZES)

    def _decide(self) -> None:
        self.wide = {i for i, node in enumerate(self.nodes) if self._must_be_wide(node)}
        self.wide |= self._for_choices() | self._from_whole_numbers()
        self._spread_down()
        self._spread_up()
        self._spread_down()
        self.wide -= {i for i in self.wide if self._widens_itself(self.nodes[i])}

    def _widens_itself(self, node: onnx.NodeProto) -> bool:
        """Whether a node reads half-type values alone and is a choice by a function, which computes in float32."""
        if (node.domain, node.op_type) not in self.functions or not chooses(node, self.types):
            return False
        sources = self.floats(node.input)
        return not self.floats(node.output) and all(
            name in self.producer and self.producer[name] not in self.wide for name in sources
        )

    def _must_be_wide(self, node: onnx.NodeProto) -> bool:
        if not self.floats([*node.input, *node.output]):
            return False
        standard = node.domain in STANDARD_DOMAINS
        if captured(node) or chooses(node, self.types):
            return True
        if not standard:
            return (node.domain, node.op_type) not in self.functions
        sums = node.op_type in _WIDE or _accumulates(node)
        return sums or self._has_odd_constant(node) or not self._is_defined(node)

    def _has_odd_constant(self, node: onnx.NodeProto) -> bool:
        """Whether a single number among the inputs becomes zero or infinite in the half type."""
        import torch
        from onnx import numpy_helper

        half = torch.float16 if self.number == FLOAT16 else torch.bfloat16
        for name in self.floats(node.input):
            tensor = self.constants.get(name)
            if tensor is not None and all(n == 1 for n in tensor.dims) and node.op_type not in MOVES:
                value = torch.from_numpy(numpy_helper.to_array(tensor).copy()).flatten()
                rounded = value.to(half)
                if bool((rounded.isinf() & value.isfinite()) | ((rounded == 0) & (value != 0))):
                    return True
        return False

    def _is_defined(self, node: onnx.NodeProto) -> bool:
        """Whether ONNX has the operator for the half type, at the model's opset, and runtimes take it."""
        import onnx

        if self.number == BFLOAT16 and node.op_type in _NO_BFLOAT16:
            return False
        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        kind = "tensor(float16)" if self.number == FLOAT16 else "tensor(bfloat16)"
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        for formals, names in ((schema.inputs, node.input), (schema.outputs, node.output)):
            for j, name in enumerate(names):
                formal = formals[min(j, len(formals) - 1)]
                if self.types.get(name) == FLOAT and kind not in allowed.get(
                    formal.type_str, {formal.type_str}
                ):
                    return False
        return True

    def _for_choices(self) -> set[int]:
        """Choices that later values depend on, with the nodes that serve them alone."""
        matters: set[str] = set()
        chosen: set[int] = set()
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            users = self.users(node)
            if chooses(node, self.types):
                results = [name for name in node.output if name and self.types[name] != FLOAT]
                if matters & set(results):
                    chosen.add(i)
            elif users and set(users) <= chosen and not self.outputs & set(node.output):
                chosen.add(i)
            if self.floats(node.output) or matters & set(node.output):
                matters.update([*node.input, *captured(node)])
        return chosen

    def _from_whole_numbers(self) -> set[int]:
        """Nodes that compute with what was cast from integers: sizes, positions, pixels."""
        exact: set[str] = set()
        small: set[str] = set()  # those of `exact` that every float type holds
        found: set[int] = set()
        for i, node in enumerate(self.nodes):
            results, inputs = self.floats(node.output), set(self.varying(node))
            if not results:
                continue
            if node.op_type in ("Cast", "Range") and not inputs:
                holds = node.op_type == "Cast" and self.types.get(node.input[0]) in _SMALL
                (small if holds else exact).update(results)
                if not holds:
                    found.add(i)
            elif inputs and inputs <= small and node.op_type in MOVES:
                small.update(results)
            elif inputs and inputs <= exact | small and node.op_type in _ELEMENTWISE | MOVES | _OF_SIZES:
                found.add(i)
                exact.update(results)
            elif inputs & exact and node.op_type in _ELEMENTWISE:
                found.add(i)
        return found

    def _spread_down(self) -> None:
        """Arithmetic on float32 results alone stays there; what moves them does where a float32 node reads it."""
        for i, node in enumerate(self.nodes):
            if i in self.wide or not self._is_local(node):
                continue
            sources = self.varying(node)
            if not sources or not all(self.producer.get(name) in self.wide for name in sources):
                continue
            if node.op_type in _ELEMENTWISE or any(user in self.wide for user in self.users(node)):
                self.wide.add(i)

    def _spread_up(self) -> None:
        """Arithmetic with one varying input whose every reader is in float32: scaling and masks before a softmax."""
        for i in reversed(range(len(self.nodes))):
            node, users = self.nodes[i], self.users(self.nodes[i])
            local = node.op_type in _ELEMENTWISE or node.op_type == "ConstantOfShape"
            if i in self.wide or not local or self.outputs & set(node.output):
                continue
            if users and all(user in self.wide for user in users) and len(self.varying(node)) <= 1:
                self.wide.add(i)

    def _is_local(self, node: onnx.NodeProto) -> bool:
        return node.domain in STANDARD_DOMAINS and node.op_type in _ELEMENTWISE | MOVES

    @cached_property
    def number_of(self) -> dict[str, int]:
        """The type of each float32 value in the graph to be written, where its producer leaves it."""
        return {
            name: FLOAT if i in self.wide else self.number
            for i, node in enumerate(self.nodes)
            for name in self.floats(node.output)
        }


_MASKING = frozenset(("Add", "Sub", "Where", "Max", "Min"))


class _Writer:
    """Writes the graph that a plan describes."""

    def __init__(self, model: onnx.ModelProto, plan: _Plan):
        self.source, self.plan = model, plan
        self.suffix = "float16" if plan.number == FLOAT16 else "bfloat16"
        self.names = {*plan.types, *(n.name for n in plan.nodes)}
        self.casts: dict[tuple[str, int], str] = {}
        self.weights: dict[str, dict[int, str]] = defaultdict(dict)
        self.home = {value.name: FLOAT for value in model.graph.input}
        self.written: list[onnx.NodeProto] = []

    def write(self) -> onnx.ModelProto:
        """The new model."""
        result = without_weights(self.source)
        del result.graph.node[:]
        for i, node in enumerate(self.plan.nodes):
            self._write_node(node, FLOAT if i in self.plan.wide else self.plan.number)
        self._drop_unread()
        result.graph.node.extend(self.written)
        for tensor in self.source.graph.initializer:
            for number, name in self.weights.get(tensor.name, {tensor.data_type: tensor.name}).items():
                same = number == tensor.data_type and name == tensor.name
                result.graph.initializer.append(tensor if same else _tensor(tensor, name, number))
        kept = [v for v in result.graph.value_info if v.name in self.home or v.name in self.plan.types]
        del result.graph.value_info[:]
        for value in kept:
            if self.plan.types.get(value.name) == FLOAT:
                value.type.tensor_type.elem_type = self.home.get(value.name, FLOAT)
            if value.name not in self.plan.constants:
                result.graph.value_info.append(value)
        return result

    def _drop_unread(self) -> None:
        """Leave out casts whose only readers read the whole numbers themselves now."""
        read = {name for node in self.written for name in {*node.input, *captured(node)}} | self.plan.outputs
        unread = {
            i for i, node in enumerate(self.written) if node.op_type == "Cast" and node.output[0] not in read
        }
        self.written = [node for i, node in enumerate(self.written) if i not in unread]

    def _write_node(self, node: onnx.NodeProto, number: int) -> None:
        import onnx

        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        floats = set(self.plan.floats(node.input))
        if node.op_type not in _SIZES:
            for j, name in enumerate(node.input):
                if name in floats:
                    copy.input[j] = self._as(name, number, node)
        elif floats:
            copy.input[0] = self._anywhere(node.input[0])
        for name in captured(node):
            if self.plan.types.get(name) == FLOAT:
                self._as_in_body(copy, name, self._as(name, FLOAT, node))
        if number != FLOAT:
            _retype(copy, number)
        self.written.append(copy)
        for j, name in enumerate(node.output):
            if self.plan.types.get(name) != FLOAT:
                continue
            self.home[name] = number
            if name in self.plan.outputs and number != FLOAT:  # the file's output is a float32 copy
                copy.output[j] = self._fresh(f"{name}/{self.suffix}")
                self.casts[name, number] = copy.output[j]
                self.home[name] = FLOAT
                self._cast(copy.output[j], name, FLOAT)

    def _as(self, name: str, number: int, node: onnx.NodeProto) -> str:
        """The name under which a value can be read in a type; casts it if nobody has yet."""
        if name in self.plan.constants:
            return self._weight(name, number, node)
        if self.home[name] == number:
            return name
        if (name, number) not in self.casts:
            target = self._fresh(f"{name}/{'float32' if number == FLOAT else self.suffix}")
            self._cast(self._whole(name), target, number)
            self.casts[name, number] = target
        return self.casts[name, number]

    def _whole(self, name: str) -> str:
        """What a value was cast from, where that is small whole numbers: they are cast to any type at once."""
        producer = self.plan.producer.get(name)
        node = None if producer is None else self.plan.nodes[producer]
        if node is not None and node.op_type == "Cast" and self.plan.types.get(node.input[0]) in _SMALL:
            return str(node.input[0])
        return name

    def _anywhere(self, name: str) -> str:
        if name in self.plan.constants:
            variants = self.weights[name]
            return next(iter(variants.values())) if variants else self._weight(name, FLOAT, None)
        return name

    def _weight(self, name: str, number: int, node: onnx.NodeProto | None) -> str:
        variants = self.weights[name]
        if number not in variants:
            if number == FLOAT16 and node is not None:
                _check_room(self.plan.constants[name], node)
            label = "float32" if number == FLOAT else self.suffix
            variants[number] = self._fresh(f"{name}/{label}") if variants else name
        return variants[number]

    def _as_in_body(self, node: onnx.NodeProto, old: str, new: str) -> None:
        from .graph import walk

        if old == new:
            return
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                for inner in walk(body):
                    inner.input[:] = [new if name == old else name for name in inner.input]
                for value in body.output:
                    if value.name == old:
                        value.name = new

    def _cast(self, source: str, target: str, number: int) -> None:
        import onnx

        self.written.append(
            onnx.helper.make_node("Cast", [source], [target], name=f"cast {target}", to=number)
        )

    def _fresh(self, name: str) -> str:
        found, i = name, 1
        while found in self.names:
            found, i = f"{name}_{i}", i + 1
        self.names.add(found)
        return found


def _retype(node: onnx.NodeProto, number: int) -> None:
    """Change what a node itself says of its type."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == FLOAT:
            attribute.i = number
        elif node.op_type == "ConstantOfShape" and attribute.name == "value":
            attribute.t.CopyFrom(_tensor(attribute.t, attribute.t.name, number))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        import onnx

        node.attribute.append(
            onnx.helper.make_attribute(
                "value", onnx.TensorProto(data_type=number, dims=[1], raw_data=bytes(2))
            )
        )
    if node.op_type == "Attention" and node.domain in STANDARD_DOMAINS:
        import onnx

        if not any(attribute.name == "softmax_precision" for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("softmax_precision", FLOAT))


def _check_room(tensor: onnx.TensorProto, node: onnx.NodeProto) -> None:
    """Refuse weights beyond float16; masks, which are added or chosen, are clamped."""
    import numpy as np
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    finite = np.abs(values[np.isfinite(values)])
    if finite.size and finite.max() > _ROOM[FLOAT16] and node.op_type not in _MASKING:
        raise ExportError(
            f"{tensor.name!r} holds {finite.max():.3g}, and float16 ends at {_ROOM[FLOAT16]:.0f}; "
            f"{node.op_type} would compute with infinity. Use bfloat16, or rescale that weight"
        )
