"""Strip-MLP against what the authors' code computed, and at sizes other than the one it was made for."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.layers.grn import GlobalResponseNorm
from timm.models._input import get_model_traits

from vitrail import profile
from vitrail.ops import strip_mix, use_ops
from vitrail.zoo.stripmlp import (
    RelativePosition,
    ResponseNorm,
    StripLayer,
    StripMLP,
    StripMLPBlock,
    checkpoint_filter_fn,
)
from vitrail.zoo.stripmlp_weights import resample_strips, resample_table
from vitrail.zoo.weights import CheckpointError, convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from parity import authors_checkpoint, check_parity, keep_input, notebook  # noqa: E402
from seeded import load_case, relative_error, seeded_image, seeded_tensor  # noqa: E402

CASES = sorted(path.stem for path in GOLDEN.glob("stripmlp_*.npz"))
OPTIONS = json.loads((GOLDEN / "stripmlp_options.json").read_text())
SMALL = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_classes": 5}


def load(model, state_dict):
    model.double().load_state_dict(checkpoint_filter_fn(state_dict, model))
    return model.eval()


def record_taps(model):
    """Hooks that note every feature map under its golden name, in the golden layout."""
    taps, keep = notebook()

    def keep_grid(module, name):
        keep(module, name, lambda out: out.permute(0, 3, 1, 2))

    keep(model.stem, "stem")
    for i, stage in enumerate(model.stages):
        if i:
            keep(stage.downsample, f"stage{i}.downsample")
        keep(stage, f"stage{i}")
        for j, block in enumerate(stage.blocks):
            keep_grid(block, f"stage{i}.block{j}")
            keep_grid(block.token_mixing, f"stage{i}.block{j}.token_mixing")
    keep(model.stages[2].skips[0], "conv_s1_28")
    keep(model.stages[3].skips[0], "conv_s1_14")
    keep(model.stages[3].skips[1], "conv_s2_14")
    keep(model.norm, "norm")
    keep_input(taps, model.head.fc, "pre_logits")
    return taps


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_feature_map_equal_the_authors(name, mode):
    case = load_case(GOLDEN / f"{name}.json")
    model = load(timm.create_model(case.model, **case.kwargs), authors_checkpoint(case))
    check_parity(case, model, record_taps, mode)


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("name", ["stripmlp_tiny_light_224", "stripmlp_tiny_light_256"])
def test_float32_stays_within_1e_5(name, mode):
    case = load_case(GOLDEN / f"{name}.json")
    model = load(timm.create_model(case.model, **case.kwargs), authors_checkpoint(case)).float()
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image(case.input_shape, case.input_seed).float())
    assert relative_error(logits, case.logits) < 1e-5


def authors_weights(case):
    """The state dict of one case of options, in the authors' layout."""
    return {
        key: torch.tensor(0) if kind == "derived" else seeded_tensor(key, shape, kind)
        for key, (shape, kind) in (OPTIONS["parameters"] | case["parameters"]).items()
    }


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("case", OPTIONS["cases"], ids=lambda case: json.dumps(case["options"]))
def test_every_option_of_the_published_code_computes_what_it_does_there(case, mode):
    model = load(StripMLP(**OPTIONS["base"] | case["options"]), authors_weights(case))
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image(case["input_shape"], OPTIONS["input_seed"]))
    assert relative_error(logits, torch.tensor(case["logits"], dtype=torch.float64)) < 1e-9


def test_response_norm_is_timms_in_fewer_passes():
    torch.manual_seed(0)
    ours, timms = ResponseNorm(6).double(), GlobalResponseNorm(6).double()
    for parameter in timms.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), timms(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["tiny_light", "tiny", "small", "base"])
def test_parameters_and_macs_are_those_of_the_paper(name):
    report = profile(f"stripmlp_{name}")
    assert [c.figure for c in report.comparisons] == ["parameters (M)", "GMAC"]
    assert report.failures == []


