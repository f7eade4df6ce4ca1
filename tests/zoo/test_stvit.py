"""STViT on Swin against what the authors' code computed, and what the paper says of the forms without code."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.ops import use_ops
from vitrail.profiling import count_with_torch, profile
from vitrail.zoo.stvit import max_pool_bins
from vitrail.zoo.stvit_swin import STViTSwin, checkpoint_filter_fn
from vitrail.zoo.stvit_weights import from_swin_names
from vitrail.zoo.weights import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from parity import authors_checkpoint, check_parity, keep_input, notebook  # noqa: E402
from seeded import (  # noqa: E402
    fingerprint,
    load_case,
    relative_error,
    seeded_image,
    seeded_tensor,
)

CASES = sorted(path.stem for path in GOLDEN.glob("stvitr_*.npz"))
OPTIONS = json.loads((GOLDEN / "stvit_options.json").read_text())
SMALL = {"depths": (1, 1, 6, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 4), "num_classes": 7}
NAMES = ["stvit_swin_tiny", "stvit_r_swin_tiny"]


def small(name, **kwargs):
    args = SMALL if name.startswith("stvit_r") else SMALL | {"image_blocks": 2}
    return timm.create_model(name, **args | kwargs)


def create(case):
    return timm.create_model(case.model.replace("stvitr_", "stvit_r_"), **case.kwargs)


def load(model, state_dict):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.double().load_state_dict(checkpoint_filter_fn(state_dict, model))
    return model.eval()


def record_taps(model):
    """Hooks that note every feature map under its golden name, in the golden layout."""
    taps, keep = notebook()

    def same(x):
        return x

    def image(x):
        return x.permute(0, 3, 1, 2)

    def tokens(x):
        return x.flatten(1, -2)

    keep(model.stem, "stem", same)
    for i, stage in enumerate(model.stages):
        if i:
            keep(stage.downsample, f"stage{i}.downsample", image)
        keep(stage, f"stage{i}", same)
        if i != model.semantic_stage:
            for j, block in enumerate(stage.blocks):
                keep(block, f"stage{i}.block{j}", image)
            continue
        for j in range(0, len(stage.blocks), 2):
            at, unit = 3 * j, stage.blocks[j + 1]
            keep(stage.blocks[j], f"stage{i}.block{at}", image)
            parts = (unit.generation.layer1, unit.generation.layer2, *unit.layers)
            for k, part in enumerate(parts):
                keep(part, f"stage{i}.block{at + 1 + k}", tokens)
            keep(unit, f"stage{i}.block{at + 5}", image)
    keep(model.norm, "norm", same)
    keep_input(taps, model.head.fc, "pre_logits")
    return taps


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_feature_map_equal_the_authors(name, mode):
    case = load_case(GOLDEN / f"{name}.json")
    model = load(create(case), authors_checkpoint(case))
    check_parity(case, model, record_taps, mode)


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("name", ["stvitr_swin_small_224", "stvitr_swin_small_flags_224"])
def test_float32_stays_within_1e_5(name, mode):
    case = load_case(GOLDEN / f"{name}.json")
    model = load(create(case), authors_checkpoint(case)).float()
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image(case.input_shape, case.input_seed).float())
    assert relative_error(logits, case.logits) < 1e-5


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("case", OPTIONS["cases"], ids=lambda case: json.dumps(case["options"]))
def test_every_option_of_the_published_code_computes_what_it_does_there(case, mode):
    parameters = OPTIONS["parameters"] | case["parameters"]
    state_dict = {
        key: seeded_tensor(key, shape, kind)
        for key, (shape, kind) in parameters.items()
        if key not in case["absent"]
    }
    state_dict |= {key: torch.tensor(0) for key in map(counter, state_dict) if key}
    size = case["options"].get("img_size", 224)
    model = load(STViTSwin(**OPTIONS["base"] | case["options"]), state_dict)
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image((2, 3, size, size), OPTIONS["image_seed"]))
    assert relative_error(logits, torch.tensor(case["logits"], dtype=torch.float64)) < 1e-9


def counter(key):
    """The counter that goes with a running mean, which published files hold and the golden ones leave out."""
    return key.replace("running_mean", "num_batches_tracked") if key.endswith("running_mean") else None


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize(
    "case", OPTIONS["padding"]["cases"], ids=lambda case: "{} x {}".format(*case["size"])
)
def test_maps_that_windows_do_not_divide_are_padded_as_in_the_authors_code_for_detection(case, mode):
    padding = OPTIONS["padding"]
    model = STViTSwin(**padding["base"]).double().eval()
    state_dict = {key: seeded_tensor(key, *entry) for key, entry in padding["parameters"].items()}
    missing, unknown = model.load_state_dict(from_swin_names(state_dict, model), strict=False)
    assert unknown == []
    assert not any(key.startswith(("stages.0.", "stages.1.")) for key in missing)
    taps = record_taps(model)
    with torch.inference_mode(), use_ops(mode):
        model(seeded_image((2, 3, *case["size"]), padding["image_seed"]))
    for name, want in case["taps"].items():
        got = fingerprint(name, taps[name], len(want["sample"]))
        assert list(got.shape) == want["shape"]
        assert relative_error(got.sample, torch.tensor(want["sample"], dtype=torch.float64)) < 1e-9, name
        assert got.mean == pytest.approx(want["mean"], abs=1e-9)
        assert got.std == pytest.approx(want["std"], rel=1e-9)


# --- figures ----------------------------------------------------------------------------------------------------------


def count(name, **kwargs):
    model = timm.create_model(name, device="meta", **kwargs).eval()
    image = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    return sum(p.numel() for p in model.parameters()) / 1e6, count_with_torch(model, image) / 1e9


@pytest.mark.parametrize(
    ("name", "params", "gmac", "dim"),
    [("stvit_r_swin_small", 49.63, 5.82, 384), ("stvit_r_swin_base", 87.81, 10.26, 512)],
)
def test_stvit_r_does_what_was_published_with_three_percent_fewer_products(name, params, gmac, dim):
    """The published code projects a token once for each patch that holds it, we project it once: 232, not 436."""
    got = count(name)
    assert got[0] == pytest.approx(params, abs=0.005)
    repeated = 3 * (4 * (9 + 100) - (36 + 196)) * (dim * 2 * dim + 5 * dim) / 1e9
    assert got[1] + repeated == pytest.approx(gmac, rel=0.001)


def test_the_profile_says_which_products_are_saved_and_counts_every_operation():
    report = profile("stvit_r_swin_small")
    assert report.ok, report.failures
    (gmac,) = (c for c in report.comparisons if c.figure.startswith("GMAC"))
    assert gmac.ours == pytest.approx(report.macs / 1e9 + 0.1805, rel=1e-4)
    assert gmac.paper == 5.82
    assert [(path.path, path.uncounted) for path in report.paths] == [("fused", {}), ("reference", {})]


@pytest.mark.parametrize(("name", "params"), [("tiny", 28.29), ("small", 49.61), ("base", 87.77)])
def test_stvit_on_swin_has_the_parameters_of_swin(name, params):
    assert count(f"stvit_swin_{name}")[0] == pytest.approx(params, rel=0.002)


@pytest.mark.parametrize(
    ("name", "swin", "less"), [("tiny", 4.5, 0.24), ("small", 8.7, 0.25), ("base", 15.4, 0.25)]
)
def test_nine_semantic_tokens_save_a_quarter_of_swin_as_in_table_2(name, swin, less):
    assert count(f"stvit_swin_{name}", sample_window_size=3)[1] == pytest.approx(swin * (1 - less), rel=0.02)


@pytest.mark.parametrize(("name", "swin"), [("tiny", 4.5), ("small", 8.7), ("base", 15.4)])
def test_sixteen_semantic_tokens_save_about_a_fifth(name, swin):
    assert count(f"stvit_swin_{name}")[1] / swin == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("name", ["stvit_swin_pico", "stvit_r_swin_pico"])
def test_pico_has_under_a_million_parameters(name):
    assert count(name)[0] < 1


# --- semantic tokens --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(h=st.integers(1, 40), w=st.integers(1, 40), bins_h=st.integers(1, 20), bins_w=st.integers(1, 20))
def test_bins_are_those_of_adaptive_pooling(h, w, bins_h, bins_w):
    x = torch.randn(2, h, w, 3)
    want = torch.nn.functional.adaptive_max_pool2d(x.permute(0, 3, 1, 2), (bins_h, bins_w)).permute(
        0, 2, 3, 1
    )
    assert torch.equal(max_pool_bins(x, bins_h, bins_w), want)


def test_each_window_of_seven_is_pooled_by_itself():
    x = torch.randn(2, 14, 21, 3)
    windows = x.unflatten(2, (3, 7)).unflatten(1, (2, 7)).permute(0, 1, 3, 5, 2, 4).flatten(0, 2)
    want = torch.nn.functional.max_pool2d(windows, 3, 2).unflatten(0, (2, 2, 3)).permute(0, 1, 4, 2, 5, 3)
    assert torch.equal(max_pool_bins(x, 6, 9), want.flatten(3, 4).flatten(1, 2))


def generation_of(model):
    return next(m for m in model.modules() if type(m).__name__ == "SemanticTokens")


def test_stvit_works_on_sixteen_tokens_a_window_after_generation():
    model = timm.create_model("stvit_swin_tiny", **SMALL | {"image_blocks": 2}).eval()
    shapes = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("SelfLayer", "SemanticTokens"):
            module.register_forward_hook(
                lambda m, args, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:3]))
            )
    with torch.inference_mode():
        model(torch.randn(1, 3, 224, 224))
    assert shapes == {
        "stages.0.blocks.0": (56, 56), "stages.1.blocks.0": (28, 28),
        "stages.2.blocks.0": (14, 14), "stages.2.blocks.1": (14, 14),
        "stages.2.blocks.2": (8, 8), "stages.2.blocks.3": (8, 8), "stages.2.blocks.4": (8, 8),
        "stages.3.blocks.0": (4, 4),
    }  # fmt: skip


def test_in_stvit_nothing_but_the_semantic_tokens_reaches_the_output():
    model = small("stvit_swin_tiny").eval()
    generation_of(model).register_forward_hook(lambda module, args, out: out.detach())
    image = torch.randn(1, 3, 224, 224, requires_grad=True)
    assert torch.autograd.grad(model(image).sum(), image, allow_unused=True) == (None,)


def test_in_stvit_r_the_image_tokens_go_on():
    model = small("stvit_r_swin_tiny").eval()
    generation_of(model).register_forward_hook(lambda module, args, out: out.detach())
    image = torch.randn(1, 3, 224, 224, requires_grad=True)
    assert torch.autograd.grad(model(image).sum(), image)[0].abs().sum() > 0


def test_layers_of_semantic_tokens_are_local_and_global_in_turn():
    model = small("stvit_r_swin_tiny", init_values=None).double().eval()
    local, everywhere = model.stages[2].blocks[1].layers
    x = torch.randn(1, 6, 6, 64, dtype=torch.float64)
    moved = x.clone()
    moved[0, 0, 0] = -moved[0, 0, 0]
    with torch.inference_mode():
        changed = [(layer(x) - layer(moved)).abs().sum(-1)[0] > 1e-12 for layer in (local, everywhere)]
    assert changed[0][:3, :3].all()
    assert changed[0].sum() == 9
    assert changed[1].all()


# --- input sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (96, 96), (97, 131), (333, 200), (33, 224), (224, 448)])
@pytest.mark.parametrize("name", NAMES)
def test_any_size_runs_and_both_paths_agree(name, size):
    torch.manual_seed(0)
    model = small(name).double().eval()
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        fused = model(image)
        with use_ops("reference"):
            reference = model(image)
    assert fused.isfinite().all()
    assert relative_error(fused, reference) < 1e-10


@pytest.mark.parametrize(
    ("size", "tokens"),
    [(224, (6, 6)), ((224, 448), (6, 12)), (256, (6, 6)), (288, (9, 9)), ((16, 176), (3, 6))],
)
def test_windows_come_as_close_to_seven_tokens_as_the_map_allows(size, tokens):
    model = small("stvit_r_swin_tiny").eval()
    taps = record_taps(model)
    with torch.inference_mode():
        model(torch.randn(1, 3, *timm.layers.to_2tuple(size)))
    assert taps["stage2.block1"].shape[1] == tokens[0] * tokens[1]


def test_swapping_height_and_width_swaps_the_map():
    """Nothing in the network prefers rows to columns, but for the tables of positions."""
    torch.manual_seed(0)
    model = small("stvit_r_swin_tiny", init_values=None, shortcut=True).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.data.zero_()
        if name.startswith("stem.proj") and parameter.dim() == 4:
            parameter.data.copy_((parameter + parameter.transpose(2, 3)) / 2)
        if name.endswith(("downsample.norm.weight", "downsample.norm.bias", "downsample.reduction.weight")):
            a, b, c, d = parameter.data.chunk(4, -1)
            parameter.data.copy_(torch.cat([a, (b + c) / 2, (b + c) / 2, d], -1))
    image = torch.randn(1, 3, 224, 352, dtype=torch.float64)
    with torch.inference_mode():
        want = model.forward_features(image).transpose(2, 3)
        assert relative_error(model.forward_features(image.transpose(2, 3)), want) < 1e-10


def test_tables_made_for_one_size_are_resampled_for_another():
    options = {"use_global": True, "relative_pos": True, "ape": True}
    torch.manual_seed(0)
    model = small("stvit_r_swin_tiny", **options).double().eval()
    image = torch.randn(1, 3, 352, 224, dtype=torch.float64)
    other = small("stvit_r_swin_tiny", img_size=(352, 224), **options).double().eval()
    with pytest.warns(UserWarning, match="relative_position_bias_table is resampled from 6 x 6 to 9 x 6"):
        state_dict = checkpoint_filter_fn(model.state_dict(), other)
    assert state_dict["stages.2.blocks.1.generation.centers"].shape == (1, 9, 6, 64)
    other.load_state_dict(state_dict)
    with torch.inference_mode():
        torch.testing.assert_close(other(image), model(image))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 64, 64), r"expected images of shape \(batch, 3, height, width\), got \[1, 4, 64, 64\]"),
        ((3, 64, 64), "expected images of shape"),
        ((1, 3, 0, 64), "images must be at least 1 x 1 pixels, got 0 x 64"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_images_that_do_not_fit_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        small(name)(torch.randn(shape))


REFUSED = {
    "half a round": ({"depths": (2, 2, 8, 2)}, "rounds of 6 layers, so its depth must be a multiple of 6, got 8 .the published code leaves"),
    "no round": ({"depths": (2, 2, 0, 2)}, "multiple of 6, got 0"),
    "no room for generation": ({"recover": False, "image_blocks": 17}, "0 to 16 of the 18 layers of the semantic stage, got 17"),
    "heads missing": ({"num_heads": (3, 6)}, r"num_heads must have one entry per stage \(4, as depths\), got \(3, 6\)"),
    "heads that do not divide": ({"num_heads": (5, 6, 12, 24)}, "num_heads must be positive and divide the width 96, got 5"),
    "semantic heads that do not divide": ({"num_heads": (3, 6, 0, 24)}, "num_heads must be positive and divide the width 384, got 0"),
    "a stage that is not there": ({"semantic_stage": 4}, "semantic_stage must be from 0 to 3, got 4"),
    "no tokens": ({"sample_window_size": 0}, "window_size and sample_window_size must be positive, got 7 and 0"),
    "an odd stem": ({"patch_size": 3}, "patch_size must be 2 or 4 with a convolutional stem, got 3"),
    "an empty image": ({"img_size": 0}, "images must be at least 1 x 1 pixels, got 0 x 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_with_the_reason(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        STViTSwin(device="meta", **options)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_released_weights_are_on_the_hub():
    for name, file in (("small", "STViT-R-Swin-S.pth"), ("base", "STViT-R-Swin-B.pth")):
        cfg = timm.models.get_pretrained_cfg(f"stvit_r_swin_{name}")
        assert (cfg.hf_hub_id, cfg.hf_hub_filename) == ("csncsn/STViT-R", file)


def test_a_file_as_the_authors_released_it_loads(tmp_path):
    """Theirs hold the training state beside the weights, and tables of indices and masks among them."""
    case = load_case(GOLDEN / "stvitr_swin_small_224.json")
    weights = authors_checkpoint(case)
    state_dict = {
        key: value.float() if value.is_floating_point() else value for key, value in weights.items()
    }
    torch.save({"model": state_dict, "epoch": 299}, tmp_path / "STViT-R-Swin-S.pth")
    overlay = {"file": str(tmp_path / "STViT-R-Swin-S.pth")}
    model = timm.create_model("stvit_r_swin_small", pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(
        model.state_dict()["stages.2.blocks.5.recovery.attn.kv.bias"],
        state_dict["layers.2.blocks.17.attn.kv.bias"],
    )
    torch.testing.assert_close(
        model.state_dict()["stages.3.downsample.norm.weight"], state_dict["layers.2.downsample.norm.weight"]
    )


@pytest.mark.parametrize("layout", ["timm's", "Swin's"])
def test_a_swin_checkpoint_is_where_stvit_starts_from(layout):
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224").eval()
    state_dict = swin.state_dict()
    if layout == "Swin's":
        moved = {f"layers.{i}.downsample": f"layers.{i - 1}.downsample" for i in (1, 2, 3)} | {
            "head.fc": "head"
        }
        for new, old in moved.items():
            state_dict = {
                key.replace(new, old) if key.startswith(new) else key: x for key, x in state_dict.items()
            }
        state_dict["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    with pytest.warns(UserWarning, match="Swin|resampled") as messages:
        model = timm.create_model(
            "stvit_swin_tiny", pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict}
        )
    texts = [str(message.message) for message in messages]
    assert sum("weights of Swin are where STViT starts from" in text for text in texts) == 1
    assert (
        sum(
            "stages.3.blocks.1.attn.rel_pos.relative_position_bias_table is resampled from 7 x 7 to 4 x 4"
            in t
            for t in texts
        )
        == 1
    )
    model.eval()
    image = torch.randn(2, 3, 224, 224)
    maps = {}
    swin.layers[2].blocks[3].register_forward_hook(lambda module, args, out: maps.__setitem__("swin", out))
    model.stages[2].blocks[3].register_forward_hook(lambda module, args, out: maps.__setitem__("ours", out))
    with torch.inference_mode():
        swin(image), model(image)
    torch.testing.assert_close(maps["ours"], maps["swin"], rtol=1e-4, atol=1e-4)
    layer = model.stages[2].blocks[4].layer1.attn
    torch.testing.assert_close(
        torch.cat([layer.q.weight, layer.kv.weight]), swin.layers[2].blocks[4].attn.qkv.weight
    )


@pytest.mark.parametrize("name", ["stvit_swin_small", "stvit_r_swin_tiny", "stvit_swin_pico"])
def test_where_nothing_was_released_the_error_says_what_to_do(name):
    with pytest.raises(
        CheckpointError,
        match=f"there are no weights for {name} to load: .*swin_in1k_init.*pretrained_cfg_overlay",
    ):
        timm.create_model(name, pretrained=True)


def test_all_mismatches_are_listed():
    model = small("stvit_r_swin_tiny")
    model.pretrained_cfg = {"architecture": "stvit_r_swin_tiny"}
    state_dict = model.state_dict()
    del state_dict["norm.bias"]
    state_dict["layers.2.something"] = state_dict.pop("stages.2.blocks.1.recovery.attn.q.weight")
    state_dict["stages.0.blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        checkpoint_filter_fn(state_dict, model)
    for text in (
        "4 mismatches",
        "stages.2.blocks.1.recovery.attn.q.weight",
        "norm.bias",
        "layers.2.something",
        "fc1.bias (3,)",
    ):
        assert text in str(error.value)
