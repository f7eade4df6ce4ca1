"""Files that take pixels: uint8, channels last, normalised in the graph."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from vitrail.export import Preprocessing, VerificationError, to_onnx

PREPARE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def stem(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 4, **kwargs), nn.GELU())


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("bias", [True, False])
def test_a_first_convolution_without_padding_takes_the_normalisation_into_its_weights(tmp_path, bias):
    report = to_onnx(
        stem(bias=bias), tmp_path / "m.onnx", img_size=16, preprocess=True, preprocessing=PREPARE
    )
    assert operators(tmp_path / "m.onnx") == ["Cast", "Transpose", "Conv", "Gelu"]
    assert [str(value) for value in report.inputs] == ["input uint8 (batch, 16, 16, 3)"]
    assert (report.metadata["input_layout"], report.metadata["normalisation"]) == ("uint8 NHWC", "folded")
    assert max(check.max_relative for check in report.verification.checks) < 1e-5


def test_a_padded_one_gets_one_product_and_one_sum_before_it(tmp_path):
    report = to_onnx(
        stem(padding=1), tmp_path / "m.onnx", img_size=16, preprocess=True, preprocessing=PREPARE
    )
    assert operators(tmp_path / "m.onnx") == ["Cast", "Mul", "Add", "Transpose", "Conv", "Gelu"]
    assert report.metadata["normalisation"] == "nodes"


def test_weights_that_are_read_twice_are_left_alone(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    report = to_onnx(Twice(), tmp_path / "m.onnx", img_size=16, preprocess=True)
    assert report.metadata["normalisation"] == "nodes"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pixels_are_cast_to_the_half_type_at_once(tmp_path, dtype):
    to_onnx(stem(), tmp_path / "m.onnx", img_size=16, preprocess=True, dtype=dtype)
    assert operators(tmp_path / "m.onnx") == ["Cast", "Transpose", "Conv", "Gelu", "Cast"]


def test_batch_and_sides_can_stay_open(tmp_path):
    model = stem(padding=1)
    report = to_onnx(
        model, tmp_path / "m.onnx", img_size=16, preprocess=True, dynamic=("batch", "height", "width")
    )
    assert report.inputs[0].shape == ("batch", "height", "width", 3)
    assert {check.shape for check in report.verification.checks} == {
        (1, 3, 16, 16),
        (3, 3, 16, 16),
        (3, 3, 53, 3),
    }
    pixels = torch.randint(0, 256, (2, 20, 33, 3), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(Preprocessing().normalise(pixels.permute(0, 3, 1, 2)))
    np.testing.assert_allclose(
        session.run(None, {"input": pixels.numpy()})[0], expected, rtol=1e-4, atol=1e-5
    )


def test_a_graph_that_reads_its_images_shape_still_gets_it_right(make, tmp_path):
    report = to_onnx(make("Windowed"), tmp_path / "m.onnx", img_size=24, preprocess=True)
    assert report.verification.passed


def test_one_channel_is_taken_too(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 4))
    report = to_onnx(
        model, tmp_path / "m.onnx", img_size=16, preprocess=True, preprocessing={"mean": 0.5, "std": 0.5}
    )
    assert report.inputs[0].shape == ("batch", 16, 16, 1)


def test_a_wrong_normalisation_is_caught(tmp_path, monkeypatch):
    from vitrail.export import pixels

    take = pixels.take_pixels
    wrong = Preprocessing(mean=(0.4, 0.5, 0.3), std=(0.2, 0.25, 0.3))
    monkeypatch.setattr("vitrail.export.onnx.take_pixels", lambda model, _: take(model, wrong))
    with pytest.raises(VerificationError, match="max error"):
        to_onnx(stem(), tmp_path / "m.onnx", img_size=16, preprocess=True, preprocessing=PREPARE)
    assert not list(tmp_path.iterdir())
