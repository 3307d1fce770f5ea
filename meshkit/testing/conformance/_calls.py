"""What runtimes promise that talk over a transport: calls, anycast, broadcasts, drain."""

import asyncio
import contextlib
import io
import random
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from meshkit import _time
from meshkit.errors import CallTimeout, MeshkitError, OutcomeUnknown, Refused
from meshkit.logger import Logger
from meshkit.runtime import Message, Runtime, Service, broadcast, handles, request
from meshkit.testing.cancellation import CancellationPoint
from meshkit.testing.conformance._mesh import Conditions, T, identity_of
from meshkit.testing.conformance._scenario import at_every_await, guaranteed, require, scenario

_LONG = 1000.0  # seconds: nothing here waits for so long


class Probe(msgspec.Struct, frozen=True):
    """What the runtimes of a mesh ask each other: to wait, and to return this very message."""

    number: int
    delay: float = 0.0
    data: bytes = b""


ECHO = request("conformance:echo", Probe, reply=Probe)
ECHO_TOO = request("conformance:echo-too", Probe, reply=str)
SHOUT = broadcast("conformance:shout", int)


class Echo(Service):
    """Returns what it is asked, after a while, and counts."""

    name = "echo"
    max_mailbox = 100_000
    max_concurrent = 10_000

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()
        self.running = 0
        self.shouts: list[tuple[str, int]] = []

    @handles(ECHO)
    async def echo(self, msg: Message[Probe]) -> Probe:
        """Return the message."""
        self.begun[msg.payload.number] += 1
        self.running += 1
        try:
            await asyncio.sleep(msg.payload.delay)
        finally:
            self.running -= 1
        return msg.payload

    @handles(SHOUT)
    async def shout(self, msg: Message[int]) -> None:
        """Remember the message."""
        self.shouts.append((msg.sender, msg.payload))


class EchoToo(Echo):
    """Handles a kind that not every node handles, too: it says who it is."""

    @handles(ECHO_TOO)
    async def echo_too(self, msg: Message[Probe]) -> str:
        """Return the id of the node."""
        return self.rt.node


