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
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args

from anyio import CancelScope

from meshkit import _check
from meshkit._entropy import random_bytes
from meshkit._time import clock_of, now
from meshkit.errors import CallTimeout, Closed, Overloaded
from meshkit.events import Event, Observer, notify, report

__all__ = ["CallEnded", "CallRegistry", "CallRegistryStats", "PendingCalls", "ReplyIgnored"]

_Outcome: TypeAlias = Literal["replied", "rejected", "timed_out", "cancelled", "send_failed", "closed", "refused"]
_Reason: TypeAlias = Literal["late", "duplicate", "unknown"]


@dataclass(frozen=True, slots=True)
class CallEnded(Event):
    """A call has ended, `duration` seconds after it began."""

    name: str
    id: str
    outcome: _Outcome
    duration: float


@dataclass(frozen=True, slots=True)
class ReplyIgnored(Event):
    """A reply came that nobody waits for; the reasons are explained in `CallRegistryStats`."""

    name: str
    id: str
    reason: _Reason


@dataclass(frozen=True, slots=True)
class CallRegistryStats:
    """How many calls are pending, how the others ended, and how many replies came that nobody waited for."""

    pending: int
    replied: int
    rejected: int
    timed_out: int
    cancelled: int
    send_failed: int
    closed: int
    refused: int  # were never sent, because `max_pending` were pending
    late: int  # replies to calls that had ended without one
    duplicate: int  # further replies to calls that had one
    unknown: int  # replies to calls that never were, or were so long ago that they are forgotten


T = TypeVar("T")


