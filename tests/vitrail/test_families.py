"""The commands on a small model of every family."""

import json
from pathlib import Path

import pytest
import torch

from vitrail.catalog import create_model
from vitrail.zoo import list_families

PICOS = [name for names in list_families().values() for name in names if name.endswith("_pico")]
FAMILIES = {
    family: next(name for name in names if name in PICOS) for family, names in list_families().items()
}


@pytest.mark.parametrize("name", PICOS)
def test_a_converted_file_loads_and_is_what_was_converted(cli, name, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    result = cli("convert", name, tmp_path / "weights.pth", tmp_path / "out.safetensors", "--json")
    assert result.code == 0, result.err
    assert result.document["num_classes"] == 10
    again = create_model(name, num_classes=10, checkpoint=str(tmp_path / "out.safetensors"))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", PICOS)
def test_both_counters_agree_on_every_operator(cli, name):
    result = cli("profile", name, "--json")
    assert result.code == 0, result.err
    assert {path["path"] for path in result.document["paths"]} <= {"fused", "reference", "standard"}
    assert all(path["uncounted"] == {} for path in result.document["paths"])


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)
def test_the_demo_shows_the_family_at_work(cli, name, tmp_path):
    result = cli("demo", "--model", name, "--output", tmp_path / "demo", "--json")
    assert result.code == 0, result.err
    document = result.document
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert written == {"picture.png", "report.json", f"{name}.onnx"}
    assert json.loads(Path(document["files"]["report"]).read_text()) == document
    assert document["views"]
    assert document["features"]
    assert document["export"]["verification"]["checks"]
    speed = document["speed"]
    assert (speed["fused_ms"] is None) == (speed["reason"] is not None)
