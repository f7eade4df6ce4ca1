"""The inference form: the same function for every family, and its place in PyTorch."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import use_ops
from vitrail.zoo import folded, fuse_for_inference
from vitrail.zoo.folded import FoldedLinear, MlpBranch, PackedConv, ResponseMlp

from .test_families import FAMILIES, each_family, relative_error

# what a small network of a family does not have
VARIANTS = {
    "biformer_stl": ("biformer_stl", {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128)}, (64, 100)),
    "biformer_stl_nchw": ("biformer_stl_nchw", {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128)}, (64, 100)),
    "biformer, layer scale": (
        "biformer_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "layer_scale_init_value": 0.1},
        (64, 64),
    ),
    "biformer, post norm": (
        "biformer_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "pre_norm": False},
        (64, 64),
    ),
    "biformer, convolution in the MLP": (
        "biformer_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "mlp_dwconv": True},
        (64, 64),
    ),
    "davit, activated position, no MLP": (
        "davit_fused_tiny",
        {
            "depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4), "cpe_act": True,
            "ffn": False, "channel_attn_v2": True,
        },
        (50, 60),
    ),
    "sparsifiner_lvvit": ("sparsifiner_lvvit_small", {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}, (64, 64)),
    "sparsifiner, pruned": (
        "sparsifiner_tiny",
        {
            "img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3, "reduce_n_factor": 2,
            "token_pruning_loc": (1, 2), "token_keep_rate": 0.7,
        },
        (96, 96),
    ),
    "stvit_deit": ("stvit_deit_tiny", {"img_size": 64, "embed_dim": 48, "depth": 8, "num_heads": 3, "sample_window_size": 2}, (64, 64)),
    "stvit_r_deit": ("stvit_r_deit_small", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "sample_window_size": 2}, (64, 64)),
    "stvit_swin": (
        "stvit_swin_tiny",
        {"depths": (1, 1, 6, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 4), "shortcut": True, "relative_pos": True},
        (64, 96),
    ),
}  # fmt: skip


def randomised(model):
    """A model whose every weight and statistic matters."""
    g = torch.Generator().manual_seed(2)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            x.data.copy_(torch.rand(x.shape, generator=g) + 0.5)
        elif x.is_floating_point():
            x.data.add_(0.1 * torch.randn(x.shape, generator=g, dtype=torch.float64))
    return model.eval()


def outputs_agree(model, images, limit, **kwargs):
    with torch.no_grad():
        want = model(images)
        got = fuse_for_inference(model, **kwargs)(images)
    assert relative_error(got, want) < limit


@each_family
@pytest.mark.parametrize("pack", [True, False])
def test_the_form_computes_the_same_to_rounding(family, pack):
    model = randomised(family.create(dtype=torch.float64))
    sizes = [family.size] + ([family.other_size] if family.other_size else [])
    for size in sizes:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        outputs_agree(model, images, 1e-11, pack=pack)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pack", [True, False])
def test_so_do_other_forms_of_the_families(variant, pack):
    name, args, size = VARIANTS[variant]
    torch.manual_seed(0)
    model = randomised(timm.create_model(name, num_classes=5, dtype=torch.float64, **args))
    outputs_agree(model, torch.randn(2, 3, *size, dtype=torch.float64), 1e-11, pack=pack)


@each_family
def test_float32_stays_within_1e_5_and_bfloat16_within_its_rounding(family):
    model, images = family.create().eval(), family.images()
    outputs_agree(model, images, 1e-5)
    with torch.no_grad():
        got = fuse_for_inference(model, torch.bfloat16)(images.bfloat16())
        assert got.dtype == torch.bfloat16
        assert relative_error(got, model(images)) < 0.1


@each_family
def test_what_a_block_consists_of_is_taken_as_one(family):
    fused = fuse_for_inference(family.create())
    kinds = [type(module) for module in fused.modules()]
    assert FoldedLinear in kinds
    assert MlpBranch in kinds or ResponseMlp in kinds
    assert not any(p.requires_grad for p in fused.parameters())
    assert not any(module.training for module in fused.modules())


@each_family
def test_the_model_itself_stays_as_it_is(family):
    model = family.create().train()
    before = copy.deepcopy(model.state_dict())
    fuse_for_inference(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@each_family
def test_it_costs_as_many_multiplications(family):
    """But for norms and scales, which neither counter of torch's counts; Strip-MLP's blended kernel has more taps."""
    model, images = family.create().eval(), family.images(batch=1)

    def flops(network):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(images)
        return counter.get_total_flops()

    few = 0.03 if family.model.startswith("stripmlp") else 1e-6
    assert flops(fuse_for_inference(model)) == pytest.approx(flops(model), rel=few)


@each_family
def test_without_packing_only_standard_operators_are_left_for_export(family):
    model = family.create().eval()
    with use_ops("reference"):
        program = torch.export.export(
            fuse_for_inference(model, pack=False),
            (family.images(),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert not [node for node in program.graph.nodes if "vitrail" in str(node.target)]
    images = family.images(batch=3)
    with torch.no_grad():
        assert relative_error(program.module()(images), model(images)) < 1e-5


@each_family
def test_it_compiles_to_one_graph_and_can_be_copied(family):
    fused, images = fuse_for_inference(family.create()), family.images()
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), fused(images))


def test_a_backbone_of_features_takes_the_form_too():
    family = FAMILIES["biformer"]
    model = family.create(features_only=True).eval()
    images = family.images()
    with torch.no_grad():
        for got, want in zip(fuse_for_inference(model)(images), model(images), strict=True):
            assert relative_error(got, want) < 1e-5


def test_other_modules_keep_what_no_rule_knows():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))

        def forward(self, x):
            return self.layers(self.attention(x, x, x, need_weights=False)[0])

    model, x = Two().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(fuse_for_inference(model)(x), model(x))


def test_other_devices_get_standard_operators():
    model = nn.Sequential(nn.Linear(8, 8)).to("meta")
    assert type(fuse_for_inference(model)[0]) is nn.Linear
    with pytest.raises(ValueError, match="pack=True needs a model on the CPU or on a GPU, got one on meta"):
        fuse_for_inference(model, pack=True)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def _tensors(module):
    return [
        x for m in module.modules() for x in (*m._parameters.values(), *m._buffers.values()) if x is not None
    ]


class PretendedDevices(FakeTensorMode):
    """Tensors that only say where they are: each operation wants all of its own on one device."""

    def __deepcopy__(self, memo):
        return self

    def move(self, x, device):
        x = self.from_tensor(x.detach().clone())
        with self:
            return x.to(device)


@pytest.fixture
def without_panels(monkeypatch):
    """The layers as they are on a GPU: products of a library, everything else by operators."""
    monkeypatch.setattr(folded, "takes_panels", lambda weight: False)


@each_family
def test_the_form_of_a_gpu_computes_the_same(family, without_panels):
    model = randomised(family.create(dtype=torch.float64))
    fused, images = fuse_for_inference(model), family.images(dtype=torch.float64)
    assert not any(getattr(module, "packed", False) for module in fused.modules())
    with torch.no_grad():
        assert relative_error(fused(images), model(images)) < 1e-11


@each_family
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_may_be_on_a_gpu_before_and_after(family, when):
    devices, dtype = PretendedDevices(), torch.float16
    model = family.create().eval().requires_grad_(False).to(dtype)
    if when == "after":
        model = fuse_for_inference(model)
    for module in model.modules():
        for name, x in list(module._parameters.items()):
            if x is not None and when == "before":
                module._parameters[name] = nn.Parameter(devices.move(x, "cuda"), requires_grad=False)
            elif x is not None:  # parameters of this kind cannot be moved, buffers can
                del module._parameters[name]
                module._buffers[name] = devices.move(x, "cpu")
        for name, x in module._buffers.items():
            if type(x) is torch.Tensor:
                module._buffers[name] = devices.move(x, "cuda" if when == "before" else "cpu")
    with devices, torch.no_grad():
        fused = fuse_for_inference(model) if when == "before" else model.to("cuda")
        out = fused(torch.empty(2, 3, *family.size, device="cuda", dtype=dtype))
    assert (out.device.type, out.dtype, out.shape) == ("cuda", dtype, (2, 5))
    assert all(x.device.type == "cuda" for x in _tensors(fused))
    assert any(isinstance(module, FoldedLinear) for module in fused.modules())
    assert not any(getattr(module, "packed", False) for module in fused.modules())


@each_family
def test_the_form_can_be_converted_and_back(family):
    model, images = family.create().eval(), family.images()
    with torch.no_grad():
        want, fused = model(images), fuse_for_inference(model)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            got = fused.to(dtype)(images.to(dtype))
            assert got.dtype == dtype
            assert relative_error(got, want) < 0.1


@each_family
def test_a_form_that_is_moved_computes_the_same_bits(family, monkeypatch):
    fused, images = fuse_for_inference(family.create()), family.images()
    before = [x.clone() for x in _tensors(fused)]
    with torch.no_grad():
        want = fused(images)
        monkeypatch.setattr(folded, "takes_panels", lambda weight: False)
        elsewhere = copy.deepcopy(fused).to("cpu")
        assert relative_error(elsewhere(images), want) < 1e-5
        assert not any(getattr(module, "packed", False) for module in elsewhere.modules())
        monkeypatch.undo()
        back = elsewhere.to("cpu")
        assert all(torch.equal(x, y) for x, y in zip(_tensors(back), before, strict=True))
        assert torch.equal(back(images), want)


def test_a_module_that_stays_where_it_is_keeps_its_tensors():
    fused = fuse_for_inference(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(256, 128, 2, 2)))
    assert isinstance(fused[1], PackedConv)
    before = [x.data_ptr() for x in _tensors(fused)]
    assert [x.data_ptr() for x in _tensors(fused.to(torch.float32))] == before