# --- options ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "widths that do not split": ({"embed_dim": 28}, "a stage of width 28 cannot be cut .* make embed_dim a multiple of 8"),
    "odd widths": ({"embed_dim": 33}, "a stage of width 33 cannot be cut"),
    "too little width": ({"embed_dim": 4}, "a stage of width 4 cannot be cut"),
    "three stages": ({"depths": (1, 1, 1)}, r"depths must have four entries, one per stage, got \(1, 1, 1\)"),
    "no patches": ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
    "rectangular patches": ({"patch_size": (4, 4)}, r"patch_size must be a positive integer, got \(4, 4\)"),
    "sizes between": ({"img_size": 250}, "multiple of 32 .* got 250 x 250; the nearest are 224 x 224 and 256 x 256"),
    "one side between": ({"img_size": (224, 230)}, "got 224 x 230; the nearest are 224 x 224 and 224 x 256"),
    "too small": ({"img_size": 20}, "got 20 x 20; the nearest are 32 x 32 and 32 x 32"),
    "nothing": ({"img_size": 0}, "got 0 x 0; the nearest are 32 x 32"),
    "finer patches": ({"img_size": 40, "patch_size": 2}, r"multiple of 16 \(8 times the patch size\).* 32 x 32 and 48 x 48"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_with_the_reason(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        StripMLP(device="meta", **options)


def test_unknown_options_raise_type_error():
    with pytest.raises(TypeError, match="not_an_option"):
        timm.create_model("stripmlp_tiny", device="meta", not_an_option=1)


def drop_path_rates(model):
    return [round(m.drop_prob, 3) for m in model.modules() if isinstance(m, DropPath)]


def test_stochastic_depth_rises_or_is_uniform_as_the_authors_trained():
    assert drop_path_rates(StripMLP(**SMALL)) == []
    assert drop_path_rates(StripMLP(**SMALL, drop_path_rate=0.3)) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    uniform = StripMLP(**SMALL, drop_path_rate=0.1, uniform_drop_path=True)
    assert drop_path_rates(uniform) == [0.1] * 8


def test_dropout_comes_before_the_classifier():
    model = StripMLP(**SMALL, img_size=32, drop_rate=0.5).train()
    torch.nn.init.ones_(model.head.fc.weight)
    features = torch.ones(64, 128, 1, 1)
    assert model.forward_head(features).std() > 1
    assert model.eval().forward_head(features).std(0).max() == 0


def test_the_expansion_of_channel_mixing_can_be_chosen():
    model = StripMLP(**SMALL, img_size=32, mlp_ratio=2)
    assert model.stages[0].blocks[0].channel_mixing.mlp.fc1.weight.shape == (32, 16)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


# --- input sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, (64, 32), (32, 96), (96, 128)], ids=str)
@pytest.mark.parametrize("name", ["stripmlp_tiny_light", "stripmlp_pico"])
def test_sizes_of_32_pixels_run_and_both_paths_agree(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, **SMALL).double().eval()
    image = torch.randn(2, 3, *model.img_size, dtype=torch.float64)
    with torch.inference_mode():
        fused = model(image)
        with use_ops("reference"):
            reference = model(image)
    assert fused.isfinite().all()
    assert relative_error(fused, reference) < 1e-10


def test_positions_depend_on_the_distance_from_the_diagonal():
    position = RelativePosition(2, (3, 5)).double()
    assert position.table.shape == (11, 2)
    got = position(torch.zeros(1, 3, 5, 2, dtype=torch.float64))
    for y in range(3):
        for x in range(5):
            assert torch.equal(got[0, y, x], position.table[x - y + 5])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 64, 64), r"takes images of 64 x 96, got 64 x 64; resize them, .*img_size=.*set_input_size\(\)"),
        ((1, 3, 96, 64), "takes images of 64 x 96, got 96 x 64"),
        ((1, 4, 64, 96), r"expected images of shape \(batch, 3, 64, 96\), got \[1, 4, 64, 96\]"),
        ((3, 64, 96), "expected images of shape"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(shape, message):
    model = StripMLP(**SMALL, img_size=(64, 96))
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))


