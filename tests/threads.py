"""Numbers of threads to try."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_threads(call: Callable[[], Sequence[Tensor]]) -> None:
    """The same bits with one, two and three threads."""
    results = []
    for count in (1, 2, 3):
        with torch_threads(count):
            results.append(call())
    for result in results[1:]:
        for x, first in zip(result, results[0], strict=True):
            assert torch.equal(x, first)
