"""What the whole suite shares: the order in which tests start."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first, so that no worker starts one when the others have finished.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
