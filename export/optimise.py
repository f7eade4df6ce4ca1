"""Making the translated graph small: constants folded, leftovers of tracing removed, normalisation folded into weights.

Torch's exporter can do this too, with every rule that onnxscript has. Chosen rules give the same graph in a fraction
of the time (one of the others is quadratic in the number of nodes), which is most of what an export takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tidy import tidy


def optimise(model: Any, names: Sequence[str]) -> None:
    """Optimise an `onnx_ir.Model` in place; what it computes stays the same up to rounding.

    Args:
        model: the translated model.
        names: for its outputs. (The exporter can't tell apart two that are one tensor.)
    """
    import onnx_ir.passes.common as passes
    from onnx_ir.passes import Sequential
    from onnxscript import optimizer, rewriter

    passes.InlinePass()(model)
    for _ in range(2):  # a second look, since rewriting makes constants and folding makes patterns
        optimizer.fold_constants(model, onnx_shape_inference=True)
        present = {node.op_type for node in model.graph}
        if rules := [rule for op_type, group in _rules().items() if op_type in present for rule in group]:
            rewriter.rewrite(model, rules)
    _cancel_transposes(model.graph)
    tidy(model.graph)
    finish = [
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(size_limit=8),  # shapes and axes; parameters stay apart
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
    ]
    Sequential(*finish)(model)
    for output, name in zip(model.graph.outputs, names, strict=True):
        output.name = name
    passes.NameFixPass()(model)


def _cancel_transposes(graph: Any) -> None:
    """Read the source where two Transposes in a row cancel out, though the first has other readers as well."""
    from onnx_ir import convenience

    for node in graph:
        first = node.inputs[0].producer() if node.op_type == "Transpose" else None
        if first is None or first.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        outer, inner = list(node.attributes["perm"].value), list(first.attributes["perm"].value)
        if [inner[axis] for axis in outer] == list(range(len(inner))):
            convenience.replace_all_uses_with(node.outputs[0], first.inputs[0])


def _rules() -> dict[str, list[Any]]:
    """Rewrite rules by the type of the node at which their pattern ends."""
    from onnxscript.rewriter.rules import common

    return {
        "Add": [common.add_0_rule],
        "BatchNormalization": [common.fuse_batchnorm_into_conv_rule, common.fuse_batchnorm_into_gemm_rule],
        "Cast": [common.no_op_cast_rule, common.cast_cast_rule],
        "Conv": [
            common.normalize_pad_format_conv_rule,
            common.fuse_pad_into_conv_rule,
            common.remove_optional_bias_from_conv_rule,
        ],
        "Div": [common.div_by_1_rule],
        "Dropout": [common.dropout_zero_rule, common.dropout_inference_rule],
        "Expand": [common.no_op_expand_rule],
        "Gemm": [common.remove_optional_bias_from_gemm_rule],
        "Mul": [common.mul_by_1_rule],
        "Relu": [common.successive_relu_rule, common.successive_clip_relu_rule],
        "Reshape": [
            common.materialize_reshape_shape_rule,
            common.reshape_reshape_rule,
            common.squeeze_reshape_1d_rule,
        ],
        "Slice": [common.collapse_slice_rule, common.collapse_slice2_rule],
        "Sub": [common.sub_0_rule],
        "Transpose": [common.no_op_transpose_rule, common.transpose_transpose_rule],
        "Unsqueeze": [common.unsqueeze_unsqueeze_rule],
    }
