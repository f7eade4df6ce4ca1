"""Sparsifiner against what the authors' code computed, against DeiT, and in both of its training phases."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitrail.ops import use_ops
from vitrail.profiling import profile
from vitrail.zoo.sparsifiner import Sparsifiner, checkpoint_filter_fn
from vitrail.zoo.weights import CheckpointError, convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from parity import authors_checkpoint, check_parity, keep_input, notebook  # noqa: E402
from seeded import load_case, relative_error, seeded_image, seeded_tensor  # noqa: E402

CASES = sorted(path.stem for path in GOLDEN.glob("sparsifiner_*.npz"))
OPTIONS = json.loads((GOLDEN / "sparsifiner_options.json").read_text())


def load(model, state_dict):
    model.double().load_state_dict(checkpoint_filter_fn(state_dict, model))
    return model.eval()


def connectivity(keys, num_keys, tokens, num_tokens):
    """`(B, heads, N, N)`: 1 where a token attends to another; rows of pruned tokens are zero."""
    mask = torch.zeros(*keys.shape[:3], num_keys + 1).scatter(-1, torch.where(keys < 0, num_keys, keys), 1.0)
    full = torch.zeros(*keys.shape[:2], num_tokens, num_tokens)
    for image, chosen in enumerate(mask[..., :num_keys]):
        alive = torch.arange(num_tokens) if tokens is None else tokens[image]
        full[image][:, alive[1:, None], alive] = chosen
    full[:, :, 0] = 1  # the class token attends to all
    return full


def record_taps(model):
    """Hooks that note every feature map under its golden name, in the golden layout."""
    taps, keep = notebook()
    grid, num_tokens = model.patch_embed.grid_size, model.patch_embed.num_patches + 1

    keep(model.patch_embed, "stem", lambda out: out.mT.unflatten(2, grid))
    for i, block in enumerate(model.blocks):

        def note_keys(module, x, tokens, name=f"block{i}.connectivity"):
            q, k, _ = module.attn.qkv(module.norm1(x)).chunk(3, dim=-1)
            keys = module.attn.predictor(q[:, 1:], k, tokens)
            taps[name] = connectivity(keys, k.shape[1], tokens, num_tokens)

        def note_block(module, args, out, name=f"block{i}", note_keys=note_keys):
            note_keys(module, *args)
            x, tokens = out if module.prunes else (out, args[1])
            index = torch.arange(num_tokens).expand(len(x), -1) if tokens is None else tokens
            taps[name] = x.new_zeros(len(x), num_tokens, x.shape[2]).scatter(
                1, index[..., None].expand_as(x), x
            )
            if module.prunes:
                kept = torch.zeros(len(x), num_tokens).scatter(1, tokens, 1.0)
                taps[f"{name}.kept_tokens"] = kept[:, 1:]

        block.register_forward_hook(note_block)
    keep(model.norm, "norm")
    keep(model.head, "head")
    keep_input(taps, model.head, "pre_logits")
    if hasattr(model, "aux_head"):
        keep(model.aux_head, "aux_head")
    return taps


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_logits_every_feature_map_and_every_choice_equal_the_authors(name, mode):
    case = load_case(GOLDEN / f"{name}.json")
    model = load(timm.create_model(case.model, **case.kwargs), authors_checkpoint(case))
    check_parity(case, model, record_taps, mode)


@pytest.mark.parametrize("mode", ["fused", "reference"])
def test_float32_chooses_almost_the_same_keys(mode):
    case = load_case(GOLDEN / "sparsifiner_tiny_224.json")
    model = load(timm.create_model(case.model, **case.kwargs), authors_checkpoint(case))
    taps = record_taps(model)
    image = seeded_image(case.input_shape, case.input_seed)
    with torch.inference_mode(), use_ops(mode):
        model(image)
        want = {name: tap.clone() for name, tap in taps.items() if name.endswith("connectivity")}
        model.float()(image.float())
    for name, keys in want.items():
        assert (taps[name] - keys).abs().sum() <= 5e-3 * keys.sum(), name


def option_cases():
    for form, entry in OPTIONS["forms"].items():
        for case in entry["cases"]:
            yield pytest.param(
                form, entry, case, id=f"{form.removeprefix('sparsifiner_')}-{json.dumps(case['options'])}"
            )


def option_checkpoint(entry, case):
    """The authors' layout: a parameter of `blocks.*` is one of every block."""
    depth = (OPTIONS["base"] | entry["base"])["depth"]
    shapes = {k: v for k, v in (entry["parameters"] | case["parameters"]).items() if k not in case["absent"]}
    state_dict = {}
    for pattern, (shape, kind) in shapes.items():
        for key in {pattern.replace("*", str(i)) for i in range(depth)}:
            state_dict[key] = torch.tensor(0) if kind == "derived" else seeded_tensor(key, shape, kind)
    if case["options"].get("share_inout_proj"):
        for key in [key for key in state_dict if key.endswith("proj_back_n")]:
            state_dict[key] = state_dict[key.replace("proj_back_n", "proj_n")].clone()
    return state_dict


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize(("form", "entry", "case"), [*option_cases()])
def test_every_option_of_the_published_code_computes_what_it_does_there(form, entry, case, mode):
    """Pruned rows of the connectivity (`PRUNE_ATTN_MATRIX_ROW` there) make no difference: the authors' logits are equal
    to the last bit with and without them, and ours never compute them."""
    model = timm.create_model(form, **OPTIONS["base"] | entry["base"] | case["options"])
    load(model, option_checkpoint(entry, case))
    with torch.inference_mode(), use_ops(mode):
        images = seeded_image(OPTIONS["input_shape"], OPTIONS["input_seed"])
        logits = [model(images), model(images)]  # the authors' code computes another thing the second time
    for got in logits:
        assert relative_error(got, torch.tensor(case["logits"], dtype=torch.float64)) < 1e-9


