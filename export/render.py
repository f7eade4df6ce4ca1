"""Reports for the terminal, by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine_report import EngineReport
    from .measure import VerificationReport
    from .onnx import ExportReport
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
