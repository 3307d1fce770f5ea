"""Stages: the steps that a message goes through, in order, until one of them says that it goes no further.

    emit      id -> content_key -> prove -> transport -> notify
    receive   frame -> kind -> version -> decode -> upgrade -> dedupe -> rate_limit -> filter -> deadline -> mailbox

A pipeline is compiled once for each behavior and holds only the stages that it needs; `rt.describe()` prints them.
Each stage decides what is to become of the message: `Continue` with it, `Drop` it for a reason, or `Fail` with an
error. What a stage raises is as if it had returned `Fail`. A stage changes nothing when it decides: what it remembers
or charges, it does in `Continue(message, then=...)`, which is called once the message is in a mailbox. So a message
that goes no further leaves no trace, wherever it was stopped.

>>> from meshkit.runtime.message import Message
>>> def no_shouting(msg):
...     return Drop("shouting") if msg.payload.isupper() else Continue(msg)
>>> pipeline = Pipeline([], [Stage("no_shouting", no_shouting)])
>>> stopped = pipeline.run(Message(id="5f", kind="social:tease", sender="alice", payload="BOO", time=0.0))
>>> stopped.stage, stopped.outcome
('no_shouting', Drop(reason='shouting'))
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from meshkit.events import report
from meshkit.runtime.message import Message, check_name

__all__ = ["EMIT", "RECEIVE", "Continue", "Drop", "Fail", "Outcome", "Passed", "Pipeline", "Stage", "Step", "Stopped"]

EMIT = ("id", "content_key", "prove", "transport", "notify")
"""The stages of a message on its way out. Frames, with many messages in them, are what is proved and transported."""
RECEIVE = ("frame", "kind", "version", "decode", "upgrade", "dedupe", "rate_limit", "filter", "deadline", "mailbox")
"""The stages of a message on its way in. The first is passed by a frame, with all messages in it."""

_PLACES = {"emit": ("prove",), "receive": ("decode", "dedupe", "rate_limit", "filter", "deadline", "mailbox")}


class Continue(Struct, frozen=True):
    """Go on with this message, which may have another payload than came; nothing else of it may be another."""

    message: Message[Any]
    then: Callable[[], object] | None = None
    """Called once the message is in a mailbox (or, emitted, on its way), and never if another stage stops it."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Go no further. It is counted by kind, stage and reason.

    The caller of a request is refused with `NotAccepted`, and so is who emits a message that is dropped on its way out.
    """

    reason: str

    def __post_init__(self) -> None:
        reason: object = self.reason
        if not isinstance(reason, str) or not reason:
            raise TypeError(f"the reason of a Drop must be text, not {reason!r}")


@dataclass(frozen=True, slots=True)
class Fail:
    """Go no further, because of an error: a `MeshkitError` is what the caller of a request gets, too.

    Any other is a failure of this node, which deals with it as the behavior says (`on_error`); the caller of a request
    is refused with `NotAccepted`, since no handler has begun.
    """

    error: Exception

    def __post_init__(self) -> None:
        if not isinstance(self.error, Exception):
            raise TypeError(f"the error of a Fail must be an exception, not {self.error!r}")


Outcome: TypeAlias = Continue | Drop | Fail
Passed: TypeAlias = Outcome | Message[Any]
"""What the runtime's own stages return, which need no `Continue` to go on with a message."""


@dataclass(frozen=True)
class Stage:
    """A stage of one's own, given to a behavior as `stages=[Stage(...)]`.

    Args:
        name: What drops are counted under.
        run: Is given the message and returns an outcome. It must not wait. Before "decode", the payload is the bytes as
            they came. It may be run again for a local message that had to wait for room in a mailbox.
        before: The stage that it comes before: "decode", "dedupe", "rate_limit", "filter", "deadline" or "mailbox" (the
            default); with `on="emit"`, "prove". Several in the same place run in the order in which they are given.
        on: Which way it looks at.
    """

    name: str
    run: Callable[[Message[Any]], Outcome]
    before: str = ""
    on: Literal["receive", "emit"] = "receive"

    def __post_init__(self) -> None:
        check_name("the name of a stage", self.name)
        if self.name in EMIT or self.name in RECEIVE:
            raise ValueError(f"{self.name!r} is one of the runtime's own stages: give yours another name")
        run: object = self.run
        if not callable(run) or inspect.iscoroutinefunction(run):
            raise TypeError(f"stage {self.name!r}: run must be a function of a message that is not async")
        if self.on not in _PLACES:
            raise ValueError(f"stage {self.name!r}: on must be 'receive' or 'emit', not {self.on!r}")
        places = _PLACES[self.on]
        if not self.before:
            object.__setattr__(self, "before", places[-1])
        elif self.before not in places:
            raise ValueError(f"stage {self.name!r}: before must be one of {', '.join(places)}, not {self.before!r}")


