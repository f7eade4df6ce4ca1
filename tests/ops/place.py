"""The place in PyTorch of the operators of the inference form."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_vmap(operator: Callable[..., Tensor], x: Tensor, *rest: Any) -> None:
    """Each entry gets its own result."""
    xs = torch.stack([x, -2 * x])
    got = torch.vmap(lambda x: operator(x, *rest))(xs)
    for i in range(2):
        torch.testing.assert_close(got[i], operator(xs[i], *rest))


def check_compiled_and_scripted(function: Callable[..., Tensor], args: Mapping[str, Any]) -> None:
    """Both give what the function gives."""
    want = function(**args)
    compiled = torch.compile(lambda **kwargs: function(**kwargs), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**args), want)
    torch.testing.assert_close(torch.jit.script(function)(**args), want)