class PendingCalls(Generic[T]):
    """The core: who waits for a reply, in which slot and until when; and who did lately.

    Deadlines are kept in buckets of `GRAIN` seconds. A call that is answered leaves its bucket in O(1); only what is
    left when a bucket begins is put in order, by a heap. So a deadline is exact, but costs no timer, and is forgotten
    with its call (compare the timing wheels of Varghese and Lauck, 1987). Buckets that are empty go before there are
    more than `SPARE`, and one for each call that is pending.
    """

    GRAIN = 0.25  # a power of two, so that the beginning of a bucket is exact
    SPARE = 64
    REMEMBERED = 8192  # so many calls, at least, are remembered after they have ended

    def __init__(self, max_pending: int) -> None:
        self.max_pending = max_pending
        self.calls: dict[str, tuple[T, dict[str, float]]] = {}  # id -> slot and bucket
        self._buckets: dict[float, dict[str, float]] = {}  # beginning -> id -> deadline
        self._beginnings: list[float] = []  # a heap
        self._soon: list[tuple[float, str]] = []  # a heap: what was left in the buckets that have begun
        self._ended: dict[str, bool] = {}  # id -> whether there was a reply
        self._ended_before: dict[str, bool] = {}  # the generation before

    def add(self, call_id: str, slot: T, deadline: float) -> float:
        """Add a call and return when `expire` must be called at the latest; infinity if there is no room for it."""
        calls = self.calls
        if call_id in calls:
            raise ValueError(f"a call with the id {call_id!r} is pending already; wait for it, or use a new id")
        if len(calls) >= self.max_pending:
            return math.inf
        beginning = deadline - deadline % self.GRAIN
        bucket = self._buckets.get(beginning)
        if bucket is None:
            if len(self._buckets) >= 2 * len(calls) + self.SPARE:  # so more than half are empty: amortised O(1)
                self._buckets = {start: bucket for start, bucket in self._buckets.items() if bucket}
                self._beginnings = sorted(self._buckets)
            bucket = self._buckets[beginning] = {}
            heapq.heappush(self._beginnings, beginning)
        bucket[call_id] = deadline
        calls[call_id] = (slot, bucket)
        return beginning

    def take(self, call_id: str, replied: bool) -> T | None:
        """End a call and return its slot; None if it is not pending."""
        call = self.calls.pop(call_id, None)
        if call is None:
            return None
        slot, bucket = call
        del bucket[call_id]
        ended = self._ended
        ended[call_id] = replied
        if len(ended) > self.REMEMBERED:
            self._ended, self._ended_before = {}, ended
        if not self.calls:
            self._buckets.clear()
            self._beginnings.clear()
            self._soon.clear()
        return slot

    def expire(self, at: float) -> list[T]:
        """End the calls whose deadlines have come and return their slots, the earliest first."""
        while self._beginnings and self._beginnings[0] <= at:
            for call_id, deadline in self._buckets.pop(heapq.heappop(self._beginnings)).items():
                heapq.heappush(self._soon, (deadline, call_id))
        expired: list[T] = []
        while self._soon and self._soon[0][0] <= at:
            deadline, call_id = heapq.heappop(self._soon)
            call = self.calls.get(call_id)
            if call is not None and call[1][call_id] == deadline:  # else it was answered, and maybe called again
                expired.append(call[0])
                self.take(call_id, False)
        return expired

    def wake_at(self) -> float:
        """Return when `expire` must be called next; infinity if nothing is pending."""
        return min([*self._beginnings[:1], *(deadline for deadline, _ in self._soon[:1])], default=math.inf)

    def why_ignored(self, call_id: str) -> _Reason:
        """Say what a reply is, if the call is not pending."""
        replied = self._ended.get(call_id, self._ended_before.get(call_id))
        return "unknown" if replied is None else "duplicate" if replied else "late"


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a slot holds instead of a response; the error is only there if the call was rejected."""

    outcome: _Outcome
    error: Exception | None = None


class CallRegistry(Generic[T]):
    """Match responses to requests, for any protocol: `await registry.call(send)`, `registry.resolve(id, response)`.

    However a call ends, nothing of it is left: no entry, task or timer. All calls share one timer. A timeout is never
    early, and no later than the loop is. An enclosing anyio deadline ends a call as any cancellation does.

    Args:
        timeout: How long to wait for a response, in seconds, where `call` does not say otherwise.
        max_pending: How many calls may be pending; one more is refused with `Overloaded`.
        name: What it is called in errors and events.
        observer: Gets a `CallEnded` for every call, and a `ReplyIgnored` for every reply that nobody waits for.
        rng: Where ids come from, in tests; by default from the operating system, since nobody should guess them.

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
        # Not PendingCalls[...](), evaluated each time: of that, Python 3.12 and 3.13 did not give back 58 bytes.
        self._pending: PendingCalls[asyncio.Future[T | _Failure]] = PendingCalls(
            _check.count("max_pending", max_pending)
        )
        self._name = name
        self._observer = observer
        self._rng = rng
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._now = now  # until it knows its loop
        self._closed = False
        self._outcomes: dict[_Outcome, int] = dict.fromkeys(get_args(_Outcome), 0)
        self._ignored: dict[_Reason, int] = dict.fromkeys(get_args(_Reason), 0)

    def __len__(self) -> int:
        return len(self._pending.calls)

    def __contains__(self, call_id: object) -> bool:
        return call_id in self._pending.calls

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self)} of {self._pending.max_pending} pending"
        return f"CallRegistry({self._name!r}, {state}, timeout={self._timeout:g})"

    async def call(
        self,
        send: Callable[[str], object],
        *,
        timeout: float | None = None,
        id: str | None = None,  # noqa: A002 - the id of the request: so it reads at the caller's
    ) -> T:
        """Send a request and return the response to it.

        `send(id)` is called once, when the call is pending already, so that no response comes too early. If it
        returns an awaitable, that is awaited, within the same timeout. `id` repeats an earlier request; by default
        it is new: 128 random bits, as 32 hexadecimal digits. A response that has come is returned, even if `send`
        fails after that, or time runs out.

        Raises:
            CallTimeout: There was no response within `timeout` seconds.
            Overloaded: `max_pending` calls are pending; nothing was sent.
            Closed: The registry is closed, and nothing was sent; or it was closed meanwhile.
            ValueError: A call with this `id` is pending; nothing was sent.
            Exception: What `send` raised, or what `reject` was given.
        """
        if self._closed:
            raise Closed(name=self._name)
        timeout = self._timeout if timeout is None else _check.duration("timeout", timeout)
        loop = self._loop
        if loop is None or not loop.is_running():  # cheaper than asking each time which loop is running
            loop = self._bind(asyncio.get_running_loop())
        call_id = self._new_id() if id is None else id
        future: asyncio.Future[T | _Failure] = loop.create_future()
        begun = self._now()
        wake_at = self._pending.add(call_id, future, begun + timeout)
        if wake_at < self._timer_at:
            self._set_timer(wake_at)
        elif wake_at == math.inf:
            self._count(call_id, begun, "refused")
            raise Overloaded(name=self._name, limit=self._pending.max_pending)
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
            if outcome.error is not None:
                try:
                    raise outcome.error
                finally:
                    del future, outcome  # they hold the error, and it holds this frame: a cycle
            if outcome.outcome == "closed":
                raise Closed(name=self._name, executed="maybe")
            raise CallTimeout(name=self._name, timeout=timeout)
        self._count(call_id, begun, "replied")
        return outcome

    def resolve(self, call_id: str, response: T) -> bool:
        """Give a call its response; return False if it is not pending, which is counted, and no error."""
        return self._settle(call_id, response)

    def reject(self, call_id: str, error: Exception) -> bool:
        """Make a call raise `error`; return False if it is not pending, which is counted, and no error.

        Give each call an error of its own, since a raised error collects tracebacks. An async `send` is cancelled.
        """
        if isinstance(error, StopIteration) or not isinstance(error, Exception):
            raise TypeError(f"a call can raise any instance of Exception but StopIteration, and not {error!r}")
        return self._settle(call_id, _Failure("rejected", error))

    def close(self) -> None:
        """Fail everything that is pending, at once, and every call from now on, with `Closed`."""
        self._closed = True
        self._end(math.inf, "closed")

    def stats(self) -> CallRegistryStats:
        """Return what has happened so far."""
        return CallRegistryStats(pending=len(self), **self._outcomes, **self._ignored)

    def _new_id(self) -> str:
        return random_bytes(16).hex() if self._rng is None else f"{self._rng.getrandbits(128):032x}"

    def _bind(self, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        if self._pending.calls and self._loop is not None and not self._loop.is_closed():
            raise RuntimeError(f"{self._name}: calls are pending on another event loop; use a registry for each loop")
        self._pending.expire(math.inf)  # what a closed loop has left behind can never go on
        self._set_timer(math.inf)
        self._loop, self._now = loop, clock_of(loop)
        return loop

    async def _finish_sending(self, sent: Awaitable[object], future: "asyncio.Future[Any]", deadline: float) -> None:
        """Wait for an async send until it is done, the deadline has come, or the call has failed."""
        with CancelScope(deadline=deadline) as scope:

            def cut_if_failed(settled: "asyncio.Future[Any]") -> None:
                if isinstance(settled.result(), _Failure):
                    scope.cancel()

            future.add_done_callback(cut_if_failed)
            try:
                await sent
            finally:
                future.remove_done_callback(cut_if_failed)

    def _settle(self, call_id: str, outcome: T | _Failure) -> bool:
        future = self._pending.take(call_id, True)
        if future is None:
            return self._ignore(call_id, self._pending.why_ignored(call_id))
        if not self._pending.calls:
            self._set_timer(math.inf)
        return _give(future, outcome) or self._ignore(call_id, "late")

    def _abandon(self, call_id: str, future: "asyncio.Future[T | _Failure]") -> None:
        """Remove the call of a caller that was cancelled, or whose send failed."""
        call = self._pending.calls.get(call_id)
        if call is not None and call[0] is future:
            self._pending.take(call_id, False)
            if not self._pending.calls:
                self._set_timer(math.inf)
        elif _replied(future):
            self._ignore(call_id, "late")  # it was there, but the caller was cancelled before it could see it

    def _ignore(self, call_id: str, reason: _Reason) -> Literal[False]:
        self._ignored[reason] += 1
        if self._observer is not None:
            notify(self._observer, ReplyIgnored(self._name, call_id, reason))
        return False

    def _count(self, call_id: str, begun: float, outcome: _Outcome) -> None:
        self._outcomes[outcome] += 1
        if self._observer is not None:
            notify(self._observer, CallEnded(self._name, call_id, outcome, self._now() - begun))

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if self._loop is None or when == math.inf else self._loop.call_at(when, self._end)
        self._timer_at = when

    def _end(self, until: float | None = None, outcome: _Outcome = "timed_out") -> None:
        """End the calls whose deadline is up to `until` (None: now)."""
        for future in self._pending.expire(self._now() if until is None else until):
            _give(future, _Failure(outcome))
        self._set_timer(self._pending.wake_at())


def _give(future: "asyncio.Future[Any]", outcome: object) -> bool:
    """Settle a call; return False if its caller was cancelled, and has not run since, or went down with its loop."""
    if future.done():
        return False
    try:
        future.set_result(outcome)
    except RuntimeError:
        return False  # its loop is closed
    return True


def _replied(future: "asyncio.Future[Any]") -> bool:
    if not future.done() or future.cancelled():
        return False
    outcome = future.result()
    return not isinstance(outcome, _Failure) or outcome.outcome == "rejected"