def test_the_first_phase_has_the_loss_and_the_gradients_of_the_authors():
    entry = OPTIONS["forms"]["sparsifiner_small"]
    model = timm.create_model("sparsifiner_small", **OPTIONS["base"])
    load(model, option_checkpoint(entry, entry["cases"][0]))
    loss = model.reconstruction_loss(seeded_image(OPTIONS["input_shape"], OPTIONS["input_seed"]))
    loss.backward()
    assert loss.item() == pytest.approx(OPTIONS["reconstruction"]["loss"], rel=1e-12)
    names = {"q_down": "proj_c_q", "k_down": "proj_c_k", "token_down": "proj_n", "basis": "proj_back_n"}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            head, _, tail = name.partition(".predictor.")
            part, *rest = tail.split(".")
            found[".".join([head, "mask_predictor", names[part], *rest])] = parameter.grad.abs().sum().item()
    wanted = OPTIONS["reconstruction"]["gradients"]
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-9)


# --- against DeiT -----------------------------------------------------------------------------------------------------

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}


def deit(**kwargs):
    torch.manual_seed(1)
    return timm.create_model("deit_tiny_patch16_224", **SMALL | kwargs).double().eval()


def sparsifiner(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("sparsifiner_tiny", **SMALL | {"reduce_n_factor": 2} | kwargs).double().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:the checkpoint holds a trunk")
def test_with_all_keys_it_is_deit(images):
    trunk = deit()
    model = load(sparsifiner(attn_keep_rate=1.0), trunk.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(model(images), trunk(images))
        for ours, theirs in zip(
            model.forward_intermediates(images, intermediates_only=True),
            trunk.forward_intermediates(images, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:the checkpoint holds a trunk")
def test_the_first_phase_reconstructs_deits_attention(images):
    trunk = deit()
    model = load(sparsifiner(token_pruning_loc=(1,), token_keep_rate=0.5), trunk.state_dict())
    attention = []
    for block in trunk.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: attention.append(out))
    trunk(images)
    pairs = model.reconstruct_attention(images)
    assert len(pairs) == 4
    for (approximation, dense), want in zip(pairs, attention, strict=True):
        torch.testing.assert_close(dense, want[:, :, 1:])
        assert approximation.shape == dense.shape == (2, 3, 16, 17)
        assert not dense.requires_grad


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_count_is_below_deits(size):
    report = profile(f"sparsifiner_{size}")
    assert report.ok, report.failures
    assert report.macs < profile(f"deit_{size}_patch16_224").macs
    assert report.attention.claimed[0] < report.attention.reduction < report.attention.claimed[1]


def test_pruned_tokens_cost_nothing():
    whole = profile(timm.create_model("sparsifiner_tiny"))
    pruned = profile(timm.create_model("sparsifiner_tiny", token_pruning_loc=(3, 6, 9), token_keep_rate=0.5))
    assert pruned.ok, pruned.failures
    assert pruned.macs < 0.52 * whole.macs


# --- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"share_inout_proj": True}, {"token_pruning_loc": (1, 2), "token_keep_rate": 0.6}]
)
def test_the_predictor_learns_in_its_own_phase_and_the_rest_in_the_other(options, images):
    model = sparsifiner(**options).train()
    predictor = {name for name, _ in model.named_parameters() if ".predictor." in name}
    assert predictor

    def learns():
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    model.reconstruction_loss(images).backward()
    assert learns() == predictor
    model.zero_grad()
    model(images).square().sum().backward()
    assert learns() == {name for name, _ in model.named_parameters()} - predictor


def test_the_first_phase_brings_the_approximation_nearer(images):
    model = sparsifiner().train()
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".predictor." in n], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.reconstruction_loss(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_lvvits_second_classifier_can_be_trained_apart(images):
    torch.manual_seed(0)
    model = timm.create_model("sparsifiner_lvvit_small", **SMALL, reduce_n_factor=2).double()
    model.set_distilled_training()
    logits, auxiliary = model(images)
    assert (logits.shape, auxiliary.shape) == ((2, 5), (2, 16, 5))
    model.eval()
    with torch.inference_mode():
        tokens = model.forward_features(images)
        want = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1)
        torch.testing.assert_close(model(images), want)


# --- token pruning ----------------------------------------------------------------------------------------------------


def test_pruned_tokens_are_gone_from_the_blocks_and_zero_in_the_maps(images):
    model = sparsifiner(token_pruning_loc=(1, 2, 3), token_keep_rate=0.5)
    lengths = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    with torch.inference_mode():
        maps = model.forward_intermediates(images, intermediates_only=True)
    assert lengths == [17, 9, 5, 3]
    assert [int(m.ne(0).any(1).sum()) for m in maps] == [2 * 16, 2 * 8, 2 * 4, 2 * 2]
    for before, after in pairwise(maps):
        assert (before.ne(0).any(1) | after.eq(0).all(1)).all(), "a pruned token came back"


def test_each_quarter_of_the_network_keeps_another_power_of_the_share():
    model = sparsifiner(depth=12, token_pruning_loc=(3, 6, 9), token_keep_rate=0.7)
    assert [block.num_kept for block in model.blocks if block.prunes] == [12, 8, 6]
    assert [block.attn.num_pruned for block in model.blocks] == [0] * 4 + [4] * 3 + [8] * 3 + [10] * 2
    many = sparsifiner(attn_keep_rate=1.0, token_pruning_loc=(1,), token_keep_rate=0.7)
    assert [block.attn.predictor.num_keys for block in many.blocks] == [17, 17, 12, 12]


# --- options ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "heads": ({"num_heads": 5}, "num_heads must divide embed_dim 384, got 5"),
    "a predictor without width": ({"reduce_c_factor": 65}, "reduce_c_factor must lie between 1 and the head width 64, got 65"),
    "two rules for coefficients": ({"basis_coef_threshold": 0.1}, "with basis_coef_threshold 0.1 set basis_coef_topk=0, got 8"),
    "a block that is not there": ({"token_pruning_loc": (3, 12)}, r"token_pruning_loc must name blocks, 0 to 11, got \(3, 12\)"),
    "no keys": ({"attn_keep_rate": 0.0}, "attn_keep_rate must lie above 0 and up to 1, got 0.0"),
    "too many keys": ({"attn_keep_rate": 1.5}, "attn_keep_rate must lie above 0 and up to 1, got 1.5"),
    "too few shares": ({"attn_keep_rate": [0.5] * 11}, r"attn_keep_rate must have one share per block \(12\), got 11"),
    "no tokens": ({"token_keep_rate": 0}, "token_keep_rate must lie above 0"),
    "no basis": ({"reduce_n_factor": 198}, "the 197 tokens need at least one basis row, got 0"),
    "a size between patches": ({"img_size": 230}, "img_size must be a multiple of the patch, 16 x 16, got 230 x 230; nearest: 224 x 224"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_with_the_reason(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Sparsifiner(device="meta", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "5_1"}, "stem must be one of 4_2, 4_2_128, naive, got '5_1'"),
        ({"skip_lam": 0}, "skip_lam must be positive, got 0"),
        ({"global_pool": "avg"}, "global_pool must be 'token', got 'avg'"),
        ({"patch_size": 7, "img_size": 14}, "patch_size must be even"),
    ],
)
def test_what_lvvit_cannot_be_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("sparsifiner_lvvit_small", device="meta", **options)


