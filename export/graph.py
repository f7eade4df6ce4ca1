"""The graph of an ONNX file: made clean, summed up, and judged."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ExportError

if TYPE_CHECKING:
    import onnx

STANDARD_DOMAINS = ("", "ai.onnx")
_INTEGERS = (6, 7)  # onnx.TensorProto.INT32, INT64


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the graph: name, element type, and a number or a name for each dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class GraphSummary:
    """What is in the file: operator set, nodes by type (most frequent first), weights, inputs, outputs."""

    opset: int
    ir_version: int
    nodes: int
    operators: dict[str, int]
    weights: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def walk(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of branches and loop bodies included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from walk(inner)


def summarize(model: onnx.ModelProto) -> GraphSummary:
    """Count what is in `model`."""
    counts = Counter(node.op_type for node in walk(model.graph))
    return GraphSummary(
        opset=opset_of(model),
        ir_version=model.ir_version,
        nodes=sum(counts.values()),
        operators=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        weights=sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        inputs=tuple(map(_tensor_info, model.graph.input)),
        outputs=tuple(map(_tensor_info, model.graph.output)),
    )


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operator set that the file uses, 0 if it names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 0)


def precision_of(model: onnx.ModelProto) -> str:
    """'float16' or 'bfloat16' where a weight has that type, else 'float32'."""
    from onnx import TensorProto

    types = {tensor.data_type for tensor in model.graph.initializer}
    for number, name in ((TensorProto.BFLOAT16, "bfloat16"), (TensorProto.FLOAT16, "float16")):
        if number in types:
            return name
    return "float32"


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    import onnx

    tensor = value.type.tensor_type
    return TensorInfo(
        value.name,
        onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
        tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim),
    )


def clean(model: onnx.ModelProto, symbols: Mapping[str, str], prefix: str = "model.") -> None:
    """Take out of `model`, in place, what belongs to the machine that traced it.

    Stack traces and source paths go, dimensions get readable names (`symbols`: traced symbol to name),
    weights get their names in the model's own state dict (`prefix` goes), nodes those of their modules
    (`stages.0.attn/MatMul`), and unused operator sets are dropped.
    """
    graph = model.graph
    _name_nodes(graph, prefix)
    renamed = {t.name: t.name[len(prefix) :] for t in graph.initializer if t.name.startswith(prefix)}
    taken = {name for node in walk(graph) for name in node.output} | {v.name for v in graph.input}
    renamed = {old: new for old, new in renamed.items() if new not in taken}
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
        del tensor.metadata_props[:]
    used = set()
    for node in walk(graph):
        used.add(node.domain)
        for i, name in enumerate(node.input):
            if name in renamed:
                node.input[i] = renamed[name]
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = renamed.get(value.name, value.name)
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = _readable(dim.dim_param, symbols)
    del graph.metadata_props[:]
    graph.doc_string = ""
    for entry in list(model.opset_import):
        if entry.domain not in STANDARD_DOMAINS and entry.domain not in used:
            model.opset_import.remove(entry)


_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules that a node comes from, outermost first, and last its own name."""


def _name_nodes(graph: onnx.GraphProto, prefix: str) -> None:
    """Name nodes by their modules. One that an optimisation made is taken to be where its input comes from."""
    modules: dict[str, str] = {}
    taken: Counter[str] = Counter()
    for node in walk(graph):
        noted = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
        scopes = re.findall(r"'([^']*)'", noted)[:-1]
        if scopes:  # the outermost module has no name; what is above it (shape arithmetic) is in none
            module = f"{scopes[-1]}.".removeprefix(prefix).rstrip(".") if scopes[0] == "" else ""
        else:
            module = next((modules[name] for name in node.input if name in modules), "")
        modules.update(dict.fromkeys(node.output, module))
        name = f"{module}/{node.op_type}".lstrip("/")
        taken[name] += 1
        node.name = f"{name}_{taken[name] - 1}" if taken[name] > 1 else name


def module_of(node: str) -> str:
    """The module path in a node's name, as `clean` gives it: `stages.0.attn` of `stages.0.attn/MatMul_1`, else ""."""
    found = re.fullmatch(r"/?([\w.]+)/\w+", node)
    return found[1] if found else ""


def _readable(expression: str, symbols: Mapping[str, str]) -> str:
    if expression in symbols:
        return symbols[expression]
    return re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), expression)


