import pytest
import torch
from PIL import Image, ImageChops

from vitrail.catalog import create_model
from vitrail.explain import Routing, draw_panel, record_routes, routing_picture

SIDE = (140, 140)
CENTRE = (0.5, 0.5)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return create_model("biformer_tiny")


@pytest.fixture
def photo():
    torch.manual_seed(1)
    pixels = (torch.rand(150, 200, 3) * 255).byte().numpy()
    return Image.fromarray(pixels)


def routing(*attended: int, grid=(7, 7), extent=(1 / 7, 1 / 7)) -> Routing:
    """Every region attends to the same ones."""
    return Routing(0, 0, grid, extent, torch.tensor([attended] * (grid[0] * grid[1])))


def test_every_block_with_routing_is_recorded(tiny):
    routings = record_routes(tiny, torch.randn(1, 3, 224, 224))
    assert [(r.stage, r.block) for r in routings] == [
        (s, b) for s, n in enumerate((2, 2, 8)) for b in range(n)
    ]
    assert {(r.stage, r.routes.shape) for r in routings} == {(0, (49, 1)), (1, (49, 4)), (2, (49, 16))}
    for r in routings:
        assert r.grid == (7, 7)
        assert r.extent == pytest.approx((1 / 7, 1 / 7))
        assert 0 <= int(r.routes.min()) <= int(r.routes.max()) < 49


def test_regions_of_a_padded_map_reach_past_the_image(tiny):
    first = record_routes(tiny, torch.randn(1, 3, 256, 192))[0]
    # a map of 64x48 tokens is padded to 70x49
    assert first.grid == (7, 7)
    assert first.extent == pytest.approx((10 / 64, 7 / 48))
    assert first.region_at((0.999, 0.999)) == (6, 6)


def test_recording_leaves_the_model_as_it_came(tiny):
    tiny.train()
    record_routes(tiny, torch.randn(1, 3, 64, 64))
    assert tiny.training
    tiny.eval()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_attended_regions_are_rows_and_columns():
    r = routing(0, 8, 48)
    assert r.attended_from((3, 3)) == {(0, 0), (1, 1), (6, 6)}
    assert r.region_at(CENTRE) == (3, 3)
    assert r.region_at((1.0, 0.0)) == (6, 0)


def test_a_panel_shows_attended_regions_as_they_are_and_dims_the_rest():
    white = Image.new("RGB", SIDE, "white")
    panel = draw_panel(white, routing(0, 48), CENTRE, SIDE)
    middle = {
        region: panel.getpixel((20 * region[1] + 10, 20 * region[0] + 10))
        for region in ((0, 0), (6, 6), (2, 5))
    }
    assert middle[0, 0] == middle[6, 6] == (255, 255, 255)
    assert max(middle[2, 5]) < 128


def test_a_panel_changes_where_the_routes_change_and_nowhere_else(photo):
    before = draw_panel(photo, routing(0, 10), CENTRE, SIDE)
    after = draw_panel(photo, routing(0, 46), CENTRE, SIDE)
    difference = ImageChops.difference(before, after).convert("L")
    changed = {
        divmod(region, 7)
        for region in range(49)
        if max(difference.crop(_inside(*divmod(region, 7))).getextrema()) > 0
    }
    assert changed == {(1, 3), (6, 4)}


def _inside(row: int, column: int) -> tuple[int, int, int, int]:
    frame = 4  # outlines of a neighbour reach in
    left, top = 20 * column + frame, 20 * row + frame
    return left, top, left + 20 - 2 * frame, top + 20 - 2 * frame


def test_the_asking_region_is_framed_in_its_own_colour():
    black = Image.new("RGB", SIDE, "black")
    panel = draw_panel(black, routing(0), CENTRE, SIDE)
    left, top = 60, 60
    assert (
        panel.getpixel((left + 10, top)) != panel.getpixel((10, 20)) != panel.getpixel((left + 10, top + 10))
    )
    moved = draw_panel(black, routing(0), (0.95, 0.95), SIDE)
    assert moved.getpixel((left + 10, top)) != panel.getpixel((left + 10, top))


def test_the_picture_is_a_png_and_follows_the_model(tiny, photo, tmp_path):
    routings = routing_picture(tiny, photo, tmp_path / "a.png", img_size=64, note="random weights")
    assert len(routings) == 12
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 400
    torch.manual_seed(5)
    routing_picture(
        create_model("biformer_tiny"), photo, tmp_path / "b.png", img_size=64, note="random weights"
    )
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    routing_picture(tiny, photo, tmp_path / "c.png", img_size=64, note="random weights")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_a_rectangular_photo_at_an_odd_size_can_be_drawn(tiny, photo, tmp_path):
    routing_picture(tiny, photo, tmp_path / "odd.png", point=(0.9, 0.1), img_size=(50, 75))
    assert (tmp_path / "odd.png").is_file()


def test_a_model_without_routing_is_refused_and_leaves_no_file(photo, tmp_path):
    with pytest.raises(ValueError, match="has no routed attention to show"):
        routing_picture(create_model("test_resnet"), photo, tmp_path / "no.png")
    assert list(tmp_path.iterdir()) == []


def test_impossible_requests_are_refused(tiny, photo, tmp_path):
    with pytest.raises(ValueError, match="shares between 0 and 1"):
        routing_picture(tiny, photo, tmp_path / "a.png", point=(3, 3))
    with pytest.raises(ValueError, match=r"end with \.png"):
        routing_picture(tiny, photo, tmp_path / "a.gif")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not an image"):
        routing_picture(tiny, broken, tmp_path / "a.png")
    with pytest.raises(ValueError, match="one image of shape"):
        record_routes(tiny, torch.zeros(2, 3, 64, 64))
