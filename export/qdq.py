"""8-bit arithmetic in a graph: which layers can have it, and QuantizeLinear and DequantizeLinear around those that do.

A layer multiplies activations by constant weights (Conv, MatMul, Gemm). In 8 bits its weights are int8, symmetric,
with a scale for each output channel; what it reads is uint8 with one scale and zero point. Runtimes recognise a layer
between DequantizeLinear nodes and multiply integers: ONNX Runtime turns MatMul into MatMulIntegerToFloat and Gemm into
QGemm, which put out float32, and Conv into QLinearConv, whose result is 8 bits, too, so a QuantizeLinear follows it.

The nodes are placed here and not by ONNX Runtime's own quantiser because that quantises a tensor for all of its
readers: a residual that passes by a layer would lose precision with it, and so would a layer left in float32.

A layer that reads the pixels of a uint8 input gets those: they are 8-bit numbers already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ExportError
from .graph import STANDARD_DOMAINS
from .pixels import pixels_of

if TYPE_CHECKING:
    import numpy as np
    import onnx

    Array = np.ndarray[Any, Any]

OPERATORS = ("Conv", "MatMul", "Gemm")
LEVELS = 255
"""Steps of an 8-bit scale."""


@dataclass(frozen=True)
class Layer:
    """A node that multiplies by constant weights.

    `name` is the node's, `module` the place in the model that its weights come from, as far as the file tells. `axis`
    is that of output channels in the weight; `bias` is "" where the node adds none. `obstacle` says why it can't be in
    8 bits, "" where it can.
    """

    name: str
    op_type: str
    module: str
    input: str
    output: str
    weight: str
    bias: str
    axis: int
    obstacle: str = ""


@dataclass(frozen=True)
class Range:
    """The least and the largest value that a tensor is to represent."""

    low: float
    high: float

    def scale(self) -> tuple[float, int]:
        """Scale and zero point of uint8 numbers that cover the range and hold zero exactly."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = (high - low) / LEVELS
        if scale < 1e-30:  # always zero
            return 1.0, 0
        return scale, round(-low / scale)


