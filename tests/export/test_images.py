import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from vitrail.export import Preprocessing
from vitrail.export.images import find_images, load_image, sample_photos


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (128, 224), (240, 160)])
@pytest.mark.parametrize("photo", sample_photos(), ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("crop_pct", "interpolation"), [(0.875, "bicubic"), (0.95, "bilinear"), (1.0, "bicubic")]
)
def test_photos_are_prepared_as_timm_prepares_them(photo, size, crop_pct, interpolation):
    image = load_image(photo)
    transform = create_transform((3, *size), crop_pct=crop_pct, interpolation=interpolation)
    ours = Preprocessing(crop_pct=crop_pct, interpolation=interpolation)(image, size)
    torch.testing.assert_close(ours, transform(image), rtol=0, atol=1e-6)


def test_a_tall_photo_is_cut_in_its_middle():
    pixels = np.zeros((300, 100, 3), np.uint8)
    pixels[100:200] = 255
    whole = Preprocessing(mean=(0.0,), std=(1.0,), interpolation="nearest", crop_pct=1.0)
    assert whole(Image.fromarray(pixels), (100, 100)).mean() == 1


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channel_counts_get_a_fitting_input(channels):
    x = Preprocessing()(Image.new("RGB", (64, 64), (255, 0, 0)), (32, 32), channels)
    assert x.shape == (channels, 32, 32)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_pictures_of_any_colour_mode_are_taken(tmp_path, mode):
    path = tmp_path / "picture.tiff"
    Image.new(mode, (40, 30)).save(path)
    assert Preprocessing()(load_image(path), (16, 16)).shape == (3, 16, 16)


def test_preprocessing_comes_from_the_model_and_can_be_overridden():
    model = nn.Identity()
    assert Preprocessing.of(model) == Preprocessing()
    model.pretrained_cfg = {
        "mean": [0.5],
        "std": (0.5, 0.5, 0.4),
        "interpolation": "random",
        "crop_pct": None,
    }
    assert Preprocessing.of(model) == Preprocessing(mean=(0.5,), std=(0.5, 0.5, 0.4))
    assert Preprocessing.of(model, {"mean": 0, "crop_pct": 1.0}).mean == (0.0,)
    assert Preprocessing.of(model, Preprocessing(crop_pct=0.5)).crop_pct == 0.5


def test_a_folder_stands_for_the_images_in_it(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    assert [path.name for path in find_images([tmp_path])] == ["a.PNG", "b.jpg"]
    assert find_images(None) == sample_photos()
    with pytest.raises(ValueError, match="holds no image"):
        find_images(tmp_path / "empty")


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.jpg is not an image"):
        load_image(tmp_path / "text.jpg")
    (tmp_path / "cut.jpg").write_bytes(sample_photos()[0].read_bytes()[:20000])
    with pytest.raises(ValueError, match=r"cut\.jpg can't be read: image file is truncated"):
        load_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interpolation": "magic"}, "interpolation must be one of .*bicubic.*, got 'magic'"),
        ({"crop_pct": 0}, r"crop_pct must be in \(0, 1\]"),
        ({"std": (0.0,)}, "std above 0"),
        ({"mean": ()}, "need a value per channel"),
    ],
)
def test_impossible_preprocessing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)
