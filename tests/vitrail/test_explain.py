import pytest
import timm
import torch
from PIL import Image, ImageChops

from vitrail.catalog import create_model
from vitrail.explain import EVERYTHING, Box, View, draw_panel, explain_picture, look
from vitrail.ops import library, use_ops
from vitrail.zoo import list_families

SIDE = (140, 140)
CENTRE = (0.5, 0.5)
PICOS = [name for names in list_families().values() for name in names if name.endswith("_pico")]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return create_model("biformer_tiny")


@pytest.fixture
def photo():
    torch.manual_seed(1)
    pixels = (torch.rand(150, 200, 3) * 255).byte().numpy()
    return Image.fromarray(pixels)


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def region(row, column, rows=7, columns=7):
    return Box(row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)


def view(*attended, asking=(3, 3)):
    """Regions of a 7 x 7 grid, counted row by row."""
    seen = tuple((region(*divmod(i, 7)), 1.0) for i in attended)
    return View("stages.0.blocks.0.attn", "routed_attention", region(*asking), seen, "")


def boxes(one):
    return [tuple(round(x, 9) for x in box) for box, _ in one.seen]


# --- what is seen, against what the model computes --------------------------------------------------------------------


def depends_on(model, image, module, token, change):
    """Whether the output of a module at a token changes with the input at another; both `(row, column)` of its map."""
    outputs = []

    def disturb(module, args):
        x = args[0].clone()
        if outputs:
            x[:, change[0], change[1]] += 10
        return (x, *args[1:])

    handles = [
        module.register_forward_pre_hook(disturb),
        module.register_forward_hook(lambda module, args, out: outputs.append(out[:, token[0], token[1]])),
    ]
    with torch.no_grad():
        model(image)
        model(image)
    for handle in handles:
        handle.remove()
    return not torch.equal(*outputs)


@pytest.mark.parametrize(
    ("model", "layer", "side"),
    [
        (("davit_fused_pico", {}), "stages.0.blocks.0.0.attn", 8),
        (("stvit_swin_pico", {}), "stages.0.blocks.0.attn", 16),
        (("stvit_r_swin_tiny", {"depths": (2, 1, 6, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 4)}), "stages.0.blocks.1.attn", 8),
    ],
    ids=["DaViT", "STViT", "shifted"],
)  # fmt: skip
def test_a_token_depends_on_the_window_that_is_shown_and_on_nothing_else(model, layer, side):
    model, image = small(model[0], **model[1]), torch.randn(1, 3, 32, 32)
    (one,) = [v for v in look(model, image, (0.3, 0.6)) if v.layer == layer]
    (box,) = boxes(one)
    token = (int(0.3 * side), int(0.6 * side))
    assert box[0] * side <= token[0] < box[2] * side
    for row in range(side):
        for column in range(0, side, 3):
            inside = box[0] * side <= row < box[2] * side and box[1] * side <= column < box[3] * side
            module = model.get_submodule(layer)
            assert depends_on(model, image, module, token, (row, column)) == inside, (row, column)


def test_a_token_depends_on_the_strips_that_are_shown_and_on_nothing_else():
    model, image = small("stripmlp_pico"), torch.randn(1, 3, 32, 32)
    views = {
        v.layer.rpartition(".")[2]: v for v in look(model, image, (0.3, 0.6)) if ".0.blocks.0." in v.layer
    }
    for name, one in views.items():
        (box,) = boxes(one)
        module = model.get_submodule("stages.0.blocks.0.token_mixing.strips." + name)
        for row, column in ((4, 9), (3, 0), (5, 15), (6, 9), (0, 8), (15, 10), (4, 11), (2, 2)):
            inside = box[0] * 16 <= row < box[2] * 16 and box[1] * 16 <= column < box[3] * 16
            assert depends_on(model, image, module, (4, 9), (row, column)) == inside, (name, row, column)


def test_every_block_with_routing_shows_its_choice(tiny):
    views = [v for v in look(tiny, torch.randn(1, 3, 224, 224)) if v.operator == "routed_attention"]
    names = [f"stages.{s}.blocks.{b}.attn" for s, n in enumerate((2, 2, 8)) for b in range(n)]
    assert [v.layer for v in views] == names
    assert [(len(v.seen), v.text) for v in views] == [
        (k, f"{k} of 49 regions") for k, n in ((1, 2), (4, 2), (16, 8)) for _ in range(n)
    ]
    assert {v.asking for v in views} == {region(3, 3)}


def test_regions_shown_are_those_of_the_routes(tiny):
    routes = {}
    router = tiny.stages[2].blocks[3].attn.router
    handle = router.register_forward_hook(lambda module, args, out: routes.update(here=out[0][0]))
    views = look(tiny, torch.randn(1, 3, 224, 224), (0.9, 0.1))
    handle.remove()
    (one,) = [v for v in views if v.layer == "stages.2.blocks.3.attn"]
    assert one.asking == region(6, 0)
    assert set(boxes(one)) == {
        tuple(round(x, 9) for x in region(*divmod(int(i), 7))) for i in routes["here"][6 * 7]
    }


