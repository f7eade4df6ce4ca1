"""Peak memory of whole networks, each measurement in a process of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from vitrail.cli.terminal import JobFailed
from vitrail.ops import library, use_ops

from .device import peak_allocated
from .memory import Peak, peak, return_memory_at_once, weights
from .networks import AUTHORS, FUSED, INFERENCE, NETWORKS, REFERENCE, Candidate, Trainer, inference_form
from .options import DTYPES
from .peers import Logits, find_checkouts
from .timing import Run


@dataclass(frozen=True)
class Task:
    """One network, along one path, in inference or training."""

    model: str
    size: int
    candidate: str
    training: bool
    batch: int
    dtype: str
    threads: int
    peers: Path | None
    device: str = "cpu"


@dataclass(frozen=True)
class Footprint:
    """The peak above the weights (and, in training, above their gradients), and the weights, in bytes."""

    peak: Peak
    weights: int


def candidates(model: str, with_authors: bool, training: bool) -> list[str]:
    """What there is to measure."""
    from vitrail import zoo

    names = [FUSED, REFERENCE]
    if not training and hasattr(zoo, "fuse_for_inference"):
        names.insert(0, INFERENCE)
    stock = NETWORKS.get(model)
    return names + ([f"timm {stock}"] if stock else []) + [AUTHORS] * with_authors


def measure(task: Task) -> Footprint:
    """Start a process that measures.

    Raises:
        JobFailed: it did not get to the end.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, task).result()
        except Exception as error:  # of the process or of its memory
            text = " ".join(str(error).split())[:300]
            raise JobFailed(f"{task.model}, {task.candidate}: {type(error).__name__}: {text}") from error


def _measure(task: Task) -> Footprint:
    return_memory_at_once()
    torch.set_num_threads(task.threads)
    dtype = DTYPES[task.dtype]
    with use_ops("fused"):
        library.load(task.device)
        candidate = _candidate(task, dtype)
        images = torch.randn(task.batch, 3, task.size, task.size).to(task.device, dtype)
        if task.training:
            found = _peak(Trainer(candidate, images, keep_grads=True), task.device)
        else:
            with torch.inference_mode():
                found = _peak(lambda: candidate.forward(images), task.device)
    return Footprint(found, weights(candidate.model))


def _peak(run: Run, device: str) -> Peak:
    return peak(run) if device == "cpu" else Peak(peak_allocated(run), None)


def _candidate(task: Task, dtype: torch.dtype) -> Candidate:
    from vitrail.catalog import create_model

    size = (task.size, task.size)
    if task.candidate == AUTHORS:
        assert task.peers is not None
        model: torch.nn.Module = Logits(find_checkouts(task.peers)[task.model].build(task.model, task.size))
        return Candidate(AUTHORS, model.eval().to(task.device, dtype))
    if task.candidate.startswith("timm "):
        model = create_model(task.candidate.removeprefix("timm "), size)
        return Candidate(task.candidate, model.to(task.device, dtype))
    # the CPU's kernels need not be there for what runs elsewhere
    with nullcontext() if task.device == "cpu" else use_ops("reference"):
        model = create_model(task.model, size).to(task.device)
    if task.candidate == INFERENCE:
        fused = inference_form(model, dtype)
        assert fused is not None
        return Candidate(INFERENCE, fused, FUSED)
    return Candidate(task.candidate, model.to(dtype), task.candidate)
