"""What these tests share: where they run, and that what no kernel writes is seen.

`VITRAIL_TEST_DEVICE=cuda` runs all of them on a GPU, `VITRAIL_TEST_SEED` draws other sizes and values. On the CPU, where
`make test` runs them, what is of a GPU alone is skipped.
"""

from collections.abc import Iterator

import pytest
import torch

from vitrail.ops import library

from .cases import DEVICE, SEED


def pytest_report_header() -> str:
    return f"device {DEVICE}, seed {SEED}: VITRAIL_TEST_SEED={SEED} draws the same again"


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> Iterator[None]:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("VITRAIL_TEST_DEVICE is cuda, but torch sees no GPU")
    with library.use_ops("fused"):
        library.load(DEVICE)
        yield


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """Definitions are convolutions, which cuDNN would otherwise compute with the ten bits of TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """What a kernel does not write is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
