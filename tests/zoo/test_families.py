"""What every family must do as a citizen of timm and PyTorch, on a small network of each.

A family joins by a row in `FAMILIES`; what is its own alone is tested in a file of its own.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from vitrail.ops import use_ops
from vitrail.zoo import list_families

PYRAMID_FORMS = ("list", "dict", "hook", "getter", "fx")


@dataclass(frozen=True)
class Family:
    """A network of one family: all of its parts, little of each."""

    model: str
    args: dict[str, Any]
    size: tuple[int, int]
    """An image size that it takes."""
    other_size: tuple[int, int] | None
    """Another one that the very same network takes; None where a network is made for one size."""
    channels: tuple[int, ...]
    reductions: tuple[int, ...]
    """Of its feature maps, from first to last."""
    taken: tuple[int, ...]
    """Indices of the maps that the pyramid tests take."""
    forms: tuple[str, ...] = PYRAMID_FORMS
    """In which of timm's ways its pyramid can be had; `getter` alone where no module's output is a map."""
    pooling: tuple[str, ...] = ("max", "avgmax", "catavgmax")
    """Values of `global_pool` other than the default."""
    no_gradient: tuple[str, ...] = ()
    """Parts of the names of parameters that get no gradient, by the paper's design."""

    def create(self, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(self.model, **{"num_classes": 5, **self.args, **kwargs})

    def images(self, batch: int = 2, **kwargs: Any) -> torch.Tensor:
        return torch.randn(batch, 3, *self.size, generator=torch.Generator().manual_seed(1), **kwargs)

    def learns(self, name: str) -> bool:
        return not any(part in name for part in self.no_gradient)


FAMILIES = {
    "biformer": Family(
        "biformer_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128)},
        size=(64, 96),
        other_size=(100, 70),
        channels=(32, 64, 96, 128),
        reductions=(4, 8, 16, 32),
        taken=(1, 3),
    ),
    "davit_fused": Family(
        "davit_fused_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4)},
        size=(64, 96),
        other_size=(100, 70),
        channels=(32, 64, 96, 128),
        reductions=(4, 8, 16, 32),
        taken=(1, 3),
        pooling=("max", "avgmax"),
    ),
    "stripmlp": Family(
        "stripmlp_tiny",
        {"depths": (1, 1, 1, 1), "embed_dim": 16, "img_size": 64},
        size=(64, 64),
        other_size=None,
        channels=(16, 32, 64, 128),
        reductions=(4, 8, 16, 32),
        taken=(1, 3),
    ),
    "sparsifiner": Family(
        "sparsifiner_tiny",
        {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3, "reduce_n_factor": 2},
        size=(96, 96),
        other_size=None,
        channels=(48, 48, 48, 48),
        reductions=(16, 16, 16, 16),
        taken=(1, 3),
        forms=("getter",),
        pooling=("avg", "max", "avgmax"),
        no_gradient=(".predictor.",),
    ),
    "stvit": Family(
        "stvit_r_swin_tiny",
        {"depths": (1, 1, 6, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 4)},
        size=(64, 96),
        other_size=(100, 70),
        channels=(16, 32, 64, 128),
        reductions=(4, 8, 16, 32),
        taken=(1, 3),
    ),
}

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def test_no_family_is_left_out():
    assert set(FAMILIES) == set(list_families())


# --- PyTorch's tools --------------------------------------------------------------------------------------------------


@each_family
def test_torch_compile_makes_one_graph(family):
    model, images = family.create().eval(), family.images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


@each_family
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_torch_export_takes_any_batch(family, mode):
    model = family.create().eval()
    with use_ops(mode):
        program = torch.export.export(
            model, (family.images(),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    images = family.images(batch=5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images))


@each_family
def test_torchscript_and_its_saved_form_compute_the_same(family, tmp_path):
    model = family.create().eval()
    torch.jit.script(model).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    with torch.no_grad():
        for size in filter(None, (family.size, family.other_size)):
            images = torch.randn(1, 3, *size)
            torch.testing.assert_close(loaded(images), model(images))


@each_family
def test_autocast_and_bfloat16_stay_close_to_float32(family):
    model, images = family.create().eval(), family.images()
    with torch.inference_mode():
        want = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative_error(model(images), want) < 0.05
        assert relative_error(model.bfloat16()(images.bfloat16()), want) < 0.1


# --- training ---------------------------------------------------------------------------------------------------------


@each_family
def test_gradient_checkpointing_changes_nothing_but_memory(family):
    model, images = family.create().double(), family.images(dtype=torch.float64)

    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if family.learns(name)}

    plain = gradients()
    model.set_grad_checkpointing()
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name], msg=name)


