"""Tables of a GPU's results, and that no file of results is left out."""

import json
from pathlib import Path

import performance_docs
import pytest

ABOUT = {
    "date": "2030-01-02T03:04:05+00:00",
    "versions": {"torch": "2.99", "timm": "1.1", "vitrail": "0.1"},
    "gpu": {"name": "NVIDIA H200", "driver": "999.1", "torch_cuda": "13.0"},
}


def candidate(seconds, graph):
    return {"seconds": seconds, "graph_seconds": graph}


def operator(graph=2e-3, **more):
    return {
        "operator": "window_attention", "setting": "stage 1", "kind": "forward", "batch": 64, "dtype": "bfloat16",
        "compiled": True, "roofline": 0.42, "bound": "memory", "missing": {},
        "candidates": {
            "fused": candidate(3e-3, graph), "reference": candidate(9e-3, 8e-3), "SDPA": candidate(4e-3, 3e-3),
            "slow": candidate(5e-3, 6e-3),
        },
        **more,
    }  # fmt: skip


def model(name, seconds, amp=True):
    return {
        "model": "biformer_small", "kind": "training", "size": 224, "batch": 128, "dtype": "float32", "amp": amp,
        "candidate": name, "seconds": seconds, "peak_bytes": 3 * 2**30,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A function that writes a file of results into a folder that holds no other."""
    monkeypatch.setattr(performance_docs, "RESULTS", tmp_path)
    monkeypatch.setattr(performance_docs, "_shown", set())

    def write(name, **document):
        command = document.pop("command", ["operators.py"])
        (tmp_path / f"{name}.json").write_text(json.dumps({**ABOUT, "command": command, **document}))

    return write


def test_without_a_gpus_results_the_page_says_so(results):
    assert performance_docs.gpu().startswith("No GPU has run any of this yet")
    page = Path(performance_docs.ROOT, "docs", "PERFORMANCE.md").read_text()
    if not list((performance_docs.ROOT / "benchmarks" / "results").glob("gpu_*.json")):
        assert performance_docs.gpu() in page


def test_files_stand_beside_torch_and_the_peers_files(results):
    assert performance_docs.runtimes().startswith("No complete run is kept yet")
    seconds = {
        "ONNX Runtime": 0.02, "ONNX Runtime, kernels": 0.016, "ONNX Runtime, int8": 0.01, "ONNX Runtime, kernels, int8": 0.008,
        "authors, ONNX Runtime": 0.05, "fused": 0.03, "inference form": 0.015,
    }  # fmt: skip
    rows = [
        {"model": "biformer_tiny", "batch": 1, "candidate": name, "seconds": found, "iqr_seconds": 0.001}
        for name, found in seconds.items()
    ]
    machine = {"threads": 2, "cores": 2, "cpu": "a processor"}
    results("runtimes_cpu", command=["runtimes.py"], rows=rows, machine=machine, instruction_set="avx2")
    row = performance_docs.runtimes().splitlines()[-1]
    assert (
        row
        == "| `biformer_tiny` | 1 | 20.0 | 5% | 0.80x | 0.50x | 0.40x | 2.50x | \N{EN DASH} | 1.50x | 0.75x |"
    )


def test_a_check_has_its_phases_and_figures(results):
    counts = {"passed": 10, "failed": 1, "skipped": 2}
    figures = {
        "benchmark": "operators",
        "command": ["operators.py", "--device", "cuda"],
        "rows": [operator(), operator(None, setting="stage 2", missing={"flex": "did not | compile"})],
        "left_out": ["strip_mix, stage 1"],
    }
    models = {
        "benchmark": "training_cuda_amp",
        "command": ["models.py", "--amp"],
        "rows": [model("fused", 0.1), model("reference", 0.25)],
        "failed": {"davit_fused_tiny": {"all": "out of memory"}},
    }
    phases = [
        {"name": "build", "outcome": "passed", "reason": "", "found": "said"},
        {"name": "tests", "outcome": "failed", "reason": "first\nsecond", "found": {"counts": counts}},
        {"name": "figures", "outcome": "passed", "reason": "", "found": figures},
        {"name": "models", "outcome": "failed", "reason": "x", "found": models},
        {"name": "more", "outcome": "left out", "reason": "no time", "found": None},
    ]
    results(
        "gpu_h200",
        benchmark="gpu_check",
        command=["gpu_check.sh"],
        commit="0123456789abcdef",
        changed=False,
        phases=phases,
    )
    text = performance_docs.gpu()
    flat = " ".join(text.split())
    assert (
        "`scripts/gpu_check.sh` (`benchmarks/results/gpu_h200.json`): NVIDIA H200, driver 999.1, CUDA 13.0"
        in flat
    )
    assert "commit 0123456789ab; 2030-01-02." in flat
    assert "| tests | failed: first | 10 | 1 | 2 |" in text
    assert "| more | left out: no time | \N{EN DASH} | \N{EN DASH} | \N{EN DASH} |" in text
    assert (
        "| `window_attention` | stage 1 | forward | 64 | bfloat16 | 3.00 | 2.00 | 42% | memory | 4.00x | 1.50x, SDPA |"
        in text
    )
    assert "| 3.00 | \N{EN DASH} | 42% | memory | 3.00x | 1.33x, SDPA |" in text
    assert "- window_attention, stage 2, forward, flex: did not | compile" in text
    assert "There was no time for strip_mix, stage 1." in text
    assert (
        "| `biformer_small` | training | reference | autocast to bfloat16 | 224 | 128 | 250 | 2.50x | 3072 |"
        in text
    )
    assert "- davit_fused_tiny, all: out of memory" in text


def test_results_of_one_benchmark_stand_there_too(results):
    results("operators_cuda_bfloat16", benchmark="operators", rows=[operator(compiled=False)])
    text = performance_docs.gpu()
    assert "`benchmarks/operators.py` (`benchmarks/results/operators_cuda_bfloat16.json`)" in " ".join(
        text.split()
    )
    assert "| `window_attention`* |" in text
    performance_docs._check_all_are_shown()


def test_a_file_that_no_table_shows_is_named(results):
    results("gpu_h200", benchmark="operators", rows=[])
    results("forgotten")
    assert "There are no rows." in performance_docs.gpu()
    with pytest.raises(ValueError, match="no table shows forgotten of"):
        performance_docs._check_all_are_shown()
