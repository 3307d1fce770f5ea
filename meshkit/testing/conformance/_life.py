"""What is promised about nodes that come and go, and about those who must stay out."""

import asyncio
import contextlib
import random

from meshkit import _time
from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.testing.cancellation import CancellationPoint
from meshkit.testing.conformance._mesh import Conditions, Node, T, identity_of
from meshkit.testing.conformance._scenario import at_every_await, guaranteed, require, scenario


class LifeTests(Conditions[T]):
    """Start, close, loss, strangers."""

    # --- close

    @scenario
    async def test_the_others_are_told_once_who_has_left(self) -> None:
        guaranteed("one that notices loss", self.notices_loss)
        async with self._nodes("alice", "bob", "carol") as [alice, bob, carol]:
            await bob.close()
            for node in (alice, carol):
                await self._is_told(node, bob)
                await self._finds(node, alice, carol)
            await self._nothing_comes()
            for node in (alice, carol):
                require(node.gone == [bob.id], f"each loss is told once, and only of those who left: {node.gone}")
            require(not bob.gone, "who has closed is told nothing")
            await self._carries(b"still here", alice, carol)

    @scenario
    async def test_what_is_sent_to_a_node_that_has_left_is_refused_or_lost_again(self) -> None:
        guaranteed("one that notices loss", self.notices_loss)
        async with self._nodes("alice", "bob") as [alice, bob]:
            await bob.close()
            await self._is_told(alice, bob)
            alice.gone.clear()
            error = await self._error_of(lambda: alice.transport.send(bob.id, b"x"))
            if error is None:
                await self._until(lambda: bob.id in alice.gone, "a frame that nobody will get is told: lost()")
            else:
                require(isinstance(error, Unreachable), f"a send to a node that left is Unreachable, not {error!r}")

    @scenario
    async def test_what_was_sent_before_a_close_arrives_before_the_loss(self) -> None:
        guaranteed("lossless", self.lossless)
        async with self._nodes("alice", "bob") as [alice, bob]:
            frames = [b"%d" % number for number in range(200)]
            missing = list[int]()
            bob.on_frame = lambda sender, frame: missing.append(1) if alice.id in bob.gone else None
            for frame in frames:
                alice.send(bob, frame)
            await alice.close()
            await self._arrives(frames, alice, bob)
            require(not missing, "what a node sends before it closes arrives before the others are told of its loss")

    @scenario
    async def test_a_closed_transport_sends_nothing_and_receives_nothing(self) -> None:
        async with self._nodes("alice", "bob") as [alice, bob]:
            for number in range(100):
                alice.send(bob, b"%d" % number)
                alice.broadcast(b"%d" % number)
            await bob.close()
            for verb in (lambda: bob.transport.send(alice.id, b"x"), lambda: bob.transport.broadcast(b"x")):
                error = await self._error_of(verb)
                require(isinstance(error, Closed), f"what a closed transport is given to send is Closed, not {error!r}")
            require(not list(bob.transport.peers), "a closed transport has no peers")
            with contextlib.suppress(Unreachable, Overloaded):
                alice.send(bob, b"x")
            await self._nothing_comes()
            await bob.close()  # closing twice is harmless
            require(not alice.heard, "a closed transport sends nothing")

    @scenario
    async def test_a_transport_that_was_never_started_can_be_closed(self) -> None:
        async with self._nodes("alice") as [alice]:
            node = self._node("bob", alice)
            await node.close()
            await self._finds(alice, alice)

    @at_every_await
    async def test_a_cancelled_close_closes(self, point: CancellationPoint) -> None:
        async with self._nodes("alice", "bob") as [alice, bob]:
            for number in range(10):
                bob.send(alice, b"%d" % number)
            await point.cancel(bob.transport.close())
            await bob.close()
            require(not list(bob.transport.peers), "a closed transport has no peers")
            if self.notices_loss:
                await self._is_told(alice, bob)
            await self._finds(alice, alice)

    # --- start

    @scenario
    async def test_a_transport_is_started_once_at_a_time(self) -> None:
        async with self._nodes("alice", "bob") as [alice, bob]:
            error = None
            try:
                await alice.start()
            except Exception as raised:  # noqa: BLE001 - it is looked at below
                error = raised
            require(isinstance(error, RuntimeError), f"to start what is started is a RuntimeError, not {error!r}")
            await self._carries(b"x", alice, bob)
            await self._carries(b"x", bob, alice)

    @scenario
    async def test_a_node_that_comes_back_is_found_again(self) -> None:
        async with self._nodes("alice", "bob", "carol") as [alice, bob, carol]:
            for _ in range(2):
                await bob.close()
                await self._finds(alice, alice, carol)
                await bob.start()
                for node in (alice, bob, carol):
                    await self._finds(node, alice, bob, carol)
                    node.heard.clear()
                await self._carries(b"welcome back", alice, bob)
                await self._carries(b"here I am", bob, carol)

    def test_a_transport_can_be_used_in_one_loop_after_the_other(self) -> None:
        node: list[Node[T]] = []

        async def live() -> None:
            node[:] = node or [self._node("alice")]
            await node[0].start()
            await node[0].close()

        self.run_scenario(live)
        self.run_scenario(live)

    @at_every_await
    async def test_a_cancelled_start_leaves_nothing_behind(self, point: CancellationPoint) -> None:
        async with self._nodes("alice") as [alice]:
            bob = self._node("bob", alice)
            try:
                cancelled = await point.cancel(bob.start())
                if cancelled:
                    require(not list(bob.transport.peers), "a start that was cancelled leaves no peers")
                    await self._finds(alice, alice)
                    await bob.start()
                await self._finds(alice, alice, bob)
                await self._carries(b"x", alice, bob)
            finally:
                await bob.close()
            bob.check()

    # --- those who must stay out

    @scenario
    async def test_a_node_that_is_not_trusted_is_not_let_in(self) -> None:
        guaranteed("authenticated", self.authenticated)
        async with self._nodes("alice", "bob") as [alice, bob]:
            mallory = self._node("mallory", alice)
            await self._tries_to_get_in(mallory, alice, bob)

    @scenario
    async def test_a_node_gets_in_under_its_own_name_only(self) -> None:
        guaranteed("authenticated", self.authenticated)
        async with self._nodes("alice", "bob") as [alice, bob]:
            await bob.close()
            await self._finds(alice, alice)
            alice.gone.clear()
            mallory = self._node("mallory", alice)
            mallory.id = bob.id
            await self._tries_to_get_in(mallory, alice)

    async def _tries_to_get_in(self, mallory: Node[T], *honest: Node[T]) -> None:
        prover = Prover(identity_of("mallory"), started=_time.wall())
        known = [set(node.transport.peers) for node in honest]
        try:
            with contextlib.suppress(Exception):
                await mallory.start(prover)
            for _ in range(20):
                with contextlib.suppress(Exception):
                    mallory.transport.broadcast(b"let me in")
                for node in honest:
                    with contextlib.suppress(Exception):
                        mallory.transport.send(node.id, b"let me in")
                await asyncio.sleep(self.settle / 10)
            for node, peers in zip(honest, known, strict=True):
                require(not node.heard, f"authenticated: nothing comes from a node that is not trusted: {node.heard}")
                require(set(node.transport.peers) == peers, "authenticated: who is not trusted is no peer")
                require(not node.gone, "authenticated: who was never let in is not lost")
        finally:
            await mallory.close()

    @scenario
    async def test_garbage_from_strangers_ends_their_connections_and_nothing_else(self) -> None:
        async with self._nodes("alice", "bob") as [alice, bob]:
            address = self.address(alice.transport)
            guaranteed("reachable by strangers (address)", address)
            noise = random.Random(1).randbytes
            request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            for garbage in (
                noise(1),
                noise(100),
                noise(100_000),
                b"\xff" * 100,
                b"\0" * 100,
                request,
                b"\x7f\xff\xff\xff",
            ):
                await self._is_hung_up(address or ("", 0), garbage)
                await self._carries(garbage[:10], bob, alice)
            require({sender for sender, _ in alice.heard} == {bob.id}, "nothing that strangers send is handed over")
            require(not alice.gone, "nobody is lost because of strangers")

    @scenario
    async def test_strangers_that_say_nothing_are_hung_up_and_keep_nobody_waiting(self) -> None:
        async with self._nodes("alice", "bob") as [alice, bob]:
            address = self.address(alice.transport)
            guaranteed("reachable by strangers (address)", address)
            strangers = [asyncio.create_task(self._is_hung_up(address or ("", 0), b"")) for _ in range(50)]
            for number in range(20):
                await self._carries(b"%d" % number, bob, alice)
            await asyncio.wait(strangers)
            for stranger in strangers:
                stranger.result()
            require({sender for sender, _ in alice.heard} == {bob.id}, "nothing that strangers send is handed over")

    async def _is_hung_up(self, address: tuple[str, int], garbage: bytes) -> None:
        """Say something as a stranger, and wait for the end of the connection."""
        reader, writer = await asyncio.open_connection(*address)
        try:
            over = asyncio.ensure_future(self._read_to_the_end(reader))
            with contextlib.suppress(OSError):
                writer.write(garbage)
                await writer.drain()
            try:
                what = f"who sends {garbage[:12]!r}" if garbage else "who says nothing"
                await self._until(over.done, f"{what}, and is a stranger, is hung up")
            finally:
                over.cancel()
                await asyncio.wait([over])
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _read_to_the_end(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(65_536):
                pass
