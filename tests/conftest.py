"""What every test of the project runs on: virtual time (but for those marked `real_time`), nothing left behind."""

import asyncio
import gc
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow]  # a machine that does other work, too, is no finding
settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=100, print_blob=True, suppress_health_check=SLOW
)
settings.register_profile("deep", deadline=None, max_examples=2000, suppress_health_check=SLOW)
settings.load_profile("ci")


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the tests themselves: many of them ask it to look for what they left."""
    gc.collect()
    gc.freeze()


@pytest.fixture
async def no_task_is_left() -> AsyncIterator[None]:
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"the test left tasks behind: {left}"


@pytest.fixture(autouse=True)
def habits(request: pytest.FixtureRequest, virtual_time: Callable[..., Any]) -> None:
    """Give every async test virtual time, and fail it if it leaves a task behind."""
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("no_task_is_left")
