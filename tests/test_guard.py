"""The one shape of all guards: what may be decorated, how they stack, and one per key."""

import asyncio
import contextlib
import functools
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

import anyio
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshkit.bulkhead import Bulkhead
from meshkit.circuit_breaker import CircuitBreaker, FailureRate, State
from meshkit.dedup import DedupCache
from meshkit.errors import BulkheadFull, CallTimeout, CircuitOpen, RateLimited, TooManyKeys
from meshkit.guard import Guard, PerKey, Stack, stack
from meshkit.hedger import Hedger
from meshkit.rate_limiter import RateLimiter
from meshkit.retrier import Retrier, RetryPolicy
from meshkit.timeout import Timeout

P = ParamSpec("P")
T = TypeVar("T")


class Tag(Guard):
    """Writes down who passes it."""

    def __init__(self, name: str, log: list[str] | None = None) -> None:
        self.name = name
        self.log = [] if log is None else log

    def __repr__(self) -> str:
        return f"Tag({self.name})"

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.log.append(f"into {self.name}")
        try:
            return await fn(*args, **kwargs)
        finally:
            self.log.append(f"out of {self.name}")


def retrier(**settings: Any) -> Retrier:
    return Retrier(RetryPolicy(base_delay=1.0, jitter=False, **settings), on=ConnectionError)


async def greet(name: str, /, *, loud: bool = False) -> str:
    """Greet somebody."""
    return f"HELLO {name}" if loud else f"hello {name}"


LIMITER = RateLimiter(max_count=100, window=1.0)
GUARDS: list[Callable[[], Guard]] = [
    lambda: Tag("x"),
    CircuitBreaker,
    lambda: CircuitBreaker(FailureRate(slow_call=1.0)),
    lambda: Bulkhead(1),
    lambda: stack(Tag("a"), CircuitBreaker(), Bulkhead(1)),
    retrier,
    lambda: Timeout(1.0),
    lambda: Hedger(delay=1.0),
    lambda: RateLimiter(max_count=5, window=1.0),
    lambda: RateLimiter(max_count=5, window=1.0).for_key("bob"),
]

CALLS: list[Callable[..., Awaitable[Any]]] = [
    *(guard().call for guard in GUARDS[1:]),
    retrier(timeout=1.0).call,
    functools.partial(DedupCache(ttl=1.0).once, "key"),
]


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_was_begun_already_is_refused_and_what_to_do_is_said(call: Any) -> None:
    with pytest.raises(TypeError, match=r"not a call of it: \(greet, x\), and not \(greet\(x\)\)$"):
        await call(greet("bob"))  # a warning that it was never awaited would be an error here
    with pytest.raises(TypeError, match=r"^the first argument must be an async function, not 'greet'$"):
        await call("greet")


async def test_what_cannot_be_called_is_neither_retried_nor_a_failure() -> None:
    breaker = CircuitBreaker(failure_threshold=1)
    events: list[object] = []
    guards = stack(Retrier(RetryPolicy(), on=Exception, observer=events.append), breaker)
    calls: list[Callable[..., Awaitable[Any]]] = [guards.call, breaker.call]
    for call in calls:
        with pytest.raises(TypeError, match="must be an async function"):
            await call(greet("bob"), "again")
    assert breaker.state is State.CLOSED
    assert not events


# --- what may be decorated ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", GUARDS)
async def test_a_decorated_function_keeps_its_name_its_signature_and_its_documentation(
    make: Callable[[], Guard],
) -> None:
    guarded = make()(greet)
    assert (guarded.__name__, guarded.__doc__) == ("greet", "Greet somebody.")
    assert inspect.signature(guarded) == inspect.signature(greet)
    assert inspect.iscoroutinefunction(guarded)
    assert await guarded("bob", loud=True) == "HELLO bob"


