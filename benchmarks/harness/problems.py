"""An operator at the shapes of one layer: its inputs, and everything that computes the same from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import library, use_ops
from vitrail.ops.flops import moved_bytes

from .timing import Run

Function = Callable[..., Tensor]

FUSED, REFERENCE, COMPILED = "fused", "reference", "reference, compiled"


class Disagreement(Exception):
    """Candidates that should compute the same do not: nothing is timed then."""

    def __init__(self, candidate: str, text: str) -> None:
        super().__init__(f"{candidate} {text}")
        self.candidate = candidate


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Problem:
    """Inputs and candidates. A candidate takes the leaves and returns the result."""

    leaves: tuple[Tensor, ...]
    """Floating-point inputs, which get gradients in training; views of them are taken inside the candidates."""
    operator: Function
    """vitrail's, along the path in force."""
    stock: Mapping[str, Function] = field(default_factory=dict)
    """Formulations in stock PyTorch."""
    yardsticks: Mapping[str, Function] = field(default_factory=dict)
    """Other functions, which one would use instead."""
    comparable: Callable[[Tensor], Tensor] = _as_it_is
    """What of a result must agree: of choices not the numbers chosen, as ties are arbitrary, but their scores."""
    chooses: bool = False
    """Whether rounding can make single rows choose otherwise, so that agreement is on average."""
    flex: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    """Formulations with FlexAttention, for a GPU: each is made, with what it prepares, only where it is measured."""


@dataclass(frozen=True)
class Setting:
    """A problem by the layer of a model that it comes from."""

    operator: str
    name: str
    build: Callable[[int, torch.dtype], Problem]
    kernels: tuple[str, ...] = ()
    """Names of the operators that it calls; default: `operator`."""
    trains: bool = True
    largest_batch: int = 8
    """Where the definition does not fit into memory beyond."""
    quick: bool = True
    """Whether it is part of the check."""
    on_cpu: bool = True
    """Whether it is measured on a CPU."""
    gpu_batch: int | None = 64
    """Images on a GPU, where the rows of a model have about as many tokens each; None: it has no kernel there."""

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the operators that it calls."""
        return self.kernels or (self.operator,)

    def compiled(self, training: bool, device: str = "cpu") -> bool:
        """Whether compiled kernels do all of it; else the definition does some, inside the operator."""
        names = [f"vitrail::{name}" for name in self.calls]
        if training:
            backwards = [f"{name}_backward" for name in names]
            names += [name for name in backwards if name in torch._C._dispatch_get_all_op_names()]
        return all(library.has_kernel(name, device.upper()) for name in names)


# --- candidates as runs -----------------------------------------------------------------------------------------------


def _along(mode: str, function: Function) -> Function:
    def call(*leaves: Tensor) -> Tensor:
        with use_ops(mode):
            return function(*leaves)

    return call


def functions(
    problem: Problem, with_stock: bool = True, compile_reference: bool = False, with_flex: bool = False
) -> dict[str, Function]:
    """All candidates by name, the fused operator first and the definition second."""
    found = {FUSED: _along("fused", problem.operator), REFERENCE: _along("reference", problem.operator)}
    if compile_reference:
        found[COMPILED] = _along("reference", torch.compile(problem.operator))
    if with_stock:
        found |= {**problem.stock, **problem.yardsticks}
    if with_flex:
        found |= {name: make() for name, make in problem.flex.items()}
    return found


def _forward(function: Function, leaves: tuple[Tensor, ...]) -> Tensor:
    with torch.inference_mode():
        return function(*leaves)


def _train(function: Function, leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    out = function(*leaves)
    # of what pads windows nothing is used where they fit the grid
    return (out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True))


def runs(problem: Problem, candidates: Mapping[str, Function], training: bool) -> dict[str, Run]:
    """The candidates as calls without arguments: forward, or forward and backward."""
    if not training:
        return {name: partial(_forward, function, problem.leaves) for name, function in candidates.items()}
    leaves = tuple(x.detach().requires_grad_() for x in problem.leaves)
    shape = _forward(problem.operator, problem.leaves)
    grad = torch.randn(shape.shape, generator=torch.Generator().manual_seed(1)).to(shape)
    return {name: partial(_train, function, leaves, grad) for name, function in candidates.items()}


# --- what must hold of them -------------------------------------------------------------------------------------------

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of results; largest error over largest value. Gradients, which are sums over more, may differ by three times that."""


def _error(a: Tensor, b: Tensor, average: bool) -> float:
    a, b = a.double(), b.double()
    if average:
        return float((a - b).abs().mean() / b.abs().mean())
    return float((a - b).abs().max() / b.abs().max())


def check(problem: Problem, candidates: Mapping[str, Run], training: bool) -> dict[str, float]:
    """The errors of all candidates but yardsticks against the definition.

    Where that does not fit into memory, against the first of the others that do.

    Raises:
        Disagreement: one of them is too large.
    """
    errors = {}
    results: dict[str, list[Tensor]] = {}
    for name, run in candidates.items():
        if name not in problem.yardsticks:
            out = run()
            out, *grads = out if training else (out,)  # type: ignore[misc]
            results[name] = [problem.comparable(out), *grads]
    limit = _TOLERANCE[problem.leaves[0].dtype]
    others = [name for name in results if name != FUSED]
    if REFERENCE not in results and not others:
        return {}
    base = REFERENCE if REFERENCE in results else others[0]
    for name, outs in results.items():
        pairs = list(zip(outs, results[base], strict=True))
        found = [_error(a, b, problem.chooses) for a, b in pairs]
        errors[name] = max(found)
        if not found[0] <= limit or not errors[name] <= 3 * limit:
            what = "results and gradients" if training else "results"
            raise Disagreement(name, f"computes something else: errors of {what} against {base}: {found}")
    return errors


def count_macs(run: Run) -> int:
    """Multiply-accumulates of a run, by the formulas of vitrail's operators."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


class _BytesOfCalls(TorchDispatchMode):
    """Adds up what calls of vitrail's operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = function(*args, **(kwargs or {}))
        if function.namespace == "vitrail":
            self.total += moved_bytes(args, results)
        return results


def count_bytes(run: Run) -> int:
    """Bytes that the calls of vitrail's operators in a run must move: each input once, each output once."""
    with _BytesOfCalls() as counter:
        run()
    return counter.total
