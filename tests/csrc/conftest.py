"""The kernels' tests need the compiled library."""

from collections.abc import Iterator

import pytest

from vitrail.ops import library


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> Iterator[None]:
    with library.use_ops("fused"):
        library.load()
        yield
