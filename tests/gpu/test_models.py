"""A network of each family on the device: along compiled operators and definitions, in half types, in training."""

import pytest
import timm
import torch
from torch import nn

import vitrail.zoo  # noqa: F401  (registers the models)
from vitrail.ops import use_ops

from ..zoo.test_families import FAMILIES
from .cases import DEVICE, ON_GPU

REAL = (
    "biformer_tiny",
    "davit_fused_tiny",
    "stripmlp_tiny",
    "sparsifiner_small",
    "stvit_deit_small",
    "stvit_r_swin_small",
)
# Largest error over largest logit: rounding may make a region or a key be chosen otherwise.
LIMIT, HALF_LIMIT = 1e-2, 0.1

only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="takes long on a CPU; VITRAIL_TEST_DEVICE=cuda")
each_network = pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(name, marks=only_on_gpu) for name in REAL)]
)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """In evaluation mode, every weight away from where it starts; and images."""
    if name in FAMILIES:
        model, images = FAMILIES[name].create(), FAMILIES[name].images()
    else:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        images = torch.randn(16, 3, 224, 224)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[1:].numel() if parameter.dim() > 1 else 100
            parameter += torch.randn(parameter.shape, generator=generator) * 0.5 * fan_in**-0.5
    return model.eval().to(DEVICE), images.to(DEVICE)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@each_network
@torch.inference_mode()
def test_logits_are_those_of_the_definitions(name):
    model, images = network(name)
    got = model(images)
    with use_ops("reference"):
        assert relative_error(got, model(images)) <= LIMIT


@each_network
@torch.inference_mode()
def test_half_types_and_autocast_stay_close(name):
    model, images = network(name)
    want = model(images)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert relative_error(model(images), want) <= HALF_LIMIT
    assert relative_error(model.bfloat16()(images.bfloat16()), want) <= HALF_LIMIT


@each_network
def test_a_step_of_training_follows_the_definitions(name):
    losses = {}
    for mode in ("fused", "reference"):
        model, images = network(name)
        model.train()
        for module in model.modules():  # which draw at random
            if isinstance(module, nn.Dropout) or "drop_prob" in vars(module):
                module.eval()
        target = torch.arange(len(images), device=DEVICE) % 5
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses[mode] = []
        for _ in range(2):
            with use_ops(mode):
                loss = nn.functional.cross_entropy(model(images), target)
                optimizer.zero_grad()
                loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(bool(g.isfinite().all()) for g in grads)
            optimizer.step()
            losses[mode].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["reference"], rel=LIMIT)
