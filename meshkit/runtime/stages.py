"""Stages: the steps that a message goes through, in order, until one of them says that it goes no further.

    emit      id -> content_key -> ... -> prove -> transport -> notify
    receive   frame -> kind -> version -> decode -> dedupe -> rate_limit -> filter -> deadline -> mailbox -> the handler

A pipeline is compiled once for each behavior and holds only the stages that it needs; `rt.describe()` prints them.
Each stage says what is to become of the message: `Continue` with it, `Drop` it for a reason, or `Fail` with an error.
Of a message that was dropped nothing is remembered, and nothing is charged to its sender by the stages that it did not
reach. What a stage raises is as if it had returned `Fail`.

>>> from meshkit.runtime.message import Message
>>> def no_shouting(msg):
...     return Drop("shouting") if msg.payload.isupper() else Continue(msg)
>>> pipeline = Pipeline([], [Stage("no_shouting", no_shouting)])
>>> pipeline.run(Message(id="5f", kind="social:tease", sender="alice", payload="BOO", time=0.0))
(Drop(reason='shouting'), 'no_shouting')
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from meshkit.runtime.message import Message, check_name

__all__ = ["EMIT", "RECEIVE", "Continue", "Drop", "Fail", "Outcome", "Pipeline", "Stage", "Step"]

EMIT = ("id", "content_key", "prove", "transport", "notify")
"""The stages of a message on its way out. Frames, with many messages in them, are what is proved and transported."""
RECEIVE = ("frame", "kind", "version", "decode", "dedupe", "rate_limit", "filter", "deadline", "mailbox")
"""The stages of a message on its way in. The first is passed by a frame, with all messages in it."""


@dataclass(frozen=True, slots=True)
class Continue:
    """Go on with this message, which may be another one than came."""

    message: Message[Any]


@dataclass(frozen=True, slots=True)
class Drop:
    """Go no further. It is counted by kind, stage and reason; the caller of a request is refused with `NotAccepted`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Go no further, because of an error: a `MeshkitError` is what the caller of a request gets, too.

    Any other is a failure of this node, which deals with it as the behavior says (`on_error`).
    """

    error: Exception


Outcome: TypeAlias = Continue | Drop | Fail


@dataclass(frozen=True)
class Stage:
    """A stage of one's own, given to a behavior as `stages=[Stage(...)]`.

    Args:
        name: What drops are counted under.
        run: Is given the message and returns an outcome. It must not wait. Before "decode", the payload is raw bytes.
        before: The stage that it comes before: of `RECEIVE` from "decode" on, or, with `on="emit"`, "prove".
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
        if not callable(self.run):
            raise TypeError(f"stage {self.name!r}: run must be a function of a message, not {self.run!r}")
        places = {"receive": RECEIVE[3:], "emit": ("prove",)}.get(self.on, ())
        if not places:
            raise ValueError(f"stage {self.name!r}: on must be 'receive' or 'emit', not {self.on!r}")
        if not self.before:
            object.__setattr__(self, "before", places[-1])
        elif self.before not in places:
            raise ValueError(f"stage {self.name!r}: before must be one of {', '.join(places)}, not {self.before!r}")


Step: TypeAlias = tuple[str, Callable[[Message[Any]], Outcome]]
"""The name of a stage, and what it runs."""


class Pipeline:
    """Stages in order: the runtime's own ones, and each custom one before the place that it names."""

    def __init__(self, own: Iterable[Step], custom: Iterable[Stage] = (), order: Iterable[str] = RECEIVE) -> None:
        self._steps: list[Step] = []
        runs = dict(own)
        custom = tuple(custom)
        for place in order:
            self._steps += [(stage.name, stage.run) for stage in custom if stage.before == place]
            if place in runs:
                self._steps.append((place, runs[place]))

    def __str__(self) -> str:
        return " -> ".join(name for name, _ in self._steps)

    def run(self, message: Message[Any]) -> tuple[Continue | Drop | Fail, str]:
        """Return the outcome for `message`, and the stage that it went no further than ("" if it passed them all)."""
        for name, run in self._steps:
            try:
                outcome = run(message)
            except Exception as error:  # noqa: BLE001 - whatever a stage raises is its failure
                return Fail(error), name
            if isinstance(outcome, Continue):
                message = outcome.message
            else:
                return _checked(outcome, name), name
        return Continue(message), ""


def _checked(outcome: object, name: str) -> Drop | Fail:
    if isinstance(outcome, Drop | Fail):
        return outcome
    return Fail(TypeError(f"stage {name!r} returned {outcome!r}: neither Continue, Drop nor Fail"))
