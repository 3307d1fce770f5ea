"""The end of a Logger, and other loops and threads: nothing is lost, and nothing is left behind."""

import asyncio
import contextlib
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence

import pytest

from meshkit.logger import LogEntry, Logger
from meshkit.testing import CancellationPoint, Leak, VirtualTimeLoop, cancellation_points, run
from tests.test_logger import Output


@pytest.fixture
def output() -> Output:
    return Output()


@pytest.fixture
def logger(output: Output) -> Iterator[Logger]:
    with Logger(output=output) as logger:
        yield logger


@pytest.mark.parametrize("is_async", [True, False])
def test_everything_is_written_at_the_end_of_the_block_and_no_timer_is_left(is_async: bool, output: Output) -> None:
    async def main() -> None:
        logger = Logger(output=output)
        if is_async:
            async with logger:
                logger.service("stash").event("store", "alice")
        else:
            with logger:
                logger.service("stash").event("store", "alice")
        assert output.lines == ["[stash] alice stored stash"]

    run(main)


def test_an_open_logger_holds_one_timer_however_many_groups_it_has(output: Output) -> None:
    logger = Logger(output=output)

    async def main() -> None:
        for number in range(100):
            logger.service("stash").event("store", "alice", str(number))
            await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        assert len(loop.live_timers()) == 1

    with pytest.raises(Leak, match="timer") as caught:
        run(main)
    assert str(caught.value).count("timer <") == 1
    logger.close()
    assert len(output.lines) == 100


async def test_after_closing_events_and_lines_are_written_at_once(logger: Logger, output: Output) -> None:
    log = logger.service("stash")
    logger.close()
    logger.close()
    log.event("store", "alice")
    log.info("late")
    assert output.lines == ["[stash] alice stored stash", "[stash] late"]
    assert repr(logger) == "Logger(batch_window=3, services=['stash'], closed)"


async def test_flush_writes_everything_now_and_batching_goes_on(logger: Logger, output: Output) -> None:
    log = logger.service("stash")
    log.event("store", "alice")
    logger.flush()
    assert output.lines == ["[stash] alice stored stash"]
    logger.flush()
    log.event("store", "bob")
    assert len(output.lines) == 1
    await asyncio.sleep(3)
    assert output.lines[1:] == ["[stash] bob stored stash"]


def test_two_loops_one_after_the_other_lose_nothing(output: Output) -> None:
    logger = Logger(output=output)

    async def main() -> None:
        logger.service("stash").event("store", "alice")

    asyncio.run(main())
    assert output.lines == []
    asyncio.run(main())  # takes up what the first one left
    assert output.lines == ["[stash] alice stored stash"]
    logger.close()
    assert output.lines == ["[stash] alice stored stash"] * 2


def test_a_loop_that_runs_again_after_another_one_goes_on_batching(output: Output) -> None:
    logger = Logger(output=output, batch_window=1)
    first, second = VirtualTimeLoop(), VirtualTimeLoop()

    async def main(seconds: float) -> None:
        logger.service("stash").event("store", "alice")
        await asyncio.sleep(seconds)

    first.run_until_complete(main(0))
    second.run_until_complete(main(0))
    first.run_until_complete(main(2))
    assert len(output.lines) == 3
    second.run_until_complete(main(2))
    assert len(output.lines) == 4
    for loop in (first, second):
        assert not loop.live_timers()
        loop.close()
    logger.close()


async def test_events_from_another_thread_are_written_at_once(logger: Logger, output: Output) -> None:
    log = logger.service("stash")
    log.event("store", "alice")

    def elsewhere() -> None:
        log.event("store", "bob")  # no loop runs here

        async def main() -> None:
            log.event("store", "carol")  # one does, but the batch belongs to the other

        asyncio.run(main())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert output.lines == ["[stash] bob stored stash", "[stash] carol stored stash"]
    logger.flush()
    assert output.lines[2:] == ["[stash] alice stored stash"]


async def test_a_grouped_line_bears_no_context_of_whoever_caused_it(output: Output) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    def stored(entries: Sequence[LogEntry]) -> str:
        seen.append(request.get())
        return "stored"

    with Logger(output=output) as logger:
        logger.register_formatter("stash", "store", stored)
        request.set("alice's")
        logger.service("stash").event("store", "alice")
        await asyncio.sleep(4)
        logger.service("stash").event("store", "alice")
        logger.flush()
        logger.service("stash").event("store", "alice", instant=True)
    assert seen == ["none", "none", "alice's"]


def test_a_program_that_ends_without_closing_loses_nothing() -> None:
    code = """
import asyncio, meshkit.logger
logger = meshkit.logger.Logger()
async def main():
    logger.service("stash").event("store", "alice")
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr[9:] == "[stash] alice stored stash\n"
    assert ended.stdout == ""


@pytest.mark.filterwarnings("error")
def test_a_logger_that_nobody_holds_any_more_is_not_kept_and_writes_what_is_left(output: Output) -> None:
    async def main() -> "weakref.ref[Logger]":
        logger = Logger(output=output)
        logger.service("stash").event("store", "alice")
        return weakref.ref(logger)

    logger = asyncio.run(main())
    gc.collect()
    assert logger() is None
    assert output.lines == ["[stash] alice stored stash"]
    with pytest.raises(ValueError, match="max_wait"):
        Logger(max_wait=-1)  # what could not be made has nothing to write
    gc.collect()


@pytest.mark.parametrize("by", ["timer", "close", "flush of a loop that has ended"])
def test_where_writing_is_interrupted_the_other_groups_are_not_lost(by: str, output: Output) -> None:
    def interrupt(entries: Sequence[LogEntry]) -> str:
        raise KeyboardInterrupt

    logger, loop = Logger(output=output), VirtualTimeLoop()

    async def main() -> None:
        logger.register_formatter("stash", "store", interrupt)
        logger.service("stash").event("store", "alice")
        logger.service("stash").event("request", "bob")
        logger.service("stash").event("request", "carol")
        if by == "timer":
            await asyncio.sleep(60)
        elif by == "close":
            logger.close()

    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(main())
        loop.close()
        logger.flush()
    logger.close()
    loop.close()
    assert output.lines == ["[stash] bob and carol requested stash"]


def test_a_logger_that_is_opened_again_groups_events_again_and_has_forgotten_nothing() -> None:
    output = Output()
    logger = Logger(output=output, disabled=["noisy"])
    logger.register_formatter("stash", "store", lambda entries: f"{sum(entry.count for entry in entries)} files")
    log = logger.service("stash")

    async def main() -> None:
        for opened in range(3):
            if opened == 1:
                logger.open()
            async with contextlib.nullcontext() if opened == 1 else logger:
                log.event("store", "alice", count=2)
                log.event("store", "bob")
                logger.service("noisy").error("noise")
                assert output.lines == ["[stash] 3 files"] * opened
                logger.flush()
            logger.close()
            assert output.lines == ["[stash] 3 files"] * (opened + 1)

    run(main)
    assert logger.service("stash") is log


def test_cancelling_a_service_anywhere_loses_no_event() -> None:
    for point in cancellation_points():
        output = Output()
        told: list[int] = []

        async def main(output: Output = output, told: list[int] = told, point: CancellationPoint = point) -> None:
            async def service() -> None:
                async with Logger(output=output, json=True, max_wait=5) as logger:
                    for number in range(4):
                        logger.service("stash").event("store", "alice")
                        told.append(number)
                        await asyncio.sleep(2)

            await point.cancel(service())
            assert output.events == len(told)

        run(main)
