"""The Logger on virtual time: what is grouped, when it is written, and that nothing is lost."""

import asyncio
import io
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
from hypothesis import given, strategies as st

from meshkit.logger import LogEntry, Logger, LoggerStats, ServiceLog
from meshkit.testing import run


class Output(io.StringIO):
    """What a logger has written, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, text: str) -> int:
        loop = asyncio._get_running_loop()
        self.times.append(-1.0 if loop is None else loop.time())
        return super().write(text)

    @property
    def lines(self) -> list[str]:
        """The lines, without the time of day."""
        return [line[9:] for line in self.getvalue().splitlines()]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]

    @property
    def events(self) -> int:
        """How many events the lines tell of."""
        return sum(record.get("count", 0) for record in self.records)

    @property
    def dropped(self) -> int:
        return sum(sum(record.get("dropped", {}).values()) for record in self.records)


@pytest.fixture
def output() -> Output:
    return Output()


@pytest.fixture
def logger(output: Output) -> Iterator[Logger]:
    with Logger(output=output) as logger:
        yield logger


async def test_three_teases_of_bob_are_one_line(logger: Logger, output: Output) -> None:
    log = logger.service("social", emoji="🎭")
    for actor in ("alice", "carol", "dave"):
        log.event("tease", actor, target="bob")
        await asyncio.sleep(1)
    assert output.lines == []
    await asyncio.sleep(60)
    assert output.lines == ["🎭 [social] alice, carol, and dave teased bob"]
    assert output.times == [5.0]


async def test_two_requests_are_one_line_about_the_service(logger: Logger, output: Output) -> None:
    log = logger.service("stash", emoji="📦")
    log.event("request", "alice")
    log.event("request", "bob")
    await asyncio.sleep(3)
    assert output.lines == ["📦 [stash] alice and bob requested stash"]


async def test_events_of_other_services_types_and_targets_are_lines_of_their_own(
    logger: Logger, output: Output
) -> None:
    social, stash = logger.service("social"), logger.service("stash")
    for _ in range(2):
        social.event("tease", "alice", "bob")
        social.event("tease", "alice", "carol")
        social.event("praise", "alice", "bob")
        stash.event("tease", "alice", "bob")
    await asyncio.sleep(3)
    assert output.lines == [
        "[social] alice teased bob (x2)",
        "[social] alice teased carol (x2)",
        "[social] alice praised bob (x2)",
        " [stash] alice teased bob (x2)",
    ]


async def test_a_steady_stream_still_shows_within_the_bounded_time(logger: Logger, output: Output) -> None:
    log = logger.service("social")
    for _ in range(400):
        log.event("tease", "alice", target="bob")
        await asyncio.sleep(0.1)
    await asyncio.sleep(60)
    assert output.times[:2] == [pytest.approx(15), pytest.approx(30)]
    counts = [int(line.rpartition("(x")[2].rstrip(")")) for line in output.lines]
    assert sum(counts) == 400


async def test_the_bounded_time_can_be_chosen(output: Output) -> None:
    with Logger(output=output, batch_window=1, max_wait=2) as logger:
        log = logger.service("social")
        for _ in range(20):
            log.event("tease", "alice", target="bob")
            await asyncio.sleep(0.5)
    assert output.times[0] == 2.0


async def test_a_hundred_thousand_events_in_one_second_lose_no_count(output: Output) -> None:
    with Logger(output=output, json=True) as logger:
        log = logger.service("social")
        rng = random.Random(1)
        total = 0
        for _ in range(100):
            for number in range(1000):
                count = 1 + number % 3
                log.event("tease", f"peer{rng.randrange(2000)}", target=f"peer{number % 11}", count=count)
                total += count
            await asyncio.sleep(0.01)
        assert logger.stats().pending == total
        await asyncio.sleep(4)
        assert logger.stats() == LoggerStats(groups=0, pending=0, dropped=0, failed=0)
    assert output.events == total
    assert len(output.records) == 11
    assert all(len(record["actors"]) <= 251 for record in output.records)


async def test_a_flood_of_targets_is_bounded_and_said_in_one_warning_line(output: Output) -> None:
    with Logger(output=output, json=True, max_groups=100) as logger:
        social, stash = logger.service("social"), logger.service("stash")
        for number in range(10_000):
            social.event("tease", "alice", target=str(number))
        stash.event("request", "bob", count=7)
        assert logger.stats() == LoggerStats(groups=100, pending=100, dropped=9907, failed=0)
        await asyncio.sleep(60)
        assert len(output.records) == 101
        [warning] = [record for record in output.records if record["level"] != "info"]
        assert (warning["level"], warning["service"]) == ("warning", "log")
        assert warning["event"].startswith("9907 events were dropped")
        assert "max_groups" in warning["event"]
        assert warning["dropped"] == {"social": 9900, "stash": 7}
        stash.event("request", "bob")  # there is room again
        await asyncio.sleep(3)
    assert output.events + output.dropped == 10_008


async def test_under_a_lasting_flood_what_was_dropped_is_told_once_a_window(output: Output) -> None:
    with Logger(output=output, json=True, max_groups=10) as logger:
        log = logger.service("social")
        for second in range(300):
            for number in range(50):
                log.event("tease", "alice", target=f"{second // 5} {number}")
            await asyncio.sleep(0.1)
    warnings = [record for record in output.records if record["level"] == "warning"]
    assert 2 <= len(warnings) <= 11
    assert output.events + output.dropped == 300 * 50


async def test_many_groups_that_are_due_together_are_written_a_few_at_a_time(output: Output) -> None:
    passes = 0
    with Logger(output=output) as logger:
        log = logger.service("social")
        for number in range(1000):
            log.event("tease", "alice", target=str(number))
        await asyncio.sleep(2.999)
        while logger.stats().groups:
            await asyncio.sleep(0.0001)
            passes += 1
    assert len(output.lines) == 1000
    assert passes > 1


async def test_an_instant_event_is_written_at_once(logger: Logger, output: Output) -> None:
    log = logger.service("social")
    log.event("tease", "alice", "bob")
    log.event("tease", "carol", "bob", instant=True)
    assert output.lines == ["[social] carol teased bob"]
    await asyncio.sleep(3)
    assert output.lines[1:] == ["[social] alice teased bob"]


async def test_a_verbose_service_writes_events_at_once_and_shows_debug_lines(logger: Logger, output: Output) -> None:
    log, other = logger.service("stash"), logger.service("social")
    log.debug("not shown")
    logger.set_service_verbose("stash", True)
    log.debug("shown")
    other.debug("not shown")
    log.event("store", "alice")
    assert output.lines == [" [stash] DEBUG shown", " [stash] alice stored stash"]
    logger.set_service_verbose("stash", False)
    log.debug("not shown")
    log.event("store", "alice")
    assert len(output.lines) == 2


async def test_a_disabled_service_shows_nothing_but_what_was_grouped_before(logger: Logger, output: Output) -> None:
    log = logger.service("presence")
    log.event("howdy", "alice")
    logger.set_service_enabled("presence", False)
    logger.set_service_verbose("presence", True)
    log.debug("not shown")
    log.info("not shown")
    log.warning("not shown")
    log.error("not shown")
    log.exception("not shown", exc_info=ValueError())  # noqa: LOG004 - which exception is said
    log.event("howdy", "bob")
    log.event("howdy", "bob", instant=True)
    logger.service("stash").info("shown")
    await asyncio.sleep(3)
    assert output.lines == ["   [stash] shown", "[presence] alice howdied presence"]
    logger.set_service_enabled("presence", True)
    log.debug("shown, as it is verbose")
    assert len(output.lines) == 3


async def test_services_are_switched_by_configuration_also_before_they_exist(output: Output) -> None:
    with Logger(output=output, disabled=["presence"], verbose=["stash"]) as logger:
        logger.service("presence").error("not shown")
        logger.service("stash").debug("shown")
        logger.service("social").debug("not shown")
    assert output.lines == ["   [stash] DEBUG shown"]


async def test_all_services_can_be_verbose(output: Output) -> None:
    with Logger(output=output, verbose=True) as logger:
        logger.service("stash").debug("shown")
        logger.set_service_verbose("stash", False)
        logger.service("stash").debug("not shown")
        logger.service("social").event("tease", "alice", "bob")
    assert output.lines == ["[stash] DEBUG shown", "[social] alice teased bob"]


@pytest.mark.parametrize("argument", ["disabled", "verbose"])
def test_one_string_of_names_is_refused(argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be names of services, like \\['stash'\\], not one string"):
        Logger(**{argument: "stash"})  # type: ignore[arg-type]  # that is the point


async def test_lines_below_the_level_are_not_shown(output: Output) -> None:
    with Logger(output=output, level="error") as logger:
        log = logger.service("stash")
        log.warning("not shown")
        log.event("store", "alice")
        log.event("store", "alice", instant=True)
        log.error("shown")
    assert output.lines == ["[stash] ERROR shown"]


def test_outside_a_loop_events_are_written_at_once(logger: Logger, output: Output) -> None:
    logger.service("stash").event("store", "alice", message="2 KB", count=2)
    assert output.lines == ["[stash] alice stored stash (x2): 2 KB"]
    assert logger.stats().groups == 0


async def test_events_of_no_count_are_no_events(logger: Logger) -> None:
    log = logger.service("stash")
    log.event("sync", "alice", count=0)
    log.event("sync", "alice", count=0, instant=True)
    assert logger.stats().groups == 0
    with pytest.raises(ValueError, match="count must be at least 0, not -1"):
        log.event("sync", "alice", count=-1)


def test_the_log_of_a_service_is_the_same_object_each_time(logger: Logger, output: Output) -> None:
    log = logger.service("stash")
    assert logger.service("stash", emoji="📦") is log
    assert logger.service("stash") is log
    assert log.name == "stash"
    log.info("has an emoji now")
    logger.service("stash", emoji="🗃").info("has another one")
    assert output.lines == ["📦 [stash] has an emoji now", "🗃 [stash] has another one"]


def test_of_many_threads_that_ask_for_a_new_service_all_get_the_same_log(logger: Logger) -> None:
    barrier = threading.Barrier(8)
    logs: list[ServiceLog] = []

    def ask() -> None:
        barrier.wait()
        logs.append(logger.service("stash"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, logs))) == 1


async def test_bound_fields_are_on_every_line_and_on_events_that_share_them(output: Output) -> None:
    with Logger(output=output, json=True) as logger:
        log = logger.service("stash").bind(shard=3)
        log.bind(request="a").info("line", size=1)
        log.bind(request="a").event("store", "alice")
        log.bind(request="b").event("store", "bob")
        log.bind(request="c").event("store", "carol", instant=True)
    line, instant, grouped = output.records
    assert (line["shard"], line["request"], line["size"]) == (3, "a", 1)
    assert (instant["shard"], instant["request"]) == (3, "c")
    assert grouped["shard"] == 3
    assert "request" not in grouped
    assert grouped["count"] == 2


async def test_a_bound_log_is_switched_with_its_service(logger: Logger, output: Output) -> None:
    bound = logger.service("stash").bind(shard=3)
    logger.set_service_enabled("stash", False)
    bound.error("not shown")
    assert output.lines == []


def test_a_field_cannot_take_the_place_of_the_text(logger: Logger) -> None:
    log = logger.service("stash")
    with pytest.raises(TypeError, match="no field can be named 'event'"):
        log.bind(event="x")
    with pytest.raises(TypeError, match="event"):
        log.info("text", event="x")  # type: ignore[misc]  # that is the point


# --- formatters --------------------------------------------------------------------------------------------


async def test_a_formatter_writes_the_text_from_entries_that_add_up(logger: Logger, output: Output) -> None:
    seen: list[LogEntry] = []

    def stored(entries: Sequence[LogEntry]) -> str:
        seen.extend(entries)
        return f"{sum(entry.count for entry in entries)} stored"

    logger.register_formatter("stash", "store", stored)
    log = logger.service("stash")
    log.event("store", "alice", message="2 KB")
    await asyncio.sleep(1)
    log.event("store", "bob", message="3 KB", count=4)
    log.event("store", "alice", message="2 KB")
    log.event("request", "alice")
    await asyncio.sleep(4)
    assert output.lines == ["[stash] 6 stored", "[stash] alice requested stash"]
    start = 1_767_225_600.0
    assert seen == [
        LogEntry("stash", "store", "alice", None, "2 KB", 2, False, "info", start),
        LogEntry("stash", "store", "bob", None, "3 KB", 4, False, "info", start + 1),
    ]


async def test_a_formatter_is_also_asked_about_instant_events(logger: Logger, output: Output) -> None:
    logger.register_formatter(
        "stash", "store", lambda entries: f"{len(entries)} {entries[0].instant} {entries[0].time}"
    )
    await asyncio.sleep(10)
    logger.service("stash").event("store", "alice", instant=True)
    assert output.lines == ["[stash] 1 True 1767225610.0"]


@pytest.mark.parametrize("formatter", [lambda _: 1 / 0, lambda _: None])
async def test_where_a_formatter_fails_the_default_text_stands_in_and_it_is_reported_once(
    formatter: Callable[..., Any], logger: Logger, output: Output
) -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    logger.register_formatter("stash", "store", formatter)
    log = logger.service("stash")
    for _ in range(3):
        log.event("store", "alice")
        await asyncio.sleep(4)
    assert output.lines == ["[stash] alice stored stash"] * 3
    assert [report["message"] for report in reports] == ["meshkit: the formatter of 'stash' for 'store' failed"]
    logger.register_formatter("stash", "store", formatter)  # a new one: its first error is news again
    log.event("store", "alice", instant=True)
    assert len(reports) == 2
    assert isinstance(reports[1]["exception"], ZeroDivisionError | TypeError)


async def test_a_formatter_may_log_and_flush(logger: Logger, output: Output) -> None:
    log = logger.service("stash")

    def stored(entries: Sequence[LogEntry]) -> str:
        log.event("request", "carol")
        logger.flush()
        return "stored"

    logger.register_formatter("stash", "store", stored)
    log.event("store", "alice")
    await asyncio.sleep(3)
    assert sorted(output.lines) == ["[stash] carol requested stash", "[stash] stored"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["tease", "praise"]),
            st.integers(0, 8),
            st.integers(0, 5),
            st.integers(1, 9),
            st.booleans(),
            st.sampled_from([0.0, 0.0, 0.5, 2.0, 5.0]),
        ),
        max_size=60,
    )
)
def test_counts_add_up_exactly(events: list[tuple[str, int, int, int, bool, float]]) -> None:
    output = Output()

    async def main() -> None:
        async with Logger(output=output, json=True, max_groups=4, max_entries=3) as logger:
            log = logger.service("social")
            for event_type, actor, target, count, instant, pause in events:
                log.event(event_type, str(actor), str(target), count=count, instant=instant)
                if pause:
                    await asyncio.sleep(pause)
                stats = logger.stats()
                assert stats.groups <= 4
        assert output.dropped == logger.stats().dropped

    run(main)
    assert output.events + output.dropped == sum(event[3] for event in events)


# --- construction and inspection ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_window": 0}, "batch_window must be finite and more than zero seconds, not 0"),
        ({"batch_window": float("nan")}, "batch_window"),
        ({"max_wait": -1}, "max_wait"),
        ({"max_wait": 2}, r"max_wait must be at least batch_window \(3 s\), not 2"),
        ({"level": "warn"}, "level must be one of debug, info, warning, error, not 'warn'"),
        ({"max_groups": 0}, "max_groups must be at least 1, not 0"),
        ({"max_entries": 0}, "max_entries must be at least 1, not 0"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Logger(**arguments)


def test_a_service_needs_a_name(logger: Logger) -> None:
    with pytest.raises(ValueError, match="the name of a service must not be ''"):
        logger.service("")


async def test_repr_shows_configuration_and_state(output: Output) -> None:
    with Logger(output=output, node="alice", batch_window=1.5) as logger:
        log = logger.service("stash")
        assert repr(log) == "<ServiceLog 'stash'>"
        logger.set_service_enabled("stash", False)
        logger.set_service_verbose("stash", True)
        assert repr(log.bind(shard=3)) == "<ServiceLog 'stash' disabled verbose shard=3>"
        logger.service("social").event("tease", "alice", "bob")
        assert repr(logger) == "Logger(node='alice', batch_window=1.5, services=['social', 'stash'], groups=1)"
        assert logger.stats() == LoggerStats(groups=1, pending=1, dropped=0, failed=0)


def test_where_lines_go_and_what_words_them_is_checked() -> None:
    with pytest.raises(TypeError, match=r"^output must be an open text stream, such as sys.stdout, not 'mesh.log'$"):
        Logger(output=cast("Any", "mesh.log"))
    with (
        Logger(output=io.StringIO()) as logger,
        pytest.raises(TypeError, match="formatter must be a function of entries"),
    ):
        logger.register_formatter("stash", "store", cast("Any", "{actor} stored"))