def test_regions_of_a_padded_map_reach_past_the_image_and_are_cut(tiny):
    first = look(tiny, torch.randn(1, 3, 256, 192), (0.999, 0.999))[0]
    # a map of 64x48 tokens is padded to 70x49
    assert first.asking == pytest.approx((60 / 64, 42 / 48, 1, 1))


def test_keys_shown_are_those_that_heads_keep():
    model, lists = small("sparsifiner_pico", patch_size=4, depth=6), []

    def note(module, args, out):
        q, k, _ = module.qkv(args[0]).chunk(3, dim=-1)
        lists.append(module.predictor(q[:, 1:], k))

    image = torch.randn(1, 3, 32, 32)
    handles = [block.attn.register_forward_hook(note) for block in model.blocks]
    with torch.no_grad():
        model.eval()(image)
    for handle in handles:
        handle.remove()
    views = look(model, image, CENTRE)
    assert len(views) == len(lists) == 6
    token = 4 * 8 + 4
    for one, keys in zip(views, lists, strict=True):
        assert one.asking == region(4, 4, 8, 8)
        kept = [set(head[head >= 0].tolist()) for head in keys[0, :, token]]
        want = {
            tuple(region(*divmod(i - 1, 8), 8, 8)): sum(i in head for head in kept) / len(kept)
            for i in set.union(*kept)
            if i > 0
        }
        assert {tuple(box): strength for box, strength in one.seen} == pytest.approx(want)


def test_after_pruning_tokens_are_shown_where_they_lie():
    model = small("sparsifiner_pico", patch_size=4, token_pruning_loc=[1, 3], token_keep_rate=0.7)
    image = torch.randn(1, 3, 32, 32)
    last = [look(model, image, ((y + 0.5) / 8, (x + 0.5) / 8))[-1] for y in range(8) for x in range(8)]
    alive = {one.asking for one in last if one.text != "its token was pruned"}
    tokens = []
    handle = model.blocks[-1].register_forward_pre_hook(
        lambda module, args: tokens.extend(args[1][0, 1:].tolist())
    )
    with torch.no_grad():
        model(image)
    handle.remove()
    assert 8 < len(tokens) < 64
    assert alive == {region(*divmod(token - 1, 8), 8, 8) for token in tokens}
    assert {box for one in last for box, _ in one.seen} <= alive


def test_a_semantic_token_gathers_from_its_patch_with_the_strength_of_its_attention():
    model = small("stvit_swin_pico")
    taken = {}
    layer = "stages.1.blocks.1.layer1.attn"
    module = model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda module, args: taken.update(x=args))
    views = look(model, torch.randn(1, 3, 32, 32), (0.9, 0.1))
    handle.remove()
    (one,) = [v for v in views if v.layer == layer]
    # 4 x 4 centres in windows of 2; the window at the lower left has rows 2 to 7 and columns 0 to 5 of 8
    assert one.asking == region(3, 0, 4, 4)
    assert {(b[0] >= 0.25, b[3] <= 0.75) for b in boxes(one)} == {(True, True)}
    assert len(one.seen) == 36
    assert max(strength for _, strength in one.seen) == 1
    centres, image = taken["x"]
    heads = module.num_heads
    with torch.no_grad():
        query = module.q(centres)[0, 3, 0].view(heads, -1)
        own, patch = centres[0, 2:, :2].flatten(0, 1), image[0, 2:8, 0:6].flatten(0, 1)
        keys = module.kv(torch.cat([own, patch])).chunk(2, -1)[0].view(40, heads, -1)
        scores = torch.einsum("hd,nhd->hn", query, keys) * query.shape[-1] ** -0.5
    weights = scores.softmax(-1).mean(0)[4:]
    torch.testing.assert_close(
        torch.tensor([s for _, s in one.seen]), weights / weights.max(), rtol=1e-4, atol=1e-5
    )


def test_full_attention_is_shown_as_strong_as_it_is():
    model = small("vit_tiny_patch16_224", depth=1, img_size=(64, 96), num_classes=0)
    block = model.blocks[0].attn
    block.fused_attn = True
    taken = {}
    handle = block.register_forward_pre_hook(lambda module, args: taken.update(x=args[0]))
    (one,) = look(model, torch.randn(1, 3, 64, 96), (0.99, 0.01))
    handle.remove()
    assert one.asking == region(3, 0, 4, 6)
    with torch.no_grad():
        q, k, _ = block.qkv(taken["x"]).view(1, 25, 3, 3, 64).permute(2, 0, 3, 1, 4)
        weights = torch.einsum("hd,hnd->hn", q[0, :, 19], k[0]) * 64**-0.5
    weights = weights.softmax(-1).mean(0)[1:]
    torch.testing.assert_close(
        torch.tensor([s for _, s in one.seen]), weights / weights.max(), rtol=1e-4, atol=1e-5
    )


def test_channel_attention_looks_at_everything():
    views = [
        v
        for v in look(small("davit_fused_pico"), torch.randn(1, 3, 32, 32))
        if v.operator == "channel_attention"
    ]
    assert len(views) == 3
    assert {(v.asking, v.seen) for v in views} == {(EVERYTHING, ((EVERYTHING, 1.0),))}


