"""Pictures of what a model does: what the place under a point of a photo looks at, layer by layer.

The families differ in which tokens a query may look at, and their operators say so in their arguments. So nothing here
knows a family: operators are watched while the model runs (`watch`), each kind has a reader that turns its arguments
into boxes of the photo (`_READERS`), and boxes are drawn.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .export import Preprocessing
from .export.capture import evaluation
from .export.files import check_target, write_atomically
from .export.images import default_size, load_image
from .ops import connectivity_topk, library, use_ops
from .ops.connectivity_attention import connectivity_logits

if TYPE_CHECKING:
    from PIL.Image import Image

# --- what is seen -----------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A rectangle of a photo, in shares of its height and width."""

    top: float
    left: float
    bottom: float
    right: float


EVERYTHING = Box(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """What one place of a photo looks at in one layer."""

    layer: str
    """Name of the module that called the operator."""
    operator: str
    asking: Box
    """The token, region or window that holds the point."""
    seen: tuple[tuple[Box, float], ...]
    """What it looks at, with a strength between 0 and 1."""
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "layer": self.layer,
            "operator": self.operator,
            "text": self.text,
            "asking": [round(x, 4) for x in self.asking],
            "seen": [[*(round(x, 4) for x in box), round(strength, 4)] for box, strength in self.seen],
        }


@dataclass(frozen=True)
class Call:
    """An operator as it was called."""

    layer: str
    operator: str
    arguments: Mapping[str, Any]
    inputs: tuple[Any, ...]
    """What the module that called it was given."""
    image_size: tuple[int, int]
    grid: tuple[int, int] | None
    """Of the patches, in models of one resolution."""


# --- readers: from an operator's arguments to boxes -------------------------------------------------------------------

Point = tuple[float, float]
Seen = tuple[Box, list[tuple[Box, float]], str]


def _cell(index: int, grid: Sequence[int]) -> Box:
    """A token of a grid, counted row by row."""
    row, column = divmod(index, grid[1])
    return Box(row / grid[0], column / grid[1], (row + 1) / grid[0], (column + 1) / grid[1])


def _span(rows: tuple[int, int], columns: tuple[int, int], grid: Sequence[int]) -> Box:
    """Rows and columns of tokens from the first to before the last; what reaches past the grid is cut off."""
    return Box(
        rows[0] / grid[0],
        columns[0] / grid[1],
        min(rows[1] / grid[0], 1.0),
        min(columns[1] / grid[1], 1.0),
    )


def _token(point: Point, grid: Sequence[int]) -> tuple[int, int]:
    """Row and column of the token under a point."""
    row, column = (min(int(at * size), size - 1) for at, size in zip(point, grid, strict=True))
    return row, column


def _at(point: Point, grid: Sequence[int]) -> int:
    row, column = _token(point, grid)
    return row * grid[1] + column


def _as_grid(tokens: int, call: Call) -> tuple[int, int] | None:
    """Height and width of a grid of so many tokens that has the shape of the image; None if there is none."""
    if call.grid is not None and tokens == call.grid[0] * call.grid[1]:
        return call.grid
    height = round((tokens * call.image_size[0] / call.image_size[1]) ** 0.5)
    return (height, tokens // height) if height and tokens % height == 0 else None


def _strengths(weights: Tensor, grid: Sequence[int]) -> list[tuple[Box, float]]:
    """Boxes of the tokens of a grid, as strong as their weights compared with the largest."""
    largest = float(weights.max())
    values = (weights / largest).tolist() if largest > 0 else [0.0] * len(weights)
    return [(_cell(i, grid), value) for i, value in enumerate(values) if value > 0]


def _probabilities(q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None = None) -> Tensor:
    """Attention of one query `(heads, d)` to keys `(heads, M, d)`, mean over heads."""
    scores = (k.float() @ q.float()[:, :, None])[..., 0] * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if mask is None else scores + mask).softmax(-1).mean(0)


