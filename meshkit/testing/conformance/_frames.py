"""What is promised about frames, by transports without runtimes."""

import asyncio
import functools
import random

from meshkit.errors import Overloaded, Unreachable
from meshkit.testing.conformance._mesh import Conditions, Node, T, identity_of
from meshkit.testing.conformance._scenario import guaranteed, require, scenario

_OF_THE_KERNEL = 16 * 1024 * 1024  # bytes that sockets may take, before what waits is the transport's


class FramesTests(Conditions[T]):
    """What bare transports promise about frames."""

    @scenario
    async def test_every_node_finds_every_other(self) -> None:
        async with self._nodes("alice", "bob", "carol", "dave"):
            pass  # a mesh is up when they have

    @scenario
    async def test_a_frame_arrives_where_it_is_sent_and_nowhere_else(self) -> None:
        async with self._nodes("alice", "bob", "carol") as nodes:
            pairs = [(one, other) for one in nodes for other in nodes if one is not other]
            for one, other in pairs:
                one.send(other, f"from {one} to {other}".encode())
            for one, other in pairs:
                await self._arrives([f"from {one} to {other}".encode()], one, other)
            await self._nothing_comes()
            for node in nodes:
                expected = {(one.id, f"from {one} to {node}".encode()) for one in nodes if one is not node}
                require(set(node.heard) <= expected, f"a frame arrives where it is sent, and at no other: {node.heard}")

    @scenario
    async def test_a_broadcast_arrives_at_every_other_node_once(self) -> None:
        async with self._nodes("alice", "bob", "carol") as nodes:
            for node in nodes:
                node.broadcast(f"from {node}".encode())
            for one in nodes:
                for other in nodes:
                    if one is not other:
                        await self._arrives([f"from {one}".encode()], one, other)
            await self._nothing_comes()
            for node in nodes:
                expected = {(one.id, f"from {one}".encode()) for one in nodes if one is not node}
                once = len(node.heard) == len(set(node.heard)) and set(node.heard) <= expected
                require(once, f"a broadcast arrives at every other node, once: {node.heard}")

    @scenario
    async def test_what_arrives_is_what_was_sent(self) -> None:
        async with self._nodes("alice", "bob") as [alice, bob]:
            largest = self.max_frame or 1024 * 1024
            sent: set[bytes] = set()
            sizes = [1, 2, 3, 127, 128, 255, 256, 257, 4095, 4096, 65_535, 65_536, 65_537, largest - 1, largest]
            for size in sizes:
                frame = random.Random(size).randbytes(size)
                sent.add(frame)
                await self._carries(frame, alice, bob)
            for frame in (b"\0" * 100, b"\xff" * 100, bytes(range(256)), b"\r\n" * 50, b"{}"):
                sent.add(frame)
                await self._carries(frame, alice, bob)
            require(set(bob.of(alice)) == sent, "what arrives is what was sent, and nothing else")

    @scenario
    async def test_what_is_sent_from_within_the_receiver_arrives(self) -> None:
        guaranteed("lossless", self.lossless)
        async with self._nodes("alice", "bob") as [alice, bob]:
            for one, other in ((alice, bob), (bob, alice)):
                one.on_frame = functools.partial(self._count_down, one, other)
            alice.send(bob, b"20")
            await self._until(
                lambda: len(alice.heard + bob.heard) == 21, "a receiver may send, and what it sends arrives"
            )

    @scenario
    async def test_frames_arrive_in_the_order_in_which_they_were_sent(self) -> None:
        guaranteed("ordered", self.ordered)
        async with self._nodes("alice", "bob", "carol") as [alice, bob, carol]:
            rng = random.Random(1)
            for number in range(200):
                for sender in (alice, carol):
                    text = f"{number}".encode().ljust(rng.choice([10, 100, 1000]))
                    await self._send(text, sender, bob)
                    sender.broadcast(b"all " + text)
                if rng.random() < 0.1:
                    await asyncio.sleep(0)
            if self.lossless:
                await self._until(lambda: len(bob.heard) >= 800, "lossless: whatever is sent and broadcast arrives")
            await self._nothing_comes()
            for sender in (alice, carol):
                for what, first in (("sent", b""), ("broadcast", b"all ")):
                    texts = [text for text in bob.of(sender) if text.startswith(b"all") == bool(first)]
                    numbers = [int(text.removeprefix(first)) for text in texts]
                    require(numbers == sorted(numbers), f"ordered: what {sender} {what} came as {numbers}")

    @scenario
    async def test_every_frame_arrives_once(self) -> None:
        async with self._nodes("alice", "bob") as [alice, bob]:
            frames = [b"%d" % number for number in range(2_000)]
            for frame in frames:
                await self._send(frame, alice, bob)
            if self.lossless:
                await self._arrives(frames, alice, bob)
            await self._nothing_comes()
            heard = bob.of(alice)
            require(
                len(set(heard)) == len(heard), f"no frame arrives twice: {len(heard)} came, {len(set(heard))} differ"
            )
            require(set(heard) <= set(frames), "nothing arrives that was not sent")

    @scenario
    async def test_a_frame_that_is_too_large_is_refused_and_does_no_harm(self) -> None:
        guaranteed("limited in the size of a frame (max_frame)", self.max_frame)
        async with self._nodes("alice", "bob") as [alice, bob]:
            too_large = bytes((self.max_frame or 0) + 1)
            for verb in (lambda: alice.transport.send(bob.id, too_large), lambda: alice.transport.broadcast(too_large)):
                error = await self._error_of(verb)
                require(isinstance(error, ValueError), f"a frame that is too large is a ValueError, not {error!r}")
            await self._carries(b"small", alice, bob)
            require(set(bob.of(alice)) == {b"small"}, "a frame that was refused does not arrive")

    @scenario
    async def test_what_cannot_be_carried_at_once_is_buffered_within_a_limit(self) -> None:
        guaranteed("limited in what it buffers (max_buffer)", self.max_buffer)
        async with self._nodes("alice", "bob") as [alice, bob]:
            block = bytes(32 * 1024)
            limit = (self.max_buffer or 0) + _OF_THE_KERNEL
            accepted, error = 0, None
            while error is None and accepted * len(block) <= limit:
                error = await self._error_of(lambda: alice.transport.send(bob.id, block))
                accepted += error is None
            require(
                isinstance(error, Overloaded), f"beyond what may wait, a frame is refused: Overloaded, not {error!r}"
            )
            missed: object = None
            try:
                missed = alice.transport.broadcast(block)
            except Overloaded:
                missed = [bob.id]
            require(missed, "a broadcast returns the nodes that miss it, or raises Overloaded where all do")
            if self.lossless:
                await self._until(lambda: len(bob.heard) >= accepted, "lossless: what was accepted arrives")
            await self._nothing_comes()
            await self._carries(b"again", alice, bob)

    @scenario
    async def test_a_node_that_nobody_knows_cannot_be_reached(self) -> None:
        async with self._nodes("alice", "bob") as [alice, bob]:
            nobody = "nobody" if alice.identity is None else identity_of("nobody").node_id
            error = await self._error_of(lambda: alice.transport.send(nobody, b"x"))
            require(isinstance(error, Unreachable), f"a send to an unknown node is refused: Unreachable, not {error!r}")
            await self._carries(b"x", alice, bob)

    @scenario
    async def test_a_node_may_be_alone(self) -> None:
        async with self._nodes("alice") as [alice]:
            alice.broadcast(b"is anybody there?")
            await self._nothing_comes()
            require(not alice.heard, "a node does not hear its own broadcasts")

    def _count_down(self, node: Node[T], other: Node[T], sender: str, frame: bytes) -> None:
        if frame != b"0":
            node.send(other, str(int(frame) - 1).encode())
