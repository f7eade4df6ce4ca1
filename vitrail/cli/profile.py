"""`vitrail profile`: parameters and multiply-accumulates, beside the paper's."""

import argparse
from typing import TYPE_CHECKING, Any

from .terminal import (
    Terminal,
    add_image_size,
    add_model,
    at_least,
    millions,
    size_text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..profiling import ProfileReport

_EXAMPLES = """\
examples:
  vitrail profile biformer_small
  vitrail profile biformer_tiny --img-size 256x192
  vitrail profile swin_tiny_patch4_window7_224 --json     # any model of timm's
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "profile",
        parents=[common],
        help="count parameters and multiply-accumulates, beside the paper's",
        description="Count parameters and multiply-accumulates (MACs), stage by stage, with fvcore and with\n"
        "torch.utils.flop_counter, on both paths of the operators. Fails (exit code 1) where the two counters\n"
        "disagree by more than 0.1% or a figure of the paper is missed by more than 2%.",
        epilog=_EXAMPLES,
    )
    add_model(parser)
    add_image_size(parser)
    parser.add_argument(
        "--batch", type=at_least(1), default=1, metavar="N", help="images in the batch (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Print the report."""
    from ..profiling import profile

    report = profile(args.model, args.img_size, args.batch)
    terminal.result(report.to_dict(), *render(report, terminal))
    for failure in report.failures:
        terminal.warn(failure)
    return 0 if report.ok else 1


def render(report: "ProfileReport", terminal: Terminal) -> "list[RenderableType]":
    """The report as tables."""
    size = size_text(report.img_size)
    batch = "1 image" if report.batch == 1 else f"{report.batch} images"
    in_all = "" if report.batch == 1 else f", {report.paths[0].fvcore / 1e9:.3f} G in all, as below"
    facts = [
        ("parameters", f"{millions(report.parameters)} M"),
        ("MACs", f"{report.macs / 1e9:.3f} G per image{in_all}"),
    ]
    for c in report.comparisons:
        verdict = "as published" if c.ok else "NOT as published"
        if c.repeated:
            verdict += f" but for {c.repeated:g} on copies of tokens"
        facts.append((c.figure, f"{c.ours:.2f}, paper {c.paper:g}: {c.deviation:+.1%}, {verdict}"))
    if report.attention:
        cost = report.attention
        paper = "" if cost.claimed is None else f"; claimed {cost.claimed[0]:.0%} to {cost.claimed[1]:.0%}"
        facts.append(
            (
                "self-attention",
                f"{cost.ours / 1e9:.3f} GMAC, {cost.reduction:.0%} below the {cost.dense / 1e9:.3f} of dense{paper}",
            )
        )
    if report.published:
        facts.append(("paper", f"{report.published.paper}, {report.published.venue}, {report.published.url}"))

    parts: list[RenderableType] = [terminal.facts(facts, f"{report.model} at {size}, {batch}"), ""]
    parts.append(
        terminal.table(
            ["operators", "fvcore GMAC", "torch GMAC", "difference"],
            [
                [path.path, f"{path.fvcore / 1e9:.3f}", f"{path.torch / 1e9:.3f}", f"{path.difference:.3%}"]
                for path in report.paths
            ],
            numbers=["fvcore GMAC", "torch GMAC", "difference"],
        )
    )
    parts.append(
        terminal.table(
            ["stage", "output", "channels", "params (M)", "GMAC", "share"],
            [
                [
                    stage.name,
                    size_text(stage.resolution),
                    str(stage.channels or ""),
                    millions(stage.parameters, 3),
                    f"{stage.macs / 1e9:.3f}",
                    f"{stage.share:.1%}",
                ]
                for stage in report.stages
            ],
            numbers=["output", "channels", "params (M)", "GMAC", "share"],
        )
    )
    uncounted = {op: calls for path in report.paths for op, calls in path.uncounted.items()}
    if uncounted:
        listed = ", ".join(f"{op} ({calls}x)" for op, calls in uncounted.items())
        parts.append(f"Not counted, and perhaps not free: {listed}")
    return parts
