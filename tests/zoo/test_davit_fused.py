"""DaViT against what the authors' code computed, against timm's, and its weights in all their layouts."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from vitrail.export import to_onnx, verify_onnx
from vitrail.ops import use_ops
from vitrail.profiling import count_with_torch
from vitrail.published import published_figures
from vitrail.zoo.davit_fused import DaViT, checkpoint_filter_fn
from vitrail.zoo.weights import CheckpointError, convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from parity import authors_checkpoint, check_parity, keep_input, notebook  # noqa: E402
from seeded import load_case, official_state_dict, relative_error, seeded_image, seeded_tensor  # noqa: E402

CASES = sorted(path.stem for path in GOLDEN.glob("davit_*.npz"))
OPTIONS = json.loads((GOLDEN / "davit_options.json").read_text())
MODELS = timm.list_models("davit_fused*")
SMALL = {"depths": (1, 1, 2), "embed_dims": (32, 48, 64), "num_heads": (2, 3, 2), "num_classes": 7}


def ours(name):
    return name.replace("davit_", "davit_fused_")


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
        for j, pair in enumerate(stage.blocks):
            for kind, block in zip(("spatial", "channel"), pair, strict=True):
                keep(block, f"stage{i}.block{j}.{kind}", lambda out: out.permute(0, 3, 1, 2))
    keep_input(taps, model.head.fc, "pre_logits")
    return taps


# --- parity with the authors ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_feature_map_equal_the_authors(name, mode):
    case = load_case(GOLDEN / f"{name}.json")
    model = load(timm.create_model(ours(case.model), **case.kwargs), authors_checkpoint(case))
    check_parity(case, model, record_taps, mode)


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("name", ["davit_tiny_224", "davit_tiny_200x264"])
def test_float32_stays_within_1e_5(name, mode):
    case = load_case(GOLDEN / f"{name}.json")
    model = load(timm.create_model(ours(case.model), **case.kwargs), authors_checkpoint(case)).float()
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image(case.input_shape, case.input_seed).float())
    assert relative_error(logits, case.logits) < 1e-5


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("case", OPTIONS["cases"], ids=lambda case: json.dumps(case["options"]))
def test_every_option_of_the_published_code_computes_what_it_does_there(case, mode):
    shared = {} if case.get("alone") else OPTIONS["parameters"]
    state_dict = {key: seeded_tensor(key, *entry) for key, entry in (shared | case["parameters"]).items()}
    model = load(DaViT(**OPTIONS["base"] | case["options"]), state_dict)
    with torch.inference_mode(), use_ops(mode):
        logits = model(seeded_image(OPTIONS["input_shape"], OPTIONS["input_seed"]))
    assert relative_error(logits, torch.tensor(case["logits"], dtype=torch.float64)) < 1e-9


# --- equality with timm -----------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model):
    """Weights under which every part of the network shows in its output."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1:  # channel attention sums over many tokens, so it must be gentler
            gentle = (".attn.qkv." in name and ".1.attn" in name) or "channel_block.attn.qkv" in name
            p.normal_(std=(0.1 if gentle else 1.0) * p[0].numel() ** -0.5)
        else:
            p.normal_(std=0.1).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def pair(name, dtype=torch.float64, **kwargs):
    """timm's model and ours, with the very same weights."""
    theirs = randomise(timm.create_model(name, dtype=dtype, **kwargs)).eval()
    kwargs.pop("named_blocks", None)
    model = timm.create_model(ours(name), device="meta", dtype=dtype, **kwargs).eval()
    model.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), model), assign=True)
    return theirs, model


def assert_equal(theirs, model, sizes, limit=1e-12):
    for height, width in sizes:
        image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height)).double()
        with torch.inference_mode():
            want, *want_maps = theirs(image), *theirs.forward_intermediates(image, intermediates_only=True)
            got, *got_maps = model(image), *model.forward_intermediates(image, intermediates_only=True)
        assert relative_error(got, want) < limit
        for got_map, want_map in zip(got_maps, want_maps, strict=True):
            assert relative_error(got_map, want_map) < limit


@pytest.mark.long
@pytest.mark.parametrize("name", ["davit_tiny", "davit_small", "davit_base"])
def test_it_equals_timms_with_the_same_weights_at_any_size(name):
    # windows divide every map, none, and some; the last is smaller than a window throughout
    assert_equal(*pair(name), [(101, 75), (112, 168), (13, 20)] + [(224, 224)] * (name == "davit_tiny"))


