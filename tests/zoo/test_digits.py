"""The smallest models learn: scikit-learn's digits, in minutes on a CPU."""

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from vitrail.zoo import list_families

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


@pytest.mark.slow
@pytest.mark.parametrize("name", PICOS)
def test_it_learns_digits_to_97_percent_in_minutes(name, digits):
    images, labels, held_out = digits
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) < 1e6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    batches = torch.arange(held_out, len(labels)).split(64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=EPOCHS * len(batches))
    for _ in range(EPOCHS):
        model.train()
        for batch in (torch.randperm(len(labels) - held_out) + held_out).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        right = (model(images[:held_out]).argmax(1) == labels[:held_out]).float().mean().item()
    print(f"{name}: {right:.2%}")
    assert right > 0.97
