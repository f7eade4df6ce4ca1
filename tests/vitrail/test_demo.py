import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrail.catalog import create_model
from vitrail.demo import measure_speed
from vitrail.ops import library, use_ops

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("demo")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as a user runs it: once, in an empty folder."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "vitrail", "demo", "--json"]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)


def test_the_demo_succeeds_and_prints_one_document(demo):
    _, done = demo
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    assert "[6/6] exporting to ONNX and verifying" in done.stderr


def test_it_leaves_a_picture_a_model_and_a_report(demo):
    folder, done = demo
    files = json.loads(done.stdout)["files"]
    assert sorted(p.name for p in (folder / "demo").iterdir()) == [
        "biformer_tiny.onnx",
        "picture.png",
        "report.json",
    ]
    assert json.loads((folder / files["report"]).read_text()) == json.loads(done.stdout)
    with Image.open(folder / files["picture"]) as picture:
        assert picture.format == "PNG"


def test_it_says_that_the_weights_are_random(demo):
    document = json.loads(demo[1].stdout)
    assert document["random_weights"] is True
    assert document["weights"] == "random, seed 0"


def test_it_shows_the_pyramid_the_routes_the_cost_and_the_verification(demo):
    document = json.loads(demo[1].stdout)
    assert document["features"] == [[1, 64, 56, 56], [1, 128, 28, 28], [1, 256, 14, 14], [1, 512, 7, 7]]
    routed = [view for view in document["views"] if view["operator"] == "routed_attention"]
    assert [len(view["seen"]) for view in routed] == [1, 1, 4, 4, *8 * [16]]
    assert all(
        view["asking"] == [0.4286, 0.4286, 0.5714, 0.5714] for view in routed
    )  # the middle one of 7 x 7
    assert document["profile"]["ok"] is True
    assert document["export"]["verification"]["checks"]
    assert Path(document["photo"]).name == "china.jpg"


def test_it_compares_fused_and_reference_where_operators_are_compiled(demo):
    speed = json.loads(demo[1].stdout)["speed"]
    assert speed["rounds"] >= 3
    assert speed["fused_ms"] > 0, speed["reason"]
    assert speed["ratio"] == pytest.approx(speed["reference_ms"] / speed["fused_ms"])
    assert speed["max_difference"] < 1e-3


def test_speed_without_compiled_operators_says_why():
    with use_ops("reference"):
        speed = measure_speed(create_model("biformer_tiny"), torch.zeros(1, 3, 64, 64), seconds=0)
    assert speed.ratio is None
    assert speed.reference_ms > 0
    assert speed.rounds == 3
    assert speed.reason == "VITRAIL_OPS=reference"
    assert library.mode() == "auto"
