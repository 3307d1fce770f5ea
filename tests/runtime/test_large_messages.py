"""What is too large for a frame is refused where it is sent, and a reply that is tells its caller at once."""

import asyncio

import pytest

from meshkit import RemoteError
from meshkit.runtime import Identity, Message, Reject, Service, broadcast, handles, request
from meshkit.runtime.message import MAX_DETAIL, MAX_ID
from meshkit.runtime.outbox import Outbox
from meshkit.testing import run
from meshkit.transports import MemoryHub, MemoryTransport
from tests.runtime.nodes import Node

READ = request("big:read", int, reply=bytes)
WRITE = request("big:write", bytes, reply=int)
SHOUT = broadcast("big:shout", bytes)
PICK = request("picky:pick", str, reply=str)
TOO_LARGE = 1024 * 1024


class Big(Service):
    name = "big"

    @handles(READ)
    async def read(self, msg: Message[int]) -> bytes:
        return bytes(msg.payload)

    @handles(WRITE)
    async def write(self, msg: Message[bytes]) -> int:
        return len(msg.payload)

    @handles(SHOUT)
    async def shout(self, msg: Message[bytes]) -> None:
        assert not msg.payload, "it must not arrive"


class Limited(MemoryTransport):
    """Refuses larger frames, as others do."""

    max_frame = 1024 * 1024

    def send(self, to: str, frame: bytes) -> None:
        assert len(frame) <= self.max_frame
        super().send(to, frame)

    def broadcast(self, frame: bytes) -> None:
        assert len(frame) <= self.max_frame
        super().broadcast(frame)


def nodes(max_frame: int = 1024 * 1024, *services: type[Service], proved: bool = True) -> tuple[Node, Node]:
    hub = MemoryHub()

    def node(name: str) -> Node:
        transport = Limited(hub)
        transport.max_frame = max_frame
        return Node(
            name,
            Big(),
            *(each() for each in services),
            transport=transport,
            identity=Identity.generate() if proved else None,
        )

    return node("alice"), node("bob")


def test_a_payload_that_does_not_fit_into_a_frame_is_a_value_error_of_its_sender_and_was_not_sent() -> None:
    async def main() -> None:
        alice, bob = nodes()
        async with alice, bob:
            with pytest.raises(ValueError, match="does not fit into a frame"):
                await alice.call(WRITE, bytes(TOO_LARGE), to=bob.node, id="large")
            assert "nothing is remembered of it" in alice.explain("large")
            for to in (None, bob.node):
                with pytest.raises(ValueError, match="does not fit into a frame"):
                    await alice.emit(SHOUT, bytes(TOO_LARGE), to=to)
            assert alice.stats().sent == 0
            assert await alice.call(WRITE, bytes(TOO_LARGE), to=alice.node) == TOO_LARGE  # there is no frame
            assert alice.stats().pending == 0

    run(main)


@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize("max_frame", [32 * 1024, 4 * 1024 * 1024])
def test_whatever_the_frames_of_a_transport_are_small_messages_share_them_and_large_ones_fill_them(
    max_frame: int, proved: bool
) -> None:
    async def main() -> None:
        alice, bob = nodes(max_frame, proved=proved)
        async with alice, bob:
            many = (alice.call(WRITE, bytes(1000), to=bob.node) for _ in range(100))
            assert await asyncio.gather(*many) == [1000] * 100
            with pytest.raises(ValueError, match="does not fit into a frame: it may have") as caught:
                await alice.call(WRITE, bytes(max_frame), to=bob.node)
            most = int(str(caught.value).split()[-1])
            assert most > max_frame - 1500
            assert await alice.call(WRITE, bytes(most - 5), to=bob.node) == most - 5  # 5 say how many they are
            assert len(await alice.call(READ, most - 5, to=bob.node)) == most - 5
            with pytest.raises(RemoteError, match="internal"):
                await alice.call(READ, most, to=bob.node)

    run(main)


def test_an_error_with_the_longest_detail_fits_into_the_smallest_frame() -> None:
    detail = "\U0001f600" * MAX_DETAIL  # of four bytes each

    class Picky(Service):
        name = "picky"

        @handles(PICK)
        async def pick(self, msg: Message[str]) -> str:
            raise Reject("wrong", detail)

    async def main() -> None:
        alice, bob = nodes(Outbox.LEAST_FRAME, Picky)
        async with alice, bob:
            with pytest.raises(RemoteError) as caught:
                await alice.call(PICK, "", to=bob.node, id="\U0001f600" * MAX_ID)
            assert caught.value.detail == detail

    run(main)


def test_a_node_does_not_start_on_a_transport_whose_frames_are_too_small_for_it() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="carries frames of 32768 bytes at least, not 32767"):
            await nodes(Outbox.LEAST_FRAME - 1)[0].start()

        def handle(number: int) -> object:
            async def handler(self: Service, msg: Message[str]) -> str:
                return msg.payload

            return handles(request(f"many:{'x' * 200}{number}", str, reply=str))(handler)

        many = type("Many", (Service,), {"name": "many", **{f"handle{n}": handle(n) for n in range(200)}})
        with pytest.raises(ValueError, match="do not fit into a frame of its transport"):
            await nodes(Outbox.LEAST_FRAME, many)[0].start()

    run(main)


def test_the_caller_of_a_reply_that_does_not_fit_into_a_frame_does_not_wait_for_it() -> None:
    async def main() -> None:
        alice, bob = nodes()
        async with alice, bob:
            with pytest.raises(RemoteError) as caught:
                await alice.call(READ, TOO_LARGE, to=bob.node, timeout=60)
            assert caught.value.code == "internal"
            assert caught.value.correlation_id in bob.logged
            assert "does not fit into a frame" in bob.logged
            assert len(await alice.call(READ, TOO_LARGE // 2, to=bob.node)) == TOO_LARGE // 2

    run(main)


def test_the_story_of_what_is_sent_begins_with_where_it_was_sent() -> None:
    async def main() -> None:
        alice, bob = nodes()
        async with alice:
            message_id = await alice.emit(SHOUT, b"")
            assert alice.explain(message_id).splitlines()[1] == "  sent to every node"
            async with bob:
                message_id = await alice.emit(SHOUT, b"", to=bob.node)
                assert f"sent to node {bob.node!r}" in alice.explain(message_id)

    run(main)
