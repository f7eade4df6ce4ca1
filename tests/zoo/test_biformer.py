"""BiFormer against what the authors' code computed, its options and its sizes. See also test_families.py."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

from vitrail.ops import use_ops
from vitrail.zoo.biformer import BiFormer, checkpoint_filter_fn

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from parity import authors_checkpoint, check_parity, keep_input, notebook  # noqa: E402
from seeded import check_tap, load_case, relative_error, seeded_image, seeded_tensor  # noqa: E402

CASES = sorted(path.stem for path in GOLDEN.glob("biformer_*.npz"))
OPTIONS = json.loads((GOLDEN / "biformer_options.json").read_text())


def load(model, state_dict):
    model.double().load_state_dict(checkpoint_filter_fn(state_dict, model))
    return model.eval()


def record_taps(model):
    """Hooks that note every feature map under its golden name, in the golden layout."""
    taps, keep = notebook()

    keep(model.stem, "stem")
    for i, stage in enumerate(model.stages):
        if i:
            keep(stage.downsample, f"stage{i}.downsample")
        keep(stage, f"stage{i}")
        for j, block in enumerate(stage.blocks):
            keep(block, f"stage{i}.block{j}", lambda out: out.permute(0, 3, 1, 2))
            if hasattr(block.attn, "router"):
                keep(block.attn.router, f"stage{i}.block{j}.routes", lambda out: out[0].sort(-1).values)
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
@pytest.mark.parametrize("name", ["biformer_tiny_224", "biformer_stl_nchw_256x192"])
def test_float32_chooses_the_same_regions_and_stays_within_1e_5(name, mode):
    case = load_case(GOLDEN / f"{name}.json")
    model = load(timm.create_model(case.model, **case.kwargs), authors_checkpoint(case)).float()
    taps = record_taps(model)
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image(case.input_shape, case.input_seed).float())
    assert relative_error(logits, case.logits) < 1e-5
    for tap in case.taps:
        if tap.endswith("routes"):
            assert check_tap(case, tap, taps[tap]) == 0, tap


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("case", OPTIONS["cases"], ids=lambda case: json.dumps(case["options"]))
def test_every_option_of_the_published_code_computes_what_it_does_there(case, mode):
    parameters = OPTIONS["parameters"] | case["parameters"]
    state_dict = {
        key: torch.tensor(0) if kind == "derived" else seeded_tensor(key, shape, kind)
        for key, (shape, kind) in parameters.items()
    }
    model = load(BiFormer(**OPTIONS["base"] | case["options"]), state_dict)
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image(OPTIONS["input_shape"], OPTIONS["input_seed"]))
    assert relative_error(logits, torch.tensor(case["logits"], dtype=torch.float64)) < 1e-9


# --- options ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "hard differentiable routing": ({"diff_routing": True}, "diff_routing needs soft_routing"),
    "a router that cannot learn": ({"soft_routing": True, "param_routing": True}, "param_routing needs diff_routing"),
    "a pooling never built": ({"kv_downsample_mode": "fracpool"}, "fracpool.*never built"),
    "an unknown pooling": ({"kv_downsample_mode": "mean"}, "kv_downsample_mode must be identity, .* got 'mean'"),
    "pooling to nothing": ({"kv_downsample_mode": "ada_avgpool"}, "kv_per_wins must be at least 1"),
    "entries missing": ({"topks": (1, 4)}, r"topks must have one entry per stage \(4, as depths\), got \(1, 4\)"),
    "heads that do not fit": ({"embed_dims": (65, 64, 96, 128)}, "number of heads, query width // head_dim = 2, must"),
    "a head wider than the map": ({"embed_dims": (16, 64, 96, 128)}, "query width // head_dim = 0, must be positive"),
    "an unknown attention": ({"param_attention": "q"}, "param_attention must be 'qkvo' or 'qkv', got 'q'"),
    "padding with soft routing": ({"pad_after": True, "soft_routing": True}, "plain routing only"),
    "an image size without padding": ({"auto_pad": False, "img_size": 256}, "multiples of 112, got 256 x 256; resize to 224 x 224"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_with_the_reason(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        BiFormer(device="meta", **options)


def test_unknown_options_raise_type_error():
    with pytest.raises(TypeError, match="not_an_option"):
        timm.create_model("biformer_tiny", device="meta", not_an_option=1)


def test_learned_routing_receives_a_gradient():
    options = {"soft_routing": True, "diff_routing": True, "param_routing": True}
    model = BiFormer(
        depths=(1, 1, 1, 1), embed_dims=(32, 32, 32, 32), num_classes=3, num_heads_full=1, **options
    )
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    grad = model.stages[1].blocks[0].attn.router.emb.weight.grad
    assert grad.abs().max() > 0


# --- input sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (97, 131), (333, 200), (33, 224)])
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_any_size_runs_and_both_paths_agree(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 1, 2, 1), num_classes=7).double().eval()
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        fused = model(image)
        with use_ops("reference"):
            reference = model(image)
    assert fused.isfinite().all()
    assert relative_error(fused, reference) < 1e-10


def test_without_padding_the_error_names_the_nearest_valid_size():
    model = timm.create_model("biformer_tiny", depths=(1, 1, 1, 1), auto_pad=False).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 112, 224)).shape == (1, 1000)
        with pytest.raises(
            ValueError, match=r"multiples of 112, got 100 x 300; resize to 112 x 336, or .*auto_pad=True"
        ):
            model(torch.randn(1, 3, 100, 300))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "biformer_tiny",
            (1, 4, 64, 64),
            r"expected images of shape \(batch, 3, height, width\), got \[1, 4, 64, 64\]",
        ),
        ("biformer_tiny", (3, 64, 64), "expected images of shape"),
        ("biformer_stl", (1, 3, 31, 64), "at least 32 x 32 pixels, got 31 x 64"),
    ],
)
def test_images_that_do_not_fit_are_refused(name, shape, message):
    model = timm.create_model(name, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))
