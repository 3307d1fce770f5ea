"""Calls over anything that carries messages: a request goes out with an id, the response that names it comes back.

>>> import asyncio
>>> async def main():
...     calls: CallRegistry[str] = CallRegistry(timeout=5.0)
...     def send(id):  # put the id into the request; whoever receives the response to it calls resolve
...         asyncio.get_running_loop().call_later(0.01, calls.resolve, id, "pong")
...     return await calls.call(send)
>>> asyncio.run(main())
'pong'
"""

import asyncio
import heapq
import inspect
import math
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from anyio import CancelScope

from meshkit import _check
from meshkit._time import now
from meshkit.errors import CallTimeout, Closed, Overloaded
from meshkit.events import Event, Observer, notify, report

__all__ = ["CallEnded", "CallRegistry", "CallRegistryStats", "PendingCalls", "ReplyIgnored"]

Outcome: TypeAlias = Literal["replied", "rejected", "timed_out", "cancelled", "send_failed", "closed"]
Reason: TypeAlias = Literal["late", "duplicate", "unknown"]


@dataclass(frozen=True, slots=True)
class CallEnded(Event):
    """A call has ended, `seconds` after it began."""

    name: str
    id: str
    outcome: Outcome
    seconds: float


@dataclass(frozen=True, slots=True)
class ReplyIgnored(Event):
    """A reply came that nobody waits for; the reasons are those of `CallRegistryStats`."""

    name: str
    id: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class CallRegistryStats:
    """How many calls wait, how the others ended, and how many replies came that nobody waited for."""

    pending: int
    refused: int
    """Calls that never began, because `max_pending` were waiting."""
    replied: int
    rejected: int
    timed_out: int
    cancelled: int
    send_failed: int
    closed: int
    late: int
    """Replies to calls that had ended without one."""
    duplicate: int
    """Further replies to calls that had one."""
    unknown: int
    """Replies to what was never called, or so long ago that it is forgotten."""


Slot = TypeVar("Slot")


class PendingCalls(Generic[Slot]):
    """The core: which calls wait, in which slot and until when, and which have ended lately.

    Deadlines are kept in buckets of `GRAIN` seconds. A call that is answered leaves its bucket in O(1); only those
    that are left when the bucket begins are put into a heap. So a deadline is exact, costs no timer, and is forgotten
    with its call (after the timing wheels of Varghese and Lauck, 1987).
    """

    GRAIN = 0.25  # a power of two, so that the beginning of a bucket is exact
    REMEMBERED = 8192  # this many calls, at least, are remembered when they have ended

    def __init__(self) -> None:
        self._calls: dict[str, tuple[Slot, float]] = {}
        self._buckets: dict[float, dict[str, float]] = {}  # id -> deadline, by the beginning of the bucket
        self._beginnings: list[float] = []  # a heap
        self._soon: list[tuple[float, str]] = []  # a heap: what was left in the buckets that have begun
        self._ended: dict[str, bool] = {}  # id -> whether it had a reply
        self._ended_before: dict[str, bool] = {}  # the generation before

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, call_id: object) -> bool:
        return call_id in self._calls

    def add(self, call_id: str, slot: Slot, deadline: float) -> float:
        """Add a call, whose id must not be pending; return when `expire` is to be called at the latest."""
        self._calls[call_id] = (slot, deadline)
        beginning = deadline - deadline % self.GRAIN
        bucket = self._buckets.get(beginning)
        if bucket is None:
            bucket = self._buckets[beginning] = {}
            heapq.heappush(self._beginnings, beginning)
        bucket[call_id] = deadline
        return beginning

    def get(self, call_id: str) -> Slot | None:
        """Return the slot of a pending call."""
        call = self._calls.get(call_id)
        return None if call is None else call[0]

    def take(self, call_id: str, *, replied: bool) -> Slot | None:
        """End a call and return its slot; None if it is not pending."""
        call = self._calls.pop(call_id, None)
        if call is None:
            return None
        slot, deadline = call
        bucket = self._buckets.get(deadline - deadline % self.GRAIN)
        if bucket is not None:
            bucket.pop(call_id, None)
        self._remember(call_id, replied)
        if not self._calls:
            self._forget_deadlines()
        return slot

    def expire(self, at: float) -> list[Slot]:
        """End the calls whose deadline has come and return their slots, the earliest first."""
        while self._beginnings and self._beginnings[0] <= at:
            for call_id, deadline in self._buckets.pop(heapq.heappop(self._beginnings)).items():
                heapq.heappush(self._soon, (deadline, call_id))
        expired: list[Slot] = []
        while self._soon and self._soon[0][0] <= at:
            deadline, call_id = heapq.heappop(self._soon)
            call = self._calls.get(call_id)
            if call is not None and call[1] == deadline:  # else it was answered, and maybe called again
                del self._calls[call_id]
                self._remember(call_id, replied=False)
                expired.append(call[0])
        return expired

    def wake_at(self) -> float:
        """Return when `expire` is to be called next; infinity if nothing is pending."""
        if not self._calls:
            return math.inf
        return min(*self._beginnings[:1], *(deadline for deadline, _ in self._soon[:1]), math.inf)

    def drain(self) -> list[Slot]:
        """End all calls and return their slots."""
        slots = [slot for slot, _ in self._calls.values()]
        for call_id in self._calls:
            self._remember(call_id, replied=False)
        self._calls.clear()
        self._forget_deadlines()
        return slots

    def why_ignored(self, call_id: str) -> Reason:
        """Say what a reply is for which no call is pending."""
        replied = self._ended.get(call_id, self._ended_before.get(call_id))
        return "unknown" if replied is None else "duplicate" if replied else "late"

    def _remember(self, call_id: str, replied: bool) -> None:
        if len(self._ended) >= self.REMEMBERED:
            self._ended_before, self._ended = self._ended, {}
        self._ended[call_id] = replied

    def _forget_deadlines(self) -> None:
        self._buckets.clear()
        self._beginnings.clear()
        self._soon.clear()


