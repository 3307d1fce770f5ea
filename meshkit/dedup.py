"""DedupCache: remembers for a while what it has seen, so that a thing is done once.

>>> cache = DedupCache(ttl=60.0)
>>> cache.check("message 1"), cache.check("message 1")
(True, False)
>>> import asyncio
>>> async def charge(cents):
...     print("charging", cents)
...     return f"receipt for {cents}"
>>> async def main():
...     return await asyncio.gather(cache.once("order 7", charge, 500), cache.once("order 7", charge, 500))
>>> asyncio.run(main())
charging 500
['receipt for 500', 'receipt for 500']
"""

import asyncio
import contextlib
import heapq
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, ParamSpec, Self, TypeVar

from meshkit import _check
from meshkit._time import Clock
from meshkit.events import Event, Observer, notify

__all__ = ["DedupCache", "DedupStats", "KeyEvicted", "SeenKeys"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeyEvicted(Event):
    """A key was forgotten before its time, to make room for a new one."""

    name: str
    key: object


@dataclass(frozen=True, slots=True)
class DedupStats:
    """Keys remembered and calls of `once` in flight now; duplicates and evictions before expiry since it was made."""

    keys: int
    in_flight: int
    duplicates: int
    evicted: int


class SeenKeys:
    """The core: which keys were seen, until when that counts, and in which order they were seen first.

    The keys lie in many small dicts, by hash, each in order of insertion: one dict of a million keys would pause for 24
    ms when it grows, and each look for its oldest key would pass all those deleted before it. A heap of the dicts, by
    the expiry of their first key, finds the oldest key of all. A key costs no object but the float of its expiry, so
    the garbage collector has nothing to visit.

    Cost: O(1) for a key that is there, O(log(max_keys / 1,200)) for a new one; 50 to 85 bytes per key.
    """

    PER_DICT = 1_200
    """Less than a dict's table of 2,048 has room for (1,365), so that a dict that is somewhat fuller fits, too."""
    MAX_DICTS = 4_095
    SWEEP = 256
    """How many expired keys one call forgets at most."""

    def __init__(self, *, ttl: float, max_keys: int) -> None:
        self.ttl = ttl
        self.max_keys = max_keys
        # An odd number of them, lest keys that are multiples of 64 share one.
        self._parts = min(max_keys // self.PER_DICT, self.MAX_DICTS) | 1
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        self.count = 0
        self._latest = now
        self._dicts: list[dict[Hashable, float]] = [{} for _ in range(self._parts)]
        self._heap: list[tuple[float, int]] = []  # each dict that holds keys, under an expiry not after its first
        self._in_heap = bytearray(self._parts)

    def expiry(self, key: Hashable, now: float) -> float | None:
        """Return until when `key` counts as seen, the very object that `add` was given; None if it does not."""
        expiry = self._dicts[hash(key) % self._parts].get(key)
        return expiry if expiry is not None and self._latest <= now < expiry else None

    def check(self, key: Hashable, now: float) -> bool:
        """Return False if `key` counts as seen; else remember it from now on for the ttl, and return True."""
        expiry = self._dicts[hash(key) % self._parts].get(key)
        if expiry is not None and self._latest <= now < expiry:
            return False
        self.add(key, now, now + self.ttl)
        return True

    def add(self, key: Hashable, now: float, expiry: float) -> None:
        """Remember `key` anew; `expiry` is now + ttl, or an object that equals it, for `expiry()` to return."""
        if now < self._latest:
            self._begin(now)  # a clock that goes back is another one, to which the expiries so far mean nothing
        self._latest = now
        index = hash(key) % self._parts
        home = self._dicts[index]
        if key in home:
            self._remove(home, [key])  # so that it comes last in order
        before = len(home)
        home[key] = expiry
        self.count += len(home) - before
        if not self._in_heap[index]:
            self._in_heap[index] = True
            heapq.heappush(self._heap, (float(expiry), index))
        if self._heap[0][0] <= now:
            self.sweep(now, self.SWEEP)

    def evict(self) -> Hashable:
        """Forget the oldest key, and return it. There must be one."""
        home, key = self._oldest()
        self._remove(home, [key])
        return key

    def forget(self, key: Hashable) -> None:
        """Forget `key`, if it is there."""
        home = self._dicts[hash(key) % self._parts]
        if key in home:
            self._remove(home, [key])

    def sweep(self, now: float, limit: int) -> int:
        """Forget up to `limit` expired keys; return how many there were."""
        found = 0
        while self._heap and self._heap[0][0] <= now and found < limit:
            index = self._heap[0][1]
            home = self._dicts[index]
            expired, first = _split(home, now, limit - found)
            if first is None:
                heapq.heappop(self._heap)
                self._in_heap[index] = False
            else:
                heapq.heapreplace(self._heap, (first, index))
            self._remove(home, expired)
            found += len(expired)
        return found

    def _oldest(self) -> tuple[dict[Hashable, float], Hashable]:
        """Return the oldest key of all, after the dict that it is in. There must be a key."""
        while True:
            noted, index = self._heap[0]
            home = self._dicts[index]
            if not home:
                heapq.heappop(self._heap)
                self._in_heap[index] = False
                continue
            key, expiry = next(iter(home.items()))
            if expiry <= noted:
                return home, key
            heapq.heapreplace(self._heap, (float(expiry), index))

    def _remove(self, home: dict[Hashable, float], keys: list[Hashable]) -> None:
        before = len(home)
        removed: list[object] = []  # kept until all is consistent: a result that ends may call us
        try:
            for key in keys:
                removed.append(home.pop(key))  # noqa: PERF401 - for one key, the usual number, this is faster
        except Exception:  # noqa: BLE001 - a key's hash is not what it was, or it cannot be compared any more
            gone = set(map(id, keys))
            entries = [home.popitem() for _ in range(before - len(removed))]  # this asks no key anything
            removed.append(entries)
            for key, expiry in reversed(entries):
                if id(key) not in gone:
                    with contextlib.suppress(Exception):
                        home[key] = expiry
        finally:
            self.count -= before - len(home)


def _split(home: dict[Hashable, float], now: float, limit: int) -> tuple[list[Hashable], float | None]:
    """Return the first keys, up to `limit`, that have expired, and the expiry of the one after them."""
    expired: list[Hashable] = []
    for key, expiry in home.items():
        if expiry > now or len(expired) == limit:
            return expired, float(expiry)
        expired.append(key)
    return expired, None


class _Done(float):
    """The expiry of a key whose `once` is done, with its result."""

    __slots__ = ("result",)
    result: Any

    def __new__(cls, expiry: float, result: Any) -> Self:
        done = super().__new__(cls, expiry)
        done.result = result
        return done


class _Outcome:
    """How a shared run ended. Not a future's exception, which would complain if nobody is left to take it."""

    def __init__(self, result: Any, error: Exception | None = None) -> None:
        self._result = result
        self._error = error
        self._traceback = None if error is None else error.__traceback__

    def get(self) -> Any:
        if self._error is not None:
            raise self._error.with_traceback(self._traceback)  # lest it grow with each who takes it
        return self._result


class _Flight:
    """A run of `once` that others wait for. What they are given is its outcome; None says: you run it now."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = False
        self._waiting: OrderedDict[asyncio.Future[_Outcome | None], None] = OrderedDict()

    @property
    def over(self) -> bool:
        return self._over or self._loop.is_closed()  # with the loop of the one that ran it went the run

    async def wait(self) -> _Outcome | None:
        turn: asyncio.Future[_Outcome | None] = self._loop.create_future()
        self._waiting[turn] = None
        try:
            return await turn
        except BaseException:
            self._waiting.pop(turn, None)
            if turn.done() and not turn.cancelled() and turn.result() is None:
                self.hand_over()  # it was this one's turn to run it
            raise

    def hand_over(self) -> None:
        """Let the next who waits run it; when nobody waits, it is over."""
        while self._waiting and not self.over:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                turn.set_result(None)
                return
        self._over = True

    def land(self, outcome: _Outcome) -> None:
        """Give all who wait the outcome."""
        if not self.over:
            self._over = True
            for turn in self._waiting:
                if not turn.done():
                    turn.set_result(outcome)


class DedupCache:
    """Remembers keys for `ttl` seconds: `check(key)` is true the first time, and `await once(key, fn)` runs fn once.

    A key expires `ttl` seconds after it was seen first; a duplicate does not prolong that. At `max_keys` the oldest key
    goes before its time, which is counted (`stats().evicted`) and told to the observer: then the ttl is no longer kept,
    so let `max_keys` be more than the keys that come within it.

    `check` and `once` share one memory; use one of them for a key. Any number of tasks of one loop may use it. When the
    clock goes back, because the next loop has another, everything is forgotten.

    Cost: `check` is amortised O(1), without pauses at any size; 50 to 85 bytes per key, and the key.
    """

    def __init__(
        self, *, ttl: float, max_keys: int = 100_000, name: str = "dedup", observer: Observer | None = None
    ) -> None:
        self._keys = SeenKeys(ttl=_check.duration("ttl", ttl), max_keys=_check.count("max_keys", max_keys))
        self._name = name
        self._observer = observer
        self._now = Clock().now
        self._flights: dict[Hashable, _Flight] = {}
        self._duplicates = self._evicted = 0

    def __len__(self) -> int:
        """Return how many keys are remembered, expired ones included that are not swept yet."""
        return self._keys.count

    def __repr__(self) -> str:
        keys = self._keys
        return f"DedupCache({self._name!r}, ttl={keys.ttl:g}, max_keys={keys.max_keys}, keys={len(self)})"

    def check(self, key: Hashable) -> bool:
        """Return True and remember `key`, if it was not seen within the ttl; False for a duplicate."""
        keys = self._keys
        if (self._flights and self._in_flight(key)) or not keys.check(key, self._now()):
            self._duplicates += 1
            return False
        if keys.count > keys.max_keys:
            self._evict()
        return True

    def seen(self, key: Hashable) -> bool:
        """Return whether `key` was seen within the ttl, or is in flight in `once`. Changes nothing."""
        return self._keys.expiry(key, self._now()) is not None or self._in_flight(key)

    def mark(self, key: Hashable) -> None:
        """Remember `key`. One that is remembered already keeps its time, and its result."""
        keys = self._keys
        if keys.check(key, self._now()) and keys.count > keys.max_keys:
            self._evict()

    def forget(self, key: Hashable) -> None:
        """Forget `key`, and the result that `once` had for it; the next time is a first time again.

        A run of `once` that is in flight stays, and so will its result.
        """
        self._keys.forget(key)

    def cleanup(self) -> int:
        """Forget every expired key now, and return how many. Never needed: each new key takes some expired ones along.

        Cost: O(expired keys).
        """
        return self._keys.sweep(self._now(), len(self))

    def stats(self) -> DedupStats:
        """Return what is remembered, and the totals."""
        return DedupStats(len(self), len(self._flights), self._duplicates, self._evicted)

    async def once(self, key: Hashable, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn(*args, **kwargs)` for the first call with `key`; return its result to all calls within the ttl.

        Calls that come while it runs wait for it. If it fails, its error goes to all of them, and the key is free
        again. If the caller that runs it is cancelled, the next that waits runs it anew. The ttl begins when it is
        done. `fn` must not call `once` with the same key: it would wait for itself.

        Raises:
            RuntimeError: `key` was seen by `check` or `mark`, so there is no result to return.
            Exception: What `fn` raised.
        """
        if not callable(fn):
            raise _check.not_a_function(fn)
        flight = self._flights.get(key)
        waits = True
        if flight is None or flight.over:
            expiry = self._keys.expiry(key, self._now())
            if expiry is not None:
                self._duplicates += 1
                remembered: T = self._result(key, expiry)
                return remembered
            flight = self._flights[key] = _Flight()
            waits = False
        self._duplicates += waits
        try:
            if waits and (outcome := await flight.wait()) is not None:
                shared: T = outcome.get()
                return shared
            try:
                result = await fn(*args, **kwargs)
                now = self._now()
                self._keys.add(key, now, _Done(now + self._keys.ttl, result))
            except Exception as error:
                flight.land(_Outcome(None, error))
                raise
            except BaseException:
                flight.hand_over()
                raise
            flight.land(_Outcome(result))
        finally:
            if flight.over and self._flights.get(key) is flight:
                del self._flights[key]
        if self._keys.count > self._keys.max_keys:
            self._evict()
        return result

    def _evict(self) -> None:
        self._evicted += 1
        key = self._keys.evict()
        if self._observer is not None:
            notify(self._observer, KeyEvicted(self._name, key))

    def _result(self, key: Hashable, expiry: float) -> Any:
        if isinstance(expiry, _Done):
            return expiry.result
        raise RuntimeError(
            f"{self._name}: {key!r} was seen by check() or mark(), so there is no result: use them, or once(), for it"
        )

    def _in_flight(self, key: Hashable) -> bool:
        flight = self._flights.get(key)
        return flight is not None and not flight.over
