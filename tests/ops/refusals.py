"""Wrong arguments: what the compiled operators must say of them, past the checks of the public functions."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from vitrail.ops import library, use_ops


def check_kernel_refuses(name: str, args: list[Any], change: Mapping[int, Any], message: str) -> None:
    """Call the compiled operator with some of its arguments replaced."""
    changed = [change.get(i, value) for i, value in enumerate(args)]
    with use_ops("fused"):
        library.load()
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.vitrail, name)(*changed)