def _regions(call: Call, point: Point) -> Seen:
    args = call.arguments
    size, routes = args["region_size"], args["routes"][0]
    grid = call.inputs[0].shape[1:3]  # not yet padded: what covers the image
    columns = -(-args["q"].shape[2] // size[1])
    row, column = _token(point, grid)

    def box(region: int) -> Box:
        top, left = region // columns * size[0], region % columns * size[1]
        return _span((top, top + size[0]), (left, left + size[1]), grid)

    asking = row // size[0] * columns + column // size[1]
    seen = [box(int(region)) for region in routes[asking]]
    # what lies past the image is padding
    seen = [b for b in dict.fromkeys(seen) if b.top < 1 and b.left < 1]
    return box(asking), [(b, 1.0) for b in seen], f"{routes.shape[1]} of {routes.shape[0]} regions"


def _window(call: Call, point: Point) -> Seen:
    args = call.arguments
    grid, size, shift = args["q"].shape[1:3], args["window_size"], args["shift"]

    def piece(at: int, length: int, window: int, offset: int) -> tuple[int, int]:
        if at < offset:  # windows cut off by the border are windows of their own
            return 0, offset
        start = offset + (at - offset) // window * window
        return start, min(start + window, length)

    rows, columns = (piece(*x) for x in zip(_token(point, grid), grid, size, shift, strict=True))
    seen = _span(rows, columns, grid)
    shifted = ", shifted" if any(shift) else ""
    words = f"a window of {size[0]} x {size[1]} of {grid[0]} x {grid[1]} tokens{shifted}"
    return _cell(_at(point, grid), grid), [(seen, 1.0)], words


def _channels(call: Call, point: Point) -> Seen:
    return EVERYTHING, [(EVERYTHING, 1.0)], "channels attend to channels, over all tokens"


def _strips(call: Call, point: Point) -> Seen:
    grid, axis = call.arguments["x"].shape[1:3], call.arguments["axis"]
    row, column = _token(point, grid)
    if axis == 2:
        seen = _span((max(row - 1, 0), row + 2), (0, grid[1]), grid)
        words = f"its row of {grid[0]} and the two beside it"
    else:
        seen = _span((0, grid[0]), (max(column - 1, 0), column + 2), grid)
        words = f"its column of {grid[1]} and the two beside it"
    return _cell(row * grid[1] + column, grid), [(seen, 1.0)], words


def _lists(call: Call, point: Point) -> Seen | None:
    keys = call.arguments["keys"][0]
    count = call.arguments["k"].shape[1]
    grid = call.grid
    if grid is None:
        return None
    # after pruning the tokens say by themselves which they are; the class token is number 0
    numbers = next(
        (x[0] for x in call.inputs[1:] if isinstance(x, Tensor) and not x.is_floating_point()), None
    )
    tokens = list(range(count)) if numbers is None else numbers.tolist()
    if len(tokens) != count or max(tokens) > grid[0] * grid[1]:
        return None
    asking = _at(point, grid)
    box = _cell(asking, grid)
    if asking + 1 not in tokens:
        return box, [], "its token was pruned"
    chosen = keys[:, tokens.index(asking + 1) - 1]
    heads = torch.zeros(grid[0] * grid[1] + 1)
    for head in chosen:
        for key in head[head >= 0].tolist():
            heads[tokens[key]] += 1
    each = (chosen >= 0).sum().item() / chosen.shape[0]
    words = f"{each:.0f} of {count} tokens per head, {int((heads > 0).sum())} in all"
    seen = [(_cell(i, grid), x / chosen.shape[0]) for i, x in enumerate(heads[1:].tolist()) if x > 0]
    return box, seen, words


def _choices(call: Call, point: Point) -> Seen | None:
    """The operator keeps no lists, so the choice is made once more."""
    a = call.arguments
    logits = connectivity_logits(
        a["q"][:, a["num_dense"] :], a["compressed"], a["offset"], a["projection"], a["num_heads"]
    )
    names = ("num_keys", "num_coefficients", "basis_threshold", "coefficient_threshold", "score_threshold")
    keys = connectivity_topk(logits, a["basis"], **{name: a[name] for name in (*names, "candidates")})
    return _lists(replace(call, arguments={**a, "keys": keys}), point)


def _centres(call: Call, point: Point) -> Seen:
    args = call.arguments
    q, k, own = args["q"][0], args["k"][0], args["own_k"][0]
    heads, window, patch = args["num_heads"], args["window_size"], args["patch_size"]
    centres, grid = q.shape[:2], k.shape[:2]
    row, column = _token(point, centres)
    corner, count = (
        (row // window[0], column // window[1]),
        [c // w for c, w in zip(centres, window, strict=True)],
    )
    start = [c * (g - p) // max(n - 1, 1) for c, g, p, n in zip(corner, grid, patch, count, strict=True)]

    def split(x: Tensor) -> Tensor:
        return x.reshape(-1, heads, x.shape[-1] // heads).transpose(0, 1)

    top, left = corner[0] * window[0], corner[1] * window[1]
    inside = k[start[0] : start[0] + patch[0], start[1] : start[1] + patch[1]]
    own = own[top : top + window[0], left : left + window[1]]
    query = split(q[row, column])[:, 0]
    weights = _probabilities(query, torch.cat([split(inside), split(own)], 1), args["scale"])
    whole = torch.zeros(tuple(grid))
    whole[start[0] : start[0] + patch[0], start[1] : start[1] + patch[1]] = weights[
        : patch[0] * patch[1]
    ].view(patch[0], patch[1])
    words = f"a semantic token gathers from {patch[0]} x {patch[1]} of {grid[0]} x {grid[1]} tokens"
    return _cell(_at(point, centres), centres), _strengths(whole.flatten(), grid), words


def _dense(call: Call, point: Point) -> Seen | None:
    q, k = call.arguments["query"], call.arguments["key"]
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        return None
    many, keys = q.shape[2], k.shape[2]
    asking = _as_grid(many, call)
    first = 0
    if asking is None:  # a class token comes first
        first, asking = 1, _as_grid(many - 1, call)
    # other tokens come first: a class token, or those that ask
    before, grid = next(
        ((n, g) for n in (0, 1, many) if keys > n and (g := _as_grid(keys - n, call)) is not None), (0, None)
    )
    if asking is None or grid is None:
        return None
    mask = call.arguments.get("attn_mask")
    index = first + _at(point, asking)
    if isinstance(mask, Tensor):
        mask = mask.expand(1, q.shape[1], many, keys)[0, :, index]
        if mask.dtype == torch.bool:
            return None
    weights = _probabilities(q[0, :, index], k[0], call.arguments.get("scale"), mask)
    return _cell(_at(point, asking), asking), _strengths(weights[before:], grid), f"all {keys} tokens"


_READERS: dict[str, Callable[[Call, Point], Seen | None]] = {
    "semantic_attention": _centres,
    "connectivity_attention": _choices,
    "sparse_attention": _lists,
    "routed_attention": _regions,
    "window_attention": _window,
    "strip_mix": _strips,
    "channel_attention": _channels,
    "scaled_dot_product_attention": _dense,
}
"""In the order in which they are worth a large picture."""


# --- watching a model -------------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Notes calls of our operators."""

    def __init__(self, note: Callable[[str, Mapping[str, Any]], None]):
        super().__init__()
        self.note = note
        self.path = library.mode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "vitrail":
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        self.note(func._opname, dict(zip(names, args, strict=False)) | kwargs)
        with use_ops(self.path):  # the path that is in force; nothing is compiled where that is forbidden
            return func(*args, **kwargs)


class _Dense(TorchFunctionMode):
    """Notes calls of scaled-dot-product attention."""

    def __init__(self, note: Callable[[str, Mapping[str, Any]], None]):
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            self.note("scaled_dot_product_attention", dict(zip(names, args, strict=False)) | kwargs)
        return func(*args, **kwargs)


@contextmanager
def watch(model: nn.Module, image_size: tuple[int, int]) -> Iterator[list[Call]]:
    """Collect the calls of operators in each forward pass inside the block."""
    calls: list[Call] = []
    running: list[tuple[str, tuple[Any, ...]]] = []
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)

    def note(operator: str, arguments: Mapping[str, Any]) -> None:
        if operator in _READERS and running:
            calls.append(Call(running[-1][0], operator, arguments, running[-1][1], image_size, grid))

    def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: running.append((name, args))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        # as definitions the operators would be many small ones
        operators = _Operators(note)
        with use_ops("auto"), operators, _Dense(note):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def look(model: nn.Module, image: Tensor, point: Point = (0.5, 0.5)) -> list[View]:
    """Run a model on one image and return what the place under a point looks at, layer by layer.

    Args:
        model: any model with operators of vitrail's, or with scaled-dot-product attention. It runs in eval mode and is
            left as it came.
        image: `(1, C, H, W)`, preprocessed.
        point: (y, x) in the image, as shares of its height and width.

    Raises:
        ValueError: the model has nothing to show, there is not exactly one image, or the point lies outside it.
    """
    if image.dim() != 4 or image.shape[0] != 1:
        raise ValueError(f"expected one image of shape (1, C, H, W), got {tuple(image.shape)}")
    if not all(0 <= at <= 1 for at in point):
        raise ValueError(f"point must be (y, x) with shares between 0 and 1 of the photo, got {point}")
    with evaluation(model), watch(model, (image.shape[2], image.shape[3])) as calls:
        model(image)
    views = []
    for call in calls:
        seen = _READERS[call.operator](call, point)
        if seen is not None:
            views.append(View(call.layer, call.operator, seen[0], tuple(seen[1]), seen[2]))
    if not views:
        raise ValueError(
            f"{type(model).__name__} has no attention and no strips to show; `vitrail models` lists models that have"
        )
    return views


# --- drawing ----------------------------------------------------------------------------------------------------------

_BACKGROUND, _TEXT, _FAINT_TEXT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
_ASKING, _SEEN = (255, 149, 0), (94, 234, 212)
_PANEL, _SMALL, _GAP, _MARGIN, _CAPTION = 396, 93, 8, 28, 50
_SMALL_PER_ROW = 4
_COLUMNS = 4  # where a model has no stages


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _pixels(box: Box, side: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a box in a picture of `side` (width, height)."""
    width, height = side
    return (
        round(box.left * width),
        round(box.top * height),
        min(round(box.right * width), width),
        min(round(box.bottom * height), height),
    )


def _fill(draw: Any, box: tuple[int, int, int, int], value: int) -> None:
    left, top, right, bottom = box
    if right > left and bottom > top:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=value)


def draw_panel(photo: "Image", views: Sequence[View], side: tuple[int, int]) -> "Image":
    """The photo, dim but for what is seen.

    Args:
        photo: what the model saw.
        views: of one layer, drawn over each other.
        side: (width, height) of the panel.
    """
    from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

    bright = photo.resize(side, Image.Resampling.LANCZOS)
    panel = Image.blend(ImageEnhance.Color(bright).enhance(0.2), Image.new("RGB", side, _BACKGROUND), 0.7)
    thick = max(2, side[0] // 110)
    large = min(side) > 2 * _SMALL
    light, outline, lead = (Image.new("L", side) for _ in range(3))
    for view in views:
        _fill(ImageDraw.Draw(light), _pixels(view.asking, side), 150)
    for view in views:
        layer, area = Image.new("L", side), Image.new("L", side)
        for box, strength in view.seen:
            pixels = _pixels(box, side)
            _fill(ImageDraw.Draw(layer), pixels, round(255 * strength))
            _fill(ImageDraw.Draw(area), pixels, 255)
            if len(view.seen) > 1 and large:
                # pieces of glass that touch are joined by lead
                ImageDraw.Draw(lead).rectangle(pixels, outline=255, width=max(1, thick // 3))
        light = ImageChops.lighter(light, layer)
        if large or len(view.seen) < 40:  # else there would be lines and nothing between
            edge = ImageChops.subtract(area, area.filter(ImageFilter.MinFilter(2 * thick + 1)))
            outline = ImageChops.lighter(outline, edge)
    panel = Image.composite(bright, panel, light)
    panel.paste(_BACKGROUND, mask=lead)
    panel.paste(_SEEN, mask=outline)
    draw = ImageDraw.Draw(panel)
    for box in dict.fromkeys(view.asking for view in views if view.asking != EVERYTHING):
        pixels = _pixels(box, side)
        draw.rectangle(pixels, outline=_BACKGROUND, width=2 * thick)
        draw.rectangle(pixels, outline=_ASKING, width=thick + 1)
    return panel


@dataclass(frozen=True)
class _Layer:
    """Views that are drawn into one panel."""

    name: str
    views: list[View]

    @property
    def rank(self) -> int:
        return min(list(_READERS).index(view.operator) for view in self.views)

    @property
    def text(self) -> str:
        texts = dict.fromkeys(view.text for view in self.views)
        return "its row and its column, each with the two beside it" if len(texts) > 1 else next(iter(texts))


def _layers(views: Sequence[View]) -> list[_Layer]:
    """Views of the same module's children belong together: rows and columns of a strip layer."""
    layers: list[_Layer] = []
    for view in views:
        parent = view.layer.rpartition(".")[0]
        if layers and layers[-1].name == parent and view.operator == layers[-1].views[0].operator:
            layers[-1].views.append(view)
        else:
            layers.append(_Layer(parent, [view]))
    return layers


def _title(name: str) -> str:
    """`stages.2.blocks.1.generation.layer1` as `Stage 3, block 2, generation.layer1`."""
    words = []
    for container, word in (("stages", "stage"), ("blocks", "block")):
        found = re.search(rf"(?:^|\.){container}[._](\d+)", name)
        if found:
            words.append(f"{word} {int(found[1]) + 1}")
            rest = name[found.end() :].lstrip(".")
    if not words:
        return name
    return ", ".join(
        [*words, *([f"part {int(rest) + 1}" if rest.isdigit() else rest] if rest else [])]
    ).capitalize()


def _columns(layers: list[_Layer]) -> list[list[_Layer]]:
    """A column for each stage; a network without stages is cut into equal parts."""
    stages: dict[str, list[_Layer]] = {}
    for layer in layers:
        found = re.search(r"stages[._](\d+)", layer.name)
        stages.setdefault(found[1] if found else "", []).append(layer)
    if len(stages) > 1:
        return list(stages.values())
    count = min(_COLUMNS, len(layers))
    cuts = [i * len(layers) // count for i in range(count + 1)]
    return [layers[a:b] for a, b in pairwise(cuts)]


def _legend(draw: Any, x: int, y: int) -> None:
    for colour, text in ((_ASKING, "what asks"), (_SEEN, "what it looks at: the brighter, the more")):
        draw.rectangle((x, y + 3, x + 14, y + 17), outline=colour, width=3)
        draw.text((x + 24, y), text, font=_font(16), fill=_FAINT_TEXT)
        x += 24 + int(draw.textlength(text, font=_font(16))) + 32


def _compose(photo: "Image", views: Sequence[View], title: str, note: str) -> "Image":
    """A column for each stage: its most telling layer large, all of its layers small below."""
    from PIL import Image, ImageDraw

    aspect = photo.height / photo.width
    big, small = (_PANEL, round(_PANEL * aspect)), (_SMALL, round(_SMALL * aspect))
    columns = _columns(_layers(views))
    rows = max(-(-len(layers) // _SMALL_PER_ROW) if len(layers) > 1 else 0 for layers in columns)
    head = _MARGIN + 92
    below = head + _CAPTION + big[1] + _GAP
    width = 2 * _MARGIN + max(len(columns), 2) * (_PANEL + 3 * _GAP) - 3 * _GAP
    height = below + (28 + rows * (small[1] + _GAP) if rows else 0) + _MARGIN
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN - 4), title, font=_font(26), fill=_TEXT)
    draw.text((_MARGIN, _MARGIN + 30), note, font=_font(16), fill=_FAINT_TEXT)
    _legend(draw, _MARGIN, _MARGIN + 56)
    for number, layers in enumerate(columns):
        x = _MARGIN + number * (_PANEL + 3 * _GAP)
        best = min(layer.rank for layer in layers)
        large = [layer for layer in layers if layer.rank == best][-1]
        draw.text((x, head), _title(large.name), font=_font(17), fill=_TEXT)
        draw.text((x, head + 24), large.text, font=_font(15), fill=_FAINT_TEXT)
        canvas.paste(draw_panel(photo, large.views, big), (x, head + _CAPTION))
        if len(layers) > 1:
            draw.text((x, below), f"all {len(layers)} layers in order", font=_font(15), fill=_FAINT_TEXT)
            for place, layer in enumerate(layers):
                row, column = divmod(place, _SMALL_PER_ROW)
                corner = (x + column * (_SMALL + _GAP), below + 28 + row * (small[1] + _GAP))
                canvas.paste(draw_panel(photo, layer.views, small), corner)
    return canvas


def explain_picture(
    model: nn.Module,
    image: "str | PathLike[str] | Image",
    path: str | PathLike[str],
    point: Point = (0.5, 0.5),
    img_size: int | tuple[int, int] | None = None,
    title: str | None = None,
    note: str = "",
) -> list[View]:
    """Draw what the place under a point of a photo looks at, stage by stage, and write it as a PNG.

    One column per stage: the photo as one of its layers sees it, dim but for what that layer looks at; all of its
    layers are small below. BiFormer shows the regions that a region chose, DaViT and Swin windows, Strip-MLP rows and
    columns, Sparsifiner the keys that were kept (as bright as many heads keep them), STViT what a semantic token
    gathers; where every token attends to every other, brightness is the attention.

    Args:
        model: any model with operators of vitrail's, in float32.
        image: a photo, or the file it is in. It is resized and cropped as the model's `pretrained_cfg` says.
        path: the picture to write; ends with `.png`. It is written whole or not at all.
        point: (y, x) in the cropped photo, as shares of its height and width; default: its centre.
        img_size: input size, one number or (height, width); default: the model's own.
        title: heading of the picture.
        note: a line below the title.

    Returns:
        What every layer looks at, in order.

    Raises:
        ValueError: the model has nothing to show, the photo can't be read, or a point outside the photo.
        OSError: a file is missing or can't be written.
    """
    target = check_target(path, ".png")
    photo = load_image(Path(image)) if isinstance(image, str | PathLike) else image
    size = default_size(model, img_size)
    prepare = Preprocessing.of(model)
    weight = next(model.parameters())
    images = prepare(photo, size, getattr(model, "in_chans", 3))[None].to(weight)
    views = look(model, images, point)

    # what the model saw, in more pixels than it had
    enlarge = -(-_PANEL // size[1])
    seen = replace(prepare, mean=(0.0,), std=(1.0,))(photo, (size[0] * enlarge, size[1] * enlarge))
    if title is None:
        centre = point == (0.5, 0.5)
        place = "the photo's centre" if centre else f"{point[0]:.0%} down and {point[1]:.0%} across"
        title = f"What {place} looks at"
    picture = io.BytesIO()
    _compose(_to_picture(seen), views, title, note).save(picture, "PNG", optimize=True)
    write_atomically(target, picture.getvalue())
    return views


def _to_picture(pixels: Tensor) -> "Image":
    """A `(3, H, W)` tensor with values in [0, 1] as an RGB image."""
    from PIL import Image

    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
