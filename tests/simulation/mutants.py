"""meshkit with a fault put in, for each of those that the simulation must find."""

from collections.abc import Callable
from typing import Any

import pytest

from meshkit._generations import Probation
from meshkit.errors import Replayed
from meshkit.runtime import calls, dispatcher, frame, replay

Patch = Callable[[pytest.MonkeyPatch], None]


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


def takes_a_reply_of_anybody(patch: pytest.MonkeyPatch) -> None:
    """A reply counts whoever it comes from."""
    genuine = calls.Calls.answered

    def answered(self: calls.Calls, sender: str, answer: Any) -> bool:
        return genuine(self, self._asked.get(answer.id, (sender, ""))[0], answer)

    patch.setattr(calls.Calls, "answered", answered)


def loses_a_cancellation(patch: pytest.MonkeyPatch) -> None:
    """That nobody waits any more is not passed on to the handler."""
    patch.setattr(dispatcher.Dispatcher, "cancel", lambda *_: None)


def lets_two_probe(patch: pytest.MonkeyPatch) -> None:
    """A half-open circuit breaker admits two."""
    patch.setattr(Probation, "full", property(lambda self: len(self.watched) + self.calls >= self._probes + 1))


def handles_a_request_again(patch: pytest.MonkeyPatch) -> None:
    """A request that comes again is handled again."""
    patch.setattr(dispatcher.Dispatcher, "repeated", lambda *_: False)


def accepts_a_frame_again(patch: pytest.MonkeyPatch) -> None:
    """A frame that comes again is taken again."""
    patch.setattr(replay.ReplayWindow, "add", lambda *_: True)


MUTANTS: list[Patch] = [
    remembers_before_the_proof,
    takes_a_reply_of_anybody,
    loses_a_cancellation,
    lets_two_probe,
    handles_a_request_again,
    accepts_a_frame_again,
]