def test_unknown_options_raise_type_error():
    with pytest.raises(TypeError, match="not_an_option"):
        timm.create_model("sparsifiner_tiny", device="meta", not_an_option=1)


# --- image size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 3, 64, 80),
            r"takes images of 64 x 64, got 64 x 80; resize them, build .*img_size.*set_input_size\(\)",
        ),
        ((1, 1, 64, 64), r"expected images of shape \(batch, 3, 64, 64\), got \[1, 1, 64, 64\]"),
        ((3, 64, 64), "expected images of shape"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        sparsifiner()(torch.randn(shape))


@pytest.mark.parametrize("form", ["sparsifiner_tiny", "sparsifiner_lvvit_small"])
def test_another_image_size_keeps_the_basis_and_resamples_it(form):
    torch.manual_seed(0)
    model = timm.create_model(form, **SMALL, token_pruning_loc=(2,), token_keep_rate=0.5).eval()
    basis = model.blocks[0].attn.predictor.basis.detach().clone()
    model.set_input_size((96, 32))
    predictor = model.blocks[0].attn.predictor
    assert predictor.basis.shape == predictor.token_down.shape == (13, 2)
    assert torch.equal(predictor.basis[0], basis[0]), "the class token has no place to resample"
    assert (predictor.num_keys, model.blocks[2].num_kept) == (4, 3)
    assert model(torch.randn(1, 3, 96, 32)).shape == (1, 5)
    rebuilt = timm.create_model(form, **SMALL | {"img_size": (96, 32)}, num_basis=2)
    rebuilt.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="got 100 x 32; nearest: 96 x 32"):
        model.set_input_size((100, 32))
    model.set_input_size((64, 64))
    assert model.blocks[0].attn.predictor.basis.shape == basis.shape