def test_a_live_model_changes_its_size_and_stays_what_it_is_otherwise():
    torch.manual_seed(0)
    model = timm.create_model("stripmlp_tiny", img_size=64, **SMALL).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.requires_grad_(False)
    model.set_input_size(img_size=(96, 128))
    assert not any(p.requires_grad for p in model.parameters())
    assert model(torch.randn(1, 3, 96, 128)).shape == (1, 5)
    with pytest.raises(ValueError, match="takes images of 96 x 128"):
        model(torch.randn(1, 3, 64, 64))
    assert get_model_traits(model)["img_size"] == (96, 128)
    fresh = timm.create_model("stripmlp_tiny", img_size=(96, 128), **SMALL)
    for key, value in model.state_dict().items():
        assert value.shape == fresh.state_dict()[key].shape, key
        if not ("_mix." in key or "_pos." in key):
            assert torch.equal(value, before[key]), key


def test_the_same_size_changes_nothing():
    model = StripMLP(**SMALL, img_size=(64, 96))
    before = dict(model.named_parameters())
    model.set_input_size(img_size=(64, 96))
    model.set_input_size()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_size_that_cannot_be_leaves_the_model_as_it_was():
    model = StripMLP(**SMALL, img_size=32)
    with pytest.raises(ValueError, match="the nearest are 32 x 32 and 64 x 64"):
        model.set_input_size(img_size=50)
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_a_model_made_on_the_meta_device_gets_its_positions_with_its_memory():
    from timm.models._manipulate import reinit_non_persistent_buffers

    model = StripMLP(**SMALL, img_size=32, device="meta").to_empty(device="cpu")
    reinit_non_persistent_buffers(model)
    want = StripMLP(**SMALL, img_size=32)
    for got, module in zip(model.modules(), want.modules(), strict=True):
        if isinstance(module, RelativePosition):
            assert torch.equal(got.index, module.index)


# --- resampling -------------------------------------------------------------------------------------------------------


def resized(x, length):
    """A `(B, strips, L, C)` grid with longer or shorter strips."""
    return F.interpolate(
        x.permute(0, 3, 1, 2), size=(x.shape[1], length), mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)


def wave(length, phase=0.0):
    """A smooth function of the place on a strip."""
    return torch.cos(torch.pi * (torch.arange(length, dtype=torch.float64) + 0.5) / length + phase)


@pytest.mark.parametrize("lengths", [(7, 8), (7, 14), (14, 7), (8, 3), (4, 1)], ids=str)
def test_a_constant_strip_becomes_what_it_became_before(lengths):
    """The weights of a position keep their sum, whatever they are."""
    old, new = lengths
    g = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, old, old, 3), (old, 3)))
    x = torch.randn(2, 5, 1, 6, generator=g, dtype=torch.float64)
    got = strip_mix(x.expand(-1, -1, new, -1), *resample_strips(weight, bias, new))
    want = strip_mix(x.expand(-1, -1, old, -1), weight, bias)
    torch.testing.assert_close(got, resized(want, new))


@pytest.mark.parametrize("lengths", [(14, 16), (14, 28), (28, 56)], ids=str)
def test_a_longer_smooth_strip_becomes_what_the_shorter_one_became(lengths):
    old, new = lengths
    g = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, old, old, 3), (old, 3)))

    def grid(length):
        return (
            torch.stack([wave(length, phase) for phase in (0, 1, 2)], -1).expand(1, 5, length, 3).contiguous()
        )

    want = resized(strip_mix(grid(old), weight, bias), new)
    got = strip_mix(grid(new), *resample_strips(weight, bias, new))
    assert relative_error(got, want) < 0.02


