"""`benchmarks/runtimes.py`: files in ONNX Runtime beside torch."""

import json

import pytest

from ..csrc.runtime_kernels import portable_kernels

PICO = (
    "--models",
    "davit_fused_pico",
    "--batch",
    2,
    "--min-seconds",
    0.01,
    "--min-rounds",
    2,
    "--threads",
    1,
)


def test_files_in_float32_and_8_bits_run_beside_torch(run, runtimes, tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_ONNXRUNTIME_LIBRARY", str(portable_kernels()))
    target = tmp_path / "runtimes.json"
    result = run(runtimes, *PICO, "--output", target)
    assert result.code == 0, result.err
    document = json.loads(target.read_text())
    rows = {row["candidate"]: row for row in document["rows"]}
    plain, int8 = (
        {"ONNX Runtime", "ONNX Runtime, kernels"},
        {"ONNX Runtime, int8", "ONNX Runtime, kernels, int8"},
    )
    assert set(rows) == {"inference form", "fused", *plain, *int8}
    for row in rows.values():
        assert (row["model"], row["size"], row["batch"]) == ("davit_fused_pico", 32, 2)
        assert row["seconds"] > 0
        assert row["efficiency"] > 0
    assert rows["ONNX Runtime"]["as_long_as"]["ONNX Runtime"] == 1
    assert all(rows[name]["error"] < 1e-4 for name in plain)
    assert all(1e-4 < rows[name]["error"] < 0.2 for name in int8)
    quantised = document["quantisation"]["davit_fused_pico"]
    assert set(quantised) == int8
    for report in quantised.values():
        assert report["images"] == 48
        assert set(report["float32"].values()) <= {"float32: no faster", "float32: sensitive"}
    assert "ONNX Runtime, int8" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "biformer_tinny"], "no model is called 'biformer_tinny'"),
        (["--dtype", "bfloat16"], "measured on the CPU in float32"),
        (["--calibration", "no/such"], "--calibration: no such image or folder: no/such"),
        (["--calibration", ".", "--no-int8"], "leave --no-int8 out"),
        (["--peers", "no/such"], "--peers: there is no folder 'no/such'"),
    ],
)
def test_wrong_use_is_explained(run, runtimes, arguments, message):
    result = run(runtimes, *arguments)
    assert result.code == 2
    assert message in result.err
