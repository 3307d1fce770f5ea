"""Guards: one shape for everything that guards a call, so that guards compose.

>>> import asyncio
>>> class Shout(Guard):
...     async def call(self, fn, /, *args, **kwargs):
...         return (await fn(*args, **kwargs)).upper()
>>> @Shout()
... async def greet(name):
...     return f"hello {name}"
>>> asyncio.run(greet("bob"))
'HELLO BOB'
"""

import functools
import inspect
import itertools
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, ParamSpec, Protocol, TypeVar

from meshkit import _check
from meshkit.errors import TooManyKeys

__all__ = ["Guard", "PerKey", "PerKeyStats", "Stack", "require_async", "stack"]

P = ParamSpec("P")
T = TypeVar("T")


class Guard(ABC):
    """A utility that guards a call: `await guard.call(fn, *args, **kwargs)`, or `@guard` on an async function.

    The decorated function keeps its exact signature. Subclasses implement `call` and say what they are in `kind`.
    """

    kind: ClassVar[str] = "guard"
    """What sort of guard this is, for `stack` to judge the order by."""

    @property
    def time_limit(self) -> float | None:
        """The longest that one call through this guard may take, in seconds; None if it sets no limit."""
        return None

    @property
    def attempt_limit(self) -> float | None:
        """After how many seconds one call of what is inside has failed for this guard; None if it sets no limit."""
        return self.time_limit

    @property
    def idle(self) -> bool:
        """Whether forgetting this guard now would lose nothing, as `PerKey` does to make room."""
        return True

    @abstractmethod
    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `fn(*args, **kwargs)` under this guard and return its result."""

    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate the async function `fn`: every call of it goes through this guard."""
        require_async(fn, self)
        call = self.call

        @functools.wraps(fn)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            return await call(fn, *args, **kwargs)

        return guarded

    def describe(self) -> str:
        """Return one line that says what this guard does, for `Stack.describe`."""
        return repr(self)


def require_async(fn: Any, guard: Guard) -> None:
    """Raise `TypeError` unless `fn` is an async function, or an object that is called like one; for decorators."""
    # An instance is called by the `__call__` of its class; a class is not, whatever it defines.
    called = getattr(fn, "__call__", None) if not inspect.isroutine(fn) and not isinstance(fn, type) else fn  # noqa: B004 - asks whether calling it is async, not whether it can be called
    if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(called):
        return
    name: str = getattr(fn, "__qualname__", repr(fn))
    why = "is not one: make it `async def`, or pass what returns an awaitable to .call()"
    if inspect.isasyncgenfunction(called):
        why = "is an async generator, which is not one call: guard the calls that it makes, or use `async with`"
    elif isinstance(fn, classmethod | staticmethod):
        why = f"is wrapped already: put @{type(fn).__name__} above @{type(guard).__name__}"  # pyright: ignore[reportUnknownArgumentType]  # of whatever
    raise TypeError(f"@{type(guard).__name__} guards async functions, and {name} {why}")


