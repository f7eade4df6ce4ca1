"""STViT on DeiT, whose code was never published: what the paper says of it, and what it shares with DeiT."""

import warnings

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from vitrail.profiling import count_with_torch
from vitrail.zoo.stvit_deit import STViTDeiT, checkpoint_filter_fn
from vitrail.zoo.weights import CheckpointError

SMALL = {"img_size": 64, "embed_dim": 48, "num_heads": 3, "num_classes": 7}


def small(name="stvit_deit_small", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL | kwargs).double().eval()


def images(size=64, batch=2):
    height, width = timm.layers.to_2tuple(size)
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def count(name, **kwargs):
    model = timm.create_model(name, device="meta", **kwargs).eval()
    image = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    return sum(p.numel() for p in model.parameters()) / 1e6, count_with_torch(model, image) / 1e9


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_parameters_are_deits_and_products_about_forty_percent(size):
    deit, ours = count(f"deit_{size}_patch16_224"), count(f"stvit_deit_{size}")
    assert ours[0] == pytest.approx(deit[0], rel=0.001)
    assert ours[1] / deit[1] == pytest.approx(0.415, abs=0.005)


def test_products_of_the_small_one_are_those_of_table_8():
    assert count("stvit_deit_small")[1] == pytest.approx(1.91, rel=0.005)


def test_recovery_costs_less_than_deit():
    assert count("stvit_r_deit_small")[1] < 0.6 * count("deit_small_patch16_224")[1]


def test_pico_has_under_a_million_parameters():
    assert count("stvit_deit_pico")[0] < 1


# --- semantic tokens --------------------------------------------------------------------------------------------------


def tokens_after_each_block(model, image):
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1]))
    with torch.inference_mode():
        model(image)
    return shapes


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("size", [224, (96, 160)])
def test_sixteen_semantic_tokens_are_all_that_is_left_after_generation(size, class_token):
    model = small(img_size=size, class_token=class_token, global_pool="token" if class_token else "avg")
    height, width = timm.layers.to_2tuple(size)
    prefix = 1 if class_token else 0
    want = [height * width // 256 + prefix] * 4 + [16 + prefix] * 7
    assert tokens_after_each_block(model, images(size)) == want


def test_nothing_but_the_semantic_tokens_reaches_the_output():
    model = small()
    model.blocks[4].register_forward_hook(lambda module, args, out: out.detach())
    image = images().requires_grad_()
    assert torch.autograd.grad(model(image).sum(), image, allow_unused=True) == (None,)


def test_each_semantic_token_reaches_the_output():
    model = small()
    kept = []

    def keep(module, args, out):
        kept.append(out.detach().requires_grad_())
        return kept[0]

    model.blocks[4].register_forward_hook(keep)
    (grad,) = torch.autograd.grad(model(images()).square().sum(), kept)
    assert (grad.abs().sum(-1) > 0).all()


def test_recovery_gives_the_full_map_back():
    model = small("stvit_r_deit_small")
    assert tokens_after_each_block(model, images()) == [16] * 6
    model = small("stvit_r_deit_small", img_size=128)
    assert tokens_after_each_block(model, images(128)) == [64] * 6
    assert model.blocks[4].generation(torch.randn(2, 64, 48, dtype=torch.float64)).shape == (2, 16, 48)


def attention(layer, x, y):
    """Multi-head attention and MLP of one layer, written out."""

    def norm(x, norm):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * norm.weight + norm.bias

    q = norm(x, layer.norm1) @ layer.attn.q.weight.T + layer.attn.q.bias
    k, v = (norm(y, layer.norm1) @ layer.attn.kv.weight.T + layer.attn.kv.bias).chunk(2, -1)
    out = torch.empty_like(q)
    for head in range(3):
        at = slice(head * 16, (head + 1) * 16)
        out[..., at] = (q[..., at] @ k[..., at].transpose(1, 2) / 4).softmax(-1) @ v[..., at]
    x = x + out @ layer.attn.proj.weight.T + layer.attn.proj.bias
    return x + layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(norm(x, layer.norm2))))


