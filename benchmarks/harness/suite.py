"""Benchmarks of whole networks: which ones, beside whose checkouts, and the run from there to the results."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitrail.catalog import SizeError, check_model_name, default_size
from vitrail.cli.terminal import Terminal, UsageError, at_least

from . import device, options
from .networks import NETWORKS
from .peers import PEERS, Checkout, PeerError, find_checkouts
from .report import Table, machine, publish

Measure = Callable[
    [Terminal, argparse.Namespace, dict[str, Checkout]], tuple[dict[str, Any], list[Table], bool]
]
"""Gives the document's rows, their tables, and whether all went well."""


def add_networks(parser: argparse.ArgumentParser, batches: str) -> None:
    """The options that say which networks are measured; `batches` names the usual batch sizes."""
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help=f"vitrail's models (default: {', '.join(NETWORKS)})"
    )
    parser.add_argument(
        "--batch", type=at_least(1), nargs="+", metavar="N", help=f"batch sizes (default: {batches})"
    )
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="a folder with checkouts of the authors' repositories"
    )
    parser.add_argument(
        "--min-rounds", type=at_least(1), default=7, metavar="N", help="(default: %(default)s)"
    )


def run(
    measure: Measure, args: argparse.Namespace, parser: argparse.ArgumentParser, stem: str, complete: bool
) -> int:
    """Measure, print, write; the exit status.

    Args:
        measure: does the work.
        args: with `models`, `batch` and `size` filled in.
        parser: says what is wrong with them.
        stem: of the usual file of results, which is written where nothing was left out (`complete`).
    """
    for name in args.models:
        try:
            check_model_name(name)
        except ValueError as error:
            parser.error(f"--models: {error}")
    args.min_seconds = args.min_seconds or 4.0
    output = options.output(args.output, stem, complete, parser)
    checkouts = _find_peers(args, parser)

    def job(terminal: Terminal) -> int:
        try:
            with options.TimeLimit(args.time_limit) as args.limit:
                results, tables, ok = measure(terminal, args, checkouts)
        except SizeError as error:
            raise UsageError(str(error)) from error
        peers = {
            checkout.peer.repository: {"folder": checkout.folder.name, "commit": checkout.commit}
            for checkout in checkouts.values()
        }
        document = {"benchmark": stem, **machine(), "peers": peers, **results}
        if args.device != "cpu":
            document["gpu"] = device.describe()
        if args.time_limit is not None:
            document["left_out"] = args.limit.left_out
        publish(terminal, document, tables, args.markdown, output)
        return 0 if ok else 1

    return options.run(job, args.json, args.threads, args.device)


def _find_peers(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Checkout]:
    """The checkouts for the models that are measured, each tried once, before the long work starts."""
    if args.peers is None:
        return {}
    try:
        found = find_checkouts(args.peers)
        for name in args.models:
            if name in found:
                found[name].build(name, args.size or default_size(name)[0])
    except PeerError as error:
        parser.error(f"--peers: {error}")
    for peer in PEERS:
        lacking = [name for name in args.models if name in peer.models and name not in found]
        if lacking:
            print(f"no checkout of {peer.repository} for {', '.join(lacking)}", file=sys.stderr)
    return {name: checkout for name, checkout in found.items() if name in args.models}