REDUCED = {
    "davit_large": {"depths": (1, 1, 1, 0)},
    "davit_base_fl": {"depths": (1, 1, 1, 1), "embed_dims": (64, 128, 256, 512)},
    "davit_huge_fl": {"depths": (1, 1, 1, 0)},
    "davit_huge": {"depths": (1, 1, 1, 0)},
    "davit_giant": {"depths": (1, 1, 1, 0)},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("davit_huge", "davit_giant") else [])
        for name in REDUCED
    ],
)
def test_the_large_forms_equal_timms_where_they_are_cut_short(name):
    assert_equal(*pair(name, num_classes=5, **REDUCED[name]), [(96, 96), (75, 101)])


@pytest.mark.parametrize(
    "options",
    [
        {"head_norm_first": True},
        {"head_norm_first": True, "global_pool": "catavgmax"},
        {"channel_attn_v2": True, "window_size": 12, "down_kernel_size": 3},
        {"channel_attn_v2": True, "named_blocks": True},
        {"norm_layer": "rmsnorm2d", "norm_layer_cl": "rmsnorm", "norm_eps": 1e-3},
        {"named_blocks": True, "attn_types": ("channel", "spatial")},
        {"attn_types": ("channel", "spatial", "channel")},
        {"cpe_act": True, "ffn": False, "attn_types": ("channel",)},
        {"down_kernel_size": 5},
        {"global_pool": "max"},
        {"qkv_bias": False, "mlp_ratio": 2},
    ],
    ids=json.dumps,
)
def test_timms_options_compute_what_they_do_there(options):
    assert_equal(*pair("davit_tiny", **SMALL, **options), [(101, 75)])


SHARED = sorted(set(timm.list_models("davit_*")) & {name.replace("_fused", "") for name in MODELS})


def test_every_davit_of_timm_is_here():
    assert [name for name in timm.list_models("davit_*") if not name.startswith("davit_fused")] == SHARED


@pytest.mark.parametrize("name", SHARED)
def test_default_arguments_are_those_of_timm(name):
    theirs, model = (timm.create_model(n, device="meta") for n in (name, ours(name)))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    shapes = {k.replace("spatial_block", "0").replace("channel_block", "1"): v for k, v in shapes.items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}
    assert theirs.feature_info == model.feature_info


@pytest.mark.parametrize("mode", ["fused", "reference"])
def test_gradients_equal_timms_also_where_windows_reach_past_the_map(mode):
    theirs, model = pair("davit_tiny", **SMALL)
    model.load_state_dict(theirs.state_dict(), assign=True)
    image = torch.randn(2, 3, 75, 101, dtype=torch.float64)
    theirs(image).square().sum().backward()
    want = {name: p.grad.clone() for name, p in theirs.named_parameters()}
    theirs.zero_grad()
    with use_ops(mode):
        model(image).square().sum().backward()
    assert max(relative_error(p.grad, want[name]) for name, p in model.named_parameters()) < 1e-9


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if published_figures(name)])
def test_parameters_and_multiply_accumulates_are_the_published_ones(name):
    paper = published_figures(name)
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(paper.params, rel=1e-3)
    image = torch.empty(1, 3, paper.img_size, paper.img_size, device="meta")
    assert count_with_torch(model, image) / 1e9 == pytest.approx(paper.gmac, rel=0.02)


def test_pico_is_small():
    assert sum(p.numel() for p in timm.create_model("davit_fused_pico", device="meta").parameters()) < 1e6


# --- options and sizes ------------------------------------------------------------------------------------------------