@pytest.mark.parametrize("class_token", [False, True])
def test_generation_is_the_papers_equations(class_token):
    """Section 3.1: pooled centres query the image (eq. 1); with global centres, themselves and the image (eq. 2)."""
    generation = small(img_size=(96, 160), class_token=class_token).blocks[4]
    first = 1 if class_token else 0
    x = torch.randn(2, 60 + first, 48, dtype=torch.float64)
    grid = x[:, first:].transpose(1, 2).unflatten(2, (6, 10))
    centers = torch.nn.functional.adaptive_max_pool2d(grid, 4).flatten(2).transpose(1, 2)
    s = torch.cat([x[:, :first], centers], 1)
    s = attention(generation.layer1, s, torch.cat([s, x[:, first:]], 1))
    queries = s.clone()
    queries[:, first:] += generation.centers
    want = attention(generation.layer2, queries, torch.cat([s, x[:, first:]], 1))
    torch.testing.assert_close(generation(x), want)


# --- as a network of timm's -------------------------------------------------------------------------------------------


def test_feature_maps_are_the_images_before_and_the_semantic_tokens_after():
    model = small(img_size=(96, 160))
    final, maps = model.forward_intermediates(images((96, 160)))
    assert [tuple(x.shape[1:]) for x in maps] == [(48, 6, 10)] * 4 + [(48, 4, 4)] * 7
    assert final.shape == (2, 16, 48)
    torch.testing.assert_close(model.norm(maps[-1].flatten(2).transpose(1, 2)), final)
    assert [info["reduction"] for info in model.feature_info] == [16] * 4 + [40] * 7
    recovered = small("stvit_r_deit_small", img_size=(96, 160))
    maps = recovered.forward_intermediates(images((96, 160)), indices=2, intermediates_only=True)
    assert [tuple(x.shape[1:]) for x in maps] == [(48, 6, 10)] * 2


def test_class_tokens_come_beside_the_maps():
    model = small(class_token=True)
    maps = model.forward_intermediates(
        images(), indices=(3, 5), return_prefix_tokens=True, intermediates_only=True
    )
    assert [(tuple(x.shape[1:]), tuple(prefix.shape[1:])) for x, prefix in maps] == [
        ((48, 4, 4), (1, 48))
    ] * 2
    found = model.forward_intermediates(images(), indices=(3,), output_dict=True, output_fmt="NLC")
    assert found["image_intermediates"][0].shape == (2, 16, 48)
    found = model.forward_intermediates(images(), indices=(3,), output_dict=True)
    assert found["image_intermediates"][0].shape == (2, 48, 4, 4)


def test_masks_of_attention_are_refused():
    with pytest.raises(ValueError, match="attn_mask and is_causal cannot be used"):
        small().forward_intermediates(images(), is_causal=True)


def test_layers_before_generation_are_deits():
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_patch16_224").eval()
    overlay = {"state_dict": deit.state_dict()}
    with pytest.warns(UserWarning, match="weights of DeiT"):
        model = timm.create_model(
            "stvit_deit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, class_token=True
        )
    image = images(224, 1).float()
    with torch.inference_mode():
        ours = model.eval().forward_intermediates(image, indices=(3,), intermediates_only=True)[0]
        torch.testing.assert_close(
            ours, deit.forward_intermediates(image, indices=(3,), intermediates_only=True)[0]
        )


# --- input sizes ------------------------------------------------------------------------------------------------------


def test_another_size_is_refused_with_what_to_do():
    model = small()
    message = r"takes images of 64 x 64, got 64 x 96; resize them, build the model with img_size=.*, or call set_input_size"
    with pytest.raises(ValueError, match=message):
        model(images((64, 96)))
    with pytest.raises(
        ValueError, match=r"expected images of shape \(batch, 3, 64, 64\), got \[2, 1, 64, 64\]"
    ):
        model(images()[:, :1])


def test_sizes_that_patches_do_not_divide_are_refused_with_the_nearest():
    message = "img_size must be a multiple of the patch, 16 x 16, got 230 x 100; nearest: 224 x 96"
    with pytest.raises(ValueError, match=message):
        STViTDeiT(img_size=(230, 100))
    with pytest.raises(ValueError, match=message):
        small().set_input_size((230, 100))


@pytest.mark.parametrize("name", ["stvit_deit_small", "stvit_r_deit_small"])
def test_the_image_size_can_change_and_the_position_table_with_it(name):
    model = small(name)
    other = small(name, img_size=(96, 160))
    table = resample_abs_pos_embed(model.pos_embed, [6, 10], [4, 4], num_prefix_tokens=0)
    with pytest.warns(UserWarning, match="pos_embed is resampled from 4 x 4 to 6 x 10"):
        state_dict = checkpoint_filter_fn(model.state_dict(), other)
    torch.testing.assert_close(state_dict["pos_embed"], table)
    other.load_state_dict(state_dict)
    model.set_input_size((96, 160))
    torch.testing.assert_close(model(images((96, 160))), other(images((96, 160))))
    assert [i["reduction"] for i in model.feature_info] == [i["reduction"] for i in other.feature_info]


# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS = (
    {"class_token": True, "global_pool": "token"},
    {"use_global": False},
    {"init_values": 1e-4},
    {"qkv_bias": False},
    {"fc_norm": True},
    {"sample_window_size": 2, "image_blocks": 0},
    {"recover": True, "recovered_blocks": 0, "class_token": True},
    {"depth": 2, "image_blocks": 0},
    {"global_pool": ""},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_build_run_and_learn(options):
    model = small(**options).train()
    model(images()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()


REFUSED = {
    "no class token to pool": ({"global_pool": "token"}, "global_pool 'token' needs class_token=True; the paper pools by 'avg'"),
    "no tokens": ({"sample_window_size": 0}, "sample_window_size must be positive, got 0"),
    "too shallow": ({"depth": 5}, r"depth 5 must hold image_blocks \(4\), the two layers of generation$"),
    "too shallow to recover": ({"depth": 7, "recover": True}, r"depth 7 must hold .*, recovery and recovered_blocks \(1\)"),
    "heads that do not divide": ({"num_heads": 5}, "num_heads must be positive and divide the width 384, got 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_with_the_reason(case):
    options, message = REFUSED[case]
    with pytest.raises((ValueError, AssertionError), match=message):
        STViTDeiT(device="meta", **options)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("stvit_deit_tiny", ["0", "3", "4.layer1", "4.layer2", "5", "10"]),
        ("stvit_r_deit_small", ["0", "3", "4.generation.layer1", "4.generation.layer2", "4.layers.0", "5"]),
    ],
)
def test_deit_is_where_stvit_starts_from(name, places, tmp_path):
    """A file as Facebook released it; layers of DeiT are where ours have their places, taken apart where need be."""
    torch.manual_seed(0)
    deit = timm.create_model("deit_small_patch16_224" if "small" in name else "deit_tiny_patch16_224")
    weights = deit.state_dict()
    torch.save({"model": weights}, tmp_path / "deit.pth")
    with pytest.warns(UserWarning) as messages:  # noqa: PT030  (there is to be no other)
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "deit.pth")}
        )
    (text,) = {str(message.message) for message in messages if "DeiT" in str(message.message)}
    centers = next(n for n, _ in model.named_parameters() if n.endswith(".centers"))
    assert text.endswith(f"left out: cls_token; still as initialised: {centers}")
    torch.testing.assert_close(model.pos_embed, deit.pos_embed[:, 1:])
    for i, place in zip((0, 3, 4, 5, 6, 11), places, strict=True):
        layer = model.get_submodule(f"blocks.{place}")
        torch.testing.assert_close(layer.mlp.fc1.weight, weights[f"blocks.{i}.mlp.fc1.weight"])
        if hasattr(layer.attn, "kv"):
            torch.testing.assert_close(
                torch.cat([layer.attn.q.bias, layer.attn.kv.bias]), weights[f"blocks.{i}.attn.qkv.bias"]
            )


def test_our_own_layout_passes_through_in_silence():
    model = small(class_token=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state_dict = checkpoint_filter_fn(model.state_dict(), model)
    assert state_dict.keys() == model.state_dict().keys()


def test_tags_name_where_weights_to_start_from_are():
    for size in ("tiny", "small", "base"):
        cfg = timm.models.get_pretrained_cfg(f"stvit_deit_{size}.deit_in1k_init")
        assert cfg.hf_hub_id == f"timm/deit_{size}_patch16_224.fb_in1k"
    with pytest.raises(CheckpointError, match=r"no weights for stvit_deit_small to load: .*deit_in1k_init"):
        timm.create_model("stvit_deit_small", pretrained=True)


def test_all_mismatches_are_listed():
    model = timm.create_model("stvit_deit_tiny")
    state_dict = timm.create_model("deit_tiny_patch16_224").state_dict()
    state_dict["blocks.9.mlp.fc1.weight"][0, 0] = torch.nan
    state_dict["pos_embed"] = state_dict["pos_embed"][..., :100]
    del state_dict["blocks.0.norm1.bias"]
    with pytest.warns(UserWarning, match="DeiT"), pytest.raises(CheckpointError) as error:
        checkpoint_filter_fn(state_dict, model)
    for text in (
        "missing (1): blocks.0.norm1.bias",
        "pos_embed (1, 196, 100)",
        "NaN or infinity (1): blocks.8.mlp.fc1.weight",
    ):
        assert text in str(error.value)
