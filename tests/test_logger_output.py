"""Lines: what they look like, where they go, and that nothing that goes wrong there reaches the service."""

import asyncio
import io
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import structlog
from hypothesis import given, strategies as st

from meshkit._log_output import console_line
from meshkit._time import clock_text, timestamp, wall
from meshkit.logger import Logger

Reports = list[dict[str, Any]]


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def unconfigured() -> Iterator[None]:
    """Leave structlog as a fresh program finds it, before and after."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def fail(text: str) -> NoReturn:
    raise ValueError(text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


# --- text for people ---------------------------------------------------------------------------------------


async def test_a_line_has_time_service_level_text_and_fields(output: io.StringIO) -> None:
    with Logger(output=output) as logger:
        log = logger.service("stash", emoji="📦")
        log.info("stored %s for %s", "a1b2", "alice", size=2300, note="two words", path="/a/b", none=None)
        log.warning("disk almost full", free=0.05)
        await asyncio.sleep(61)
        log.error("disk full")
    first, last = clock_text(1_767_225_600), clock_text(1_767_225_661)
    assert output.getvalue().splitlines() == [
        f"{first} 📦 [stash] stored a1b2 for alice  size=2300 note='two words' path=/a/b none=None",
        f"{first} 📦 [stash] WARNING disk almost full  free=0.05",
        f"{last} 📦 [stash] ERROR disk full",
    ]


def test_the_texts_of_lines_begin_in_the_same_column(output: io.StringIO) -> None:
    with Logger(output=output, node="alice") as logger:
        logger.service("social")
        logger.service("presence", emoji="📡").info("x")
        logger.service("stash", emoji="📦").info("x")
        logger.service("social").info("x")
    assert [line[9:] for line in output.getvalue().splitlines()] == [
        "alice    📡 [presence] x",
        "alice       📦 [stash] x",
        "alice         [social] x",
    ]


def test_a_line_of_debugging_says_so(output: io.StringIO) -> None:
    with Logger(output=output, level="debug") as logger:
        logger.service("stash").debug("looking")
    assert output.getvalue().endswith(" [stash] DEBUG looking\n")


@pytest.mark.parametrize(
    ("text", "arguments", "shown"),
    [
        ("100%", (), "100%"),
        ("%s", ("a",), "a"),
        ("%d of %d", (1,), "%d of %d (1,)"),
        ("%d", ("a",), "%d ('a',)"),
        ("no place", ("a", 1), "no place ('a', 1)"),
        ("100%", ("a",), "100% ('a',)"),
    ],
)
def test_arguments_that_do_not_fit_are_shown_all_the_same(
    text: str, arguments: tuple[object, ...], shown: str, output: io.StringIO
) -> None:
    with Logger(output=output) as logger:
        logger.service("stash").info(text, *arguments)
    assert output.getvalue()[9:] == f"[stash] {shown}\n"


def test_an_exception_is_shown_with_its_traceback_indented(output: io.StringIO) -> None:
    with Logger(output=output) as logger:
        try:
            fail("bad\n12:00:03 [auth] root logged in\x1b[2J")
        except ValueError as error:
            logger.service("stash").exception("failed", key=1)
            caught = error
        logger.service("stash").exception("later", exc_info=caught)
    lines = output.getvalue().splitlines()
    assert lines[0][9:] == "[stash] ERROR failed  key=1"
    assert lines[1] == "    Traceback (most recent call last):"
    assert lines[-2:] == ["    ValueError: bad", "    12:00:03 [auth] root logged in\\x1b[2J"]
    assert sum("Traceback" in line for line in lines) == 2


@given(st.text(), st.text(min_size=1), st.text())
def test_nothing_from_a_peer_can_forge_a_line_or_drive_the_terminal(text: str, key: str, value: str) -> None:
    line = console_line({"timestamp": 0.0, "level": "info", "service": "s", "event": text, key: value})
    assert not re.search("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line)


def test_an_actor_with_a_line_feed_stays_on_its_line(output: io.StringIO) -> None:
    with Logger(output=output, node="a\nb") as logger:
        logger.service("stash").event("store", "bob\n12:00:03 [auth] root logged in", message="\u202eevil")
    assert output.getvalue().count("\n") == 1
    assert "\\n12:00:03" in output.getvalue()
    assert "\\u202eevil" in output.getvalue()


@pytest.mark.parametrize(
    ("environment", "stream", "coloured"),
    [
        ({}, Terminal, True),
        ({}, io.StringIO, False),
        ({"NO_COLOR": "1"}, Terminal, False),
        ({"NO_COLOR": ""}, Terminal, True),
        ({"FORCE_COLOR": "1"}, io.StringIO, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, Terminal, False),
        ({"TERM": "dumb"}, Terminal, False),
    ],
)
def test_colours_are_for_terminals_and_whoever_asks(
    environment: dict[str, str], stream: type[io.StringIO], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = stream()
    with Logger(output=out, node="alice") as logger:
        log = logger.service("stash", emoji="📦")
        log.warning("full", free=3)
        log.info("ready")
    assert ("\x1b[33mWARNING\x1b[0m" in out.getvalue()) == coloured
    assert ("\x1b" in out.getvalue()) == coloured
    plain = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())
    assert [line[9:] for line in plain.splitlines()] == [
        "alice    📦 [stash] WARNING full  free=3",
        "alice    📦 [stash] ready",
    ]


# --- JSON --------------------------------------------------------------------------------------------------


async def test_in_json_everything_is_a_field(output: io.StringIO) -> None:
    with Logger(output=output, json=True, node="alice") as logger:
        log = logger.service("social", emoji="🎭")
        log.event("tease", "carol", target="bob", count=2)
        log.event("tease", "dave", target="bob")
        await asyncio.sleep(3)
        log.event("dance", "carol")
        log.info("ready", peers={"bob"}, weird=object)
    first, ready, dance = map(json.loads, output.getvalue().splitlines())
    assert first == {
        "timestamp": "2026-01-01T00:00:03.000Z",
        "level": "info",
        "service": "social",
        "emoji": "🎭",
        "node": "alice",
        "event": "carol and dave teased bob (x3)",
        "event_type": "tease",
        "actors": ["carol", "dave"],
        "target": "bob",
        "count": 3,
    }
    assert "target" not in dance
    assert ready["peers"] == "{'bob'}"


def test_in_json_an_exception_is_a_field(output: io.StringIO) -> None:
    with Logger(output=output, json=True) as logger:
        try:
            fail("bad")
        except ValueError:
            logger.service("stash").exception("failed")
    [record] = map(json.loads, output.getvalue().splitlines())
    assert record["level"] == "error"
    assert record["exception"].endswith("ValueError: bad")


# --- structlog ---------------------------------------------------------------------------------------------


def captured(**configuration: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []

    def capture(_logger: object, level: str, fields: Any) -> Any:
        records.append({**fields, "level": level})
        raise structlog.DropEvent

    structlog.configure(processors=[capture], **configuration)
    return records


@pytest.mark.usefixtures("unconfigured")
async def test_an_app_that_has_configured_structlog_keeps_its_configuration() -> None:
    logger = Logger()  # before the configuration, as at import time
    records = captured()
    configuration = structlog.get_config()
    with logger:
        log = logger.service("stash", emoji="📦").bind(shard=3)
        log.info("ready, %s", "alice", peers=2)
        log.event("request", "alice")
        log.event("request", "bob")
    assert records == [
        {"event": "ready, alice", "service": "stash", "emoji": "📦", "shard": 3, "peers": 2, "level": "info"},
        {
            "event": "alice and bob requested stash",
            "service": "stash",
            "emoji": "📦",
            "shard": 3,
            "event_type": "request",
            "actors": ["alice", "bob"],
            "count": 2,
            "level": "info",
        },
    ]
    assert structlog.get_config() == configuration


@pytest.mark.usefixtures("unconfigured")
def test_without_a_configuration_lines_go_to_standard_error_and_none_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Logger() as logger:
        logger.service("stash").info("ready")
        assert capsys.readouterr().err[9:] == "[stash] ready\n"
        monkeypatch.setattr(sys, "stderr", None)  # a program without a console
        logger.service("stash").info("nobody can see this")
        assert logger.stats().failed == 0
    assert not structlog.is_configured()


@pytest.mark.usefixtures("unconfigured")
def test_an_output_that_is_given_is_written_to_whatever_the_configuration(output: io.StringIO) -> None:
    records = captured()
    with Logger(output=output) as logger:
        logger.service("stash").info("ready")
    assert output.getvalue().endswith("[stash] ready\n")
    assert records == []


@pytest.mark.usefixtures("unconfigured")
def test_the_bound_logger_and_the_names_of_the_standard_library_are_used(caplog: pytest.LogCaptureFixture) -> None:
    structlog.configure(
        processors=[structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    with Logger() as logger:
        logger.service("stash").warning("100% full")
    [record] = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("meshkit.stash", "WARNING", "100% full")


@pytest.mark.usefixtures("unconfigured")
async def test_an_async_bound_logger_is_written_to_at_once() -> None:
    records = captured(wrapper_class=structlog.stdlib.AsyncBoundLogger)
    with Logger() as logger:
        logger.service("stash").info("ready")
    assert [record["event"] for record in records] == ["ready"]


async def test_the_context_variables_of_structlog_are_on_lines_and_not_on_grouped_events(output: io.StringIO) -> None:
    with Logger(output=output, json=True) as logger, structlog.contextvars.bound_contextvars(request="a"):
        logger.service("stash").info("line")
        logger.service("stash").event("store", "alice", instant=True)
        logger.service("stash").event("store", "alice")
        await asyncio.sleep(4)
    assert [json.loads(line).get("request") for line in output.getvalue().splitlines()] == ["a", "a", None]


# --- what goes wrong ---------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream whose reader has gone, until it comes back."""

    broken = True

    def write(self, text: str) -> int:
        if self.broken:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