@pytest.mark.parametrize("make", GUARDS)
async def test_methods_of_every_kind_may_be_decorated(make: Callable[[], Guard]) -> None:
    guard = make()

    class Greeter:
        greeting = "hello"

        @guard
        async def greet(self, name: str) -> str:
            return f"{self.greeting} {name}"

        @classmethod
        @guard
        async def of_class(cls, name: str) -> str:
            return f"{cls.greeting} {name}"

        @staticmethod
        @guard
        async def of_nobody(name: str) -> str:
            return f"hello {name}"

        async def plain(self, name: str) -> str:
            return f"{self.greeting} {name}"

    for method in (Greeter().greet, Greeter.of_class, Greeter().of_class, Greeter.of_nobody, guard(Greeter().plain)):
        assert await method("bob") == "hello bob"


class Callable_:  # noqa: N801 - an object that is called like an async function
    async def __call__(self, name: str) -> str:
        return f"hello {name}"


@pytest.mark.parametrize("make", GUARDS)
async def test_what_is_called_like_an_async_function_may_be_decorated(make: Callable[[], Guard]) -> None:
    guard = make()
    assert await guard(Callable_())("bob") == "hello bob"
    assert await guard(functools.partial(greet, "bob"))(loud=True) == "HELLO bob"


@pytest.mark.parametrize("make", GUARDS)
async def test_call_takes_anything_that_returns_an_awaitable(make: Callable[[], Guard]) -> None:
    def plain(name: str) -> "asyncio.Future[str]":
        future = asyncio.get_running_loop().create_future()
        future.set_result(f"hello {name}")
        return future

    assert await make().call(plain, "bob") == "hello bob"
    assert await make().call(lambda: greet("bob", loud=True)) == "HELLO bob"


def sync(name: str) -> str:
    return name


async def generate() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("make", GUARDS)
@pytest.mark.parametrize(
    ("fn", "advice"),
    [
        (sync, "sync is not one: make it `async def`, or pass what returns an awaitable to .call()"),
        (len, "len is not one"),
        (Callable_, "Callable_ is not one"),
        (3, "3 is not one"),
        (generate, "generate is an async generator, which is not one call: guard the calls that it makes"),
        (classmethod(greet), "is wrapped already: put @classmethod above @"),  # type: ignore[arg-type]
        (staticmethod(greet), "is wrapped already: put @staticmethod above @"),
    ],
)
def test_what_is_no_async_function_is_refused_with_advice(make: Callable[[], Guard], fn: Any, advice: str) -> None:
    guard = make()
    with pytest.raises(TypeError) as caught:
        guard(fn)
    assert str(caught.value).startswith(f"@{type(guard).__name__} guards async functions, and ")
    assert advice in str(caught.value)


def test_a_guard_of_ones_own_needs_only_call() -> None:
    tag = Tag("x")
    assert (tag.kind, tag.time_limit, tag.idle, tag.describe()) == ("guard", None, True, "Tag(x)")
    with pytest.raises(TypeError, match="abstract"):
        Guard()  # type: ignore[abstract]


# --- stack -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["call", "decorated"])
async def test_a_call_passes_the_guards_from_the_outermost_to_the_innermost(form: str) -> None:
    log: list[str] = []
    guards = stack(Tag("a", log), stack(Tag("b", log), Tag("c", log)))
    called = guards.call(greet, "bob") if form == "call" else guards(greet)("bob")
    assert await called == "hello bob"
    assert log == ["into a", "into b", "into c", "out of c", "out of b", "out of a"]


def test_it_describes_the_order() -> None:
    guards = stack(retrier(), CircuitBreaker(name="bob"), Bulkhead(10), Timeout(2.0))
    lines = guards.describe().splitlines()
    assert [line.partition("(")[0] for line in lines] == [
        "1. Retrier",
        "2. CircuitBreaker",
        "3. Bulkhead",
        "4. Timeout",
        "5. your function",
    ]
    assert repr(guards) == f"stack({', '.join(map(repr, guards.guards))})"