# --- watching ---------------------------------------------------------------------------------------------------------


def test_looking_leaves_the_model_as_it_came(tiny):
    tiny.train()
    look(tiny, torch.randn(1, 3, 64, 64))
    assert tiny.training
    tiny.eval()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_looking_does_the_same_where_only_the_definitions_may_run(tiny, monkeypatch):
    image = torch.randn(1, 3, 64, 64)
    want = look(tiny, image)
    monkeypatch.setattr(library, "_load", lambda *_: pytest.fail("compiled, though that is forbidden"))
    with use_ops("reference"):
        found = look(tiny, image)
        assert library.mode() == "reference"
    assert [(v.layer, v.asking, v.text) for v in found] == [(v.layer, v.asking, v.text) for v in want]


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_a_panel_shows_what_is_seen_as_it_is_and_dims_the_rest():
    white = Image.new("RGB", SIDE, "white")
    panel = draw_panel(white, [view(0, 48)], SIDE)
    middle = {at: panel.getpixel((20 * at[1] + 10, 20 * at[0] + 10)) for at in ((0, 0), (6, 6), (2, 5))}
    assert middle[0, 0] == middle[6, 6] == (255, 255, 255)
    assert max(middle[2, 5]) < 128


def test_strength_is_brightness():
    white = Image.new("RGB", SIDE, "white")
    seen = tuple((region(0, i), (i + 1) / 5) for i in range(5))
    panel = draw_panel(white, [View("a.b", "sparse_attention", region(3, 3), seen, "")], SIDE)
    brightness = [panel.getpixel((20 * i + 10, 10))[0] for i in range(5)]
    assert brightness == sorted(set(brightness))
    assert brightness[-1] == 255


def test_a_panel_changes_where_the_choice_changes_and_nowhere_else(photo):
    before, after = draw_panel(photo, [view(0, 10)], SIDE), draw_panel(photo, [view(0, 46)], SIDE)
    difference = ImageChops.difference(before, after).convert("L")
    frame = 4  # outlines of a neighbour reach in
    changed = set()
    for row in range(7):
        for column in range(7):
            left, top = 20 * column + frame, 20 * row + frame
            inside = (left, top, left + 20 - 2 * frame, top + 20 - 2 * frame)
            if max(difference.crop(inside).getextrema()) > 0:
                changed.add((row, column))
    assert changed == {(1, 3), (6, 4)}


def test_what_asks_is_framed_in_its_own_colour():
    black = Image.new("RGB", SIDE, "black")
    panel = draw_panel(black, [view(0)], SIDE)
    left, top = 60, 60
    assert (
        panel.getpixel((left + 10, top)) != panel.getpixel((18, 10)) != panel.getpixel((left + 10, top + 10))
    )
    moved = draw_panel(black, [view(0, asking=(6, 6))], SIDE)
    assert moved.getpixel((left + 10, top)) != panel.getpixel((left + 10, top))


@pytest.mark.parametrize("name", PICOS)
def test_every_family_has_a_picture(name, photo, tmp_path):
    views = explain_picture(small(name), photo, tmp_path / "a.png")
    assert all(v.text for v in views)
    for one in views:
        for box, strength in ((one.asking, 1.0), *one.seen):
            assert 0 <= box.top < box.bottom <= 1
            assert 0 <= box.left < box.right <= 1
            assert 0 < strength <= 1
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.height > 400


def test_there_is_a_pico_of_every_family():
    assert {next(f for f, names in list_families().items() if name in names) for name in PICOS} == set(
        list_families()
    )


def test_the_picture_follows_the_model(tiny, photo, tmp_path):
    views = explain_picture(tiny, photo, tmp_path / "a.png", img_size=64, note="random weights")
    assert len(views) == 14
    torch.manual_seed(5)
    explain_picture(
        create_model("biformer_tiny"), photo, tmp_path / "b.png", img_size=64, note="random weights"
    )
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    explain_picture(tiny, photo, tmp_path / "c.png", img_size=64, note="random weights")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_a_rectangular_photo_at_an_odd_size_can_be_drawn(tiny, photo, tmp_path):
    explain_picture(tiny, photo, tmp_path / "odd.png", point=(0.9, 0.1), img_size=(50, 75))
    assert (tmp_path / "odd.png").is_file()


def test_a_model_with_nothing_to_show_is_refused_and_leaves_no_file(photo, tmp_path):
    with pytest.raises(ValueError, match="has no attention and no strips to show"):
        explain_picture(create_model("test_resnet"), photo, tmp_path / "no.png")
    assert list(tmp_path.iterdir()) == []


def test_impossible_requests_are_refused(tiny, photo, tmp_path):
    with pytest.raises(ValueError, match="shares between 0 and 1"):
        explain_picture(tiny, photo, tmp_path / "a.png", point=(3, 3))
    with pytest.raises(ValueError, match=r"end with \.png"):
        explain_picture(tiny, photo, tmp_path / "a.gif")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not an image"):
        explain_picture(tiny, broken, tmp_path / "a.png")
    with pytest.raises(ValueError, match="one image of shape"):
        look(tiny, torch.zeros(2, 3, 64, 64))
