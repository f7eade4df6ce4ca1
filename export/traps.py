"""What TensorRT is known to get wrong or to refuse, found in an ONNX graph before it is built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .graph import module_of, walk

if TYPE_CHECKING:
    import onnx

LARGEST_TOPK = 3840
_CHOICES = ("TopK", "ArgMax", "ArgMin")
_GATHERS = ("Gather", "GatherElements", "GatherND")
_INDEX_ARITHMETIC = frozenset(
    ("Add", "Sub", "Mul", "Mod", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Concat",
     "Flatten", "Identity", "Slice", "Split")
)  # fmt: skip
"""What may stand between a choice and the gather that follows it."""
_BETWEEN_SOFTMAX_AND_PRODUCT = frozenset(("Cast", "Mul", "Where", "Dropout", "Identity", "Reshape"))


def traps(model: onnx.ModelProto, open_batch: bool) -> list[str]:
    """A sentence for each known trap that the graph runs into, with the modules where it does; empty for none.

    Args:
        model: the graph as it goes to TensorRT.
        open_batch: whether the engine is to take several batch sizes.
    """
    found = []
    if open_batch and (gathers := list(_chosen_gathers(model.graph))):
        found.append(
            f"rows that TopK chose are gathered with the batch open ({_places(gathers)}); TensorRT has returned wrong "
            f"results for that (NVIDIA/TensorRT#2299): compare with torch on the GPU, at the least and the largest "
            f"batch, or fix the batch (one number)"
        )
    if large := [node for node in walk(model.graph) if _too_large(model.graph, node)]:
        found.append(
            f"TopK takes more than {LARGEST_TOPK} elements, or a number that is not constant ({_places(large)}); "
            f"TensorRT refuses that: use a smaller image or a smaller k"
        )
    if narrow := list(_half_norms(model)):
        found.append(
            f"norms compute in float16 ({_places(narrow)}); sums of squares overflow there: keep them in float32, "
            f"as dtype='float16' on a float32 file does"
        )
    return found


def attentions(graph: onnx.GraphProto) -> int:
    """How many attentions the graph computes: Attention nodes, and softmaxes that a product reads."""
    readers = _readers(graph)
    count = 0
    for node in walk(graph):
        if node.op_type == "Attention":
            count += 1
        elif node.op_type == "Softmax":
            ends = _beyond([node], readers, _BETWEEN_SOFTMAX_AND_PRODUCT)
            count += any(end.op_type in ("MatMul", "Einsum", "Gemm") for end in ends)
    return count


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in walk(graph):
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _beyond(
    start: Sequence[onnx.NodeProto], readers: dict[str, list[onnx.NodeProto]], through: Iterable[str]
) -> Iterator[onnx.NodeProto]:
    """The nodes that read what `start` gives, at first hand or through nodes of these types."""
    waiting, seen = [name for node in start for name in node.output], set()
    while waiting:
        name = waiting.pop()
        for node in readers.get(name, ()):
            if id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            if node.op_type in through:
                waiting += node.output


def _chosen_gathers(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Gathers whose index follows from a choice."""
    readers = _readers(graph)
    indices = [node for node in walk(graph) if node.op_type in _CHOICES]
    derived = set()
    for node in indices:
        derived.add(node.output[-1])  # TopK's second output, ArgMax's only one
    waiting = list(derived)
    while waiting:
        for node in readers.get(waiting.pop(), ()):
            if node.op_type in _INDEX_ARITHMETIC and not derived.issuperset(node.output):
                derived.update(node.output)
                waiting += node.output
    for node in walk(graph):
        if node.op_type in _GATHERS and node.input[1] in derived:
            yield node


def _too_large(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    if node.op_type != "TopK":
        return False
    from onnx import numpy_helper

    constant = next((tensor for tensor in graph.initializer if tensor.name == node.input[1]), None)
    return constant is None or int(numpy_helper.to_array(constant).max()) > LARGEST_TOPK


def _half_norms(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Norms whose input is float16."""
    import onnx

    norms = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization")
    present = [node for node in walk(model.graph) if node.op_type in norms]
    if not present:
        return
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # a file beyond protobuf's 2 GiB; TensorRT's own parser judges it then
        return
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    yield from (node for node in present if types.get(node.input[0]) == onnx.TensorProto.FLOAT16)


def _places(nodes: Sequence[onnx.NodeProto]) -> str:
    places = list(dict.fromkeys(module_of(node.name) or node.name or node.op_type for node in nodes))
    more = f" and {len(places) - 2} more" if len(places) > 2 else ""
    return f"{', '.join(places[:2])}{more}"
