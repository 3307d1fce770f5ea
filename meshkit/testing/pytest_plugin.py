"""The pytest plugin: virtual time for a test that asks for it, and at the end how to repeat simulations that failed.

Request the fixture `virtual_time`: an `async def` test (with pytest-asyncio 1.5 or later) then runs on a
`VirtualTimeLoop`. A plain test can call the fixture's value, `run`, as often as it likes: each call runs a coroutine
function on a fresh loop.

    async def test_it_gives_up_after_an_hour(virtual_time):
        await asyncio.sleep(3600)

Where the fixture is used for every test, `@pytest.mark.real_time` exempts one. Tests that are made by
`meshkit.testing.simulate` need no fixture.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any

import pytest

_REPEAT = "repeat"  # the name of a property of the test, also in a JUnit report


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "real_time: run this async test on an ordinary event loop")


def pytest_report_header() -> list[str]:
    """Say so where the environment says which seeds run."""
    return [f"{name}={os.environ[name]}" for name in ("MESHKIT_SEED", "MESHKIT_SEEDS") if os.environ.get(name)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: "pytest.CallInfo[None]",
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the line that repeats a simulation that failed: the note that `simulate` left at the error."""
    report = yield
    notes: list[str] = getattr(call.excinfo.value, "__notes__", []) if call.excinfo and report.failed else []
    report.user_properties += [(_REPEAT, note) for note in notes if note.startswith("MESHKIT_SEED=")]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show those lines after all that was said about the failures."""
    failed = terminalreporter.getreports("failed")
    lines = [text for report in failed for name, text in report.user_properties if name == _REPEAT]
    if lines:
        terminalreporter.section("repeat the simulations that failed")
        terminalreporter.write("".join(f"{line}\n" for line in lines))


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
