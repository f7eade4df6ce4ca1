"""Pictures of what a model does: which regions of a photo a region attends to."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .export import Preprocessing
from .export.capture import evaluation
from .export.files import check_target, write_atomically
from .export.images import load_image
from .export.verify import default_size
from .ops.regions import ceil_div
from .zoo.biformer import FullAttention, RegionRouter

if TYPE_CHECKING:
    from PIL.Image import Image

# --- what the routers chose -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """The choices of one block for one image."""

    stage: int
    block: int
    """Both count from 0."""
    grid: tuple[int, int]
    """Rows and columns of regions."""
    extent: tuple[float, float]
    """Height and width of a region as shares of the image's; the last regions of a padded map reach past it."""
    routes: Tensor
    """`(regions, topk)` int64, the regions that each region attends to; both are numbered row by row."""

    def region_at(self, point: tuple[float, float]) -> tuple[int, int]:
        """Row and column of the region under a point, given as (y, x) shares of the image."""
        row, column = (
            min(int(at / share), count - 1)
            for at, share, count in zip(point, self.extent, self.grid, strict=True)
        )
        return row, column

    def attended_from(self, region: tuple[int, int]) -> set[tuple[int, int]]:
        """Rows and columns of the regions that the one at (row, column) attends to."""
        columns = self.grid[1]
        row, column = region
        return {(int(r) // columns, int(r) % columns) for r in self.routes[row * columns + column]}


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect what the routers choose in each forward pass inside the block."""
    routings: list[Routing] = []
    maps: dict[str, torch.Size] = {}
    handles = []

    def watch(name: str, stage: int, block: int, router: RegionRouter) -> None:
        def before(attention: nn.Module, args: tuple[Any, ...]) -> None:
            maps[name] = args[0].shape  # (B, H, W, C), not yet padded: what covers the image

        def after(router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
            q, _, region_size = args
            grid = ceil_div(q.shape[1], region_size[0]), ceil_div(q.shape[2], region_size[1])
            extent = region_size[0] / maps[name][1], region_size[1] / maps[name][2]
            routings.append(Routing(stage, block, grid, extent, output[0][0].cpu()))

        handles.append(model.get_submodule(name).register_forward_pre_hook(before))
        handles.append(router.register_forward_hook(after))

    for name, module in model.named_modules():
        place = re.search(r"stages[._](\d+)\.blocks\.(\d+)\.", name)
        if isinstance(module, RegionRouter) and place:
            watch(name.rpartition(".")[0], int(place[1]), int(place[2]), module)
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()


def record_routes(model: nn.Module, image: Tensor) -> list[Routing]:
    """Run a model on one image and return what its routers chose, block by block.

    Args:
        model: a model with routed attention (`biformer_*`). It runs in eval mode and is left as it came.
        image: `(1, C, H, W)`, preprocessed.

    Raises:
        ValueError: the model has no routed attention, or there is not exactly one image.
    """
    if image.dim() != 4 or image.shape[0] != 1:
        raise ValueError(f"expected one image of shape (1, C, H, W), got {tuple(image.shape)}")
    with evaluation(model), _recording(model) as routings:
        model(image)
    if not routings:
        raise ValueError(
            f"{type(model).__name__} has no routed attention to show; the models that do are biformer_*"
        )
    return routings


# --- drawing ----------------------------------------------------------------------------------------------------------

_BACKGROUND, _TEXT, _FAINT_TEXT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
_ASKING, _ATTENDED = (255, 149, 0), (94, 234, 212)
_PANEL, _SMALL, _GAP, _MARGIN, _CAPTION = 396, 93, 8, 28, 26
_SMALL_PER_ROW = 4


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _pixels(routing: Routing, region: tuple[int, int], side: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a region in a picture of `side` (width, height)."""
    width, height = side
    top, left = region[0] * routing.extent[0] * height, region[1] * routing.extent[1] * width
    bottom, right = top + routing.extent[0] * height, left + routing.extent[1] * width
    return round(left), round(top), min(round(right), width), min(round(bottom), height)


def draw_panel(
    photo: "Image", routing: Routing, point: tuple[float, float], side: tuple[int, int]
) -> "Image":
    """The photo, dim but for the regions that the one under `point` attends to.

    Args:
        photo: what the model saw.
        routing: of one block.
        point: (y, x) as shares of the image.
        side: (width, height) of the panel.
    """
    from PIL import Image, ImageDraw, ImageEnhance

    bright = photo.resize(side, Image.Resampling.LANCZOS)
    panel = Image.blend(ImageEnhance.Color(bright).enhance(0.2), Image.new("RGB", side, _BACKGROUND), 0.7)
    thick = max(2, side[0] // 110)
    asking = routing.region_at(point)
    boxes = {region: _pixels(routing, region, side) for region in routing.attended_from(asking)}
    # what is left are regions of more than padding
    boxes = {region: box for region, box in boxes.items() if box[2] > box[0] and box[3] > box[1]}
    draw = ImageDraw.Draw(panel)
    if asking not in boxes:
        box = _pixels(routing, asking, side)
        panel.paste(Image.blend(bright, Image.new("RGB", side, _BACKGROUND), 0.4).crop(box), box[:2])
    for box in boxes.values():
        panel.paste(bright.crop(box), box[:2])
    for (row, column), (left, top, right, bottom) in boxes.items():
        edges = {
            (row - 1, column): (left, top, right, top),
            (row + 1, column): (left, bottom, right, bottom),
            (row, column - 1): (left, top, left, bottom),
            (row, column + 1): (right, top, right, bottom),
        }
        for neighbour, line in edges.items():
            if neighbour in boxes:  # pieces of glass that touch are joined by lead
                draw.line(line, fill=_BACKGROUND, width=max(1, thick // 2))
            else:
                draw.line(line, fill=_ATTENDED, width=thick)
    _mark(draw, _pixels(routing, asking, side), thick)
    return panel


def _mark(draw: Any, box: tuple[int, int, int, int], thick: int) -> None:
    """The frame of the region that asks."""
    draw.rectangle(box, outline=_BACKGROUND, width=2 * thick)
    draw.rectangle(box, outline=_ASKING, width=thick + 1)


def _legend(draw: Any, x: int, y: int) -> None:
    for colour, text in ((_ASKING, "the region that asks"), (_ATTENDED, "the regions that it attends to")):
        draw.rectangle((x, y + 3, x + 14, y + 17), outline=colour, width=3)
        draw.text((x + 24, y), text, font=_font(16), fill=_FAINT_TEXT)
        x += 24 + int(draw.textlength(text, font=_font(16))) + 32


def _compose(
    photo: "Image",
    routings: list[Routing],
    unrouted: list[str],
    point: tuple[float, float],
    title: str,
    note: str,
) -> "Image":
    """A column for each stage: its last block large, the blocks before it small below.

    `unrouted` says of each stage what it does where it has no routing.
    """
    from PIL import Image, ImageDraw

    aspect = photo.height / photo.width
    big, small = (_PANEL, round(_PANEL * aspect)), (_SMALL, round(_SMALL * aspect))
    stages = len(unrouted)
    by_stage = [[r for r in routings if r.stage == stage] for stage in range(stages)]
    rows = max(-(-(len(blocks) - 1) // _SMALL_PER_ROW) for blocks in by_stage)
    head = _MARGIN + 92
    below = head + _CAPTION + big[1]
    width = 2 * _MARGIN + stages * _PANEL + (stages - 1) * 3 * _GAP
    height = below + (_GAP + _CAPTION + rows * (small[1] + _GAP) if rows > 0 else 0) + _MARGIN
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN - 4), title, font=_font(26), fill=_TEXT)
    draw.text((_MARGIN, _MARGIN + 30), note, font=_font(16), fill=_FAINT_TEXT)
    _legend(draw, _MARGIN, _MARGIN + 56)
    for stage, blocks in enumerate(by_stage):
        x = _MARGIN + stage * (_PANEL + 3 * _GAP)
        if blocks:
            last = blocks[-1]
            regions = last.grid[0] * last.grid[1]
            caption = (
                f"Stage {stage + 1}, block {last.block + 1}: {last.routes.shape[1]} of {regions} regions"
            )
            canvas.paste(draw_panel(photo, last, point, big), (x, head + _CAPTION))
        else:
            caption = f"Stage {stage + 1}: {unrouted[stage]}"
            panel = photo.resize(big, Image.Resampling.LANCZOS)
            like = routings[-1]
            _mark(ImageDraw.Draw(panel), _pixels(like, like.region_at(point), big), max(2, big[0] // 110))
            canvas.paste(panel, (x, head + _CAPTION))
        draw.text((x, head), caption, font=_font(17), fill=_TEXT)
        if len(blocks) > 1:
            words = "block 1" if len(blocks) == 2 else f"blocks 1 to {len(blocks) - 1}"
            draw.text((x, below + _GAP), words, font=_font(15), fill=_FAINT_TEXT)
        for number, routing in enumerate(blocks[:-1]):
            row, column = divmod(number, _SMALL_PER_ROW)
            corner = (x + column * (_SMALL + _GAP), below + _GAP + _CAPTION + row * (small[1] + _GAP))
            canvas.paste(draw_panel(photo, routing, point, small), corner)
    return canvas


def routing_picture(
    model: nn.Module,
    image: "str | PathLike[str] | Image",
    path: str | PathLike[str],
    point: tuple[float, float] = (0.5, 0.5),
    img_size: int | tuple[int, int] | None = None,
    title: str | None = None,
    note: str = "",
) -> list[Routing]:
    """Draw which regions of a photo the region under a point attends to, stage by stage, and write it as a PNG.

    One panel per stage: the photo as its last block sees it, dim but for the regions that are attended to; the blocks
    before it are small below.

    Args:
        model: a model with routed attention (`biformer_*`), in float32.
        image: a photo, or the file it is in. It is resized and cropped as the model's `pretrained_cfg` says.
        path: the picture to write; ends with `.png`. It is written whole or not at all.
        point: (y, x) in the cropped photo, as shares of its height and width; default: its centre.
        img_size: input size, one number or (height, width); default: the model's own.
        title: heading of the picture.
        note: a line below the title.

    Returns:
        What every block chose, in order.

    Raises:
        ValueError: the model has no routed attention, the photo can't be read, or a point outside the photo.
        OSError: a file is missing or can't be written.
    """
    if not all(0 <= at <= 1 for at in point):
        raise ValueError(f"point must be (y, x) with shares between 0 and 1 of the photo, got {point}")
    target = check_target(path, ".png")
    photo = load_image(Path(image)) if isinstance(image, str | PathLike) else image
    size = default_size(model, img_size)
    prepare = Preprocessing.of(model)
    weight = next(model.parameters())
    images = prepare(photo, size, getattr(model, "in_chans", 3))[None].to(weight)
    routings = record_routes(model, images)

    # what the model saw, in more pixels than it had
    enlarge = -(-_PANEL // size[1])
    seen = replace(prepare, mean=(0.0,), std=(1.0,))(photo, (size[0] * enlarge, size[1] * enlarge))
    stages = getattr(model, "stages", range(routings[-1].stage + 1))
    unrouted = [
        "full attention, to everything" if _has_full_attention(stage) else "no attention" for stage in stages
    ]
    if title is None:
        place = (
            "at the photo's centre"
            if point == (0.5, 0.5)
            else f"{point[0]:.0%} down and {point[1]:.0%} across"
        )
        title = f"Where the region {place} looks"
    picture = io.BytesIO()
    _compose(_to_picture(seen), routings, unrouted, point, title, note).save(picture, "PNG", optimize=True)
    write_atomically(target, picture.getvalue())
    return routings


def _has_full_attention(stage: object) -> bool:
    return isinstance(stage, nn.Module) and any(isinstance(m, FullAttention) for m in stage.modules())


def _to_picture(pixels: Tensor) -> "Image":
    """A `(3, H, W)` tensor with values in [0, 1] as an RGB image."""
    from PIL import Image

    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
