"""What the nodes of the simulated cluster do, and the books that are kept of it outside of them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from meshkit import (
    CircuitBreaker,
    Closed,
    Message,
    OutcomeUnknown,
    Refused,
    Reject,
    RemoteError,
    Runtime,
    Service,
    State,
    _time,
    broadcast,
    handles,
    request,
)
from meshkit.testing import Crashed, SimCluster, SimLoop, SimNode


class Work(msgspec.Struct, frozen=True):
    id: str
    seconds: float
    then: str | None = None  # another node, that is asked meanwhile


WORK = request("sim:work", Work, reply=str)
NEWS = broadcast("sim:news", str)

TRANSIT = 0.5
"""Seconds that a frame takes at most, where nothing holds it up."""
SLACK = 0.25
"""Seconds by which clocks that are one per cent off may differ about a deadline."""
RESET_TIMEOUT = 3.0
MAILBOX, CONCURRENT = 20, 4


@dataclass(eq=False)
class Call:
    """What a caller wants done, and what came of it."""

    id: str
    deadline: float = 0.0
    errors: list[BaseException] = field(default_factory=list)  # one for each attempt that failed
    replied: bool = False


class World:
    """The books. Whoever finds that something is not as it must be raises an AssertionError."""

    def __init__(self, sim: SimLoop) -> None:
        self.sim = sim
        self.calls: dict[str, Call] = {}
        self.starts: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        self.effects: Counter[tuple[str, Runtime]] = Counter()
        self.news: Counter[tuple[str, Runtime]] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.stalls: list[list[float]] = []  # when something was paused or held, from and until
        self.wrong: list[str] = []
        self.runtimes: list[Runtime] = []

    def check(self, holds: object, text: str) -> None:
        """Take note of what is wrong; it is raised by whoever looks next: a handler's own error would be hidden."""
        if not holds:
            self.wrong.append(f"at {self.sim.now:.3f} s: {text}")

    def stalled(self, since: float) -> float:
        """Return for how long something stood still since then."""
        now = self.sim.now
        return sum(max(0.0, min(end, now) - max(begin, since)) for begin, end in self.stalls)

    def call(self) -> Call:
        number = len(self.calls)
        self.calls[f"c{number}"] = call = Call(f"c{number}")
        return call

    def begin(self, work: Work) -> None:
        call, now = self.calls[work.id], self.sim.now
        late = now - call.deadline - self.stalled(call.deadline - 30) - TRANSIT * (1 + work.id.count("/")) - SLACK
        self.check(late <= 0, f"{work} began {late:.3f} s after its deadline and the transit")
        self.starts[work.id] += 1
        self.running[work.id] += 1

    def effect(self, work: Work, rt: Runtime) -> None:
        self.effects[work.id, rt] += 1
        self.check(self.effects[work.id, rt] == 1, f"{work} took effect twice on {rt}")

    def look(self) -> None:
        """Check what must hold at any time."""
        for rt in self.runtimes:
            stats = rt.stats()
            ended = stats.handled + stats.failed + stats.cancelled + stats.cut
            self.check(stats.delivered == ended + stats.queued + stats.running, f"books of {rt}: {stats}")
            self.check(stats.queued <= MAILBOX and stats.running <= CONCURRENT, f"bounds of {rt}: {stats}")
            self.check(stats.pending <= 100, f"calls of {rt}: {stats}")
        if self.wrong:
            raise AssertionError("\n".join(self.wrong))

    def settle(self) -> None:
        """Check what must hold when all has ended."""
        for call in self.calls.values():
            starts = self.starts[call.id]
            if call.replied:
                self.check(starts, f"{call} replied, but it never began")
            elif call.errors and all(getattr(error, "executed", "maybe") == "no" for error in call.errors):
                self.check(not starts, f"{call} was refused, but it began")
            if any(isinstance(error, RemoteError) and error.code != "bad_reply" for error in call.errors):
                self.check(starts, f"{call} failed, but it never began")
        self.check(not +self.running, f"these still run: {+self.running}")
        self.look()