def test_the_patch_of_a_convolutional_stem_is_fixed():
    model = timm.create_model("sparsifiner_lvvit_small", **SMALL, device="meta")
    with pytest.raises(ValueError, match=r"the patch of a convolutional stem is fixed, \(16, 16\), got 8"):
        model.set_input_size((64, 64), 8)


def test_a_checkpoint_of_another_image_size_is_resampled_and_brings_its_basis(images):
    small = sparsifiner(reduce_n_factor=2)
    with (
        pytest.warns(UserWarning, match="images of 4 x 4 patches, the model for 6 x 4"),
        pytest.warns(UserWarning, match="from now on 8 basis rows, not 12"),
    ):
        large = load(sparsifiner(img_size=(96, 64), reduce_n_factor=2), small.state_dict())
    assert large.blocks[0].attn.predictor.basis.shape == (25, 8)
    assert large(torch.randn(1, 3, 96, 64, dtype=torch.float64)).isfinite().all()
    small.set_input_size((96, 64))
    for name, value in small.state_dict().items():
        torch.testing.assert_close(large.state_dict()[name], value, msg=name)
    fixed = sparsifiner(img_size=(96, 64), num_basis=12)
    with (
        pytest.warns(UserWarning, match="patches"),
        pytest.raises(CheckpointError, match=r"token_down \(25, 8\) instead of \(25, 12\)"),
    ):
        checkpoint_filter_fn(sparsifiner(reduce_n_factor=2).state_dict(), fixed)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparsifiner_tiny", "sparsifiner_lvvit_small", "sparsifiner_pico"])
def test_pretrained_says_that_there_are_none_and_what_to_do(name):
    assert name not in timm.list_pretrained("sparsifiner*")
    with pytest.raises(
        CheckpointError, match=f"no weights for {name} .*released no trained.*_in1k_init.*file="
    ) as caught:
        timm.create_model(name, pretrained=True, device="meta")
    tag = str(caught.value).split("create_model('")[1].split("'")[0]
    assert tag in timm.list_pretrained("sparsifiner*")