async def test_a_broken_stream_stops_nothing_and_is_reported_once_until_it_works_again() -> None:
    reports: Reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    stream = Broken()
    with Logger(output=stream) as logger:
        log = logger.service("stash")
        for _ in range(3):
            log.info("lost")
            log.event("store", "alice")
            await asyncio.sleep(4)
        assert logger.stats().failed == 6
        assert [report["message"] for report in reports] == ["meshkit: a log line could not be written"]
        assert isinstance(reports[0]["exception"], BrokenPipeError)
        stream.broken = False
        log.info("written")
        stream.broken = True
        log.info("lost")
        assert len(reports) == 2
    assert stream.getvalue().endswith("[stash] written\n")


async def test_an_exception_handler_that_logs_through_the_broken_logger_does_not_recurse() -> None:
    logger = Logger(output=Broken())
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logger.service("loop").error("%s", context))
    with logger:
        logger.service("stash").info("lost")
    assert logger.stats().failed == 2


def test_a_closed_stream_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    stream = io.StringIO()
    stream.close()
    with Logger(output=stream) as logger:
        logger.service("stash").info("lost")
        logger.service("stash").event("store", "alice")
    assert [str(report.exc_value) for report in reports] == ["I/O operation on closed file"]
    assert repr(reports[0].object).startswith("meshkit: a log line could not be written")


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