REFUSED = {
    "entries missing": ({"embed_dims": (32, 64)}, r"embed_dims must have one entry per stage \(4, as depths\), got \(32, 64\)"),
    "heads missing": ({"num_heads": (1,)}, r"num_heads must have one entry per stage \(4, as depths\), got \(1,\)"),
    "heads that do not fit": ({"num_heads": (3, 6, 11, 24)}, "num_heads must divide embed_dims, got 11 and 384 in stage 2"),
    "no heads": ({"num_heads": (0, 6, 12, 24)}, "num_heads must divide embed_dims, got 0 and 96 in stage 0"),
    "an empty window": ({"window_size": (7, 0)}, r"window_size must be positive, got \(7, 0\)"),
    "an unknown attention": ({"attn_types": ("spatial", "temporal")}, "attn_types must be some of 'spatial' and 'channel'"),
    "a stem that cannot run": ({"patch_size": 2}, "patch_size must be 4, got 2: the published code builds 2, with a norm"),
    "an unknown stem": ({"patch_size": 8}, "patch_size must be 4, got 8$"),
    "an even kernel": ({"down_kernel_size": 4}, "down_kernel_size must be 2 or odd, got 4"),
    "no kernel": ({"down_kernel_size": 0}, "down_kernel_size must be 2 or odd, got 0"),
    "pooling that widens": ({"global_pool": "catavgmax"}, "'catavgmax' doubles the width.*or head_norm_first=True"),
    "unknown weights": ({"weight_init": "jax"}, "weight_init must be empty or 'conv', got 'jax'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_with_the_reason(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        DaViT(device="meta", **options)


def test_unknown_options_raise_type_error():
    with pytest.raises(TypeError, match="not_an_option"):
        timm.create_model("davit_fused_tiny", device="meta", not_an_option=1)


def test_convolutions_may_start_as_in_the_authors_other_initialisation():
    stds = {}
    for weight_init in ("", "conv"):
        torch.manual_seed(0)
        model = DaViT(weight_init=weight_init, **SMALL)
        stds[weight_init] = model.stages[1].downsample.conv.weight.std().item()
        assert model.stages[0].blocks[0][0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert stds["conv"] == pytest.approx(0.02, rel=0.1)
    assert stds[""] > 0.04


def test_stochastic_depth_rises_over_all_attentions_as_in_the_authors_code():
    model = DaViT(depths=(1, 2), embed_dims=(32, 32), num_heads=(1, 1), drop_path_rate=0.5, device="meta")
    rates = [
        getattr(block.drop_path1, "drop_prob", 0.0)
        for stage in model.stages
        for pair in stage.blocks
        for block in pair
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (96, 96), (97, 131), (333, 200), (33, 224)])
@pytest.mark.parametrize("options", [{}, {"window_size": (3, 8)}, {"channel_attn_v2": True}], ids=json.dumps)
def test_any_size_runs_and_both_paths_agree(size, options):
    torch.manual_seed(0)
    model = randomise(DaViT(**SMALL, **options)).double().eval()
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        fused = model(image)
        with use_ops("reference"):
            reference = model(image)
    assert fused.isfinite().all()
    assert relative_error(fused, reference) < 1e-12


def test_no_map_is_ever_laid_out_anew():
    """(B, C, H, W) to the outside, channels last in memory: from the stem on, a permute is a view."""
    model = DaViT(**SMALL).eval()
    seen = []
    for module in (model.stem.conv, model.stem, *model.stages, *(s.downsample for s in model.stages)):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.inference_mode():
        model(torch.randn(2, 3, 76, 108))
    assert len(seen) == 8
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (3, 64, 64)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(batch, 3, height, width\), got \["):
        DaViT(**SMALL)(torch.randn(shape))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    return load_case(GOLDEN / "davit_tiny_224.json")


@pytest.fixture(scope="module")
def authors_file(case, tmp_path_factory):
    """A training checkpoint as the authors save them."""
    path = tmp_path_factory.mktemp("weights") / "authors.pth"
    weights = {f"module.{key}": value.float() for key, value in official_state_dict(case).items()}
    torch.save({"state_dict": weights, "epoch": 299, "arch": "DaViT_tiny"}, path)
    return path


def test_the_authors_files_load_and_convert(case, authors_file, tmp_path):
    convert_checkpoint("davit_fused_tiny", authors_file, tmp_path / "ours.safetensors")
    for file in (authors_file, tmp_path / "ours.safetensors"):
        overlay = {"file": str(file)}
        model = timm.create_model("davit_fused_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval()
        with torch.inference_mode():
            logits = model(seeded_image(case.input_shape, case.input_seed).float())
        assert relative_error(logits, case.logits) < 1e-5


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of local folders, one per repository, and the list of what was asked of it."""
    asked = []

    def download(repo_id, filename, revision=None, cache_dir=None):
        asked.append(repo_id)
        file = tmp_path / repo_id / filename
        if not file.is_file():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(file)

    def put(repo_id, state_dict):
        (tmp_path / repo_id).mkdir(parents=True)
        save_file(
            {key: value.contiguous() for key, value in state_dict.items()},
            tmp_path / repo_id / "model.safetensors",
        )

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return asked, put


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_pretrained_takes_timms_weights_from_the_hub(size, hub):
    asked, put = hub
    theirs = randomise(timm.create_model(f"davit_{size}", depths=(1, 1, 1, 1)))
    put(f"timm/davit_{size}.msft_in1k", theirs.state_dict())
    model = timm.create_model(f"davit_fused_{size}", pretrained=True, depths=(1, 1, 1, 1))
    assert set(asked) == {f"timm/davit_{size}.msft_in1k"}
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in model.state_dict().items())
    cfg = timm.get_pretrained_cfg(f"davit_{size}")
    for key in ("mean", "std", "interpolation", "crop_pct", "input_size", "num_classes"):
        assert model.pretrained_cfg[key] == getattr(cfg, key), key


def test_pretrained_weights_adapt_to_classes_channels_and_feature_pyramids(hub):
    _, put = hub
    put("timm/davit_tiny.msft_in1k", timm.create_model("davit_tiny").state_dict())
    model = timm.create_model("davit_fused_tiny", pretrained=True, num_classes=5, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    net = timm.create_model("davit_fused_tiny", pretrained=True, features_only=True)
    assert [x.shape[1] for x in net(torch.randn(1, 3, 64, 64))] == [96, 192, 384, 768]


def florence(state_dict):
    """Our weights under the names of Florence-2's checkpoints, among those of its language model."""
    names = (
        ("stem.", "convs.0."), (".conv.", ".proj."), (".downsample.", "."), (".blocks.", "/"), ("stages.", "convs."),
        (".cpe1.proj.", ".conv1.fn.dw."), (".cpe2.proj.", ".conv2.fn.dw."), (".norm2.", ".ffn.norm."), (".mlp.", ".ffn.fn.net."),
    )  # fmt: skip
    out = {"language_model.model.shared.weight": torch.zeros(3), "image_projection": torch.zeros(2, 2)}
    for key, value in state_dict.items():
        if key.startswith("head."):
            continue
        for old, new in names:
            key = key.replace(old, new)
        if "/" in key:
            stage, rest = key.removeprefix("convs.").split("/")
            pair, kind, rest = rest.split(".", 2)
            attention = ("window_attn", "channel_attn")[int(kind)]
            rest = rest.replace("norm1.", f"{attention}.norm.") if rest.startswith("norm1.") else rest
            rest = rest.replace("attn.", f"{attention}.fn.", 1) if rest.startswith("attn.") else rest
            key = f"blocks.{stage}.{pair}.{attention.replace('window', 'spatial').replace('attn', 'block')}.{rest}"
        out[f"vision_tower.{key}"] = value
    return out


def test_the_tower_of_florence_2_loads_as_timm_loads_it(hub):
    asked, put = hub
    small = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4)}
    source = randomise(timm.create_model("davit_fused_base_fl", **small))
    names = florence(source.state_dict())
    assert "vision_tower.blocks.1.0.spatial_block.window_attn.fn.qkv.weight" in names
    assert "vision_tower.blocks.1.0.channel_block.ffn.fn.net.fc1.bias" in names
    assert "vision_tower.convs.1.proj.weight" in names
    put("microsoft/Florence-2-base", names)
    model = timm.create_model("davit_fused_base_fl", pretrained=True, **small).double().eval()
    theirs = timm.create_model("davit_base_fl", pretrained=True, **small).double().eval()
    assert set(asked) == {"microsoft/Florence-2-base"}
    assert torch.equal(
        model.stages[1].blocks[0][1].attn.qkv.weight, source.stages[1].blocks[0][1].attn.qkv.weight
    )
    assert_equal(theirs, model, [(100, 76)])
    assert torch.equal(model.head.norm.weight, torch.ones(32))


BROKEN = {
    "another depth": (lambda s: s | {"stages.2.blocks.3.0.norm1.weight": torch.zeros(384)}, r"1 mismatches: unknown \(1\): stages.2.blocks.3.0.norm1.weight"),
    "another width": (lambda s: s | {"head.norm.bias": torch.zeros(7)}, r"1 mismatches: of another shape \(1\): head.norm.bias \(7,\) instead of \(768,\)"),
    "a part missing": (lambda s: {k: v for k, v in s.items() if ".cpe2." not in k}, r"24 mismatches: missing \(24\): stages.0.blocks.0.0.cpe2"),
    "not a number": (lambda s: s | {"stem.norm.bias": torch.full((96,), torch.nan)}, r"with NaN or infinity \(1\): stem.norm.bias"),
    "another network": (lambda s: {f"layer.{i}": v for i, v in enumerate(s.values())}, "no checkpoint of davit_fused_tiny: 0 of its"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(case, tmp_path):
    change, message = BROKEN[case]
    torch.save(change(timm.create_model("davit_tiny").state_dict()), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        timm.create_model(
            "davit_fused_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "file.pth")}
        )


def test_where_nothing_was_published_the_error_says_what_to_do():
    with pytest.raises(
        CheckpointError, match=r"no weights for davit_fused_large .*: tiny, small and base.*file="
    ):
        timm.create_model("davit_fused_large", pretrained=True, device="meta")


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_one_file_serves_every_batch_height_and_width(tmp_path):
    torch.manual_seed(0)
    options = {"channel_attn_v2": True, "down_kernel_size": 3}
    model = randomise(DaViT(depths=(1, 1), embed_dims=(32, 48), num_heads=(2, 3), **options)).eval()
    report = to_onnx(model, tmp_path / "model.onnx", img_size=224, dynamic=("batch", "height", "width"))
    assert [value.shape for value in report.inputs] == [("batch", 3, "height", "width")]
    assert report.notes == ()
    for size in ((200, 264), (97, 131), (336, 224)):
        assert verify_onnx(tmp_path / "model.onnx", model, img_size=size).passed