def find_layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers of a graph, in its order, those that can't be in 8 bits among them; nodes without a name get one, in
    place."""
    import onnx

    graph = model.graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    readers = Counter(name for node in graph.node for name in node.input)
    adds = {node.input[i]: node.input[1 - i] for node in graph.node if node.op_type == "Add" for i in (0, 1)}
    taken = {node.name for node in graph.node}
    layers = []
    for i, node in enumerate(graph.node):
        if node.domain not in STANDARD_DOMAINS or node.op_type not in OPERATORS:
            continue
        x, weight, bias = node.input[0], node.input[1], node.input[2] if len(node.input) > 2 else ""
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if (x in shapes) == (weight in shapes):
            continue
        obstacle = _obstacle(node.op_type, attributes, shapes, x, weight, bias, readers)
        if x in shapes:
            x, weight = weight, x
        if not node.name:
            node.name = next(n for n in (f"{node.op_type}_{i}", f"{node.op_type}_{i}_") if n not in taken)
        axis = 0 if node.op_type == "Conv" or attributes.get("transB") else 1
        named = next(
            (n for n in (weight, bias, adds.get(node.output[0], "")) if "." in n and n in shapes), ""
        )
        module = _module(named)
        layers.append(Layer(node.name, node.op_type, module, x, node.output[0], weight, bias, axis, obstacle))
    return layers


def _obstacle(
    op_type: str,
    attributes: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    x: str,
    weight: str,
    bias: str,
    readers: Mapping[str, int],
) -> str:
    """Why a layer can't be in 8 bits, "" if it can."""
    if x in shapes:
        return "weights on the left"
    if not (len(shapes[weight]) > 2 if op_type == "Conv" else len(shapes[weight]) == 2):
        return "weights of other dimensions"
    if readers[weight] > 1:
        return "weights shared"
    if bias and bias not in shapes:
        return "bias computed"
    if attributes.get("transA") or any(attributes.get(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return "product scaled or transposed"
    return ""


def _module(parameter: str) -> str:
    """`stages.0.mlp.fc1` of `stages.0.mlp.fc1.weight`; a name that says more than that stays whole."""
    module, _, last = parameter.rpartition(".")
    return module if last in ("weight", "bias", "shift") else parameter


class Quantiser:
    """Puts chosen layers of a graph into 8 bits, as often as asked, from weights that are rounded once.

    Args:
        model: the float32 graph; it is left as it was.
        layers: what `find_layers` found in it.
        ranges: of the layers' inputs, and of the outputs of convolutions.
        weight_bits: 8, or 7 for processors whose 8-bit products saturate (x86 with AVX2 and without VNNI).
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Collection[Layer],
        ranges: Mapping[str, Range],
        weight_bits: int = 8,
    ) -> None:
        from onnx import numpy_helper

        self._model = model
        self._pixels = pixels_of(model)
        self._ranges = {**ranges, **dict.fromkeys(self._pixels, Range(0, LEVELS))}
        self._largest = 2 ** (weight_bits - 1) - 1
        needed = {name for layer in layers for name in (layer.weight, layer.bias)}
        self._values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in needed}
        self._rounded = {layer.name: self._round(layer) for layer in layers}

    def _round(self, layer: Layer) -> tuple[Array, Array]:
        """The weights of a layer as int8, and their scales."""
        import numpy as np

        values = self._values[layer.weight]
        if not np.isfinite(values).all():
            raise ExportError(f"the weights of {layer.name} ({layer.weight}) hold NaN or infinity")
        others = tuple(axis for axis in range(values.ndim) if axis != layer.axis)
        scale = np.maximum(np.abs(values).max(others) / self._largest, np.float32(1e-30))
        if layer.bias:  # which becomes int32, in steps of both scales
            step = self._ranges[layer.input].scale()[0]
            scale = np.maximum(scale, np.abs(self._values[layer.bias]).reshape(-1) / (step * 2**30))
        shape = [-1 if axis == layer.axis else 1 for axis in range(values.ndim)]
        rounded = np.clip(np.rint(values / scale.reshape(shape)), -self._largest, self._largest)
        return rounded.astype(np.int8), scale.astype(np.float32)

    def apply(self, chosen: Collection[Layer]) -> onnx.ModelProto:
        """A copy of the graph with the chosen layers in 8 bits, and the others as they were."""
        import onnx

        by_name = {layer.name: layer for layer in chosen}
        source = self._model.graph
        made = onnx.ModelProto(
            ir_version=self._model.ir_version,
            producer_name=self._model.producer_name,
            producer_version=self._model.producer_version,
            opset_import=self._model.opset_import,
            metadata_props=self._model.metadata_props,
            functions=self._model.functions,
        )
        made.graph.name = source.name
        made.graph.input.extend(source.input)
        made.graph.output.extend(source.output)
        # of what stays in float32; types of other tensors follow
        made.graph.value_info.extend(source.value_info)
        self._dequantized: dict[str, str] = {}  # by tensor, the name of what comes out of 8 bits
        for node in source.node:
            layer = by_name.get(node.name)
            if layer is None:
                made.graph.node.append(node)
            else:
                self._place(made.graph, node, layer)
        read = self._drop_unread_pixels(made.graph)
        gone = {name for layer in chosen for name in (layer.weight, layer.bias)} - read
        made.graph.initializer.extend(t for t in source.initializer if t.name not in gone)
        return made

    def _drop_unread_pixels(self, graph: onnx.GraphProto) -> set[str]:
        """Remove what only changed the type of pixels that layers now read as they are; the names still read."""
        read = Counter(name for node in graph.node for name in node.input)
        read.update(output.name for output in graph.output)
        for i in reversed(range(len(graph.node))):
            node = graph.node[i]
            if node.output[0] in self._pixels and not read[node.output[0]]:
                read.subtract(node.input)
                del graph.node[i]
        return {name for name, readers in read.items() if readers}

    def _place(self, graph: onnx.GraphProto, node: onnx.NodeProto, layer: Layer) -> None:
        import numpy as np

        if layer.input not in self._dequantized:
            self._dequantized[layer.input] = f"{layer.input}_dequantized"
            self._pair(graph, layer.input, layer.input, self._dequantized[layer.input])
        weight, scale = self._rounded[layer.name]
        inputs = [
            self._dequantized[layer.input],
            self._constant(graph, layer.weight, weight, scale, layer.axis),
        ]
        if layer.bias:
            step = scale * np.float32(self._ranges[layer.input].scale()[0])
            bias = np.rint(self._values[layer.bias].reshape(-1) / step).astype(np.int32)
            inputs.append(self._constant(graph, layer.bias, bias, step, 0))
        kept = graph.node.add()
        kept.CopyFrom(node)
        del kept.input[:]
        kept.input.extend(inputs)
        if layer.op_type == "Conv":
            kept.output[0] = f"{layer.output}_float"
            self._pair(graph, kept.output[0], layer.output, layer.output)
            self._dequantized[layer.output] = layer.output

    def _pair(self, graph: onnx.GraphProto, source: str, tensor: str, target: str) -> None:
        """QuantizeLinear and DequantizeLinear from `source` to `target`, by the range of `tensor`."""
        import numpy as np
        from onnx import helper, numpy_helper

        scale, zero = self._ranges[tensor].scale()
        kind = "input" if source == tensor else "output"
        names = [f"{tensor}_{kind}_scale", f"{tensor}_{kind}_zero_point"]
        values = (np.float32(scale), np.uint8(zero))
        for name, value in zip(names, values, strict=True):
            graph.initializer.append(numpy_helper.from_array(np.array(value), name))
        between = f"{tensor}_{kind}_quantized"
        if source in self._pixels:
            image, axes, name = (
                self._model.graph.input[0].name,
                self._pixels[source],
                f"{tensor}_{kind}_pixels",
            )
            graph.node.append(helper.make_node("Transpose", [image], [between], name=name, perm=axes))
        else:
            name = f"{tensor}_{kind}_QuantizeLinear"
            graph.node.append(helper.make_node("QuantizeLinear", [source, *names], [between], name=name))
        name = f"{tensor}_{kind}_DequantizeLinear"
        graph.node.append(helper.make_node("DequantizeLinear", [between, *names], [target], name=name))

    def _constant(self, graph: onnx.GraphProto, name: str, values: Array, scale: Array, axis: int) -> str:
        """DequantizeLinear of a constant with a scale for each channel; the name of its result."""
        import numpy as np
        from onnx import helper, numpy_helper

        # a number for a single channel and for several alike
        zero = np.zeros(scale.shape, values.dtype)
        parts = {f"{name}_quantized": values, f"{name}_scale": scale, f"{name}_zero_point": zero}
        graph.initializer.extend(numpy_helper.from_array(value, part) for part, value in parts.items())
        node = helper.make_node(
            "DequantizeLinear",
            list(parts),
            [f"{name}_dequantized"],
            name=f"{name}_DequantizeLinear",
            axis=axis,
        )
        graph.node.append(node)
        return node.output[0]
