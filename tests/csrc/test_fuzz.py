"""Random and spoiled arguments: the compiled operators answer or raise. `make fuzz` makes a million calls."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz_operators.py"


def test_no_arguments_crash_an_operator():
    command = [sys.executable, str(SCRIPT), "--calls", "12000", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    counts = json.loads(run.stdout)["operators"]
    assert len(counts) >= 4
    for name, count in counts.items():
        assert count["answered"] > 100, name  # valid arguments come by, too
        assert count["refused"] > 100, name
