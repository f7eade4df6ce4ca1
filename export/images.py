"""Photographs as model inputs: where verification takes them from and how they are prepared."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes an input: resize, cut out the centre, normalise.

    The photo is scaled so that the input covers `crop_pct` of it, its centre of the input's size is cut
    out, and values in [0, 1] become `(value - mean) / std`. This is timm's evaluation transform.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}"
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct}")
        if not self.mean or not self.std or min(self.std) <= 0:
            raise ValueError(
                f"mean and std need a value per channel, std above 0; got {self.mean} and {self.std}"
            )

    @classmethod
    def of(
        cls, model: nn.Module, overrides: Preprocessing | Mapping[str, Any] | None = None
    ) -> Preprocessing:
        """What the model's `pretrained_cfg` (timm's field) asks for, ImageNet's habits where it says nothing.

        Args:
            model: any module.
            overrides: a whole `Preprocessing`, or a mapping of some of its fields.

        Raises:
            ValueError: an unknown field or an impossible value.
        """
        if isinstance(overrides, Preprocessing):
            return overrides
        known = cls.__dataclass_fields__.keys()
        if unknown := sorted(set(overrides or {}) - known):
            raise ValueError(f"preprocessing has no {', '.join(unknown)}; its fields are {', '.join(known)}")
        config = pretrained_cfg(model)
        if config.get("interpolation") not in INTERPOLATIONS:  # timm's 'random', say
            config.pop("interpolation", None)
        values = {**{key: config[key] for key in known if config.get(key) is not None}, **(overrides or {})}
        for key in ("mean", "std"):
            if key in values:
                value = values[key]
                values[key] = tuple(map(float, value)) if isinstance(value, Iterable) else (float(value),)
        return replace(cls(), **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    def __call__(self, image: Any, size: tuple[int, int], channels: int = 3) -> Tensor:
        """Turn a PIL image into a float32 input of shape (channels, *size).

        Three channels are RGB, one is grey; other counts repeat RGB, since no photo has them.
        """
        return self.normalise(self.pixels(image, size, channels))

    def pixels(self, image: Any, size: tuple[int, int], channels: int = 3) -> Tensor:
        """Scale and cut a PIL image to uint8 of shape (channels, *size)."""
        import numpy as np
        from PIL import Image

        image = image.convert("L" if channels == 1 else "RGB")
        height, width = size
        need_w, need_h = int(width / self.crop_pct), int(height / self.crop_pct)
        # timm's own two ways of rounding the longer side.
        whole = int if need_w == need_h else round
        if image.width * need_h <= image.height * need_w:
            scaled = need_w, max(need_h, whole(need_w * image.height / image.width))
        else:
            scaled = max(need_w, whole(need_h * image.width / image.height)), need_h
        image = image.resize(scaled, getattr(Image.Resampling, self.interpolation.upper()))
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        planes = torch.from_numpy(np.array(image, dtype=np.uint8)).reshape(height, width, -1).permute(2, 0, 1)
        return torch.stack(list(islice(cycle(planes), channels)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (..., channels, height, width) as float32 inputs of the same shape."""
        channels = pixels.shape[-3]
        mean, std = (
            torch.tensor(list(islice(cycle(values), channels)), dtype=torch.float32, device=pixels.device)
            for values in (self.mean, self.std)
        )
        return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's description of the weights that a model carries, `{}` for a module that has none."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return dict(config) if isinstance(config, Mapping) else {}


def default_size(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width from the argument, else from the model's `pretrained_cfg`, else 224.

    Raises:
        TypeError, ValueError: not a positive whole number or a pair of them.
    """
    if img_size is None:
        input_size = pretrained_cfg(model).get("input_size")
        return (int(input_size[-2]), int(input_size[-1])) if input_size else (224, 224)
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
        raise TypeError(f"img_size must be a whole number or (height, width), got {img_size!r}")
    if min(pair) < 1:
        raise ValueError(f"img_size must be positive, got {img_size!r}")
    return pair[0], pair[1]


def sample_photos() -> list[Path]:
    """The two photographs that scikit-learn ships: a temple roof and a flower."""
    from importlib.util import find_spec

    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ImportError(
            "the sample photos come with scikit-learn: pip install scikit-learn, or give images=[...]"
        )
    folder = Path(package.origin).parent / "datasets" / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


def find_images(
    images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None, deep: bool = False
) -> list[Path]:
    """The image files meant by `images`: files as they are, folders as the images directly in them.

    None stands for the sample photos. With `deep`, those in the folders' own folders are meant, too.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing was given, or a folder holds no image.
    """
    if images is None:
        return sample_photos()
    found: list[Path] = []
    for path in map(Path, [images] if isinstance(images, (str, os.PathLike)) else images):
        if path.is_dir():
            listed = path.rglob("*") if deep else path.iterdir()
            inside = sorted(p for p in listed if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise ValueError(f"the folder {path} holds no image ({', '.join(SUFFIXES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"no such image or folder: {path}")
    if not found:
        raise ValueError("images is empty; name at least one, or leave it out for the sample photos")
    return found


def load_image(path: Path) -> Any:
    """A PIL image, decoded.

    Raises:
        ValueError: the file is not an image that Pillow can read, or is cut short.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).copy()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {path} can't be read: {error}") from error
