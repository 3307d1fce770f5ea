"""How the tests run: as plain methods, on a loop of their own, which they must leave empty."""

import asyncio
import functools
import unittest
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from meshkit.testing.cancellation import CancellationPoint, cancellation_points


class _Runs(Protocol):
    def run_scenario(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None: ...


C = TypeVar("C", bound=_Runs)


BROKEN = "the transport broke a promise"


def require(kept: object, promise: str) -> None:
    """Fail the test if a promise was not kept."""
    if not kept:
        raise AssertionError(f"{BROKEN}: {promise}")


def guaranteed(guarantee: str, value: object) -> None:
    """Skip the test if the transport does not declare this guarantee."""
    if value is None or value is False:
        raise unittest.SkipTest(f"this transport is not declared to be {guarantee}")


def scenario(test: Callable[[C], Coroutine[Any, Any, None]]) -> Callable[[C], None]:
    """Make a plain test of an asynchronous one: it needs no plugin, and leaves nothing behind."""

    def runs(self: C) -> None:
        self.run_scenario(functools.partial(test, self))

    return _named(runs, test)


def at_every_await(test: Callable[[C, CancellationPoint], Coroutine[Any, Any, None]]) -> Callable[[C], None]:
    """Make a plain test of an asynchronous one, which is run once for every point at which it can be cancelled."""

    def runs(self: C) -> None:
        for point in cancellation_points():
            try:
                self.run_scenario(functools.partial(test, self, point))
            except AssertionError as error:
                error.add_note(f"cancelled at {point}")
                raise

    return _named(runs, test)


def _named(runs: Callable[[C], None], test: Callable[..., object]) -> Callable[[C], None]:
    # Not functools.wraps: pytest would look through it, and take the point of cancellation for a fixture.
    runs.__name__, runs.__qualname__, runs.__doc__ = test.__name__, test.__qualname__, test.__doc__
    return runs


async def leaving_nothing(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `main()` on this loop; fail if it leaves tasks, sockets or errors behind."""
    loop = asyncio.get_running_loop()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    watched = _watched(loop)
    await main()
    for _ in range(5):
        await asyncio.sleep(0)  # a socket is closed one pass of the loop after its transport
    left: list[object] = [*(asyncio.all_tasks() - {asyncio.current_task()})]
    left += ["a socket"] * max(0, _watched(loop) - watched)
    require(not left, f"when it is closed, nothing is left: {left}")
    require(not unhandled, f"no error is left to the event loop: {unhandled}")


def _watched(loop: asyncio.AbstractEventLoop) -> int:
    """Return how many sockets the loop waits for, where that can be known."""
    selector = getattr(loop, "_selector", None)
    return 0 if selector is None else len(selector.get_map())
