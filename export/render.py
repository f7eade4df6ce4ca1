"""Reports for the terminal, by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine_report import EngineReport
    from .measure import VerificationReport
    from .onnx import ExportReport
    from .quantise import QuantizationReport
    from .trace import Trace


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


def engine_table(report: EngineReport) -> Any:
    """The engine, what is in it, its times and its verification, one under the other."""
    from rich.console import Group
    from rich.table import Table

    facts = Table(title=f"{report.model} as a TensorRT engine", show_header=False, title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row(
        "file", f"{report.path}, {report.size_bytes / 1e6:.1f} MB; what is in it: {report.path}.json"
    )
    facts.add_row("library", f"{report.library}, for {', '.join(report.archs)}; {report.dtype}")
    for name, shapes in report.profile.items():
        least, best, largest = ("x".join(map(str, shape)) for shape in shapes)
        span = least if least == largest else f"{least} to {largest}, best at {best}"
        facts.add_row("input", f"{name} {span}")
    facts.add_row("output", "\n".join(map(str, report.outputs)))
    kinds = ", ".join(f"{kind} {count}" for kind, count in report.kernel_types.items())
    facts.add_row(
        "kernels", f"{sum(report.kernel_types.values())} from {report.network_layers} layers: {kinds}"
    )
    facts.add_row("attention", f"{len(report.fused_attentions)} of {report.attentions} fused into one kernel")
    if report.plugins:
        facts.add_row("plugins", f"{len(report.plugins)} layers")
    for what, size in (("activations", report.activation_bytes), ("weights", report.weights_bytes)):
        if size is not None:
            facts.add_row(what, f"{size / 1e6:.1f} MB on the GPU")
    facts.add_row("seconds", ", ".join(f"{step} {took:.1f}" for step, took in report.seconds.items()))
    for timing in report.timings:
        facts.add_row(
            "time",
            f"{'x'.join(map(str, timing.shape))}: {timing.median_ms:.3f} ms "
            f"({timing.p10_ms:.3f} to {timing.p90_ms:.3f}), {timing.images_per_second:.0f} images/s",
        )
    for note in report.notes:
        facts.add_row("note", note)
    return Group(facts, *([checks_table(report.verification)] if report.verification else []))


def checks_table(report: VerificationReport) -> Any:
    """A row for each comparison."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{report.title} (atol {report.atol:g}, rtol {report.rtol:g} of the largest value)",
        title_justify="left",
    )
    for name in ("input", "shape", "output"):
        table.add_column(name)
    for name in ("max error", "mean error", "99%", "relative", "cosine", "same top-1", "top-5", "verdict"):
        table.add_column(name, justify="right")
    for row in report.checks:
        table.add_row(
            row.source,
            "x".join(map(str, row.shape)),
            row.output,
            f"{row.max_error:.2g}",
            f"{row.mean_error:.2g}",
            f"{row.percentiles[2]:.2g}" if row.percentiles else "",
            f"{row.max_relative:.2g}",
            f"{row.cosine:.6f}",
            "" if row.top1 is None else f"{row.top1} of {row.images}",
            "" if row.top5 is None else f"{row.top5}",
            Text("passed", "green") if row.passed else Text(row.failure.partition(" (")[0], "red"),
        )
    lines = [Text(problem, "red") for problem in report.problems]
    lines += [Text(f"note: {note}", "yellow") for note in report.notes]
    return Group(table, *lines, *(trace_parts(report.trace) if report.trace else []))


def trace_parts(trace: Trace) -> list[Any]:
    """How the error grows on the way, and what was found."""
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(line, "bold") for line in trace.explain()]
    if trace.between:
        shown = ", ".join(trace.between[:6]) + (
            f", and {len(trace.between) - 6} more" if len(trace.between) > 6 else ""
        )
        parts.append(Text(f"between them, without a counterpart: {shown}"))
    if not trace.places:
        return parts
    table = Table(
        title=f"error on the way, {trace.source}, values matched {trace.how}: "
        f"{len(trace.growth())} of {len(trace.places)} places",
        title_justify="left",
    )
    table.add_column("value", overflow="fold")
    table.add_column("compared with", overflow="fold")
    table.add_column("shape")
    for name in ("max error", "relative", "cosine"):
        table.add_column(name, justify="right")
    for place in trace.growth():
        style = "" if place.agrees else ("bold red" if place == trace.first else "red")
        table.add_row(
            Text(place.b, style),
            Text("" if place.a == place.b else str(place.a), style),
            "x".join(map(str, place.shape)),
            f"{place.max_error:.2g}",
            f"{place.max_relative:.2g}",
            f"{place.cosine:.6f}",
        )
    return [*parts, table]


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
    more = {
        "no faster": f" (less than {settings['least_speedup']}x)",
        "sensitive": f" (to stay within {settings['max_error']:g})",
    }
    why = ", ".join(f"{verdicts.count(v)} {v}{more.get(v, '')}" for v in dict.fromkeys(verdicts))
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
    for name in ("size", "at a time", "error", "cosine", "same top-1", "verdict"):
        table.add_column(name, justify="right")
    for row in report.checks:
        top1 = "" if row.agreement.top1 is None else f"{row.agreement.top1:.1%}"
        table.add_row(
            f"{row.images}, {'not' if row.held_out else 'also'} calibrated with",
            "x".join(map(str, row.size)),
            str(row.batch),
            f"{row.agreement.error:.3g}",
            f"{row.agreement.cosine:.5f}",
            top1,
            Text(row.failure, "red") if row.failure else Text("passed", "green"),
        )
    return table
