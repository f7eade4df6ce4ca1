"""Counts the nodes of exported files, for the test that keeps them from growing.

    python scripts/count_nodes.py [MODEL ...]

Each model (default: all) is exported as `vitrail export onnx` does it, in float32 with a dynamic batch and without
verification, and its count goes into tests/export/node_counts.json. A model takes some ten seconds to a minute; the
counts of the others stay, so that the work can be shared out.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import timm
import torch

from vitrail.export import to_onnx
from vitrail.zoo import list_families
from vitrail.zoo.inference import standard_form

COUNTS = Path(__file__).resolve().parents[1] / "tests" / "export" / "node_counts.json"


def count(name: str) -> int:
    """Nodes in the file of a model with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with tempfile.TemporaryDirectory() as folder:
        report = to_onnx(model, Path(folder) / "m.onnx", verify=False, rewrite=standard_form)
    return report.graph.nodes


def main() -> int:
    """Count and write, model by model."""
    models = sorted(name for names in list_families().values() for name in names)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all")
    chosen = parser.parse_args().models or models
    if unknown := sorted(set(chosen) - set(models)):
        parser.error(f"no such model: {', '.join(unknown)}")
    for name in chosen:
        nodes = count(name)
        print(f"{name} {nodes}", flush=True)
        counts = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
        counts[name] = nodes
        COUNTS.write_text(json.dumps(dict(sorted(counts.items())), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
