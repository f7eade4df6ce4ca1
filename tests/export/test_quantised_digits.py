"""What 8 bits cost in accuracy: networks that have learnt digits keep their first classes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.export import quantize_onnx, to_onnx
from vitrail.export.sensitivity import outputs
from vitrail.zoo import list_families
from vitrail.zoo.inference import standard_form

from ..digits import digits, train

PICOS = [name for names in list_families().values() for name in names if name.endswith("_pico")]
PREPROCESSING = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory):
    """A folder of 160 digits of those that the networks learn from."""
    images, _, held_out = data
    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(images[held_out : held_out + 160]):
        pixels = (image.permute(1, 2, 0) + 1) * 127.5
        Image.fromarray(pixels.round().numpy().astype(np.uint8)).save(folder / f"{i:03}.png")
    return folder


def accuracies(name, data, photos, folder, **options):
    """Top-1 of the files in float32 and in 8 bits on the digits held out, and the report."""
    images, labels, held_out = data
    model, _ = train(name, data, **options)
    model.eval()
    plain, made = folder / "float32.onnx", folder / "int8.onnx"
    to_onnx(model, plain, rewrite=standard_form, verify=False, preprocessing=PREPROCESSING)
    report = quantize_onnx(plain, made, calibration=photos, model=model, faster_only=False)
    found = [
        outputs(Path(path).read_bytes(), images[:held_out].numpy())["logits"].argmax(1)
        for path in (plain, made)
    ]
    return [(classes == labels[:held_out].numpy()).mean() for classes in found], report


@pytest.mark.long
def test_a_network_in_8_bits_keeps_what_it_has_learnt(data, photos, tmp_path):
    (plain, made), report = accuracies("biformer_pico", data, photos, tmp_path, epochs=6)
    assert plain > 0.8
    assert made > plain - 0.01
    assert report.passed
    assert sum(layer.quantised for layer in report.layers) > 0.8 * len(report.layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICOS)
def test_top_1_stays_within_a_point(name, data, photos, tmp_path):
    (plain, made), report = accuracies(name, data, photos, tmp_path)
    print(
        f"{name}: {plain:.2%} in float32, {made:.2%} in 8 bits, error {report.result.error:.3f}, "
        f"in float32 {[layer.module for layer in report.excluded]}"
    )
    assert plain > 0.97
    assert made > plain - 0.01