def test_its_time_limit_is_the_least_and_it_is_idle_when_all_are() -> None:
    breaker = CircuitBreaker()
    guards = stack(Timeout(5.0), breaker, Timeout(2.0))
    assert guards.time_limit == 2.0
    assert stack(Tag("a")).time_limit is None
    assert guards.idle
    breaker.record_failure()
    assert not guards.idle


@pytest.mark.parametrize(
    ("guards", "reason"),
    [
        (lambda: (twice := CircuitBreaker(), Tag("x"), twice), "is in the stack twice: a call would pass it twice"),
        (lambda: (retrier(), Timeout(1.0), retrier()), "their attempts multiply: keep one of them"),
        (lambda: (Bulkhead(3), retrier()), "slots of the Bulkhead would sleep through the retrier's delays: put the"),
        (lambda: (Bulkhead(3), Tag("x"), retrier()), "put the Retrier outside"),
        (lambda: (Hedger(delay=1.0), retrier()), "every hedge would retry by itself: put the Retrier outside"),
        (lambda: (Hedger(delay=1.0), Hedger(delay=2.0)), "their copies multiply: keep one of them"),
        (lambda: (Timeout(1.0), Timeout(2.0)), "the longer limit inside can never be reached: swap them"),
        (lambda: (Timeout(1.0), Tag("x"), Timeout(2.0)), "the longer limit inside can never be reached"),
        (lambda: (retrier(timeout=1.0), Timeout(2.0)), "the longer limit inside can never be reached"),
        (lambda: (stack(Bulkhead(3), Tag("x")), stack(retrier())), "put the Retrier outside"),
        (lambda: (Timeout(1.0), CircuitBreaker()), "so the circuit would stay closed: put a Timeout(1) inside"),
        (lambda: (Timeout(1.0), CircuitBreaker(), Bulkhead(3)), "put a Timeout(1) inside"),
        (lambda: (retrier(timeout=9.0, attempt_timeout=2.0), CircuitBreaker()), "put a Timeout(2) inside"),
        (lambda: (Timeout(1.0), CircuitBreaker(FailureRate(slow_call=2.0))), "put a Timeout(1) inside"),
        (tuple, "at least one guard"),
    ],
)
def test_orders_that_make_no_sense_are_refused_with_a_reason(guards: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        stack(*guards())


@pytest.mark.parametrize(
    "guards",
    [
        lambda: (retrier(), LIMITER.for_key("bob"), CircuitBreaker(), Bulkhead(3), Timeout(1.0)),
        lambda: (Timeout(9.0), retrier(timeout=8.0), Hedger(delay=1.0), CircuitBreaker(), Timeout(1.0)),
        lambda: (Timeout(9.0), CircuitBreaker(), Timeout(1.0)),
        lambda: (Timeout(9.0), CircuitBreaker(), retrier(attempt_timeout=1.0)),
        lambda: (Timeout(9.0), CircuitBreaker(FailureRate(slow_call=2.0))),
        lambda: (Timeout(9.0), retrier(), CircuitBreaker()),  # the function may have a limit of its own
        lambda: (Timeout(9.0), LIMITER.for_key("bob"), CircuitBreaker()),  # this one limits the wait
        lambda: (retrier(timeout=9.0), CircuitBreaker()),
        lambda: (Timeout(1.0), Timeout(1.0)),
        lambda: (CircuitBreaker(), retrier()),
        lambda: (CircuitBreaker(), CircuitBreaker()),
        lambda: (retrier(), Bulkhead(3), Bulkhead(2)),
        lambda: (stack(retrier(), CircuitBreaker()), Timeout(1.0)),
    ],
)
async def test_orders_that_make_sense_are_accepted(guards: Callable[[], Any]) -> None:
    assert await stack(*guards()).call(greet, "bob") == "hello bob"


def test_what_is_no_guard_is_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match=r"^stack\(\) takes guards, not <function sync"):
        stack(sync)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"take the guard of a key: breakers\[peer\]$"):
        stack(retrier(), PerKey(lambda _: CircuitBreaker()))  # type: ignore[arg-type]


