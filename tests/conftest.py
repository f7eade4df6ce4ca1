"""What the whole suite shares: the order of the tests, how pytest-xdist deals them out, and which examples
hypothesis tries."""

from typing import Any

import pytest
from hypothesis import settings

# The same examples every time, so that a failure speaks of the change; `--hypothesis-profile=explore` tries others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first, so that no worker starts one when the others have finished.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files go to one worker, which builds their fixtures once; timm's suite and what may run on a GPU have none
    that cost anything and are spread."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith("/test_timm_suite.py") or "/gpu/" in file else file

    config.option.loadscopereorder = False
    return ByFile(config, log)
