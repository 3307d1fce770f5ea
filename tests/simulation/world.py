"""What the nodes of the simulated cluster do, and how they ask one another."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import anyio

from meshkit import (
    CircuitBreaker,
    Closed,
    Message,
    OutcomeUnknown,
    Refused,
    Reject,
    RemoteError,
    Retrier,
    RetryPolicy,
    Runtime,
    Service,
    State,
    TooFewReplies,
    _time,
    broadcast,
    handles,
    local,
    request,
)
from meshkit.testing import Crashed, SimCluster, SimNode
from tests.simulation.books import RETRIES, Attempt, Call, Run, Told, Work, World

WORK = request("sim:work", Work, reply=str)
FLAKY = request(
    "sim:flaky",
    Work,
    reply=str,
    order_by="sender",
    max_mailbox=5,
    max_concurrent=2,
    retry=RetryPolicy(max_retries=RETRIES, base_delay=0.5),
    on_error="drop",
)
NEWS = broadcast("sim:news", str)
NOTE = local("sim:note", str, max_mailbox=2, max_concurrent=1)

RESET_TIMEOUT = 3.0
GRACE = 1.0


class Worker(Service):
    name = "worker"
    max_mailbox, max_concurrent = 20, 4

    def __init__(self, world: World, node: SimNode) -> None:
        self.world = world
        self.node = node
        self.machine = node.machine
        self.flaky: dict[str, str] = {}  # what is being handled, by sender
        self.breakers: dict[str, CircuitBreaker] = {}
        self.probes: dict[str, list[float]] = {}

    async def start(self) -> None:
        await asyncio.sleep(self.world.sim.rng.random() * 0.3)  # meanwhile, others ask already

    async def handle(self, msg: Message[Work], how: Callable[[Run], Awaitable[None]]) -> str:
        run = self.world.begin(msg.payload, self.rt, self.machine, msg.deadline)
        try:
            await asyncio.sleep(run.work.seconds)
            await how(run)
            await self.rt.emit(NOTE, run.work.id)
            self.world.notes[self.rt] += 1
            self.world.effect(run)
        except Closed:
            raise Reject("nested") from None
        finally:
            self.world.end(run)
        return run.reply

    @handles(WORK)
    async def work(self, msg: Message[Work]) -> str:
        return await self.handle(msg, self.do)

    async def do(self, run: Run) -> None:
        if run.work.then is not None:
            await self.ask_on(run, run.work.then)
        elif run.work.seconds and hash_of(run.work.id) % 7 == 0:
            raise Reject("tired", retryable=True)

    @handles(FLAKY)
    async def try_work(self, msg: Message[Work]) -> str:
        other = self.flaky.setdefault(msg.sender, msg.id)
        self.world.check(other == msg.id, f"{msg.id} and {other} of one sender are handled at the same time")
        try:
            return await self.handle(msg, self.try_to)
        finally:
            self.flaky.pop(msg.sender, None)

    async def try_to(self, run: Run) -> None:
        """Fail up to so many times that it must be given up."""
        before = [other for other in self.world.calls[run.work.id].runs if other.rt is self.rt]
        if len(before) <= hash_of(run.work.id) % (RETRIES + 2):
            raise ValueError("once more")

    async def ask_on(self, run: Run, then: str) -> None:
        child, world = self.world.call(), self.world
        until = self.machine.moment(max(anyio.current_effective_deadline(), _time.now()))
        attempt = world.attempt(child, self.node.name, world.names[then], until)
        work = child.work(run.work.seconds)
        try:
            await keep_book(world, child, attempt, self.rt.call(WORK, work, to=then, timeout=30))
        except (Refused, OutcomeUnknown, RemoteError) as error:
            raise Reject("nested") from error

    @handles(NEWS)
    async def hear(self, msg: Message[str]) -> None:
        world = self.world
        world.heard[msg.payload, self.rt] += 1
        world.check(world.heard[msg.payload, self.rt] == 1, f"{msg.payload!r} was heard twice by {self.node}")
        world.check(msg.payload in world.news, f"{self.node} has heard {msg.payload!r}, which nobody has said")

    @handles(NOTE)
    async def note(self, msg: Message[str]) -> None:
        self.world.notes[self.rt] -= 1
        await asyncio.sleep(0.01)

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
                self.world.happened["probe of a breaker"] += 1
                probes.append(begun)
            try:
                await ask_once(self.world, self.rt, call, to, seconds, timeout)
            finally:
                if begun in probes:
                    probes.remove(begun)

        await breaker.call(ask)


# --- callers; each runs on the computer of its runtime


async def keep_book(world: World, call: Call, attempt: Attempt, asks: Awaitable[str]) -> None:
    """Await what a node is asked for; take note of what comes of it, and pass that on."""
    try:
        reply = await asks
    except BaseException as error:  # a cancellation, too
        world.tell(call, attempt, attempt.to, error)
        raise
    world.tell(call, attempt, attempt.to, reply)


async def ask_once(
    world: World, rt: Runtime, call: Call, to: str | None, seconds: float, timeout: float, then: str | None = None
) -> None:
    """Ask one node, or any."""
    attempt = world.attempt(call, rt.name, world.names[to] if to else None, world.sim.now + timeout)
    work = call.work(seconds, then)
    behavior, call_id = FLAKY if call.flaky else WORK, call.id if call.repeats else None
    await keep_book(world, call, attempt, soon(lambda: rt.call(behavior, work, to=to, timeout=timeout, id=call_id)))


async def soon(ask: Callable[[], Awaitable[str]]) -> str:
    """Let an error of `call` itself be one of awaiting it."""
    return await ask()


async def ask_again(world: World, rt: Runtime, call: Call, to: str, seconds: float, timeout: float) -> None:
    """Ask until there is an answer, each time under the same id."""
    policy = RetryPolicy(max_retries=6, base_delay=0.2, timeout=20)
    retrier = Retrier(policy, on=(Refused, OutcomeUnknown, RemoteError), idempotent=True)
    await retrier.call(ask_once, world, rt, call, to, seconds, timeout)


async def ask_many(world: World, rt: Runtime, call: Call, timeout: float, quorum: int) -> None:
    """Ask all, until so many have replied."""
    attempt = world.attempt(call, rt.name, None, world.sim.now + timeout, many=True)
    failed: TooFewReplies | None = None
    outcomes: dict[str, Told]
    try:
        came = await rt.call_many(WORK, call.work(0.1), timeout=timeout, quorum=quorum)
        world.check(len(came.replies) >= quorum, f"{call.id} needs {quorum} replies, and got {came}")
        outcomes = {**came.replies, **came.errors}
    except TooFewReplies as error:
        failed, outcomes = error, {**error.replies, **error.errors}
    except BaseException as error:
        world.tell(call, attempt, None, error)
        raise
    for peer, outcome in outcomes.items():
        world.tell(call, attempt, world.names[peer], outcome)
    world.tell(call, attempt, None, failed)
    if failed is not None:
        raise failed


async def spread(world: World, rt: Runtime, news: str) -> None:
    world.news.add(news)
    await rt.emit(NEWS, news)


async def outcome(node: SimNode, ask: Coroutine[Any, Any, None]) -> None:
    """Await what a caller does; whatever comes of it is one of ours."""
    with suppress(Crashed, Refused, OutcomeUnknown, RemoteError, Closed):
        await node.run(ask)


def hash_of(text: str) -> int:
    return sum(text.encode())


def worker_of(node: SimNode) -> Worker:
    worker = node.rt.services[0]
    assert isinstance(worker, Worker)
    return worker


def make_cluster(world: World, names: list[str]) -> SimCluster:
    def make(node: SimNode) -> Runtime:
        worker = Worker(world, node)
        rt = Runtime(node.name, [worker], transport=node.transport(), identity=node.identity, grace=GRACE)
        rt.logger.set_service_enabled("runtime", False)
        rt.logger.set_service_enabled("worker", False)
        world.born[rt] = world.sim.now
        return rt

    cluster = SimCluster(make, names)
    world.names.update({node.id: node.name for node in cluster})
    return cluster