def test_deits_weights_come_from_timms_hub_and_leave_the_predictor_at_its_beginning(monkeypatch, tmp_path):
    asked = []
    trunk = timm.create_model("deit_tiny_patch16_224")
    save_file(trunk.state_dict(), tmp_path / "model.safetensors")

    def download(repository, name, **kwargs):
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.warns(UserWarning, match=r"trunk without connectivity predictors.*reconstruction_loss"):
        model = timm.create_model("sparsifiner_tiny.deit_in1k_init", pretrained=True)
    assert asked == [("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")]
    for name, value in trunk.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.blocks[0].attn.predictor.basis.std().item() == pytest.approx(0.02, rel=0.2)


def test_lvvits_weights_come_from_its_authors(monkeypatch, tmp_path):
    asked = []
    torch.manual_seed(3)
    source = timm.create_model("sparsifiner_lvvit_small", **SMALL)
    trunk = {key: value for key, value in source.state_dict().items() if ".predictor." not in key}

    def download(url, path, **kwargs):
        asked.append(url)
        torch.save(trunk, path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    overlay = {"num_classes": 5}
    with pytest.warns(UserWarning, match="trunk without"):
        model = timm.create_model(
            "sparsifiner_lvvit_small.lvvit_in1k_init",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            **SMALL,
        )
    address = "https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/"
    assert asked == [f"{address}lvvit_s-26M-224-83.3.pth.tar"]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in trunk.items())


def test_a_local_file_of_deits_layout_starts_the_trunk(tmp_path):
    trunk = timm.create_model("deit_tiny_patch16_224", **SMALL | {"num_classes": 1000})
    torch.save({"model": trunk.state_dict()}, tmp_path / "deit.pth")
    arguments = {**SMALL, "pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "deit.pth")}}
    with pytest.warns(UserWarning, match="trunk without"):
        model = timm.create_model("sparsifiner_tiny", in_chans=1, **arguments)
    assert torch.equal(model.blocks[3].mlp.fc2.weight, trunk.blocks[3].mlp.fc2.weight)
    assert model.patch_embed.proj.weight.shape == (48, 1, 16, 16)
    assert model.head.weight.shape == (5, 48)


def test_the_authors_layout_converts_to_ours(tmp_path):
    case = load_case(GOLDEN / "sparsifiner_tiny_224.json")
    authors = {key: value.float() for key, value in authors_checkpoint(case).items()}
    torch.save({"model": authors}, tmp_path / "authors.pth")
    report = convert_checkpoint("sparsifiner_tiny", tmp_path / "authors.pth", tmp_path / "ours.safetensors")
    assert (report.parameters, report.num_classes) == (case.params, 1000)
    model = timm.create_model(
        "sparsifiner_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "ours.safetensors")},
    )
    basis = authors["blocks.7.attn.mask_predictor.proj_back_n"]
    assert torch.equal(model.blocks[7].attn.predictor.basis, basis)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.1.attn.predictor.basis": None},
            r"1 mismatches: missing \(1\): blocks.1.attn.predictor.basis",
        ),
        ({"dist_token": torch.zeros(1, 1, 48)}, r"unknown \(1\): dist_token"),
        ({"norm.weight": torch.full((48,), torch.nan)}, r"NaN or infinity \(1\): norm.weight"),
        (
            {"blocks.0.attn.qkv.weight": torch.zeros(1, 1)},
            r"blocks.0.attn.qkv.weight \(1, 1\) instead of \(144, 48\)",
        ),
    ],
)
def test_a_damaged_checkpoint_gives_one_error_that_lists_it(change, message):
    model = sparsifiner()
    state_dict = {key: value for key, value in (model.state_dict() | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        checkpoint_filter_fn(state_dict, model)


def test_two_matrices_are_not_taken_for_one_shared():
    with pytest.raises(CheckpointError, match=r"unknown \(4\): blocks\.0\.attn\.predictor\.basis"):
        checkpoint_filter_fn(sparsifiner().state_dict(), sparsifiner(share_inout_proj=True))