class CallsTests(Conditions[T]):
    """Runtimes over the transport."""

    _calls = 10_000

    @scenario
    async def test_a_call_goes_to_the_node_that_is_named_and_its_reply_comes_back(self) -> None:
        services = [Echo(), Echo(), Echo()]
        async with self._runtimes(*services) as runtimes:
            for number, (caller, to) in enumerate((one, other) for one in runtimes for other in runtimes):
                probe = Probe(number, data=bytes(number))
                require(
                    await self._ask(caller, probe, to.node) == probe, "a call returns the reply to it, and no other"
                )
                begun = [service.begun[number] for service in services]
                require(begun[runtimes.index(to)] == sum(begun) >= 1, "a call is handled by the node that is named")

    @scenario
    async def test_a_call_to_any_node_is_answered_by_those_that_handle_it_in_turn(self) -> None:
        guaranteed("lossless", self.lossless)
        async with self._runtimes(Echo(), EchoToo(), EchoToo(), Echo()) as [asks, one, other, _]:
            replied = [await asks.call(ECHO_TOO, Probe(number), timeout=self.patience) for number in range(10)]
            require(
                set(replied) == {one.node, other.node},
                f"a call without `to` goes to each node that handles it, in turn: {len(set(replied))} of 2 replied",
            )
            await one.stop()
            await self._until(lambda: one.node not in asks.peers, f"when {one.name} stops, it is no peer any more")
            replied = [await asks.call(ECHO_TOO, Probe(number), timeout=self.patience) for number in range(4)]
            require(set(replied) == {other.node}, "a call without `to` goes to nodes that are up")

    @scenario
    async def test_an_emitted_broadcast_is_handled_once_on_every_node(self) -> None:
        guaranteed("lossless", self.lossless)
        services = [Echo(), Echo(), Echo()]
        async with self._runtimes(*services) as runtimes:
            for number, runtime in enumerate(runtimes):
                await runtime.emit(SHOUT, number)
            expected = sorted((runtime.node, number) for number, runtime in enumerate(runtimes))
            await self._until(
                lambda: all(len(service.shouts) >= len(expected) for service in services),
                "lossless: a broadcast is handled on every node",
            )
            await self._nothing_comes()
            require(
                all(sorted(service.shouts) == expected for service in services),
                f"a broadcast is handled once on every node, which knows the sender: {services[0].shouts}",
            )

    @scenario
    async def test_large_payloads_go_both_ways(self) -> None:
        async with self._runtimes(Echo(), Echo()) as [caller, to]:
            size = min(self.max_frame or 1024 * 1024, 1024 * 1024) - 4096  # for the proof, and the envelope
            probes = [Probe(number, data=random.Random(number).randbytes(size)) for number in range(3)]
            for probe in probes:
                require(await self._ask(caller, probe, to.node) == probe, "a payload as large as can be comes back")

    @scenario
    async def test_frames_that_mean_nothing_do_no_harm(self) -> None:
        async with self._runtimes(Echo(), Echo()) as [caller, to]:
            transport = self._transports[0]  # of a node that the other one trusts, and that has gone mad
            noise = random.Random(2).randbytes
            for garbage in (
                b"\0",
                b"\x01",
                b"\x01\x00",
                b"\x01\x00\xc1",
                noise(89),
                noise(90),
                noise(100),
                noise(10_000),
            ):
                transport.send(to.node, garbage)
                transport.broadcast(garbage)
            await self._ask(caller, Probe(1), to.node)
            require(not to.stats().running, "nothing runs because of frames that mean nothing")

    @scenario
    async def test_a_call_that_is_not_answered_in_time_fails_then_and_its_handler_is_cancelled(self) -> None:
        service = Echo()
        async with self._runtimes(Echo(), service) as [caller, to]:
            error = None
            try:
                await caller.call(ECHO, Probe(1, delay=_LONG), to=to.node, timeout=0.2)
            except MeshkitError as raised:
                error = raised
            require(isinstance(error, CallTimeout), f"a call without an answer in time is a CallTimeout, not {error!r}")
            await self._until(lambda: not service.running, "a handler is cancelled when its caller has given up")

    @at_every_await
    async def test_a_cancelled_call_leaves_nothing_behind(self, point: CancellationPoint) -> None:
        service = Echo()
        async with self._runtimes(Echo(), service) as [caller, to]:
            with contextlib.nullcontext() if self.lossless else contextlib.suppress(CallTimeout):
                await point.cancel(caller.call(ECHO, Probe(1, delay=0.01), to=to.node, timeout=self.patience))
            await self._until(lambda: not service.running, "a handler is cancelled when its caller is")
            require(caller.stats().pending == 0, "a call that has ended is not waited for")
            require(service.begun[1] <= 1, "a call is handled once")
            await self._ask(caller, Probe(2), to.node)

    @scenario
    async def test_who_waits_for_a_node_that_leaves_knows_at_once(self) -> None:
        guaranteed("lossless", self.lossless)
        service = Echo()
        async with self._runtimes(Echo(), service, grace=0.0) as [caller, to]:
            call = asyncio.create_task(caller.call(ECHO, Probe(1, delay=_LONG), to=to.node, timeout=_LONG))
            await self._until(lambda: service.running, "a call is handled")
            await to.stop()
            await self._until(call.done, "who waits for a node that leaves knows at once")
            error = call.exception()
            require(isinstance(error, OutcomeUnknown), f"a call that was cut short is OutcomeUnknown, not {error!r}")

    @scenario
    async def test_a_node_that_stops_finishes_what_it_was_asked_and_takes_nothing_new(self) -> None:
        guaranteed("lossless", self.lossless)
        service = Echo()
        async with self._runtimes(Echo(), service) as [caller, to]:
            before = Probe(1, delay=min(0.3, self.patience / 3))
            call = asyncio.create_task(caller.call(ECHO, before, to=to.node, timeout=self.patience))
            await self._until(lambda: service.running, "a call is handled")
            stop = asyncio.create_task(to.stop())
            await asyncio.sleep(0)
            error = None
            try:
                await caller.call(ECHO, Probe(2), to=to.node, timeout=self.patience)
            except MeshkitError as raised:
                error = raised
            require(isinstance(error, Refused), f"a node that stops refuses what is new: Refused, not {error!r}")
            await asyncio.wait([call])
            require(
                not call.exception() and call.result() == before, "a node that stops answers what it was asked before"
            )
            await stop
            require(not service.begun[2], "what was refused did not run")

    @scenario
    async def test_ten_thousand_calls_with_random_cancels_and_no_cross_talk(self) -> None:
        services = [Echo(), Echo(), Echo()]
        calls, at_once, rng = self._calls, 200, random.Random(1)
        outcomes: dict[str, int] = {"replied": 0, "cancelled": 0, "timed out": 0, "failed": 0}
        async with self._runtimes(*services) as runtimes:

            async def ask(number: int) -> None:
                caller, to = rng.sample(runtimes, 2)
                probe = Probe(number, delay=rng.choice([0.0, 0.0, 0.001, 0.01]), data=rng.randbytes(16))
                patience = rng.choice([self.patience, self.patience, 0.005])
                call = asyncio.ensure_future(caller.call(ECHO, probe, to=to.node, timeout=patience))
                if rng.random() < 0.3:
                    asyncio.get_running_loop().call_later(rng.choice([0.0, 0.0005, 0.005]), call.cancel)
                try:
                    reply = await call
                except asyncio.CancelledError:
                    outcomes["cancelled"] += 1
                except CallTimeout:
                    outcomes["timed out"] += 1
                    require(not self.lossless or patience < self.patience, "lossless: a call is answered")
                except MeshkitError as error:
                    outcomes["failed"] += 1  # so does one whose node has fallen silent, as its signs of life are lost
                    require(not self.lossless, f"lossless: a call is answered, and not {error!r}")
                else:
                    outcomes["replied"] += 1
                    require(reply == probe, f"a reply belongs to its request: {probe} was answered with {reply}")

            async def some() -> None:
                while not faults and (number := next(numbers, None)) is not None:
                    try:
                        await ask(number)
                    except Exception as error:  # noqa: BLE001 - raised below, and not in a group
                        faults.append(error)

            numbers = iter(range(calls))
            faults: list[Exception] = []
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(some())
            for fault in faults:
                raise fault
            require(sum(outcomes.values()) == calls, f"every call ends: {outcomes}")
            await self._until(
                lambda: not any(service.running for service in services), "no handler is left when all calls have ended"
            )
            require(all(not runtime.stats().pending for runtime in runtimes), "no call is left when all have ended")
            begun = sum((service.begun for service in services), start=type(services[0].begun)())
            require(max(begun.values()) == 1, "no call is handled twice")

    async def _ask(self, caller: Runtime, probe: Probe, to: str) -> Probe:
        """Call a node; over a transport that may lose frames, until there is a reply."""
        deadline = _time.now() + self.patience
        while not self.lossless and _time.now() < deadline:
            with contextlib.suppress(CallTimeout):
                return await caller.call(ECHO, probe, to=to, timeout=max(0.5, 5 * self.settle))
        return await caller.call(ECHO, probe, to=to, timeout=self.patience)

    @contextlib.asynccontextmanager
    async def _runtimes(self, *services: Echo, grace: float = 5.0) -> AsyncGenerator[list[Runtime]]:
        """Run a mesh of runtimes, each with one of these services, which know what the others handle."""
        names = [f"node{number}" for number in range(len(services))]
        trust = [identity_of(name).node_id for name in names]
        self._transports = transports = list[T]()
        runtimes: list[Runtime] = []
        async with contextlib.AsyncExitStack() as stack:
            for name, service in zip(names, services, strict=True):
                transports.append(transport := self.transport(transports[:]))
                proof: Any = {} if transport.in_process else {"identity": identity_of(name), "trust": trust}
                logger = Logger(node=name, output=io.StringIO())
                runtime = Runtime(name, [service], transport=transport, logger=logger, grace=grace, **proof)
                runtimes.append(await stack.enter_async_context(runtime))
            for runtime in runtimes:
                await self._meets(runtime, *runtimes)
            yield runtimes

    async def _meets(self, runtime: Runtime, *others: Runtime) -> None:
        """Wait until `runtime` knows what the others handle."""
        nodes = {other.node for other in others} - {runtime.node}
        await self._until(
            lambda: {node for node, peer in runtime.peers.items() if peer.kinds} == nodes,
            lambda: f"what one node broadcasts, all hear; {runtime.name} has heard of {[*runtime.peers.values()]}",
        )