def test_smooth_strips_and_tables_survive_a_way_there_and_back():
    smooth = (wave(14)[:, None] * wave(14, 1.0))[None, :, :, None].expand(3, -1, -1, 2).contiguous()
    bias = wave(14)[:, None].expand(-1, 2).contiguous()
    weight, back = resample_strips(*resample_strips(smooth, bias, 28), 14)
    assert relative_error(weight, smooth) < 0.1
    assert relative_error(back, bias) < 0.02
    table = wave(29)[:, None].expand(-1, 2)
    used = slice(1, -1)
    assert relative_error(resample_table(resample_table(table, 28), 14)[used], table[used]) < 0.02


def test_a_table_keeps_the_meaning_of_a_distance_and_takes_nothing_from_its_unused_ends():
    old = torch.arange(-7.0, 8)[:, None].repeat(1, 2)
    old[[0, -1]] = torch.nan
    new = resample_table(old, 14)
    distance = (torch.arange(-14.0, 15) / 2).clamp(-6, 6)  # half as far on a map of half the size
    assert torch.equal(new, distance[:, None].expand(-1, 2))
    assert resample_table(old, 7) is old
    assert resample_table(torch.tensor([[torch.nan], [5.0], [torch.nan]]), 2).flatten().tolist() == [5.0] * 5