class Step(NamedTuple):
    """One stage of a pipeline: its name, what it runs, and what else there is to print."""

    name: str
    run: Callable[[Message[Any]], Passed]
    details: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.details})" if self.details else self.name


@dataclass(frozen=True, slots=True)
class Stopped:
    """A message that went no further than `stage`, as it was there."""

    message: Message[Any]
    stage: str
    outcome: Drop | Fail


class Pipeline:
    """Stages in order: the runtime's own ones, and each custom one before the place that it names.

    `check(payload)` raises an error unless a custom stage may go on with that payload, when it has been decoded.
    """

    def __init__(
        self,
        own: Iterable[Step],
        custom: Iterable[Stage] = (),
        order: Iterable[str] = RECEIVE,
        check: Callable[[Any], None] = lambda payload: None,
    ) -> None:
        self._steps: list[Step] = []
        steps = {step.name: step for step in own}
        custom = tuple(custom)
        for place in order:
            check_there = _require_bytes if place == "decode" else check
            self._steps += [Step(stage.name, _careful(stage, check_there)) for stage in custom if stage.before == place]
            if place in steps:
                self._steps.append(steps[place])

    def __str__(self) -> str:
        return " -> ".join(map(str, self._steps))

    def run(self, message: Message[Any]) -> Continue | Stopped:
        """Return with what to go on, and what to do then; or what stopped it, and where. Changes nothing yet."""
        name, thens = "", None
        try:
            for name, run, _ in self._steps:
                outcome = run(message)
                if outcome is message:
                    continue
                if isinstance(outcome, Message):
                    message = outcome
                    continue
                if not isinstance(outcome, Continue):
                    return Stopped(message, name, outcome)
                message = outcome.message
                if outcome.then is not None:
                    thens = [*(thens or ()), outcome.then]
        except Exception as error:  # noqa: BLE001 - whatever a stage raises is its failure
            return Stopped(message, name, Fail(error))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a CancelledError, too: nothing here waits, so it is its own
            return Stopped(message, name, Fail(RuntimeError(f"stage {name!r} raised {type(error).__name__}")))
        return Continue(message) if thens is None else Continue(message, functools.partial(_each, thens))


def _each(thens: list[Callable[[], object]]) -> None:
    """Call each one once, though the message may be sent several times: to one node after the other."""
    while thens:
        then = thens.pop(0)
        try:
            then()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - the message is delivered already
            failure = error if isinstance(error, Exception) else RuntimeError(f"it raised {type(error).__name__}")
            report(failure, "a stage failed after the message was delivered", then)


def _careful(stage: Stage, check: Callable[[Any], None]) -> Callable[[Message[Any]], Outcome]:
    """Return what runs a custom stage, and lets nothing pass that the stages after it do not expect."""

    def run(message: "Message[Any]") -> Outcome:  # in quotes, as in `Route`: not evaluated at each start
        if stage.before == "decode" and not isinstance(message.payload, bytes):
            message = replace(message, payload=bytes(message.payload))
        outcome: object = stage.run(message)
        if isinstance(outcome, Continue):
            changed: object = outcome.message
            if changed is not message:
                if not isinstance(changed, Message) or replace(changed, payload=None) != replace(message, payload=None):
                    raise TypeError(f"stage {stage.name!r} went on with {changed!r}: only the payload may be another")
                check(changed.payload)
            return outcome
        if isinstance(outcome, Drop | Fail):
            return outcome
        if inspect.iscoroutine(outcome):
            outcome.close()
        raise TypeError(f"stage {stage.name!r} returned {outcome!r}: neither Continue, Drop nor Fail")

    return run


def _require_bytes(payload: object) -> None:
    if not isinstance(payload, bytes):
        raise TypeError(f"before it is decoded the payload must be bytes, not {type(payload).__name__}")