class Worker(Service):
    name = "worker"
    max_mailbox, max_concurrent = MAILBOX, CONCURRENT

    def __init__(self, world: World, node: SimNode) -> None:
        self.world = world
        self.node = node
        self.breakers: dict[str, CircuitBreaker] = {}
        self.probes: dict[str, list[float]] = {}

    @handles(WORK)
    async def work(self, msg: Message[Work]) -> str:
        work, world = msg.payload, self.world
        world.begin(work)
        try:
            await asyncio.sleep(work.seconds)
            if work.then is not None:
                await self.ask_on(work, work.then)
            elif work.seconds and hash_of(work.id) % 7 == 0:
                raise Reject("tired", retryable=True)
            world.effect(work, self.rt)
        finally:
            world.running[work.id] -= 1
        return f"{work.id} by {self.rt.node}"

    async def ask_on(self, work: Work, then: str) -> None:
        child = Call(f"{work.id}/{len(self.world.calls)}", deadline=self.world.calls[work.id].deadline)
        self.world.calls[child.id] = child
        try:
            await self.rt.call(WORK, Work(child.id, work.seconds), to=then, timeout=30)
        except (Refused, OutcomeUnknown, RemoteError, Closed) as error:
            raise Reject("nested") from error

    @handles(NEWS)
    async def hear(self, msg: Message[str]) -> None:
        self.world.news[msg.payload, self.rt] += 1
        self.world.check(self.world.news[msg.payload, self.rt] == 1, f"{msg.payload!r} was heard twice by {self.rt}")

    async def ask_guarded(self, call: Call, to: str, seconds: float, timeout: float) -> None:
        """Ask through a circuit breaker, of which never more than one probe may be under way."""
        breaker = self.breakers.get(to)
        if breaker is None:
            breaker = self.breakers[to] = CircuitBreaker(
                failure_threshold=2, reset_timeout=RESET_TIMEOUT, trips_on=(OutcomeUnknown,)
            )
        probes = self.probes.setdefault(to, [])

        async def ask() -> None:
            begun = _time.now()
            if breaker.state is State.HALF_OPEN:
                probes[:] = [other for other in probes if other + RESET_TIMEOUT > begun]  # one that hangs is given up
                self.world.check(not probes, f"{breaker} admitted another probe")
                probes.append(begun)
            try:
                await ask_once(self.world, self.rt, call, to, seconds, timeout)
            finally:
                if begun in probes:
                    probes.remove(begun)

        await breaker.call(ask)


async def ask_once(
    world: World,
    rt: Runtime,
    call: Call,
    to: str | None,
    seconds: float,
    timeout: float,
    *,
    repeats: bool = False,
    then: str | None = None,
) -> None:
    """Ask, on the caller's computer; keep book of what comes of it, and pass that on."""
    begun = world.sim.now
    call.deadline = max(call.deadline, begun + timeout)
    try:
        reply = await rt.call(
            WORK, Work(call.id, seconds, then), to=to, timeout=timeout, id=call.id if repeats else None
        )
    except BaseException as error:  # a cancellation, too
        call.errors.append(error)
        raise
    else:
        call.replied = True
        world.check(
            reply.startswith(f"{call.id} by ") and to in {None, reply.rpartition(" ")[2]}, f"{call} got {reply}"
        )
    finally:
        took = world.sim.now - begun - world.stalled(begun)
        world.check(took <= timeout + SLACK, f"{call} took {took:.3f} s, and had {timeout:.3f} s")


async def outcome(world: World, call: Call, node: SimNode, ask: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Await what a caller does; it has exactly one outcome, and that is one of ours."""
    try:
        await node.run(ask())
        world.outcomes["ok"] += 1
    except Crashed as error:
        call.errors.append(error)
        world.outcomes["crashed"] += 1
    except (Refused, OutcomeUnknown, RemoteError, Closed) as error:
        if not call.errors:
            call.errors.append(error)
        world.outcomes[type(error).__name__] += 1


def hash_of(text: str) -> int:
    return sum(text.encode())


def worker_of(node: SimNode) -> Worker:
    worker = node.rt.services[0]
    assert isinstance(worker, Worker)
    return worker


def make_cluster(world: World, names: list[str], **options: object) -> SimCluster:
    def make(node: SimNode) -> Runtime:
        rt = Runtime(node.name, [Worker(world, node)], transport=node.transport(), identity=node.identity)
        rt.logger.set_service_enabled("runtime", False)
        rt.logger.set_service_enabled("worker", False)
        world.runtimes.append(rt)
        return rt

    return SimCluster(make, names, **options)  # type: ignore[arg-type]
