"""Reports for the terminal, by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .onnx import ExportReport
    from .quantise import QuantizationReport
    from .verify import VerificationReport


def report_table(report: ExportReport) -> Any:
    """The file, its operators, its verification, one under the other."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    graph = report.graph
    facts = Table(title=f"{report.model} as ONNX", show_header=False, title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("file", f"{report.path}, {report.size_bytes / 1e6:.1f} MB")
    facts.add_row(
        "operators", f"opset {graph.opset}, {graph.nodes} nodes, {graph.weights / 1e6:.2f} M weights"
    )
    facts.add_row("", ", ".join(f"{name} {count}" for name, count in graph.operators.items()))
    facts.add_row("input", "\n".join(map(str, graph.inputs)))
    facts.add_row("output", "\n".join(map(str, graph.outputs)))
    facts.add_row(
        "dynamic", ", ".join(f"{axis}: {rule}" for axis, rule in report.dynamic.items()) or "nothing"
    )
    facts.add_row("seconds", ", ".join(f"{step} {took:.1f}" for step, took in report.seconds.items()))
    for note in report.notes:
        facts.add_row("note", note)
    checks: Any = checks_table(report.verification) if report.verification else Text("not verified")
    return Group(facts, checks)


def checks_table(report: VerificationReport) -> Any:
    """A row for each comparison."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{report.runtime} against torch (atol {report.atol:g}, rtol {report.rtol:g} of the largest value)",
        title_justify="left",
    )
    for name in ("input", "shape", "output"):
        table.add_column(name)
    for name in ("max error", "mean error", "relative", "cosine", "same top-1", "verdict"):
        table.add_column(name, justify="right")
    for row in report.checks:
        table.add_row(
            row.source,
            "x".join(map(str, row.shape)),
            row.output,
            f"{row.max_error:.2g}",
            f"{row.mean_error:.2g}",
            f"{row.max_relative:.2g}",
            f"{row.cosine:.6f}",
            "" if row.top1 is None else f"{row.top1} of {row.images}",
            Text("passed", "green") if row.passed else Text(row.failure, "red"),
        )
    return Group(table, *(Text(f"note: {note}", "yellow") for note in report.notes))


_SHOWN = 15
"""Layers in 8 bits whose errors are shown: the most sensitive ones."""


def quantization_table(report: QuantizationReport) -> Any:
    """The file in 8 bits, its layers by their error, its verification."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    excluded = report.excluded
    settings = report.settings
    facts = Table(title=f"{report.model} in 8 bits", show_header=False, title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    smaller = f"{report.size_bytes / 1e6:.1f} MB, {report.float_bytes / report.size_bytes:.1f}x smaller"
    facts.add_row("file", f"{report.path}, {smaller}")
    facts.add_row("weights", settings["weights"])
    facts.add_row(
        "activations", f"{settings['activations']}, {settings['calibration']} of {settings['images']} images"
    )
    verdicts = [layer.verdict.removeprefix("float32: ") for layer in excluded]
    why = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    facts.add_row(
        "layers", f"{len(report.layers) - len(excluded)} in 8 bits{f'; in float32: {why}' if why else ''}"
    )
    facts.add_row(
        "error", f"{report.result.error:.3g} (all that are faster together: {report.everything.error:.3g})"
    )
    facts.add_row("seconds", ", ".join(f"{step} {took:.1f}" for step, took in report.seconds.items()))

    layers = Table(title="where the error comes from, by layer", title_justify="left")
    for name in ("layer", "operator"):
        layers.add_column(name, overflow="fold")
    for name in ("own error", "with all below", "faster", "error without it"):
        layers.add_column(name, justify="right")
    layers.add_column("made")
    measured = [layer for layer in report.layers if layer.error is not None]
    shown = [layer for layer in report.layers if not layer.quantised or layer in measured[:_SHOWN]]
    for layer in shown:
        figures = (layer.error, layer.together, layer.speedup, layer.after)
        cells = ["" if value is None else f"{value:.2g}" for value in figures]
        cells[2] += "x" if cells[2] else ""
        verdict = Text(layer.verdict, "green" if layer.quantised else "yellow")
        layers.add_row(layer.module or layer.name, layer.operator, *cells, verdict)
    if len(shown) < len(report.layers):
        layers.caption = f"and {len(report.layers) - len(shown)} more in 8 bits; --json lists them"
    return Group(facts, layers, _agreement_table(report))


def _agreement_table(report: QuantizationReport) -> Any:
    from rich.table import Table
    from rich.text import Text

    if not report.checks:
        return Text("not verified")
    table = Table(title=f"against {report.checks[0].against}", title_justify="left")
    table.add_column("images")
    for name in ("at a time", "error", "cosine", "same top-1", "verdict"):
        table.add_column(name, justify="right")
    for row in report.checks:
        top1 = "" if row.agreement.top1 is None else f"{row.agreement.top1:.1%}"
        table.add_row(
            f"{row.images}, {'not' if row.held_out else 'also'} calibrated with",
            str(row.batch),
            f"{row.agreement.error:.3g}",
            f"{row.agreement.cosine:.5f}",
            top1,
            Text(row.failure, "red") if row.failure else Text("passed", "green"),
        )
    return table
