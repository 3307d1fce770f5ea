r"""Where a Logger's own lines go, and what they look like to a person.

>>> fields = {"timestamp": 0.0, "level": "info", "service": "stash", "emoji": "📦", "event": "ready", "peers": 3}
>>> console_line(fields, width=10)[8:]
' 📦 [stash] ready  peers=3'
>>> fields["event"] = "ready\n12:00:03 [auth] root logged in"
>>> console_line(fields, width=10)[8:]
' 📦 [stash] ready\\n12:00:03 [auth] root logged in  peers=3'
"""

import os
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TextIO

from meshkit._time import clock_text, timestamp, wall
from meshkit.events import report

__all__ = ["LEVELS", "Console", "LogLines", "LogOutput", "Service", "console_line", "stamp"]

LEVELS = ("debug", "info", "warning", "error")


class Service:
    """What all logs of one service share: which levels are shown is decided here, not at every line."""

    __slots__ = ("debug", "emoji", "enabled", "error", "info", "level", "name", "verbose", "warning")

    def __init__(self, name: str, level: str, *, verbose: bool) -> None:
        self.name = name
        self.emoji = ""
        self.level = level
        self.switch(enabled=True, verbose=verbose)

    def switch(self, *, enabled: bool, verbose: bool) -> None:
        """Show nothing, or all, or what `level` says."""
        self.enabled = enabled
        self.verbose = verbose
        least = len(LEVELS) if not enabled else 0 if verbose else LEVELS.index(self.level)
        self.debug, self.info, self.warning, self.error = (number >= least for number in range(len(LEVELS)))


class LogLines:
    """Hands lines to structlog, and lets nothing that goes wrong there out to the service.

    `target` returns the bound logger to write to, given the name of a service.
    """

    def __init__(self, target: Callable[[str], Any], node: str | None) -> None:
        self._target = target
        self._node = {} if node is None else {"node": node}
        self._failing = False
        self.failed = 0
        """How many lines could not be written."""

    def write(
        self, service: Service, level: str, event: str, args: tuple[object, ...], fields: Mapping[str, object]
    ) -> None:
        """Write a line, or count it as lost."""
        about = {"service": service.name, "emoji": service.emoji} if service.emoji else {"service": service.name}
        try:
            text = _interpolate(event, args)
            getattr(self._target(service.name), level)(text, **{**about, **self._node, **fields})
        except Exception as error:  # noqa: BLE001 - a closed pipe, or a field that cannot be shown, stops no service
            self.lost(error)
        else:
            self._failing = False

    def lost(self, error: Exception) -> None:
        """Count a line that could not be written. The first error of a series of them is reported."""
        self.failed += 1
        if not self._failing:
            self._failing = True  # set first: whoever is told may log it, here
            report(error, "a log line could not be written", self)


def _interpolate(event: str, args: tuple[object, ...]) -> str:
    if not args:
        return event
    try:
        return event % args
    except (TypeError, ValueError):  # arguments of the wrong number or kind: show what there is
        return f"{event} {args!r}"


def stamp(_logger: object, _level: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the time, as text for machines (a structlog processor)."""
    fields["timestamp"] = timestamp(wall())
    return fields


class LogOutput:
    """A text stream that takes whole lines, from any thread, and writes what its encoding lacks as escapes.

    None stands for what `sys.stderr` is at the moment.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lock = threading.RLock()  # re-entrant: a signal handler or a finalizer may log in the middle of a line
        self._seen: TextIO | None = None
        self._colours = False

    def write(self, line: str) -> None:
        """Write `line` and a line feed, and flush; what the stream raises is for the caller."""
        stream = self._now()
        if stream is None:
            return  # a program without a console (pythonw) has no standard error
        with self._lock:
            try:
                stream.write(f"{line}\n")
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                stream.write(f"{line}\n".encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()

    debug = info = warning = error = write  # structlog calls a method named after the level

    @property
    def colours(self) -> bool:
        """Whether lines should be coloured: on a terminal, unless NO_COLOR is set; with FORCE_COLOR, anywhere."""
        stream = self._now()
        if stream is not self._seen:
            self._seen = stream
            self._colours = stream is not None and _wants_colours(stream)
        return self._colours

    def _now(self) -> TextIO | None:
        return sys.stderr if self._stream is None else self._stream


def _wants_colours(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):  # https://no-color.org: set, and not empty
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (ValueError, AttributeError):  # it is closed, or has only what lines need
        return False


class Console:
    """The structlog processor that makes of an event the line that `console_line` describes."""

    def __init__(self, output: LogOutput) -> None:
        self._output = output
        self._width = 0

    def make_room(self, service: Service) -> None:
        """Align with lines of this service from now on."""
        self._width = max(self._width, len(_label(service.name, service.emoji)) + bool(service.emoji))

    def __call__(self, _logger: object, _level: str, fields: MutableMapping[str, Any]) -> str:
        return console_line({**fields, "timestamp": wall()}, width=self._width, colours=self._output.colours)


_LEVELS = {"debug": "2", "info": "", "warning": "33", "error": "31;1"}
_SERVICES = ("32", "34", "35", "36", "92", "94", "95", "96")  # red and yellow are kept for levels
_SHOWN = frozenset({"timestamp", "level", "event", "service", "emoji", "node", "exception"})
_IN_THE_SENTENCE = frozenset({"event_type", "actors", "target", "count"})
# Control characters, line separators and changes of direction: what comes from a peer must not be able to forge a line
# or to drive the terminal.
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_PLAIN = re.compile(r"[^\s\"'=\\]+")


def console_line(fields: Mapping[str, Any], *, width: int = 0, colours: bool = False) -> str:
    """Return `12:00:03 node  📦 [service] LEVEL text  key=value`; a traceback follows, indented.

    What stands before the text is right-aligned to `width` columns (an emoji is two wide). A batched event shows no
    fields that its sentence has told already.
    """
    service, emoji, level = str(fields.get("service", "")), fields.get("emoji", ""), fields["level"]
    known = _SHOWN | _IN_THE_SENTENCE if "event_type" in fields else _SHOWN
    rest = [(_clean(key), _value(value)) for key, value in fields.items() if key not in known]

    def paint(code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colours and code else text

    parts = [paint("2", clock_text(fields["timestamp"]))]
    if "node" in fields:
        parts.append(paint("1", f"{_clean(str(fields['node'])):<8}"))
    label = _label(_clean(service), emoji)
    parts.append(" " * (width - len(label) - bool(emoji)) + paint(_SERVICES[sum(service.encode()) % 8], label))
    if level != "info":
        parts.append(paint(_LEVELS[level], level.upper()))
    parts.append(paint(_LEVELS[level] if level == "debug" else "", _clean(str(fields["event"]))))
    line = " ".join(parts)
    if rest:
        line += "  " + " ".join(f"{paint('36', key)}={value}" for key, value in rest)
    if "exception" in fields:
        line += "\n" + textwrap.indent("\n".join(map(_clean, str(fields["exception"]).split("\n"))), "    ")
    return line


def _label(service: str, emoji: str) -> str:
    return f"{emoji} [{service}]" if emoji else f"[{service}]"


def _value(value: object) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and not _UNSAFE.search(value):
        return value
    return _clean(repr(value))


def _clean(text: str) -> str:
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