class Stack(Guard):
    """Several guards as one, the outermost first; made by `stack`."""

    kind: ClassVar[str] = "stack"

    def __init__(self, *guards: Guard) -> None:
        flat = [inner for guard in guards for inner in (guard.guards if isinstance(guard, Stack) else (guard,))]
        for guard in flat:
            _check_is_guard(guard)
        self.guards: tuple[Guard, ...] = tuple(flat)
        _check_order(self.guards)
        _check_breakers(self.guards)

    def __repr__(self) -> str:
        return f"stack({', '.join(map(repr, self.guards))})"

    @property
    def time_limit(self) -> float | None:
        """The least of the limits inside."""
        return min((guard.time_limit for guard in self.guards if guard.time_limit is not None), default=None)

    @property
    def idle(self) -> bool:
        """Whether all guards inside are idle."""
        return all(guard.idle for guard in self.guards)

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `fn` through every guard, the outermost first."""
        if not callable(fn):
            raise _check.not_a_function(fn)
        outermost, *inner = self.guards
        guarded: Callable[P, Awaitable[T]] = fn
        for guard in reversed(inner):
            guarded = functools.partial(guard.call, guarded)
        return await outermost.call(guarded, *args, **kwargs)

    def __call__(self, fn: Callable[P, Coroutine[Any, Any, T]], /) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate `fn` with every guard, the innermost first."""
        require_async(fn, self)
        for guard in reversed(self.guards):
            fn = guard(fn)
        fn.__dict__["__guard__"] = self  # it knows its guards one by one, and must hold the stack, for `PerKey`
        return fn

    def describe(self) -> str:
        """Return the order in which a call passes the guards, one to a line, the outermost first."""
        lines = [f"{number}. {guard.describe()}" for number, guard in enumerate(self.guards, 1)]
        return "\n".join([*lines, f"{len(lines) + 1}. your function"])


def stack(*guards: Guard) -> Stack:
    """Make one guard out of many: `stack(outer, ..., inner)`. Nested stacks are flattened.

    A good order for a call to another service: Retrier, RateLimiter, CircuitBreaker, Bulkhead, Timeout.

    Raises:
        ValueError: The order makes no sense; the message says why and what to do instead.
    """
    return Stack(*guards)


_NONSENSE = {
    ("retrier", "retrier"): "their attempts multiply: keep one of them",
    ("bulkhead", "retrier"): "slots of the Bulkhead would sleep through the retrier's delays: put the Retrier outside",
    ("hedger", "retrier"): "every hedge would retry by itself: put the Retrier outside",
    ("hedger", "hedger"): "their copies multiply: keep one of them",
}


def _check_order(guards: tuple[Guard, ...]) -> None:
    if not guards:
        raise ValueError("stack() needs at least one guard")
    for position, inner in enumerate(guards):
        for outer in guards[:position]:
            if outer is inner:
                raise ValueError(f"{inner.describe()} is in the stack twice: a call would pass it twice")
            reason = _NONSENSE.get((outer.kind, inner.kind))
            if reason:
                raise ValueError(f"{outer.describe()} around {inner.describe()}: {reason}")
            if inner.kind == "timeout" and _exceeds(inner.time_limit, outer.time_limit):
                raise ValueError(
                    f"{outer.describe()} around {inner.describe()}: the longer limit inside can never be reached: "
                    "swap them, or drop the inner one"
                )


def _check_breakers(guards: tuple[Guard, ...]) -> None:
    """Refuse a limit right around a breaker that is blind to it; further out it may be meant."""
    for position, (outer, breaker) in enumerate(itertools.pairwise(guards), 1):
        limit = outer.attempt_limit
        if breaker.kind != "breaker" or outer.kind not in {"timeout", "retrier"} or limit is None:
            continue
        inside = [guard.attempt_limit for guard in guards[position:]]
        if not any(seen is not None and seen <= limit for seen in inside):
            raise ValueError(
                f"{outer.describe()} around {breaker.describe()}: what its limit of {limit:g} s cuts is cancelled, and "
                f"what is cancelled never counts, so the circuit would stay closed: put a Timeout({limit:g}) inside"
            )


def _check_is_guard(guard: Any) -> None:
    if not isinstance(guard, Guard):
        hint = "; take the guard of a key: breakers[peer]" if isinstance(guard, PerKey) else ""
        raise TypeError(f"stack() takes guards, not {guard!r}{hint}")


def _exceeds(inner: float | None, outer: float | None) -> bool:
    return inner is not None and outer is not None and inner > outer


@dataclass(frozen=True, slots=True)
class PerKeyStats:
    """How many `keys` there are, and how many were forgotten (`evicted`) or `refused` in all."""

    keys: int
    evicted: int
    refused: int


class _Evictable(Protocol):
    @property
    def idle(self) -> bool: ...