async def test_local_refusals_stay_out_of_the_statistics_of_a_breaker() -> None:
    breaker = CircuitBreaker(failure_threshold=1)
    guards = stack(breaker, Bulkhead(1))
    results = await asyncio.gather(*(guards.call(asyncio.sleep, 1) for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(result, BulkheadFull) for result in results) == 19

    limiter = RateLimiter(max_count=1, window=60.0)
    limited = stack(breaker, limiter.for_key("bob"))
    assert await limited.call(greet, "bob") == "hello bob"
    with pytest.raises(RateLimited), anyio.fail_after(1):
        await limited.call(greet, "bob")

    inner = CircuitBreaker(failure_threshold=1)
    inner.isolate()
    with pytest.raises(CircuitOpen):
        await breaker.call(inner(greet), "bob")
    assert breaker.state is State.CLOSED
    assert breaker.idle


async def test_a_refused_probe_gives_its_place_back() -> None:
    bulkhead = Bulkhead(1)
    breaker = CircuitBreaker(failure_threshold=1, reset_timeout=10.0)
    guards = stack(breaker, bulkhead)
    breaker.record_failure()
    await asyncio.sleep(10)
    async with bulkhead:
        with pytest.raises(BulkheadFull):
            await guards.call(greet, "bob")
    assert await guards.call(greet, "bob") == "hello bob"
    assert breaker.state is State.CLOSED


async def test_a_retrier_outside_waits_for_the_breaker_to_let_a_probe_through() -> None:
    times: list[float] = []
    breaker = CircuitBreaker(failure_threshold=2, reset_timeout=30.0)

    async def flaky() -> str:
        times.append(asyncio.get_running_loop().time())
        if len(times) < 3:
            raise ConnectionError
        return "done"

    outer = Retrier(RetryPolicy(max_retries=5, base_delay=1.0, jitter=False), on=(ConnectionError, CircuitOpen))
    assert await stack(outer, breaker)(flaky)() == "done"
    assert times == [0.0, 1.0, 31.0], "two failures opened it; the retry after that waited out the break"
    assert breaker.state is State.CLOSED


async def test_a_timeout_inside_the_breaker_counts_and_one_outside_does_not() -> None:
    inside, outside = CircuitBreaker(failure_threshold=1), CircuitBreaker(failure_threshold=1)
    slow = CircuitBreaker(FailureRate(minimum_calls=1, slow_call=0.5))
    for guards in (stack(inside, Timeout(1.0)), stack(Timeout(1.0), Tag("x"), outside), stack(Timeout(1.0), slow)):
        with pytest.raises(CallTimeout):
            await guards.call(asyncio.sleep, 100)
    assert slow.state is State.OPEN, "it has seen that the call was slow"
    assert (inside.state, outside.state) == (State.OPEN, State.CLOSED)


async def test_the_copies_of_a_hedger_outside_pass_the_breaker_each_and_the_loser_does_not_count() -> None:
    breaker = CircuitBreaker(failure_threshold=1)
    seconds = iter([100.0, 1.0])

    async def read() -> str:
        await asyncio.sleep(next(seconds))
        return "value"

    assert await stack(Hedger(delay=1.0), breaker).call(read) == "value"
    assert (breaker.state, breaker.stats().failures) == (State.CLOSED, 0)


# --- PerKey ------------------------------------------------------------------------------------------------


def test_each_key_has_one_guard_of_its_own_made_on_first_use() -> None:
    made: list[str] = []

    def make(peer: str) -> CircuitBreaker:
        made.append(peer)
        return CircuitBreaker(name=peer)

    breakers = PerKey(make, max_keys=3)
    assert breakers["bob"] is breakers["bob"]
    assert breakers["carol"] is not breakers["bob"]
    assert made == ["bob", "carol"]
    assert breakers.get("dave") is None, "asking made none"
    assert breakers.get("bob") is breakers["bob"]
    assert (len(breakers), list(breakers), "bob" in breakers, "dave" in breakers) == (2, ["carol", "bob"], True, False)
    assert [key for key, _ in breakers.items()] == ["carol", "bob"]
    assert repr(breakers) == "PerKey('guards', keys=2, max_keys=3)"


def test_a_key_spray_cannot_close_an_open_breaker() -> None:
    breakers = PerKey[str, CircuitBreaker](lambda peer: CircuitBreaker(failure_threshold=2, name=peer), max_keys=100)
    victim = breakers["victim"]
    for _ in range(2):
        victim.record_failure()
    nearly = breakers["nearly"]
    nearly.record_failure()
    for number in range(10_000):
        breakers[f"spray {number}"]
    assert breakers["victim"] is victim
    assert victim.state is State.OPEN
    assert breakers["nearly"] is nearly
    assert len(breakers) == 100
    assert breakers.stats().evicted == 10_002 - 100


async def fails_later() -> None:
    await asyncio.sleep(1)
    raise ConnectionError


def trippy(_: object) -> CircuitBreaker:
    return CircuitBreaker(failure_threshold=1)


@pytest.mark.parametrize("form", ["call", "decorated", "block", "stack", "decorated with a stack"])
async def test_what_a_call_under_way_reports_is_not_lost_in_a_spray(form: str) -> None:
    breakers = PerKey[str, CircuitBreaker](trippy, max_keys=10)
    stacks = PerKey[str, Stack](lambda _: stack(CircuitBreaker(failure_threshold=1), Timeout(9.0)), max_keys=10)

    async def block() -> None:
        async with breakers["victim"]:
            await fails_later()

    async def caught() -> None:  # so that no traceback holds the guard after the call
        with contextlib.suppress(ConnectionError):
            if form == "call":
                await breakers["victim"].call(fails_later)
            elif form == "decorated":
                await breakers["victim"](fails_later)()
            elif form == "block":
                await block()
            elif form == "stack":
                await stacks["victim"].call(fails_later)
            else:
                await stacks["victim"](fails_later)()

    under_way = asyncio.create_task(caught())
    await asyncio.sleep(0)
    for number in range(1_000):
        breakers[f"spray {number}"]
        stacks[f"spray {number}"]
    await under_way
    with pytest.raises(CircuitOpen):
        await (stacks["victim"].call(greet, "bob") if "stack" in form else breakers["victim"].call(greet, "bob"))


async def test_a_guard_that_was_let_go_of_is_the_same_while_a_call_through_it_is_under_way() -> None:
    breakers = PerKey[str, CircuitBreaker](trippy, max_keys=2)
    a, b = (asyncio.create_task(breakers[peer].call(fails_later)) for peer in "ab")
    await asyncio.sleep(0)
    identities = {peer: id(breakers.get(peer)) for peer in "ab"}
    breakers["c"]  # both are idle and held: the one that was not used for longest makes room all the same
    assert sorted(breakers) == ["b", "c"]
    assert breakers.get("a") is None
    assert id(breakers["a"]) == identities["a"]
    assert sorted(breakers) == ["a", "b"], "c, which nobody held, made room"
    await asyncio.gather(a, b, return_exceptions=True)
    for peer in "ab":
        assert breakers[peer].state is State.OPEN
    with pytest.raises(TooManyKeys):
        breakers["c"]
    assert breakers.stats().evicted == 2


def test_whoever_kept_a_guard_and_whoever_asks_for_its_key_have_the_same() -> None:
    breakers = PerKey[int, CircuitBreaker](trippy, max_keys=10)
    kept = [breakers[number] for number in range(50)]
    assert len(breakers) == 10
    for number in range(50):
        assert breakers[number] is kept[number]
        assert len(breakers) == 10
    del kept[:40]
    for number in range(100, 110):
        breakers[number].record_failure()
    assert len(breakers._let_go) == 10, "those that are still in `kept`"
    kept.clear()
    assert not breakers._let_go, "what nobody holds is not kept"


def test_a_guard_that_was_let_go_of_comes_back_only_where_there_is_room() -> None:
    breakers = PerKey[str, CircuitBreaker](trippy, max_keys=1)
    held = breakers["a"]
    breakers["b"].record_failure()
    held.record_failure()
    with pytest.raises(TooManyKeys):
        breakers["a"]
    breakers["b"].reset()
    assert breakers["a"] is held
    assert held.state is State.OPEN


def test_what_cannot_be_referred_to_weakly_is_refused_at_once() -> None:
    class Slotted:
        __slots__ = ()
        idle = True

    def make(_: str) -> Slotted:
        return Slotted()

    with pytest.raises(TypeError, match=r"weak reference to '.*Slotted'"):
        PerKey(make)["a"]


def test_a_make_that_asks_for_other_keys_cannot_exceed_max_keys() -> None:
    def make(number: int) -> CircuitBreaker:
        if number:
            breakers[number - 1]
        return CircuitBreaker()

    breakers = PerKey[int, CircuitBreaker](make, max_keys=3)
    breakers[10]
    assert list(breakers) == [8, 9, 10]


def test_when_no_guard_is_idle_a_new_key_is_refused_and_counted_and_the_others_stay() -> None:
    made = 0

    def make(_: str) -> CircuitBreaker:
        nonlocal made
        made += 1
        return CircuitBreaker(failure_threshold=1)

    breakers = PerKey(make, max_keys=3, name="peers")
    for peer in "abc":
        breakers[peer].record_failure()
    for _ in range(5):
        with pytest.raises(TooManyKeys, match=r"^peers: no room for 'd', all 3 keys are in use; raise max_keys$"):
            breakers["d"]
    assert (sorted(breakers), made) == (["a", "b", "c"], 3)
    assert (breakers.stats().keys, breakers.stats().evicted, breakers.stats().refused) == (3, 0, 5)
    breakers["b"].reset()
    breakers["d"].record_failure()
    assert sorted(breakers) == ["a", "c", "d"]


async def test_peers_that_are_gone_for_good_make_room_in_the_end() -> None:
    breakers = PerKey[object, CircuitBreaker](lambda _: CircuitBreaker(2, reset_timeout=30.0), max_keys=50)
    for number in range(50):
        breakers[number].record_failure()
        if number % 2:
            breakers[number].record_failure()
    with pytest.raises(TooManyKeys):
        breakers["new"]
    await asyncio.sleep(330)
    for number in range(50):
        breakers[f"new {number}"]
    assert len(breakers) == 50


def test_a_make_that_raises_leaves_nothing_behind() -> None:
    def make(key: str) -> CircuitBreaker:
        if key == "bad":
            raise KeyError(key)
        return CircuitBreaker()

    breakers = PerKey(make, max_keys=2)
    breakers["good"]
    with pytest.raises(KeyError):
        breakers["bad"]
    assert list(breakers) == ["good"]


async def test_there_may_be_a_whole_stack_per_key() -> None:
    guards = PerKey[str, Stack](lambda peer: stack(retrier(), CircuitBreaker(name=peer), Bulkhead(1)), max_keys=1)
    under_way = asyncio.create_task(guards["bob"].call(asyncio.sleep, 1))
    await asyncio.sleep(0)
    with pytest.raises(TooManyKeys):
        guards["carol"]
    await under_way
    assert isinstance(guards["carol"], Stack)


class Evictable:
    def __init__(self, number: int, looked: list[int]) -> None:
        self.number = number
        self.busy = False
        self._looked = looked

    @property
    def idle(self) -> bool:
        self._looked.append(self.number)
        return not self.busy


class PerKeyMachine(RuleBasedStateMachine):
    """The model: a list of (key, number of the guard), where those looked at or used go to the end.

    The first idle one that nobody holds makes room, or else the first idle one; while it is held it is remembered.
    """

    @initialize(max_keys=st.integers(1, 5), looks=st.integers(1, 6))
    def start(self, max_keys: int, looks: int) -> None:
        class FewLooks(PerKey[int, Evictable]):
            MAX_LOOKS = looks

        self.max_keys = max_keys
        self.looks = looks
        self.made = 0
        self.looked: list[int] = []
        self.per_key = FewLooks(self.make, max_keys=max_keys)
        self.kept: list[tuple[int, int]] = []
        self.let_go: dict[int, int] = {}
        self.busy: set[int] = set()
        self.held: dict[int, Evictable] = {}
        self.evicted = self.refused = 0

    def make(self, _: int) -> Evictable:
        self.made += 1
        return Evictable(self.made, self.looked)

    def make_room(self) -> bool:
        if len(self.kept) < self.max_keys:
            return True
        spare: list[tuple[int, int]] = []
        for _ in range(min(self.looks, len(self.kept))):
            oldest = self.kept.pop(0)
            if oldest[1] not in self.busy and oldest[1] not in self.held:
                self.evicted += 1
                return True
            self.kept.append(oldest)
            if oldest[1] not in self.busy:
                spare.append(oldest)
        if spare:
            self.kept.remove(spare[0])
            self.let_go[spare[0][0]] = spare[0][1]
            self.evicted += 1
        return bool(spare)

    @rule(key=st.integers(0, 9))
    def use(self, key: int) -> None:
        known = next((entry for entry in self.kept if entry[0] == key), None)
        self.looked.clear()
        if known:
            self.kept.remove(known)
            self.kept.append(known)
            assert self.per_key[key].number == known[1]
        elif self.make_room():
            number = self.let_go.pop(key, self.made + 1)
            assert self.per_key[key].number == number
            self.kept.append((key, number))
        else:
            self.refused += 1
            with pytest.raises(TooManyKeys):
                self.per_key[key]
        assert len(self.looked) <= self.looks

    @rule(key=st.integers(0, 9), busy=st.booleans())
    def change(self, key: int, busy: bool) -> None:
        guard = self.per_key.get(key)
        if guard is not None:
            guard.busy = busy
            (self.busy.add if busy else self.busy.discard)(guard.number)

    @rule(key=st.integers(0, 9))
    def hold(self, key: int) -> None:
        guard = self.per_key.get(key)
        if guard is not None:
            self.held[guard.number] = guard

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[number]
        self.let_go = {key: other for key, other in self.let_go.items() if other != number}

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "kept"):
            return
        assert [(key, guard.number) for key, guard in self.per_key.items()] == self.kept
        assert len(self.per_key) <= self.max_keys
        stats = self.per_key.stats()
        assert (stats.keys, stats.evicted, stats.refused) == (len(self.kept), self.evicted, self.refused)


TestPerKey = PerKeyMachine.TestCase
TestPerKey.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.parametrize("make", [None, "bob", CircuitBreaker()])
def test_what_makes_guards_is_a_function(make: Any) -> None:
    with pytest.raises(TypeError, match="make must be a function of a key that makes a guard, not "):
        PerKey(make)


def test_what_is_made_for_a_key_is_a_guard() -> None:
    makers: list[Callable[[str], Any]] = [str.upper, list]
    for make in makers:
        peers: PerKey[str, Any] = PerKey(make)
        with pytest.raises(TypeError, match=r"^guards: make\('bob'\) must return a guard, not "):
            peers["bob"]
        assert "bob" not in peers


@pytest.mark.parametrize("max_keys", [0, -1])
def test_a_bad_max_keys_is_refused_by_name(max_keys: int) -> None:
    with pytest.raises(ValueError, match=f"^max_keys must be at least 1, not {max_keys}$"):
        PerKey(lambda _: CircuitBreaker(), max_keys=max_keys)
