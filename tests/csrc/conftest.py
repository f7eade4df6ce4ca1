"""What the tests of compiled kernels share: the library is there, and other instruction sets and threads are tried."""

from collections.abc import Callable, Iterator

import pytest
import torch

from vitrail.ops import library

from ..threads import with_threads
from .kernels import DEVICE, OTHER_CAPABILITIES, check_with


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> Iterator[None]:
    with library.use_ops("fused"):
        library.load(DEVICE)
        yield


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """What a kernel does not write is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=OTHER_CAPABILITIES)
def lesser_instruction_set(request: pytest.FixtureRequest) -> None:
    """Runs the tests of the same file again, in a process that may use no more than this instruction set."""
    check_with(request.param, str(request.path))


@pytest.fixture
def assert_same_bits_on_any_number_of_threads() -> Callable[..., None]:
    """A check that a function gives the same bits with one, two and three threads."""
    return with_threads