Resp = TypeVar("Resp")


class _Failure:
    """What a slot holds instead of a response; `error` is None when time ran out."""

    __slots__ = ("error", "outcome")

    def __init__(self, outcome: Outcome, error: Exception | None = None) -> None:
        self.outcome: Outcome = outcome
        self.error = error


_TIMED_OUT = _Failure("timed_out")


class CallRegistry(Generic[Resp]):
    """Match responses to requests, for any protocol: `await registry.call(send)`, `registry.resolve(id, response)`.

    However a call ends, nothing of it is left: no entry, task or timer. All calls share one timer. A timeout is never
    early, and no later than the loop is. An enclosing anyio deadline ends a call as any cancellation does.

    Args:
        timeout: How long to wait for a response, in seconds, where `call` does not say otherwise.
        max_pending: How many calls may wait at a time; one more is refused with `Overloaded`.
        name: What it is called in errors and events.
        observer: Gets a `CallEnded` for every call, and a `ReplyIgnored` for every reply that nobody waits for.
        rng: Where ids come from, in tests; by default from the operating system, since they must not be guessed.

    Any number of tasks may use it, on one loop at a time; from other threads go through `anyio.from_thread`.
    """

    def __init__(
        self,
        *,
        timeout: float = 30.0,
        max_pending: int = 100_000,
        name: str = "calls",
        observer: Observer | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._timeout = _check.duration("timeout", timeout)
        self._max_pending = _check.count("max_pending", max_pending)
        self._name = name
        self._observer = observer
        self._rng = rng
        self._pending: PendingCalls[asyncio.Future[Resp | _Failure]] = PendingCalls()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._closed = False
        self._refused = 0
        self._outcomes: dict[Outcome, int] = dict.fromkeys(
            ("replied", "rejected", "timed_out", "cancelled", "send_failed", "closed"), 0
        )
        self._ignored: dict[Reason, int] = dict.fromkeys(("late", "duplicate", "unknown"), 0)

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, call_id: object) -> bool:
        return call_id in self._pending

    def __repr__(self) -> str:
        return (
            f"CallRegistry({self._name!r}, {'closed, ' if self._closed else ''}pending={len(self)}, "
            f"max_pending={self._max_pending}, timeout={self._timeout:g})"
        )

    async def call(
        self,
        send: Callable[[str], object],
        *,
        timeout: float | None = None,
        id: str | None = None,  # noqa: A002 - it is the id of the request, and callers read it so
    ) -> Resp:
        """Send a request and return the response to it.

        `send(id)` is called once the call is pending, so that no response can be too early. What it returns is
        awaited, if it can be, within the same timeout. `id` is for repeating an earlier request; by default it is
        new, of 128 random bits, as 32 hexadecimal digits.

        What comes first counts: once there is a response it is returned, even if `send` fails after it.

        Raises:
            CallTimeout: There was no response within `timeout` seconds.
            Overloaded: `max_pending` calls are waiting already; nothing was sent.
            Closed: The registry is closed, and nothing was sent; or it was closed meanwhile.
            ValueError: A call with this `id` is pending; nothing was sent.
            Exception: What `send` raised, or what `reject` was given.
        """
        if self._closed:
            raise Closed(name=self._name)
        timeout = self._timeout if timeout is None else _check.duration("timeout", timeout)
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind(loop)
        if len(self._pending) >= self._max_pending:
            self._refused += 1
            raise Overloaded(name=self._name, limit=self._max_pending)
        call_id = self._new_id() if id is None else id
        if call_id in self._pending:
            raise ValueError(f"{self._name}: a call with the id {call_id!r} is pending already")
        begun = now()
        future: asyncio.Future[Resp | _Failure] = loop.create_future()
        wake_at = self._pending.add(call_id, future, begun + timeout)
        if wake_at < self._timer_at:
            self._set_timer(wake_at)
        try:
            try:
                sent = send(call_id)
                if sent is not None and inspect.isawaitable(sent):
                    await self._finish_sending(sent, future, begun + timeout)
            except Exception as error:
                if not future.done():
                    raise
                report(error, f"{self._name}: send failed after its call had ended", send)
            outcome = await future
        except BaseException as error:
            self._abandon(call_id, future)
            self._count(call_id, begun, "send_failed" if isinstance(error, Exception) else "cancelled")
            raise
        if isinstance(outcome, _Failure):
            self._count(call_id, begun, outcome.outcome)
            raise outcome.error or CallTimeout(name=self._name, timeout=timeout)
        self._count(call_id, begun, "replied")
        return outcome

    def resolve(self, call_id: str, response: Resp) -> bool:
        """Give a call its response; return False if it is not pending, which is counted, and no error."""
        return self._settle(call_id, response)

    def reject(self, call_id: str, error: Exception) -> bool:
        """Make a call raise `error`; return False if it is not pending, which is counted, and no error.

        Give each call an error of its own, since a raised error collects tracebacks. An `async` send is cut.
        """
        if isinstance(error, StopIteration) or not isinstance(error, Exception):
            raise TypeError(f"a call can raise any instance of Exception but StopIteration, and not {error!r}")
        return self._settle(call_id, _Failure("rejected", error))

    def close(self) -> None:
        """Fail everything that is pending, at once, and every call from now on, with `Closed`."""
        self._closed = True
        for future in self._pending.drain():
            _set(future, _Failure("closed", Closed(name=self._name, executed="maybe")))
        self._clear_timer()

    def stats(self) -> CallRegistryStats:
        """Return what has happened so far."""
        return CallRegistryStats(pending=len(self), refused=self._refused, **self._outcomes, **self._ignored)

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._pending and self._loop is not None and not self._loop.is_closed():
            raise RuntimeError(f"{self._name}: calls are pending on another event loop; use one registry for each loop")
        self._pending.drain()  # what was pending on a loop that has been closed can never go on
        self._clear_timer()
        self._loop = loop

    def _new_id(self) -> str:
        return os.urandom(16).hex() if self._rng is None else f"{self._rng.getrandbits(128):032x}"

    async def _finish_sending(
        self, sent: Awaitable[object], future: "asyncio.Future[Resp | _Failure]", deadline: float
    ) -> None:
        """Wait for an async send until the deadline, or until the call has failed."""
        with CancelScope(deadline=deadline) as scope:

            def cut(settled: "asyncio.Future[Resp | _Failure]") -> None:
                if not settled.cancelled() and isinstance(settled.result(), _Failure):
                    scope.cancel()

            future.add_done_callback(cut)
            try:
                await sent
            finally:
                future.remove_done_callback(cut)

    def _settle(self, call_id: str, outcome: Resp | _Failure) -> bool:
        future = self._pending.take(call_id, replied=not isinstance(outcome, _Failure))
        if future is None:
            return self._ignore(call_id, self._pending.why_ignored(call_id))
        if not self._pending:
            self._clear_timer()
        return _set(future, outcome) or self._ignore(call_id, "late")

    def _abandon(self, call_id: str, future: "asyncio.Future[Resp | _Failure]") -> None:
        """Remove the call of a caller that was cancelled, or whose send failed."""
        if self._pending.get(call_id) is future:
            self._pending.take(call_id, replied=False)
            if not self._pending:
                self._clear_timer()
        elif not future.cancelled() and not isinstance(future.result(), _Failure):
            self._ignore(call_id, "late")  # it was there, but the caller was cancelled before it could see it

    def _ignore(self, call_id: str, reason: Reason) -> Literal[False]:
        self._ignored[reason] += 1
        if self._observer is not None:
            notify(self._observer, ReplyIgnored(self._name, call_id, reason))
        return False

    def _count(self, call_id: str, begun: float, outcome: Outcome) -> None:
        self._outcomes[outcome] += 1
        if self._observer is not None:
            notify(self._observer, CallEnded(self._name, call_id, outcome, now() - begun))

    def _set_timer(self, when: float) -> None:
        self._clear_timer()
        if self._loop is not None and when < math.inf:
            self._timer_at = when
            self._timer = self._loop.call_at(when, self._expire)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._timer_at = math.inf

    def _expire(self) -> None:
        for future in self._pending.expire(now()):
            _set(future, _TIMED_OUT)
        self._set_timer(self._pending.wake_at())


def _set(future: "asyncio.Future[Resp | _Failure]", outcome: Resp | _Failure) -> bool:
    """Put `outcome` into the slot; return False if its task has been cancelled, but has not run since."""
    if future.done():
        return False
    future.set_result(outcome)
    return True
