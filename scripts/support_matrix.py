"""Tries what can be exported to what, and writes what came of it into docs/support.json, for docs/EXPORT.md.

    python scripts/support_matrix.py                              # every model, for an hour
    python scripts/support_matrix.py --pico                       # those that CI tries again, for minutes
    python scripts/support_matrix.py biformer_tiny --axes sides   # a part; the rest of the record stays

Each model is exported with nothing open (fixed), with an open batch, and with open height and width as well (sides), to
ONNX of standard and of fused operators, to 8 bits, and to engines, in every precision. What runs on a CPU is compared
with torch. Then `make docs` writes the tables.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.csrc.plugins import EMULATED_PLUGINS  # noqa: E402
from tests.export.cuttings import write_cuttings  # noqa: E402
from tests.export.support import AXES, MODELS, PICOS, RECORD, Trials  # noqa: E402
from vitrail.ops import library  # noqa: E402

PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "tensorrt_rtx")


@cache
def plugins() -> Path:
    """The library over emulated kernels, which TensorRT takes as it takes the one for GPUs."""
    return library.build(part=EMULATED_PLUGINS, progress=lambda *_: None)


def record(name: str, axes: str, outcomes: dict[str, str]) -> None:
    """Put outcomes of a model into the record; what else it holds stays."""
    known = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"models": {}}
    models = known["models"]
    kept = {cell: x for cell, x in models.get(name, {}).items() if cell.split("-")[0] != axes}
    models[name] = {**kept, **outcomes}
    ordered = {
        model: {cell: models[model][cell] for part in AXES for cell in models[model] if cell.startswith(f"{part}-")}
        for model in MODELS
        if model in models
    }  # fmt: skip
    content = {"versions": {package: version(package) for package in PACKAGES}, "models": ordered}
    RECORD.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Try and write, model by model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all")
    parser.add_argument("--pico", action="store_true", help="the smallest model of each family")
    parser.add_argument(
        "--axes", choices=tuple(AXES), action="append", help="only these open axes; repeatable (default: all)"
    )
    options = parser.parse_args()
    chosen = options.models or (PICOS if options.pico else MODELS)
    if unknown := sorted(set(chosen) - set(MODELS)):
        parser.error(f"{', '.join(unknown)} is not among {', '.join(MODELS)}")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            photos = write_cuttings(Path(folder) / "photos", 48 if name in PICOS else 224)
            trials = Trials(name, Path(folder), photos, plugins)
            for axes in options.axes or AXES:
                outcomes: dict[str, str] = {}
                for cell, outcome in trials.all(axes):
                    outcomes[str(cell)] = str(outcome)
                    print(f"{time.strftime('%X')} {name} {cell}: {outcome}", flush=True)
                if outcomes:
                    record(name, axes, outcomes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
