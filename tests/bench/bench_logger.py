"""The Logger: a filtered line beside structlog's own, a batched event, whole lines, and what a flood costs."""

import asyncio
import io
import time
from typing import Any, TextIO

import structlog

from meshkit.logger import Logger
from tests.bench.harness import Compare, Fact, Measure, bytes_each, slowest

ACTORS = [f"peer-{number}" for number in range(100)]
TARGETS = [f"target-{number}" for number in range(100)]


class Nowhere(io.TextIOBase):
    """A stream that costs nothing."""

    def write(self, text: str) -> int:
        return len(text)


NOWHERE: TextIO = Nowhere()  # type: ignore[assignment]  # it has all that is used of one


def bound(renderer: Any) -> Any:
    """Return a bound structlog logger, as its documentation advises."""
    processors = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        structlog.processors.TimeStamper(fmt="iso"),
        renderer,
    ]
    return structlog.wrap_logger(
        structlog.PrintLogger(NOWHERE),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        context_class=dict,
    ).bind(service="stash")


BOUND_JSON = bound(structlog.processors.JSONRenderer())
BOUND_CONSOLE = bound(structlog.dev.ConsoleRenderer(colors=False))
TEXT = Logger(output=NOWHERE).service("stash", emoji="📦")
JSON = Logger(output=NOWHERE, json=True).service("stash", emoji="📦")


def bare_filtered(n: int) -> None:
    log = BOUND_JSON
    for _ in range(n):
        log.debug("received a store request", peer="bob")


def ours_filtered(n: int) -> None:
    log = TEXT
    for _ in range(n):
        log.debug("received a store request", peer="bob")


def bare_filtered_plain(n: int) -> None:
    log = BOUND_JSON
    for _ in range(n):
        log.debug("received a store request")


def ours_filtered_plain(n: int) -> None:
    log = TEXT
    for _ in range(n):
        log.debug("received a store request")


def bare_json(n: int) -> None:
    log = BOUND_JSON
    for _ in range(n):
        log.info("received a store request", peer="bob")


def ours_json(n: int) -> None:
    log = JSON
    for _ in range(n):
        log.info("received a store request", peer="bob")


def bare_console(n: int) -> None:
    log = BOUND_CONSOLE
    for _ in range(n):
        log.info("received a store request", peer="bob")


def ours_console(n: int) -> None:
    log = TEXT
    for _ in range(n):
        log.info("received a store request", peer="bob")


async def bare_counts(n: int) -> None:
    """The least that could count events: a dict of dicts, and the time of the last event of each group."""
    groups: dict[tuple[str, str, str | None], dict[str, int]] = {}
    last: dict[tuple[str, str, str | None], float] = {}
    clock = asyncio.get_running_loop().time
    for number in range(n):
        key = ("stash", "store", TARGETS[number % 7])
        actor = ACTORS[number % 100]
        counts = groups.setdefault(key, {})
        counts[actor] = counts.get(actor, 0) + 1
        last[key] = clock()


async def ours_counts(n: int) -> None:
    with Logger(output=NOWHERE) as logger:
        log = logger.service("stash")
        for number in range(n):
            log.event("store", ACTORS[number % 100], TARGETS[number % 7])


def nanoseconds_per_event(n: int) -> float:
    async def main() -> float:
        with Logger(output=NOWHERE) as logger:
            log = logger.service("stash")
            start = time.perf_counter()
            for number in range(n):
                log.event("store", ACTORS[number % 100], TARGETS[number % 7])
            return (time.perf_counter() - start) / n * 1e9

    return asyncio.run(main())


def slowest_event_of_a_flood(n: int) -> float:
    """Every event has a new target: the groups fill, then events are dropped."""

    async def main() -> float:
        with Logger(output=NOWHERE) as logger:
            log = logger.service("stash")
            return slowest(lambda number: log.event("store", ACTORS[number % 100], str(number)), n)

    return asyncio.run(main())


def longest_pass_while_groups_are_written(n: int) -> float:
    """How late the loop is, at worst, while as many groups as may be open fall due together."""

    async def main() -> float:
        with Logger(output=NOWHERE, batch_window=0.01) as logger:
            log = logger.service("stash")
            for number in range(n):
                log.event("store", ACTORS[number % 100], str(number))
            worst, before = 0.0, time.perf_counter()
            while logger.stats().groups:
                await asyncio.sleep(0)
                worst, before = max(worst, time.perf_counter() - before), time.perf_counter()
            return worst * 1000

    return asyncio.run(main())


def bytes_per_entry(n: int) -> float:
    names = [str(number) for number in range(n)]

    async def main() -> float:
        logger = Logger(output=NOWHERE, max_entries=max(1, n))
        log = logger.service("stash")

        def fill(count: int) -> object:
            for name in names[:count]:
                log.event("store", name)
            return logger

        figure = bytes_each(fill, n)
        logger.close()
        return figure

    return asyncio.run(main())


def measures() -> list[Measure]:
    return [
        Compare("debug below the level, one field", bare_filtered, ours_filtered, 200_000, goal=1.3),
        Compare("debug below the level, no field", bare_filtered_plain, ours_filtered_plain, 200_000, goal=1.3),
        Fact("a batched event", nanoseconds_per_event, 100_000, "ns", goal=2000),
        Compare("a batched event / dict of counts and times", bare_counts, ours_counts, 100_000),
        Compare("a line in JSON / structlog's", bare_json, ours_json, 5_000),
        Compare("a line of text / structlog's console", bare_console, ours_console, 5_000),
        Fact("slowest event, 100,000 different targets", slowest_event_of_a_flood, 100_000, "ms", goal=10),
        Fact("longest pass of the loop, 1,000 groups due", longest_pass_while_groups_are_written, 1000, "ms", goal=10),
        Fact("bytes per entry of a group", bytes_per_entry, 10_000, "B"),
    ]