K = TypeVar("K", bound=Hashable)
G = TypeVar("G", bound=_Evictable)


class PerKey(Generic[K, G]):
    """One guard per key, made on first use: `breakers = PerKey(lambda peer: CircuitBreaker(...))`, `breakers[peer]`.

    At `max_keys` an idle one, among those not used for longest, makes room for a new key. One that is not idle is
    never forgotten: a spray of new keys cannot close an open breaker. Where no idle one is found, a new key is
    refused with `TooManyKeys`.

    An idle guard that somebody else still holds (a call under way does) is let go of last, and not forgotten: until
    nobody holds it, its key gets the same one again. `make` may return anything that is `idle` at times and can be
    referred to weakly.

    Cost: amortised O(1); making room looks at no more than 64 guards, and goes on from there the next time (the
    CLOCK algorithm, Corbató 1968). Not for use from several threads.
    """

    MAX_LOOKS = 64

    def __init__(self, make: Callable[[K], G], *, max_keys: int = 10_000, name: str = "guards") -> None:
        given: object = make
        if not callable(given) or isinstance(given, Guard):
            raise TypeError(f"make must be a function of a key that makes a guard, not {make!r}")
        self._make = make
        self._max_keys = _check.count("max_keys", max_keys)
        self._name = name
        self._guards: OrderedDict[K, G] = OrderedDict()  # those used last at the end
        self._let_go: weakref.WeakValueDictionary[K, G] = weakref.WeakValueDictionary()  # but held by somebody else
        self._evicted = self._refused = 0

    def __getitem__(self, key: K) -> G:
        """Return the guard of `key`, made now if it has none.

        Raises:
            TooManyKeys: `key` is new, and there is no idle guard to forget.
        """
        guard = self._guards.get(key)
        if guard is not None:
            self._guards.move_to_end(key)
            return guard
        self._make_room(key)  # first: for a key that is refused, none is made
        guard = self._let_go.pop(key, None)
        if guard is None:
            guard = self._make(key)
            if inspect.getattr_static(guard, "idle", None) is None:  # now, and not when there are too many
                raise TypeError(f"{self._name}: make({key!r}) must return a guard, not {guard!r}")
            weakref.ref(guard)  # the same
            self._make_room(key)  # again: `make` may have asked for other keys
        self._guards[key] = guard
        return guard

    def get(self, key: K) -> G | None:
        """Return the guard of `key`, None if it has none. Changes nothing: neither makes one nor counts as a use."""
        return self._guards.get(key)

    def items(self) -> list[tuple[K, G]]:
        """Return all keys with their guards, those used last at the end. Changes nothing."""
        return list(self._guards.items())

    def stats(self) -> PerKeyStats:
        """Return how many keys there are, and what became of others."""
        return PerKeyStats(len(self._guards), self._evicted, self._refused)

    def _make_room(self, key: K) -> None:
        guards = self._guards
        if len(guards) < self._max_keys:
            return
        held: list[K] = []
        for _ in range(min(self.MAX_LOOKS, len(guards))):
            oldest = next(iter(guards))
            if not guards[oldest].idle:
                guards.move_to_end(oldest)
                continue
            self._let_go[oldest] = guards.pop(oldest)
            still_held = self._let_go.pop(oldest, None)
            if still_held is None:
                break
            guards[oldest] = still_held  # better one that nobody holds
            held.append(oldest)
        else:
            if not held:
                self._refused += 1
                raise TooManyKeys(name=self._name, key=key, max_keys=self._max_keys)
            self._let_go[held[0]] = guards.pop(held[0])
        self._evicted += 1

    def __contains__(self, key: object) -> bool:
        return key in self._guards

    def __len__(self) -> int:
        return len(self._guards)

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._guards))

    def __repr__(self) -> str:
        return f"PerKey({self._name!r}, keys={len(self._guards)}, max_keys={self._max_keys})"
