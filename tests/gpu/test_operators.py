"""Every operator against its definition in float64: random sizes and values, any layout, many images.

The bodies run on the CPU as on a GPU, whose own matters are in `test_cuda.py`.
"""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import (
    CASES,
    DEVICE,
    DTYPES,
    LAYOUTS,
    ON_GPU,
    TOLERANCE,
    Draw,
    check,
    gradient_for,
    has_kernels,
    run,
)

each_operator = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MANY = 256 if ON_GPU else 9
LARGEST = 24 if ON_GPU else 10


def case_of(name, key="", batch=2, largest=LARGEST):
    return CASES[name](Draw(f"{name} {key}", batch, largest))


def test_every_operator_that_may_run_on_a_gpu_is_here():
    names = {
        name.removeprefix("vitrail::").removesuffix("_backward")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vitrail::")
    }
    assert {name for name in names if not name.startswith("packed_")} == set(CASES)


@each_dtype
@each_operator
def test_a_tiny_call_matches_the_definition(name, dtype):
    case = case_of(name, f"tiny {dtype}", batch=1, largest=5)
    check(case, case.arguments(dtype, "awkward"))


@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype
@each_operator
def test_it_matches_the_definition(name, dtype, layout):
    for i in range(8 if ON_GPU else 2):
        draw = Draw(f"{name} {dtype} {layout} {i}", 1 + i % 3, LARGEST)
        case = CASES[name](draw)
        check(case, case.arguments(dtype, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_operator
def test_many_images_match_the_definition(name, dtype):
    case = case_of(name, f"many {dtype}", MANY, 12 if ON_GPU else 6)
    check(case, case.arguments(dtype, "packed"))


@each_dtype
@each_operator
def test_it_gives_the_same_bits_every_time(name, dtype):
    if not has_kernels(name):
        pytest.skip(f"{name} runs by its definition on {DEVICE}")
    case = case_of(name, f"bits {dtype}", 16 if ON_GPU else 3)
    arguments = case.arguments(dtype, "packed")
    backward = case.differentiable and has_kernels(name, backward=True)
    grad = gradient_for(run(case, arguments)[0]) if backward else None
    first = run(case, arguments, grad)
    for _ in range(4 if ON_GPU else 1):
        for again, x in zip(run(case, arguments, grad), first, strict=True):
            assert torch.equal(again, x)


# --- as an operator of PyTorch ----------------------------------------------------------------------------------------


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
BACKWARD_CHECKS = ("test_schema", "test_faketensor")


class Recorder(TorchDispatchMode):
    """The calls of vitrail's operators, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vitrail":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def with_gradients(function, args):
    """The arguments, those that get gradients as leaves."""
    module = sys.modules.get(f"vitrail.ops.{function.name().removeprefix('vitrail::')}")
    wanted = module._operator._wanted if hasattr(module, "_operator") else ()
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    return tuple(
        x.requires_grad_() if i in wanted and isinstance(x, torch.Tensor) else x for i, x in enumerate(args)
    )


@each_operator
def test_opcheck_finds_nothing(name):
    torch.use_deterministic_algorithms(False)  # compares what it allocates
    case = case_of(name, "opcheck", largest=6)
    arguments = case.arguments(torch.float32)
    with Recorder() as recorder:
        (out,) = run(case, arguments)
    calls = [(function, with_gradients(function, args)) for function, args in recorder.calls]
    assert any(function.name() == f"vitrail::{name}" for function, _ in calls)
    if case.differentiable:
        with Recorder() as recorder:
            run(case, arguments, gradient_for(out))
        calls += [(f, args) for f, args in recorder.calls if f.name().endswith("_backward")]
    for function, args in calls:
        # second derivatives, which are the definition's, are tried in tests/ops
        tried = BACKWARD_CHECKS if function.name().endswith("_backward") else OPCHECKS
        torch.library.opcheck(function, args, test_utils=tried)


@each_operator
def test_autocast_computes_in_half_and_stays_close(name):
    case = case_of(name, "autocast")
    if case.comparable is not None:
        pytest.skip(f"{name} gives numbers of what it chooses")
    arguments = case.arguments(torch.float32)
    (want,) = run(case, arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        (got,) = run(case, arguments)
    module = sys.modules[f"vitrail.ops.{name}"]
    assert got.dtype == (torch.bfloat16 if module._operator._cast else torch.float32)
    if not case.may_differ:  # rounded queries choose other keys
        error = (got.float() - want).abs().max()
        assert error <= 3 * TOLERANCE[torch.bfloat16] * want.abs().max()


@each_operator
def test_torch_compile_makes_one_graph(name):
    case = case_of(name, "compile", largest=6)
    arguments = case.arguments(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_(case.differentiable and x.is_floating_point()) for x in arguments]
    out = compiled(*leaves)
    grad = gradient_for(out) if case.differentiable else None
    got, want = [out.detach()], run(case, arguments, grad)
    if case.differentiable:
        wanted = [leaves[i] for i in range(len(case.floats)) if i not in case.no_gradient]
        got += torch.autograd.grad(out, wanted, grad, materialize_grads=True)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
