"""The smallest models learn: scikit-learn's digits, in minutes on a CPU."""

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from vitrail.ops import use_ops
from vitrail.zoo import fuse_for_inference, list_families

PICOS = [name for names in list_families().values() for name in names if name.endswith("_pico")]
EPOCHS = 25


@pytest.fixture(scope="module")
def digits():
    """Images `(N, 3, 32, 32)` and labels, a quarter of them for testing."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8).sub(1)[:, None]
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = len(labels) // 4
    return images[order], labels[order], held_out


def train(name, digits, steps=None):
    """A model after all epochs, or after a few steps, and its losses."""
    images, labels, held_out = digits
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    batches = torch.arange(held_out, len(labels)).split(64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=EPOCHS * len(batches))
    losses = []
    for _ in range(EPOCHS):
        model.train()
        for batch in (torch.randperm(len(labels) - held_out) + held_out).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == steps:
                return model, losses
    return model.eval(), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", PICOS)
def test_it_learns_digits_to_97_percent_in_minutes_and_keeps_that_in_bfloat16(name, digits):
    images, labels, held_out = digits
    model, _ = train(name, digits)
    assert sum(p.numel() for p in model.parameters()) < 1e6

    def right(network, dtype):
        with torch.inference_mode():
            found = network(images[:held_out].to(dtype)).argmax(1)
        return (found == labels[:held_out]).float().mean().item()

    plain = right(model, torch.float32)
    low = right(fuse_for_inference(model, dtype=torch.bfloat16), torch.bfloat16)
    print(f"{name}: {plain:.2%}, inference form in bfloat16 {low:.2%}")
    assert plain > 0.97
    assert right(fuse_for_inference(model), torch.float32) == plain
    assert low == pytest.approx(plain, abs=1.5 / held_out)  # one digit


@pytest.mark.slow
@pytest.mark.parametrize("name", PICOS)
def test_its_training_curve_is_that_of_the_reference_path(name, digits):
    """In float32, until rounding has grown: it flips choices of regions and keys, and training amplifies it."""
    curves = {}
    for mode in ("fused", "reference"):
        with use_ops(mode):
            _, curves[mode] = train(name, digits, steps=20)
    fused, reference = (torch.tensor(curves[mode]) for mode in ("fused", "reference"))
    print(
        f"{name}: largest relative difference of 20 losses {((fused - reference) / reference).abs().max():.1e}"
    )
    torch.testing.assert_close(fused, reference, rtol=1e-3, atol=0)
