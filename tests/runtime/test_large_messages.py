"""What is too large for a frame is refused where it is sent, and a reply that is tells its caller at once."""

import pytest

from meshkit import RemoteError
from meshkit.runtime import Identity, Message, Service, broadcast, handles, request
from meshkit.testing import run
from meshkit.transports import MemoryHub
from tests.runtime.nodes import Node

READ = request("big:read", int, reply=bytes)
WRITE = request("big:write", bytes, reply=int)
SHOUT = broadcast("big:shout", bytes)
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


def nodes() -> tuple[Node, Node]:
    hub = MemoryHub()
    alice, bob = (Node(name, Big(), hub=hub, identity=Identity.generate()) for name in ("alice", "bob"))
    return alice, bob


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
