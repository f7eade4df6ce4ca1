"""Run in the place of `export/builder.py`: the same process, requests and writing, but no TensorRT, and zeros as engine."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("builder", Path(__file__).parents[2] / "export" / "builder.py")
builder = module_from_spec(spec)
spec.loader.exec_module(builder)


def build(request):
    builder.write(request["engine"], memoryview(bytes(200_000)), request["target"])
    return {
        "seconds": 0.0,
        "network_layers": 2,
        "plugins": [],
        "warnings": [],
        "lines": [],
        "inspected": {"layers": ["conv"], "activation": 0},
    }


builder.describe = lambda request: {"version": "0", "archs": ["SM89"]}
builder.build = build
sys.exit(builder.main())
