"""scikit-learn's digits, which the smallest models learn in minutes on a CPU, and how they learn them."""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

EPOCHS = 25


def digits() -> tuple[Tensor, Tensor, int]:
    """Images `(N, 3, 32, 32)`, values in [-1, 1], their labels, and how many of the first are for testing: a quarter."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8).sub(1)[:, None]
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order], len(labels) // 4


def train(
    name: str, data: tuple[Tensor, Tensor, int], steps: int | None = None, epochs: int = EPOCHS
) -> tuple[nn.Module, list[float]]:
    """A model after all epochs, or after a few steps, and its losses."""
    images, labels, held_out = data
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    batches = torch.arange(held_out, len(labels)).split(64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(batches))
    losses: list[float] = []
    for _ in range(epochs):
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
