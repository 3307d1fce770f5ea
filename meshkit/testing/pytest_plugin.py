"""The pytest plugin: request the fixture `virtual_time`, and your test runs on virtual time.

An `async def` test (with pytest-asyncio 1.5 or later) then runs on a `VirtualTimeLoop`. A plain test can call the
fixture's value, `run`, as often as it likes: each call runs a coroutine function on a fresh loop.

    async def test_it_gives_up_after_an_hour(virtual_time):
        await asyncio.sleep(3600)

Where the fixture is used for every test, `@pytest.mark.real_time` exempts one.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "real_time: run this async test on an ordinary event loop")


@pytest.fixture
def virtual_time(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]:
    """Run this test on virtual time; the value is `meshkit.testing.run`."""
    marked = request.node.get_closest_marker
    hook = request.config.pluginmanager.hook.pytest_asyncio_loop_factories
    if marked("asyncio") and not marked("real_time") and hook.spec is None:  # nobody would ask for our loop
        pytest.fail("virtual_time needs pytest-asyncio 1.5 or later, or else this test would run in real time", False)
    from meshkit.testing.virtual_time import run  # a plugin must cost nothing where it is not used

    return run


@pytest.hookimpl(optionalhook=True, trylast=True)
def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tell pytest-asyncio which loop the test gets; every other test keeps the loop that it would have had."""
    if "virtual_time" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("real_time"):
        from meshkit.testing.virtual_time import VirtualTimeLoop

        return {"virtual": VirtualTimeLoop}
    return {"asyncio": asyncio.new_event_loop}