async def test_a_field_that_cannot_be_shown_costs_its_line_and_no_more(output: io.StringIO) -> None:
    reports: Reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    with Logger(output=output) as logger:
        logger.service("stash").info("lost", field=Unspeakable())
        logger.service("stash").info("lost %s", Unspeakable())
        logger.service("stash").info("written")
    assert logger.stats().failed == 2
    assert output.getvalue()[9:] == "[stash] written\n"
    assert len(reports) == 1


@pytest.mark.parametrize("instant", [True, False])
async def test_an_event_that_cannot_be_told_costs_its_line_and_no_other(instant: bool, output: io.StringIO) -> None:
    reports: Reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    with Logger(output=output) as logger:
        log = logger.service("stash")
        log.event("store", Unspeakable())  # type: ignore[arg-type]  # that is the point
        log.event("store", "bob", message=Unspeakable(), instant=instant)  # type: ignore[arg-type]  # as above
        log.event("request", "alice")
        await asyncio.sleep(4)
        assert output.getvalue()[9:] == "[stash] alice requested stash\n"
        assert logger.stats().failed == 1 + instant
    assert [report["message"] for report in reports] == ["meshkit: a log line could not be written"]


def test_a_stream_needs_no_more_than_to_take_text() -> None:
    class Lines:
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    stream = Lines()
    with Logger(output=stream) as logger:  # type: ignore[arg-type]  # half a stream
        logger.service("stash").info("ready")
        assert logger.stats().failed == 0
    assert stream.text[9:] == "[stash] ready\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_encoding_of_the_stream_lacks_is_escaped(encoding: str) -> None:
    raw = io.BytesIO()
    with Logger(output=io.TextIOWrapper(raw, encoding=encoding)) as logger:
        logger.service("stash", emoji="📦").info("größe \ud800")
    assert raw.getvalue().count(b"\n") == 1
    text = raw.getvalue().decode(encoding)
    assert ("📦" in text) == (encoding == "utf-8")
    assert text.endswith(r"\ud800" + os.linesep)
    assert encoding != "ascii" or r"gr\xf6\xdfe" in text
    assert encoding != "ascii" or r"\U0001f4e6 [stash]" in text


def test_json_is_the_same_in_every_encoding() -> None:
    raw = io.BytesIO()
    with Logger(output=io.TextIOWrapper(raw, encoding="ascii"), json=True) as logger:
        logger.service("stash", emoji="📦").info("größe")
    record = json.loads(raw.getvalue())
    assert (record["emoji"], record["event"]) == ("📦", "größe")


class Slow(io.StringIO):
    """Hands over to other threads in the middle of a line, where a stream may."""

    def write(self, text: str) -> int:
        for character in text:
            super().write(character)
        return len(text)


def test_lines_of_many_threads_stay_whole() -> None:
    stream = Slow()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with Logger(output=stream) as logger:
        log = logger.service("stash")

        def work(name: str) -> None:
            for _ in range(50):
                log.info(name * 40)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sys.setswitchinterval(interval)
    texts = [line[17:] for line in stream.getvalue().splitlines()]
    assert len(texts) == 200
    assert set(texts) == {name * 40 for name in "abcd"}


# --- wall time as text -------------------------------------------------------------------------------------


def test_times_are_written_as_people_and_machines_read_them() -> None:
    assert timestamp(1_767_225_603.25) == "2026-01-01T00:00:03.250Z"
    assert timestamp(1_767_225_603.9996) == "2026-01-01T00:00:04.000Z"
    assert timestamp(0.001) == "1970-01-01T00:00:00.001Z"
    assert timestamp(3e11) == "11476-08-15T05:20:00.000Z"  # ten thousand years of virtual time lose no line
    assert re.fullmatch(r"\d\d:\d\d:\d\d", clock_text(wall()))
