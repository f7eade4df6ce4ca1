"""Photographs to calibrate with."""

from pathlib import Path

from vitrail.export.images import load_image, sample_photos

COUNT = 20


def write_cuttings(folder: Path, size: int = 48) -> Path:
    """Fill a folder with 20 cuttings of photos, square, of `size` pixels; some of them in a folder of their own."""
    (folder / "more").mkdir(parents=True)
    for i in range(COUNT):
        photo = load_image(sample_photos()[i % 2])
        left, top = 30 * i % (photo.width - size), 15 * i % (photo.height - size)
        place = folder / "more" if i % 4 == 3 else folder
        photo.crop((left, top, left + size, top + size)).save(place / f"{i:02}.png")
    return folder