@each_family
def test_a_training_step_follows_the_reference_path(family):
    images, target = family.images(batch=4, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    losses = {}
    for mode in ("fused", "reference"):
        model = family.create().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[mode] = []
        for _ in range(4):
            with use_ops(mode):
                loss = nn.functional.cross_entropy(model(images), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses[mode].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["reference"], rel=1e-9)
    assert losses["fused"][-1] < losses["fused"][0]


# --- timm's arguments -------------------------------------------------------------------------------------------------


def map_sizes(family: Family, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Channels, height and width of the maps taken, for an image of `size`."""
    return [(family.channels[i], *(-(-side // family.reductions[i]) for side in size)) for i in family.taken]


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, f in FAMILIES.items() for form in f.forms])
def test_feature_pyramids_come_in_all_of_timms_forms(name, form):
    family = FAMILIES[name]
    net = family.create(features_only=True, out_indices=family.taken, feature_cls=form).eval()
    assert net.feature_info.channels() == [family.channels[i] for i in family.taken]
    assert net.feature_info.reduction() == [family.reductions[i] for i in family.taken]
    for size in filter(None, (family.size, family.other_size)):
        with torch.no_grad():
            maps = net(torch.randn(1, 3, *size))
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        assert [tuple(m.shape[1:]) for m in maps] == map_sizes(family, size)


@each_family
def test_one_channel_images_and_other_pooling_work(family):
    for pooling in family.pooling:
        model = family.create(in_chans=1, num_classes=3, global_pool=pooling)
        assert model(family.images()[:, :1]).shape == (2, 3)


@pytest.mark.parametrize("name", [name for names in list_families().values() for name in names])
def test_a_model_on_the_meta_device_holds_no_memory(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    images = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta", dtype=torch.bfloat16)
    assert model(images).shape == (2, model.num_classes or model.num_features)


# --- as a backbone ----------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """A family's feature maps through torchvision's feature pyramid network."""

    def __init__(self, family: Family):
        super().__init__()
        self.body = family.create(features_only=True, out_indices=family.taken)
        self.out_channels = 16
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, images):
        return self.fpn({str(i): features for i, features in enumerate(self.body(images))})


@each_family
def test_a_torchvision_detector_learns_on_a_photo(family):
    photo = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1) / 255
    boxes = torch.tensor([[110.0, 60, 560, 330], [280, 340, 400, 420]])  # the temple; people before it
    target = [{"boxes": boxes, "labels": torch.tensor([1, 2])}]
    backbone = Pyramid(family)
    anchors = AnchorGenerator(
        tuple((2 * family.reductions[i],) for i in family.taken), ((0.5, 1.0, 2.0),) * len(family.taken)
    )
    detector = RetinaNet(
        backbone,
        num_classes=3,
        anchor_generator=anchors,
        fixed_size=(family.size[1], family.size[0]),  # torchvision wants width, height
        size_divisible=1,
    )
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = sum(detector([photo], target).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in backbone.body.named_parameters():
        assert parameter.grad is not None or not family.learns(name), name
    (found,) = detector.eval()([photo])
    assert found["boxes"].shape == (*found["scores"].shape, 4)
    assert found["boxes"].isfinite().all()
