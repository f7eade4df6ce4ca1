"""What the tests of the kernels share.

Operators are called directly, past the checks and the autograd of the public function: what is tested is what the
library does when nothing protects it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.ops import library

# Where the operators run: their arguments are moved there, what they return is moved back.
DEVICE = os.environ.get("VITRAIL_TEST_DEVICE", "cpu")
# The library is that of the GPU kernels, thread by thread on the host (see emulation.py).
EMULATED = "VITRAIL_EMULATED" in os.environ
GPU_KERNELS = EMULATED or DEVICE != "cpu"
# Channels of a head: more than a whole number of vectors; tiles on a GPU end at 64.
WIDE = 61 if GPU_KERNELS else 70
# Of results, relative to the values that were averaged.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Of gradients, relative to the largest or to 1; half types round results, which gradients then start from.
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.float64: 3e-14, torch.bfloat16: 2e-2, torch.float16: 3e-3}
if GPU_KERNELS:  # which know no float64
    del TOLERANCE[torch.float64], GRADIENT_TOLERANCE[torch.float64]
# Operators with GPU kernels, forward and backward; those whose gradients no kernel gives: a choice has none, the others
# are for inference; and one that is made of these.
GPU_OPERATORS = (
    "routed_attention",
    "window_attention",
    "semantic_attention",
    "sparse_attention",
    "channel_attention",
    "strip_mix",
)
GPU_FORWARD_ONLY = ("region_route", "connectivity_topk", "depthwise_conv", "response_norm")
GPU_COMPOSED = ("connectivity_attention",)
OTHER_CAPABILITIES = ("default", "avx2", "avx512")
# Of properties; fewer where another instruction set, or the slow emulation, runs them once more.
EXAMPLES = 20 if EMULATED else 30 if "ATEN_CPU_CAPABILITY" in os.environ else 100


def operator(name: str) -> Callable[..., Any]:
    """`torch.ops.vitrail.<name>`, on the device that is tested."""
    return on_device(getattr(torch.ops.vitrail, name))


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a function of several operators."""
    if DEVICE == "cpu":
        return function

    def moved(*arguments: Any) -> Any:
        results = function(*(_moved(x) if isinstance(x, Tensor) else x for x in arguments))
        return tuple(x.cpu() for x in results) if isinstance(results, (tuple, list)) else results.cpu()

    return moved


def _moved(x: Tensor) -> Tensor:
    """On the device, with the strides that it has: what lies between its elements comes along."""
    if x.device.type != "cpu":
        return x
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def check_outputs(outputs: Sequence[Tensor], expected: Sequence[Tensor], v: Tensor) -> None:
    """Results and log-sum-exps against those of a float64 definition."""
    (out, lse), (want, want_lse) = outputs, expected
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    assert (out.dtype, lse.dtype) == (v.dtype, wide)
    assert out.is_contiguous()
    assert (out.shape, lse.shape) == (want.shape, want_lse.shape)
    if out.numel() == 0:
        return
    # errors of single elements, relative to the values that were averaged
    assert (out.double() - want).abs().max() <= TOLERANCE[v.dtype] * v.double().abs().max()
    lse_tolerance = 1e-14 if v.dtype == torch.float64 else 3e-6
    assert (lse.double() - want_lse).abs().max() <= lse_tolerance * max(1.0, want_lse.abs().max())


def check_gradients(
    name: str, arguments: Sequence, wanted: Sequence[int], definition: Callable, tolerance: float = 1.0
) -> list[Tensor]:
    """The backward operator against autograd through a float64 definition; `wanted`: arguments with gradients."""
    out, lse = operator(name)(*arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to(out.dtype)
    gradients = operator(f"{name}_backward")(grad, out, lse, *arguments)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    leaves = [i for i in wanted if arguments[i] is not None]
    for i in leaves:
        wide[i] = wide[i].detach().requires_grad_()
    with torch.enable_grad():
        want = iter(torch.autograd.grad(definition(*wide)[0], [wide[i] for i in leaves], grad.double()))
    for i, got in zip(wanted, gradients, strict=True):
        if arguments[i] is None:
            assert got.numel() == 0
            continue
        expected = next(want)
        assert got.dtype == arguments[i].dtype
        assert got.shape == expected.shape
        if got.numel() > 0:
            limit = tolerance * GRADIENT_TOLERANCE[out.dtype] * expected.abs().max().clamp(min=1.0)
            assert (got.double() - expected).abs().max() <= limit, f"argument {i}"
    return gradients


def check_with(capability: str, file: str) -> None:
    """The tests of a file again, in a process that may use no more than this instruction set."""
    if os.environ.get("ATEN_CPU_CAPABILITY") is not None:
        assert library.status().capability == os.environ["ATEN_CPU_CAPABILITY"]
        return
    order = (*OTHER_CAPABILITIES, "avx512_bf16")
    if order.index(capability) > order.index(library.status().capability or "default"):
        pytest.skip(f"this processor has no {capability}")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, file]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
