"""Logger: a log per service, in which repeated events become one line.

>>> import io
>>> output = io.StringIO()
>>> with Logger(output=output) as logger:
...     log = logger.service("stash", emoji="📦")
...     log.info("ready to serve %s", "alice", peers=3)
...     log.event("store", "alice", message="2.3 KB")
>>> for line in output.getvalue().splitlines():
...     print(line[9:])  # without the time of day
📦 [stash] ready to serve alice  peers=3
📦 [stash] alice stored stash: 2.3 KB

While an event loop runs, events of the same service, type and target are grouped until `batch_window` seconds pass
without another: "alice, carol, and dave teased bob". It is built on structlog, and takes over nobody's configuration.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TextIO, TypeAlias

import structlog
from structlog.typing import Processor

from meshkit import _check
from meshkit._event_batch import Group, sentence
from meshkit._event_timer import TimedBatch
from meshkit._log_output import LEVELS, Console, LogLines, LogOutput, Service, stamp
from meshkit._time import wall
from meshkit.events import report

__all__ = ["EventFormatter", "LogEntry", "LogLevel", "Logger", "LoggerStats", "ServiceLog"]

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
"""How serious a line is; events are "info"."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """What formatters are given: `count` events of one actor with one message, the first of them at `time`.

    `time` is in seconds since the epoch. The counts of a group's entries add up to the events that happened. Where
    there were more actors than a group has room for, entries of the actor "(others)" stand for them.
    """

    service: str
    event_type: str
    actor: str
    target: str | None = None
    message: str | None = None
    count: int = 1
    instant: bool = False
    level: LogLevel = "info"
    time: float = 0.0


EventFormatter: TypeAlias = Callable[[Sequence[LogEntry]], str]
"""Makes the text of one line from the entries of a group, in the order first seen; there is at least one."""


@dataclass(frozen=True, slots=True)
class LoggerStats:
    """The open groups of a `Logger`, the events in them, and what was lost since it was made.

    `dropped` events found `max_groups` groups open (a warning said so); `failed` lines could not be written (the first
    of each series went to the loop's exception handler).
    """

    groups: int
    pending: int
    dropped: int
    failed: int


class ServiceLog:
    """The log of one service; made by `Logger.service`.

    `log.info("stored %s", digest, peer="bob")` takes a text, %-arguments for it, and fields. A line that cannot be
    written raises nothing. Lines may come from any thread; so may events, which are then written at once.
    """

    __slots__ = ("_batch", "_fields", "_lines", "_service", "_write_event")

    def __init__(
        self,
        service: Service,
        fields: Mapping[str, object],
        lines: LogLines,
        batch: TimedBatch,
        write_event: Callable[[Group, bool], None],
    ) -> None:
        self._service = service
        self._fields = fields
        self._lines = lines
        self._batch = batch
        self._write_event = write_event

    def __repr__(self) -> str:
        state = "".join([" disabled"] * (not self._service.enabled) + [" verbose"] * self._service.verbose)
        fields = "".join(f" {key}={value!r}" for key, value in self._fields.items())
        return f"<ServiceLog {self._service.name!r}{state}{fields}>"

    @property
    def name(self) -> str:
        """The name of the service."""
        return self._service.name

    def debug(self, event: str, *args: object, **fields: object) -> None:
        """Write a line that matters only to who looks for a fault."""
        if self._service.debug:
            self._line("debug", event, args, fields)

    def info(self, event: str, *args: object, **fields: object) -> None:
        """Write a line about what went as it should."""
        if self._service.info:
            self._line("info", event, args, fields)

    def warning(self, event: str, *args: object, **fields: object) -> None:
        """Write a line about what somebody should look at."""
        if self._service.warning:
            self._line("warning", event, args, fields)

    def error(self, event: str, *args: object, **fields: object) -> None:
        """Write a line about what failed."""
        if self._service.error:
            self._line("error", event, args, fields)

    def exception(self, event: str, *args: object, **fields: object) -> None:
        """Write an error with the traceback of the exception that is being handled, or of `exc_info=error`."""
        if self._service.error:
            self._line("error", event, args, {"exc_info": True, **fields})

    def bind(self, **fields: object) -> "ServiceLog":
        """Return a log of the same service all of whose lines have these fields as well.

        A line about many events has those bound fields that were the same for all of them.
        """
        if "event" in fields:
            raise TypeError("no field can be named 'event': that is the text of the line")
        return ServiceLog(self._service, {**self._fields, **fields}, self._lines, self._batch, self._write_event)

    def event(
        self,
        event_type: str,
        actor: str,
        target: str | None = None,
        message: str | None = None,
        count: int = 1,
        instant: bool = False,
    ) -> None:
        """Count an event: `actor` did `event_type`, to `target` if there is one, `count` times.

        It becomes part of one line about all events of its type and target, written when no more have come for the
        logger's `batch_window`. `instant` events, those of a verbose service, and those outside an event loop are
        written at once. Cost: about 1 µs when batched.
        """
        service = self._service
        if not service.info or (count != 1 and not _check.count("count", count, minimum=0)):
            return
        key = (service.name, event_type, target)
        if instant or service.verbose or not self._batch.add(key, actor, message, count, self._fields):
            group = Group(key, self._fields, wall())
            group.enter((actor, message), count, group.opened, 1)
            self._write_event(group, instant)

    def _line(self, level: LogLevel, event: str, args: tuple[object, ...], fields: dict[str, object]) -> None:
        self._lines.write(self._service, level, event, args, {**self._fields, **fields})


class Logger:
    """Makes the logs of services, and writes their lines.

    Lines go through structlog: your configuration of it, where there is one (the fields `service`, `emoji`, `node`,
    `event_type`, `actors`, `target` and `count` are yours to render); otherwise, and where `output` is given, a chain
    of the logger's own that prints text for people, or JSON.

    Args:
        batch_window: Seconds without another event of its kind after which a group of events is written.
        max_wait: Seconds after its first event when a group is written at the latest; by default, 5 windows.
        level: Lines below it are not shown. A verbose service shows all of its lines.
        disabled: Names of services that show nothing, not even errors.
        verbose: Names of services that show debug lines, and every event at once; True for all of them.
        node: The name of the node that logs: a column in text, the field `node` elsewhere.
        output: A text stream to write to, whatever structlog's configuration; by default, `sys.stderr`.
        json: Write one JSON object per line instead of text for people.
        max_groups: How many groups may be open. Events that would open another are dropped; a warning counts them.
        max_entries: How many different actors (and messages) a group remembers; of further ones, only how many events.

    Use it in a `with` or `async with` block, or `close` it, to have what is still grouped written. Writing is
    synchronous, as in `logging`. Cost: about 15 µs for a line, 1 µs for a batched event, 0.1 µs for a line that is not
    shown. A group takes about 1 kB, each of its entries 150 bytes beside the names.
    """

    def __init__(
        self,
        *,
        batch_window: float = 3.0,
        max_wait: float | None = None,
        level: LogLevel = "info",
        disabled: Iterable[str] = (),
        verbose: Iterable[str] | bool = (),
        node: str | None = None,
        output: TextIO | None = None,
        json: bool = False,
        max_groups: int = 1000,
        max_entries: int = 250,
    ) -> None:
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
        if output is not None and not hasattr(output, "write"):
            raise TypeError(f"output must be an open text stream, such as sys.stdout, not {output!r}")
        self._batch = TimedBatch(
            self._write_group,
            self._tell_dropped,
            batch_window=batch_window,
            max_wait=max_wait,
            max_groups=max_groups,
            max_entries=max_entries,
        )
        self._level = level
        self._all_verbose = verbose is True
        self._node = node
        self._follows_app = output is None
        stream = LogOutput(output)
        self._console = Console(stream)
        render: list[Processor] = [stamp, structlog.processors.JSONRenderer()] if json else [self._console]
        self._own: Any = structlog.wrap_logger(
            stream,
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.format_exc_info,
                *render,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(0),
            context_class=dict,
        ).bind()
        self._lines = LogLines(self._target, node)
        self._formatters: dict[tuple[str, str], EventFormatter] = {}
        self._failing: set[tuple[str, str]] = set()
        self._services: dict[str, tuple[Service, ServiceLog]] = {}
        for name in _names("disabled", disabled):
            self.set_service_enabled(name, False)
        for name in _names("verbose", () if isinstance(verbose, bool) else verbose):
            self.set_service_verbose(name, True)

    def __repr__(self) -> str:
        node = "" if self._node is None else f"node={self._node!r}, "
        state = "closed" if self._batch.closed else f"groups={len(self._batch.groups)}"
        return f"Logger({node}batch_window={self._batch.window:g}, services={sorted(self._services)}, {state})"

    def service(self, name: str, *, emoji: str | None = None) -> ServiceLog:
        """Return the log of the service `name`, the same object each time; an `emoji` that is given is its from now.

        A service is a part of your program, and is kept for good: do not make one for each peer.
        """
        service, log = self._services.get(name) or self._make(name)
        if emoji is not None:
            service.emoji = emoji
        self._console.make_room(service)
        return log

    def _make(self, name: str) -> tuple[Service, ServiceLog]:
        if not name:
            raise ValueError(f"the name of a service must not be {name!r}")
        service = Service(name, self._level, verbose=self._all_verbose)
        log = ServiceLog(service, {}, self._lines, self._batch, self._write_group)
        return self._services.setdefault(name, (service, log))  # of two threads, the first makes it

    def set_service_enabled(self, name: str, on: bool) -> None:
        """Show lines and events of this service, or nothing more of it. What is grouped already is still written."""
        service, _ = self._services.get(name) or self._make(name)
        service.switch(enabled=on, verbose=service.verbose)

    def set_service_verbose(self, name: str, on: bool) -> None:
        """Show debug lines of this service too, and each of its events at once; or no longer."""
        service, _ = self._services.get(name) or self._make(name)
        service.switch(enabled=service.enabled, verbose=on)

    def register_formatter(self, service: str, event_type: str, formatter: EventFormatter) -> None:
        """Let `formatter` say what such events are about. Where it raises, the default text stands in.

        Its first error goes to the loop's exception handler.
        """
        if not callable(formatter):
            raise TypeError(f"formatter must be a function of entries that returns a text, not {formatter!r}")
        self._formatters[service, event_type] = formatter
        self._failing.discard((service, event_type))

    def flush(self) -> None:
        """Write all groups now. Call it on the thread whose loop logs."""
        self._batch.flush()

    def close(self) -> None:
        """Write all groups now, and from now on every event at once. Idempotent."""
        self._batch.close()

    def open(self) -> None:
        """Group events again after `close`. A new logger is open; so is one whose `with` block is entered again."""
        self._batch.closed = False

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> LoggerStats:
        """Return what waits and what was lost. Cost: proportional to what waits."""
        groups = self._batch.groups
        return LoggerStats(len(groups), groups.pending, groups.dropped, self._lines.failed)

    def _target(self, service: str) -> Any:
        """Return the structlog logger to write to: the app's, as it is configured at this moment, or our own."""
        if not (self._follows_app and structlog.is_configured()):
            return self._own
        bound = structlog.get_logger(f"meshkit.{service}").bind()
        return bound.sync_bl if isinstance(bound, structlog.stdlib.AsyncBoundLogger) else bound

    def _tell_dropped(self, dropped: dict[str, int]) -> None:
        text = "%d events were dropped, of too many different targets at once: raise max_groups, or name fewer"
        self.service("log").warning(text, sum(dropped.values()), dropped=dropped)

    def _write_group(self, group: Group, instant: bool = False) -> None:
        service, _ = self._services[group.key[0]]
        try:
            text, fields = self._text(group, instant), group.line_fields()
        except Exception as error:  # noqa: BLE001 - an actor that cannot be shown costs its line, and no other
            self._lines.lost(error)
        else:
            self._lines.write(service, "info", text, (), fields)

    def _text(self, group: Group, instant: bool) -> str:
        service, event_type, target = group.key
        formatter = self._formatters.get((service, event_type))
        if formatter is not None:
            entries = [
                LogEntry(service, event_type, actor, target, message, count, instant, "info", first)
                for (actor, message), count, first in group.entries()
            ]
            try:
                text: object = formatter(entries)
                if isinstance(text, str):
                    return text
                error: Exception = TypeError(f"it returned {text!r}, which is no text")
            except Exception as raised:  # noqa: BLE001 - whatever is wrong with a formatter, the line is written
                error = raised
            if (service, event_type) not in self._failing:
                self._failing.add((service, event_type))
                report(error, f"the formatter of {service!r} for {event_type!r} failed", formatter)
        return sentence(group.key, group.counts)


def _names(argument: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{argument} must be names of services, like [{names!r}], not one string")
    return list(names)
