import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from meshkit import _time
from meshkit.testing import VirtualTimeLoop, run


class Slow(asyncio.SelectorEventLoop):
    """Somebody's loop with a clock of its own."""

    def time(self) -> float:
        return 1_000_000 + super().time() / 1000


@contextlib.contextmanager
def loop_of(kind: type[asyncio.AbstractEventLoop]) -> Iterator[asyncio.AbstractEventLoop]:
    loop = kind()
    try:
        yield loop
    finally:
        loop.close()


def close(first: float, second: float) -> bool:
    return abs(first - second) < 60


def test_outside_of_a_loop_now_is_monotonic_and_wall_is_the_system_clock() -> None:
    assert _time.running_loop() is None
    assert close(_time.now(), time.monotonic())
    assert close(_time.Clock().now(), time.monotonic())
    assert close(_time.wall(), time.time())


async def test_on_virtual_time_every_clock_is_the_loop() -> None:
    clock = _time.Clock()
    start = _time.wall()
    for expected in (0.0, 90.0, 3690.0):
        assert _time.now() == clock.now() == expected
        assert _time.wall() == start + expected
        await asyncio.sleep(90 if expected == 0 else 3600)
    assert _time.running_loop() is asyncio.get_running_loop()


@pytest.mark.real_time
async def test_on_an_ordinary_loop_now_is_its_time_and_wall_is_the_system_clock() -> None:
    loop = asyncio.get_running_loop()
    clock = _time.Clock()
    for _ in range(2):
        before = loop.time()
        assert before <= _time.now() <= loop.time()
        assert before <= clock.now() <= loop.time()
        await asyncio.sleep(0)
    assert close(_time.wall(), time.time())


def test_a_loop_of_somebody_else_is_obeyed() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        clock = _time.Clock()
        for _ in range(2):
            assert close(_time.now(), loop.time())
            assert close(clock.now(), loop.time())
            assert not close(clock.now(), time.monotonic())

    with loop_of(Slow) as loop:
        loop.run_until_complete(main())


def test_a_time_that_a_tool_put_on_the_loop_itself_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    with loop_of(asyncio.SelectorEventLoop) as loop:
        monkeypatch.setattr(loop, "time", lambda: 42.0)

        async def main() -> None:
            assert _time.now() == 42.0
            assert _time.Clock().now() == 42.0

        # What the loop itself does with such a clock is not looked at: it runs main in its first pass.
        loop.run_until_complete(main())


def test_one_clock_serves_loops_one_after_the_other_and_none() -> None:
    clock = _time.Clock()

    async def virtual() -> None:
        assert clock.now() == asyncio.get_running_loop().time() < 10
        await asyncio.sleep(5)
        assert clock.now() == 5.0

    async def ordinary() -> None:
        assert close(clock.now(), time.monotonic())

    for _ in range(2):
        run(virtual)
        assert close(clock.now(), time.monotonic())
        asyncio.run(ordinary())
        assert close(clock.now(), time.monotonic())
        with loop_of(Slow) as loop:
            loop.run_until_complete(ordinary_on_slow(clock))
        run(virtual)


async def ordinary_on_slow(clock: _time.Clock) -> None:
    assert close(clock.now(), asyncio.get_running_loop().time())


def test_the_clocks_of_two_threads_do_not_disturb_each_other() -> None:
    seen = []

    async def other() -> None:
        await asyncio.sleep(500)
        seen.append((_time.now(), _time.Clock().now()))

    async def main() -> None:
        await asyncio.sleep(3)
        thread = threading.Thread(target=run, args=(other,))
        thread.start()
        thread.join()
        seen.append((_time.now(), _time.Clock().now()))

    run(main)
    assert seen == [(500.0, 500.0), (3.0, 3.0)]


def test_wall_time_asks_any_loop_that_has_it() -> None:
    async def main() -> float:
        await asyncio.sleep(1)
        return _time.wall()

    with loop_of(VirtualTimeLoop) as loop:
        assert loop.run_until_complete(main()) == 1_767_225_601.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_767_225_603.0, "2026-01-01T00:00:03.000Z"),
        (1_767_225_603.25, "2026-01-01T00:00:03.250Z"),
        (1_767_225_603, "2026-01-01T00:00:03.000Z"),
        (951_782_399.5, "2000-02-28T23:59:59.500Z"),
        (-0.25, "1969-12-31T23:59:59.750Z"),
    ],
)
def test_a_timestamp_is_rfc_3339_in_utc_to_the_millisecond(seconds: float, text: str) -> None:
    assert _time.timestamp(seconds) == text


def test_the_text_of_the_clock_is_the_local_time_of_day() -> None:
    for seconds in (0.0, 1_767_225_603.9):
        assert _time.clock_text(seconds) == time.strftime("%H:%M:%S", time.localtime(seconds))