def check(model: onnx.ModelProto, opset: int) -> None:
    """Raise `ExportError` unless `model` is valid ONNX of standard operators, and functions of these, at `opset`."""
    import onnx

    functions = {(f.domain, f.name) for f in model.functions}
    nodes = [*walk(model.graph), *(node for f in model.functions for node in f.node)]
    used = {(n.domain, n.op_type) for n in nodes if n.domain not in STANDARD_DOMAINS}
    foreign = sorted(f"{domain}::{name}" for domain, name in used - functions)
    if foreign:
        raise ExportError(
            f"the graph holds operators that are not standard ONNX: {', '.join(foreign)}; give them a definition in "
            f"standard torch operators for the time of the export"
        )
    if opset_of(model) != opset:
        raise ExportError(
            f"the model can't be written at opset {opset} (it came out at {opset_of(model)}); try opset 20"
        )
    from .precision import skeleton

    try:
        # large weights play no part, and onnx's checker takes no more than 2 GiB
        onnx.checker.check_model(skeleton(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error


def check_file(path: Path) -> None:
    """Raise `ExportError` unless the file, whose weights are beside it, passes onnx's checker."""
    import onnx

    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the written file is not valid ONNX: {error}") from error


def advice(model: onnx.ModelProto) -> list[str]:
    """What makes the graph slower or larger than it need be, a sentence each; empty when all is well.

    Looked for: gathers by expanded index, TopK for one element, LayerNormalization or Gelu spelled out,
    transposes that cancel out, reshapes, casts or a slice and a squeeze in a row, nodes that do nothing, and nodes of
    constants alone.
    """
    graph = model.graph
    producer = {name: node for node in walk(graph) for name in node.output}
    constants = {t.name: t for t in graph.initializer}
    found: Counter[str] = Counter()
    readers = Counter(name for node in walk(graph) for name in node.input)
    for node in walk(graph):
        above = producer.get(node.input[0]) if node.input else None
        if node.op_type == "GatherElements" and _is(producer.get(node.input[1]), "Expand"):
            found[
                "GatherElements reads an index blown up by Expand; Gather of whole rows by a flat index is faster"
            ] += 1
        elif node.op_type == "TopK" and _single(constants.get(node.input[1])):
            found["TopK picks one element; ArgMax is cheaper"] += 1
        elif node.op_type == "Erf" and opset_of(model) >= 20:
            found["Gelu is spelled out through Erf; the Gelu node is one kernel"] += 1
        elif node.op_type == "Sqrt" and _is(_skip_add(above, producer), "ReduceMean"):
            found["a normalisation is spelled out (ReduceMean, Sqrt); LayerNormalization is one kernel"] += 1
        elif node.op_type == "Transpose" and _is(above, "Transpose") and _cancel(above, node):
            found["two Transposes in a row cancel out"] += 1
        elif node.op_type == "Reshape" and _is(above, "Reshape") and readers[node.input[0]] == 1:
            found["two Reshapes in a row are one"] += 1
        elif node.op_type == "Squeeze" and _is(above, "Slice") and readers[node.input[0]] == 1:
            found["Slice and Squeeze of one row are one Gather, or one Split for all rows"] += 1
        elif node.op_type == "Cast" and _is(above, "Cast"):
            found["two Casts in a row are one, or lose digits"] += 1
        elif node.op_type == "Mul" and any(_single(constants.get(name), floats=True) for name in node.input):
            found["Mul multiplies by one"] += 1
        elif node.op_type in ("Identity", "Dropout"):
            found[f"{node.op_type} does nothing"] += 1
        elif (
            node.input
            and all(name in constants for name in node.input if name)
            and node.op_type not in ("Constant", "ConstantOfShape")  # the second is a constant in few bytes
        ):
            found[f"{node.op_type} has constant inputs alone and could be computed once"] += 1
    return [f"{text} ({count} times)" if count > 1 else text for text, count in found.items()]


def _is(node: Any, op_type: str) -> bool:
    return node is not None and node.op_type == op_type


def _skip_add(node: Any, producer: Mapping[str, Any]) -> Any:
    return producer.get(node.input[0]) if _is(node, "Add") else node


def _single(tensor: Any, floats: bool = False) -> bool:
    """Whether a tensor is one number, 1; of whole numbers unless `floats`."""
    if tensor is None or math.prod(tensor.dims) != 1 or floats == (tensor.data_type in _INTEGERS):
        return False
    from onnx import numpy_helper

    return bool((numpy_helper.to_array(tensor) == 1).all())


def _permutation(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])


def _cancel(first: Any, second: onnx.NodeProto) -> bool:
    a, b = _permutation(first), _permutation(second)
    return bool(a) and len(a) == len(b) and [a[i] for i in b] == list(range(len(a)))
