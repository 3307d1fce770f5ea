"""meshkit with a fault put in, for each of those that the simulation must find, and what it then says.

Each is what a slip of one line would be.
"""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import pytest

from meshkit._generations import Probation
from meshkit.errors import Replayed
from meshkit.runtime import answers, backlog, calls, dispatcher, frame, intake, presence, replay

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """What puts a fault in, a part of what is then said of it, and a seed that finds it."""

    patch: Patch
    says: str
    seed: int

    @property
    def name(self) -> str:
        return self.patch.__name__


MUTANTS: list[Mutant] = []


def found_by(says: str, *, seed: int = 0) -> Callable[[Patch], Patch]:
    def add(patch: Patch) -> Patch:
        MUTANTS.append(Mutant(patch, says, seed))
        return patch

    return add


def rewrite(patch: pytest.MonkeyPatch, module: ModuleType, of: type, name: str, line: str, instead: str) -> None:
    """Write something else in one place of a method."""
    function: FunctionType = vars(of)[name]
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(line) == 1, f"there is no one {line!r} in {function.__qualname__}"
    namespace: dict[str, Any] = {}
    exec(source.replace(line, instead), vars(module), namespace)
    patch.setattr(of, name, namespace[name])


# --- what is proved, and remembered


@found_by("in calm weather")
def remembers_before_the_proof(patch: pytest.MonkeyPatch) -> None:
    """A message is remembered before it is proved: so a forger can keep the true one out."""
    remembered: dict[frame.Prover, set[bytes]] = {}
    genuine = frame.Prover.open

    def open_(self: frame.Prover, data: bytes, now: float) -> frame.Opened:
        seen = remembered.setdefault(self, set())
        if data[2:82] in seen:  # its sender and its id
            raise Replayed
        seen.add(data[2:82])
        return genuine(self, data, now)

    patch.setattr(frame.Prover, "open", open_)


@found_by("got 'lies'")
def takes_a_reply_of_anybody(patch: pytest.MonkeyPatch) -> None:
    """A reply counts whoever it comes from."""
    rewrite(patch, calls, calls.Calls, "answered", "if asked != sender:", "if False:")


@found_by("of its caller and the transit")
def accepts_a_frame_again(patch: pytest.MonkeyPatch) -> None:
    """A frame that comes again is taken again."""
    patch.setattr(replay.ReplayWindow, "add", lambda *_: True)


@found_by("before the life in which it runs", seed=4)
def accepts_what_is_older_than_itself(patch: pytest.MonkeyPatch) -> None:
    """A node that has started again takes what its life before has handled."""
    patch.setattr(frame, "_SKEW", 40.0)


# --- what is handled


@found_by("took effect more than once", seed=1)
def handles_a_request_again(patch: pytest.MonkeyPatch) -> None:
    """A request that comes again is handled again."""
    patch.setattr(answers.Answers, "get", lambda *_: None)


@found_by("goes on", seed=2)
def lets_handlers_go_on(patch: pytest.MonkeyPatch) -> None:
    """A handler is not cancelled at its deadline."""
    line = "scope.deadline = message.deadline"
    rewrite(patch, dispatcher, dispatcher.Dispatcher, "_serve", line, "pass")


@found_by("began after its deadline", seed=1)
def begins_what_has_expired(patch: pytest.MonkeyPatch) -> None:
    """What has expired in the mailbox is begun."""
    line = "if message.deadline <= self._now():"
    rewrite(patch, dispatcher, dispatcher.Dispatcher, "_serve", line, "if False:")


@found_by("of its caller and the transit")
def forgets_the_deadline_around(patch: pytest.MonkeyPatch) -> None:
    """The deadline of a handler is not passed on to what it asks of others."""
    line = "min(timeout, anyio.current_effective_deadline() - self._now(), _LONGEST)"
    rewrite(patch, calls, calls.Calls, "call", line, "timeout")


@found_by("at the same time", seed=1)
def loses_the_order(patch: pytest.MonkeyPatch) -> None:
    """What rests lets others of its sender pass."""
    rewrite(
        patch,
        backlog,
        backlog.Backlog,
        "rest",
        "self.resting[item] = None",
        "self.resting[item] = None; self.done(item)",
    )


@found_by("bounds of", seed=1)
def takes_more_than_fits(patch: pytest.MonkeyPatch) -> None:
    """A mailbox is full only at twice as many."""
    line = "if self._waiting + self.reserved >= self.max_items"
    rewrite(patch, backlog, backlog.Backlog, "offer", line, "if self._waiting >= 2 * self.max_items")


@found_by("books of")
def counts_what_is_given_up_twice(patch: pytest.MonkeyPatch) -> None:
    """What its caller gives up before it has begun is counted twice."""
    line = "self._journal.cancelled += 1"
    rewrite(patch, dispatcher, dispatcher.Dispatcher, "cancel", line, "self._journal.cancelled += 2")


# --- what becomes of it


@found_by("although its caller has given up")
def loses_a_cancellation(patch: pytest.MonkeyPatch) -> None:
    """That nobody waits any more is not passed on to the handler."""
    patch.setattr(dispatcher.Dispatcher, "cancel", lambda *_: None)


@found_by("although its caller has crashed")
def works_for_the_dead(patch: pytest.MonkeyPatch) -> None:
    """What a node has asked that has gone since is not given up."""
    patch.setattr(dispatcher.Dispatcher, "lost", lambda *_: None)


@found_by("of a crash")
def waits_for_the_dead(patch: pytest.MonkeyPatch) -> None:
    """Who waits for a node that has gone is not told."""
    patch.setattr(calls.Calls, "lost", lambda *_: None)


@found_by("in calm weather")
def leaves_before_others_know(patch: pytest.MonkeyPatch) -> None:
    """A node that stops does not wait until the others know."""
    patch.setattr(presence.Heartbeat, "DRAIN_TIMEOUT", 0.0)


@found_by("was refused", seed=22)
def refuses_what_has_begun(patch: pytest.MonkeyPatch) -> None:
    """A node that stops says of what it is to try again that it never began."""
    line = '"draining" if delivery.attempts == 1 else "cut"'
    rewrite(patch, dispatcher, dispatcher.Dispatcher, "close_mailboxes", line, '"draining"')


@found_by("was not told again")
def refuses_to_repeat_its_answer(patch: pytest.MonkeyPatch) -> None:
    """A node that stops refuses also what it has done already, when it is asked again."""
    line = " and not self._dispatcher.knows(sender, ask.id)"
    rewrite(patch, intake, intake.Intake, "_on_ask", line, "")


@found_by("admitted another probe")
def lets_two_probe(patch: pytest.MonkeyPatch) -> None:
    """A half-open circuit breaker admits two."""
    patch.setattr(Probation, "full", property(lambda self: len(self.watched) + self.calls >= self._probes + 1))


@found_by("it is not so: SimCluster.connected", seed=15)
def falls_silent(patch: pytest.MonkeyPatch) -> None:
    """A node says once that it is up, and then no more."""
    rewrite(patch, presence, presence.Heartbeat, "_say_on_time", "beats * self._beat.every", "1e6")
