"""`vitrail models`: what there is."""

import argparse
from typing import TYPE_CHECKING, Any

from .terminal import Terminal, UsageError, billions, millions, size_text

if TYPE_CHECKING:
    from ..catalog import ModelRow

_EXAMPLES = """\
examples:
  vitrail models
  vitrail models tiny
  vitrail models 'biformer_*' --json
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "models",
        parents=[common],
        help="list the models: size, cost, weights",
        description="List vitrail's models with parameters and multiply-accumulates at their default size.\n"
        "Nothing is allocated or downloaded. `top-1` is ImageNet-1K accuracy as published, not measured here.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "filter", metavar="FILTER", nargs="?", help="only names that contain this, or match it with * and ?"
    )
    parser.set_defaults(run=run)


def _weights(row: "ModelRow") -> str:
    """Where weights come from, in a few words."""
    if row.weights_url and row.weights.startswith("pretrained=True, "):
        return row.weights.removeprefix("pretrained=True, ")
    if row.weights == "none published":
        return "none, to be trained"
    return "see docs/WEIGHTS.md"


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Print the table."""
    from ..catalog import describe, model_names

    names = model_names(args.filter)
    if not names:
        raise UsageError(f"no model matches '{args.filter}'; `vitrail models` lists them all")
    rows = []
    with terminal.steps(len(names)) as steps:
        for name in names:
            steps.step(name)
            rows.append(describe(name))
    rows.sort(key=lambda row: (row.family, row.macs, row.name))
    document = {
        "models": [
            {
                "name": row.name,
                "family": row.family,
                "parameters": row.parameters,
                "macs": row.macs,
                "img_size": list(row.img_size),
                "top1": row.published.top1 if row.published else None,
                "weights": row.weights,
                "weights_url": row.weights_url,
                "paper": row.published.url if row.published else None,
            }
            for row in rows
        ]
    }
    table = terminal.table(
        ["name", "family", "params (M)", "GMAC", "size", "top-1", "weights"],
        [
            [
                row.name,
                row.family,
                millions(row.parameters),
                billions(row.macs),
                size_text(row.img_size),
                f"{row.published.top1}" if row.published and row.published.top1 else "",
                _weights(row),
            ]
            for row in rows
        ],
        numbers=["params (M)", "GMAC", "size", "top-1"],
    )
    terminal.result(document, table)
    return 0