def smooth_network(size):
    """Smooth strip weights and tables; the convolutions inside a stage look at one pixel, the others take means."""
    torch.manual_seed(0)
    model = StripMLP(**SMALL, img_size=size).double().eval()
    for module in model.modules():
        if isinstance(module, StripLayer):
            length, groups = module.bias.shape
            waves = [wave(length, g)[:, None] * wave(length, 2 * g) for g in range(groups)]
            module.weight.data = torch.stack(waves, -1).repeat(3, 1, 1, 1) / length
            module.bias.data = wave(length)[:, None].repeat(1, groups)
        elif isinstance(module, RelativePosition):
            module.table.data = wave(len(module.table))[:, None] * wave(module.table.shape[1])
        elif isinstance(module, torch.nn.Conv2d) and module.stride == (1, 1):
            middle = [n // 2 for n in module.kernel_size]
            module.weight.data.zero_()[..., middle[0], middle[1]] = 1
        elif isinstance(module, torch.nn.Conv2d):
            means = module.weight.data.mean((2, 3), keepdim=True)
            module.weight.data = means.expand_as(module.weight).contiguous()
    return model


def smooth_image(size):
    return torch.stack([wave(size)[:, None] + wave(size, phase) for phase in (0.0, 0.5, 1.0)])[None]


@pytest.mark.parametrize("size", [160, 192, 256])
def test_logits_of_a_smooth_network_stay_close(size):
    model = smooth_network(128)
    with torch.no_grad():
        want = model(smooth_image(128))
        model.set_input_size(size)
        assert relative_error(model(smooth_image(size)), want) < 0.03
        for module in model.modules():
            if isinstance(module, StripLayer):
                torch.nn.init.normal_(module.weight, std=module.weight.std().item())
        assert relative_error(model(smooth_image(size)), want) > 0.2  # so they do matter


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_authors_layout_loads_through_timm_and_converts(tmp_path):
    """A training checkpoint as the authors save them: weights under `model`, options beside them."""
    case = load_case(GOLDEN / "stripmlp_tiny_light_224.json")
    weights = {
        key: value.float() if value.is_floating_point() else value
        for key, value in authors_checkpoint(case).items()
    }
    torch.save({"model": weights, "epoch": 299}, tmp_path / "authors.pth")
    report = convert_checkpoint(
        "stripmlp_tiny_light", tmp_path / "authors.pth", tmp_path / "ours.safetensors"
    )
    assert (report.parameters, report.num_classes) == (case.params, 1000)
    for name in ("authors.pth", "ours.safetensors"):
        overlay = {"file": str(tmp_path / name)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = timm.create_model("stripmlp_tiny_light", pretrained=True, pretrained_cfg_overlay=overlay)
        with torch.inference_mode():
            logits = model.eval()(seeded_image(case.input_shape, case.input_seed).float())
        assert relative_error(logits, case.logits) < 1e-5


@pytest.fixture(scope="module")
def case_64():
    """The smallest of the networks that the authors' code computed, made for 64 x 64 pixels."""
    return OPTIONS["cases"][0]


@pytest.mark.parametrize("layout", ["the authors'", "ours"])
@pytest.mark.parametrize("size", [(96, 96), (32, 32), (64, 128)], ids=str)
def test_a_checkpoint_of_another_size_is_resampled_and_says_so(case_64, layout, size):
    same = load(StripMLP(**OPTIONS["base"]), authors_weights(case_64))
    weights = authors_weights(case_64) if layout == "the authors'" else same.state_dict()
    model = StripMLP(**OPTIONS["base"] | {"img_size": size})
    message = (
        rf"checkpoint is for images of 64 x 64 pixels, the model for {size[0]} x {size[1]}: .* were resampled"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        load(model, weights)
    assert len(caught) == 1
    same.set_input_size(img_size=size)
    for key, value in same.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-14, msg=key)


def test_a_checkpoint_of_the_same_size_says_nothing(case_64):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(StripMLP(**OPTIONS["base"]), authors_weights(case_64))


def test_a_resampled_checkpoint_loads_through_timm_with_other_classes_and_channels(tmp_path):
    torch.save(timm.create_model("stripmlp_pico").state_dict(), tmp_path / "pico.pth")
    overlay = {"file": str(tmp_path / "pico.pth")}
    with pytest.warns(UserWarning, match="images of 32 x 32 pixels, the model for 48 x 64"):
        model = timm.create_model(
            "stripmlp_pico",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            img_size=(48, 64),
            num_classes=5,
            in_chans=1,
        )
    assert model(torch.randn(2, 1, 48, 64)).shape == (2, 5)


def change(key, edit):
    return lambda weights: weights | {key: edit(weights[key])}


STRIP = "blocks1.0.token_mixing.smlp_block.proj_h."
DAMAGED = {
    "another width": (lambda w: w | {"norm.weight": torch.ones(64)}, r"of another shape .* norm.weight \(64,\) instead of \(128,\)"),
    "strips that are not square": (change(STRIP + "weight", lambda w: w[:, 1:]), "of another shape .*row_mix.weight"),
    "a strip without its bias": (lambda w: {k: v for k, v in w.items() if k != STRIP + "bias"}, "missing .*row_mix.bias"),
    "a strip without its weight": (lambda w: {k: v for k, v in w.items() if k != STRIP + "weight"}, "missing .*row_mix.weight"),
    "groups of another network": (change(STRIP + "weight", lambda w: w[:16]), r"of another shape .*row_mix.weight \(3, 16, 16, 1\)"),
    "a table with one row too few": (
        change("blocks1.0.token_mixing.smlp_block.relate_pos_h.embeddings_table", lambda t: t[1:]), "of another shape .*row_pos.table",
    ),
    "what is no number": (change(STRIP + "bias", lambda b: b * torch.nan), "NaN or infinity .*row_mix.bias"),
    "something else": (lambda w: {"a": torch.ones(1)}, "this is no checkpoint of StripMLP"),
}  # fmt: skip


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(case_64, case, size):
    edit, message = DAMAGED[case]
    model = StripMLP(**OPTIONS["base"] | {"img_size": size})
    with pytest.raises(CheckpointError, match=message):
        checkpoint_filter_fn(edit(authors_weights(case_64)), model)


@pytest.mark.parametrize("name", ["stripmlp_tiny_light", "stripmlp_tiny", "stripmlp_small", "stripmlp_base"])
def test_pretrained_says_where_the_weights_are_and_how_to_use_them(name):
    with pytest.raises(
        CheckpointError, match=rf"no weights for {name} .*pan.baidu.com.*file=.*vitrail convert"
    ):
        timm.create_model(name, pretrained=True)


def test_no_weights_of_pico_were_ever_published():
    with pytest.raises(CheckpointError, match="no weights for stripmlp_pico to load: none were published"):
        timm.create_model("stripmlp_pico", pretrained=True)


# --- timm -------------------------------------------------------------------------------------------------------------


def test_skips_reach_the_maps_of_stages_three_and_four():
    """What travels past a stage is in the maps of `forward_intermediates` and `features_only`, too."""
    torch.manual_seed(0)
    model = StripMLP(**SMALL, img_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(image)
        torch.testing.assert_close(model.norm(maps[3]), final)
        torch.testing.assert_close(final, model.forward_features(image))
        torch.testing.assert_close(model.forward_intermediates(image, 2, norm=True)[1][1], final)
        early, (early_map,) = model.forward_intermediates(image, [2], stop_early=True)
        torch.testing.assert_close(early_map, maps[2])
        torch.testing.assert_close(early, maps[2])
        for skip, changed in ((model.stages[2].skips[0], {2, 3}), (model.stages[3].skips[1], {3})):
            skip.weight.zero_()
            without = model.forward_intermediates(image, intermediates_only=True)
            assert {i for i in range(4) if not torch.equal(maps[i], without[i])} == changed
            maps = without


@pytest.mark.parametrize("form", ["list", "dict", "hook", "getter", "fx"])
def test_every_form_of_a_feature_pyramid_has_the_maps_of_the_network(form):
    """timm's own list and dict would run the stages one after the other, without the skips."""
    torch.manual_seed(0)
    args = {**SMALL, "img_size": (32, 64), "out_indices": (0, -2, 3)}
    net = timm.create_model("stripmlp_tiny", features_only=True, feature_cls=form, **args).eval()
    torch.manual_seed(0)
    model = timm.create_model("stripmlp_tiny", **args).eval()
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        maps, wanted = net(image), model.forward_intermediates(image, [0, 2, 3], intermediates_only=True)
    if form == "dict":
        assert list(maps) == ["0", "2", "3"]
        maps = list(maps.values())
    for got, want in zip(maps, wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert net.feature_info.reduction() == [4, 16, 32]


def test_reductions_follow_the_patch_size():
    net = timm.create_model("stripmlp_pico", features_only=True)
    assert net.feature_info.reduction() == [2, 4, 8, 16]
    assert [m.shape[-1] for m in net(torch.randn(1, 3, 32, 32))] == [16, 8, 4, 2]


def test_every_parameter_belongs_to_a_layer_of_the_layer_wise_schedule():
    from timm.models import group_parameters

    model = StripMLP(**SMALL, img_size=32)
    groups = group_parameters(model, model.group_matcher())
    grouped = [name for names in groups.values() for name in names]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    assert groups[0] == ["stem.weight"]
    (with_skips,) = (names for names in groups.values() if "stages.3.skips.0.weight" in names)
    assert {"stages.3.downsample.weight", "stages.3.skips.1.weight"} < set(with_skips)
    assert all(name.startswith(("stages.3.", "norm.")) for name in with_skips)


def test_blocks_compute_the_same_whatever_the_memory_layout():
    torch.manual_seed(0)
    block = StripMLPBlock(16, (4, 6), 3.0, 0.0, None, None).double().eval()
    x = torch.randn(2, 4, 6, 16, dtype=torch.float64)
    other = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not other.is_contiguous()
    with torch.no_grad(), pytest.raises(ValueError, match="contiguous channels"):
        strip_mix(other, block.token_mixing.strips.row_mix.weight)
    with torch.no_grad():
        torch.testing.assert_close(block(other), block(x))
