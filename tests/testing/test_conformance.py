"""The suite is put to the test: it lets pass what keeps its promises, and finds each one that is broken."""

import asyncio
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest

from meshkit.errors import Closed, Overloaded, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Receiver
from meshkit.testing import TransportConformance


class Net:
    """Where the nodes of a simulated network meet."""

    def __init__(self) -> None:
        self.nodes: dict[str, Radio] = {}
        self.rng = random.Random(1)


class Radio:
    """A transport that keeps its promises, over a network of its own that takes a hundredth of a second."""

    in_process = False
    exposed = True
    max_frame = 2 * 1024 * 1024
    max_buffer = 8 * 1024 * 1024

    def __init__(self, net: Net) -> None:
        self.net = net
        self.node = self.name = ""
        self.waiting = 0
        self.under_way: deque[tuple[Radio, bytes]] = deque()
        self.timers: list[asyncio.TimerHandle] = []
        self.receiver: Receiver
        self.prover: Prover

    @property
    def peers(self) -> Sequence[str]:
        return [node for node in self.net.nodes if node != self.node] if self.node else []

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        if self.node:
            raise RuntimeError("it is started already")
        assert prover is not None
        await asyncio.sleep(0.001)
        self.admit(node, prover)
        await asyncio.sleep(0.001)
        self.node, self.receiver, self.prover = node, receiver, prover
        self.name = node
        self.net.nodes[node] = self
        for other in self.net.nodes.values():
            if other is not self:
                other.receiver.found(node)

    def admit(self, node: str, prover: Prover) -> None:
        mutual = all(prover.trusts(peer) and other.prover.trusts(node) for peer, other in self.net.nodes.items())
        if not mutual or prover.identity.node_id != node:
            raise PermissionError("not trusted")

    def send(self, to: str, frame: bytes) -> None:
        if not self.node:
            raise Closed(name="radio")
        if len(frame) > self.max_frame:
            raise ValueError("too large")
        if to not in self.net.nodes:
            raise Unreachable(node=to, reason="it is not there")
        if self.waiting + len(frame) > self.max_buffer:
            raise Overloaded(name="radio", limit=self.max_buffer)
        self.waiting += len(frame)
        self.carry(self.net.nodes[to], frame)

    def carry(self, to: "Radio", frame: bytes) -> None:
        self.under_way.append((to, frame))  # timers of the same time come in any order
        self.after(0.01, lambda: self.deliver(self.name, *self.under_way.popleft()))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.timers.append(asyncio.get_running_loop().call_later(delay, action))

    def deliver(self, sender: str, to: "Radio", frame: bytes) -> None:
        self.waiting -= len(frame)
        if to.node:
            to.receiver.received(sender, frame)

    def broadcast(self, frame: bytes) -> dict[str, Overloaded] | None:
        if not self.node:
            raise Closed(name="radio")
        if len(frame) > self.max_frame:
            raise ValueError("too large")
        missed = {}
        for node in self.peers:
            try:
                self.send(node, frame)
            except Overloaded as error:
                missed[node] = error
        return missed

    async def close(self) -> None:
        node, self.node = self.node, ""
        if not node:
            return
        del self.net.nodes[node]
        try:
            while self.waiting:
                await asyncio.sleep(0.01)
        finally:
            self.hang_up()
            self.tell_loss(node)

    def hang_up(self) -> None:
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()
        self.under_way.clear()
        self.waiting = 0

    def tell_loss(self, node: str) -> None:
        for other in self.net.nodes.values():
            other.receiver.lost(node)


class OverRadio(TransportConformance[Radio]):
    make: ClassVar[type[Radio]] = Radio
    authenticated = True
    max_frame = Radio.max_frame
    max_buffer = Radio.max_buffer
    _calls = 1_000
    net: Net

    def transport(self, others: Sequence[Radio]) -> Radio:
        self.net = self.net if others else Net()
        return self.make(self.net)


class TestRadio(OverRadio):
    """All of the suite, over a transport that keeps its promises."""


class Weak(Radio):
    """Loses frames, and delays others, which it says."""

    def carry(self, to: Radio, frame: bytes) -> None:
        rng = self.net.rng
        if rng.random() < 0.3:
            self.waiting -= len(frame)
        else:
            self.after(rng.choice([0.01, 0.02]), lambda: self.deliver(self.name, to, frame))


class TestWeakRadio(OverRadio):
    """All of the suite, over a transport that promises less, and keeps that."""

    make = Weak
    ordered = lossless = False
    _calls = 200
    patience = 60.0


# --- transports that lie


class DropsEveryTenth(Radio):
    count = 0

    def carry(self, to: Radio, frame: bytes) -> None:
        self.count += 1
        if self.count % 10 == 0:
            self.waiting -= len(frame)
        else:
            super().carry(to, frame)


class Reorders(Radio):
    count = 0

    def carry(self, to: Radio, frame: bytes) -> None:
        self.count += 1
        self.after(0.01 + 0.001 * (self.count % 2), lambda: self.deliver(self.name, to, frame))


class Repeats(Radio):
    def deliver(self, sender: str, to: Radio, frame: bytes) -> None:
        super().deliver(sender, to, frame)
        if frame.endswith(b"7") and to.node:
            to.receiver.received(sender, frame)


class DeliversToTheWrongNode(Radio):
    def deliver(self, sender: str, to: Radio, frame: bytes) -> None:
        super().deliver(sender, next(n for n in self.net.nodes.values() if n is not self), frame)


class DeliversToMore(Radio):
    def deliver(self, sender: str, to: Radio, frame: bytes) -> None:
        super().deliver(sender, to, frame)
        for other in self.net.nodes.values():
            if other not in {self, to}:
                other.receiver.received(sender, frame)


class SaysTheWrongSender(Radio):
    def deliver(self, sender: str, to: Radio, frame: bytes) -> None:
        super().deliver(to.node, to, frame)


class HearsItself(Radio):
    def broadcast(self, frame: bytes) -> dict[str, Overloaded] | None:
        missed = super().broadcast(frame)
        self.receiver.received(self.node, frame)
        return missed


class CutsShort(Radio):
    def carry(self, to: Radio, frame: bytes) -> None:
        self.waiting -= max(0, len(frame) - 65_536)
        super().carry(to, frame[:65_536])


class HandsOverViews(Radio):
    def deliver(self, sender: str, to: Radio, frame: bytes) -> None:
        super().deliver(sender, to, memoryview(frame))  # type: ignore[arg-type]


class RaisesInSend(Radio):
    def send(self, to: str, frame: bytes) -> None:
        raise OSError("the antenna fell down")


class NeverSaysLost(Radio):
    def tell_loss(self, node: str) -> None:
        pass


class SaysLostTwice(Radio):
    def tell_loss(self, node: str) -> None:
        super().tell_loss(node)
        super().tell_loss(node)


class SaysLostTooEarly(Radio):
    async def close(self) -> None:
        if self.node:
            super().tell_loss(self.node)
        await super().close()

    def tell_loss(self, node: str) -> None:
        pass


class DeliversAfterClose(Radio):
    def deliver(self, sender: str, to: Radio, frame: bytes) -> None:
        self.waiting -= len(frame)
        to.receiver.received(sender, frame)


class ForgetsWhatWaits(Radio):
    async def close(self) -> None:
        self.waiting = 0
        await super().close()

    def deliver(self, sender: str, to: Radio, frame: bytes) -> None:
        if self.node:
            super().deliver(sender, to, frame)


class SendsAfterClose(Radio):
    def send(self, to: str, frame: bytes) -> None:
        if self.node:
            super().send(to, frame)


class ClosesOnce(Radio):
    async def close(self) -> None:
        if not self.node:
            raise RuntimeError("closed already")
        await super().close()


class NeverCloses(Radio):
    async def close(self) -> None:
        await super().close()
        await asyncio.Event().wait()


class IsClosedOnlyIfNotCancelled(Radio):
    async def close(self) -> None:
        await asyncio.sleep(0.01)
        await super().close()


class CloseLosesItsMind(Radio):
    """Cancelled at the wrong moment, it tells nobody, and thinks that it is closed."""

    async def close(self) -> None:
        node, self.node = self.node, ""
        if node:
            del self.net.nodes[node]
            await asyncio.sleep(0.01)
            self.tell_loss(node)


class KnowsEverybody(Radio):
    def send(self, to: str, frame: bytes) -> None:
        if to in self.net.nodes or not self.node:
            super().send(to, frame)


class StartsTwice(Radio):
    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        self.node = ""
        await super().start(node, receiver, prover)


class StaysHalfStarted(Radio):
    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        await asyncio.sleep(0.01)
        await super().start(node, receiver, prover)
        await asyncio.sleep(0.01)


class LivesOnce(Radio):
    used = False

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        if self.used:
            raise RuntimeError("used up")
        await super().start(node, receiver, prover)
        self.used = True


class FindsTooEarly(Radio):
    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        for other in self.net.nodes.values():
            other.receiver.found(node)
        await super().start(node, receiver, prover)


class LeavesATask(Radio):
    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        await super().start(node, receiver, prover)
        self.task = asyncio.create_task(asyncio.sleep(1e6))


class HasNoLimits(Radio):
    max_frame = max_buffer = 10**12


class BlocksForEver(Radio):
    """Once its buffer was full, it stays so."""

    def send(self, to: str, frame: bytes) -> None:
        try:
            super().send(to, frame)
        except Overloaded:
            self.max_buffer = 0
            raise


class SaysNotWhoMissesIt(Radio):
    def broadcast(self, frame: bytes) -> None:
        super().broadcast(frame)


class BroadcastsToNobody(Radio):
    def broadcast(self, frame: bytes) -> None:
        pass


class CallsFromAThread(Radio):
    def deliver(self, sender: str, to: Radio, frame: bytes) -> None:
        thread = threading.Thread(target=super().deliver, args=(sender, to, frame))
        thread.start()
        thread.join()


class LosesRepliesNowAndThen(Radio):
    count = 0

    def carry(self, to: Radio, frame: bytes) -> None:
        self.count += 1
        if self.count % 100 == 99:
            self.waiting -= len(frame)
        else:
            super().carry(to, frame)


class TrustsAnybody(Radio):
    def admit(self, node: str, prover: Prover) -> None:
        pass


class BelievesNames(Radio):
    def admit(self, node: str, prover: Prover) -> None:
        if not all(other.prover.trusts(node) for other in self.net.nodes.values()):
            raise PermissionError("not trusted")


@pytest.mark.parametrize(
    ("make", "test", "says"),
    [
        (DropsEveryTenth, "test_every_frame_arrives_once", "lossless: 200 of 2000 frames from alice never came to bob"),
        (Reorders, "test_frames_arrive_in_the_order_in_which_they_were_sent", "ordered: what alice sent came as"),
        (Repeats, "test_every_frame_arrives_once", "no frame arrives twice: 2200 came, 2000 differ"),
        (DeliversToTheWrongNode, "test_a_frame_arrives_where_it_is_sent_and_nowhere_else", "never came to"),
        (DeliversToMore, "test_a_frame_arrives_where_it_is_sent_and_nowhere_else", "and at no other"),
        (SaysTheWrongSender, "test_a_broadcast_arrives_at_every_other_node_once", "never came to"),
        (HearsItself, "test_a_node_may_be_alone", "does not hear its own broadcasts"),
        (HearsItself, "test_a_broadcast_arrives_at_every_other_node_once", "at every other node, once"),
        (CutsShort, "test_what_arrives_is_what_was_sent", "65537 bytes, arrives at bob as it was sent"),
        (HandsOverViews, "test_a_broadcast_arrives_at_every_other_node_once", "as bytes, not as a memoryview"),
        (RaisesInSend, "test_every_frame_arrives_once", "raises Unreachable, Overloaded, Closed, not OSError"),
        (NeverSaysLost, "test_the_others_are_told_once_who_has_left", "when bob closes, alice is told lost(bob)"),
        (SaysLostTwice, "test_the_others_are_told_once_who_has_left", "each loss is told once"),
        (SaysLostTooEarly, "test_what_was_sent_before_a_close_arrives_before_the_loss", "before the others are told"),
        (DeliversAfterClose, "test_a_closed_transport_sends_nothing_and_receives_nothing", "but a frame did"),
        (ForgetsWhatWaits, "test_what_was_sent_before_a_close_arrives_before_the_loss", "lossless: 200 of 200"),
        (SendsAfterClose, "test_a_closed_transport_sends_nothing_and_receives_nothing", "is Closed, not None"),
        (ClosesOnce, "test_a_transport_that_was_never_started_can_be_closed", "closed already"),
        (NeverCloses, "test_a_node_may_be_alone", "close() of node alice returns within 10 s"),
        (CloseLosesItsMind, "test_a_cancelled_close_closes", "when bob closes, alice is told lost(bob)"),
        (KnowsEverybody, "test_a_node_that_nobody_knows_cannot_be_reached", "Unreachable, not None"),
        (StartsTwice, "test_a_transport_is_started_once_at_a_time", "is a RuntimeError, not None"),
        (StaysHalfStarted, "test_a_cancelled_start_leaves_nothing_behind", "leaves no peers"),
        (LivesOnce, "test_a_node_that_comes_back_is_found_again", "used up"),
        (LivesOnce, "test_a_transport_can_be_used_in_one_loop_after_the_other", "used up"),
        (FindsTooEarly, "test_every_node_finds_every_other", "and among the peers"),
        (LeavesATask, "test_a_node_may_be_alone", "left behind"),
        (HasNoLimits, "test_a_frame_that_is_too_large_is_refused_and_does_no_harm", "is a ValueError, not None"),
        (HasNoLimits, "test_what_cannot_be_carried_at_once_is_buffered_within_a_limit", "Overloaded, not None"),
        (BlocksForEver, "test_what_cannot_be_carried_at_once_is_buffered_within_a_limit", "a full buffer empties"),
        (
            SaysNotWhoMissesIt,
            "test_what_cannot_be_carried_at_once_is_buffered_within_a_limit",
            "returns the nodes that miss it",
        ),
        (BroadcastsToNobody, "test_a_broadcast_arrives_at_every_other_node_once", "lossless: 1 of 1 frames"),
        (BroadcastsToNobody, "test_a_call_to_any_node_is_answered_by_those_that_handle_it_in_turn", "all hear"),
        (CallsFromAThread, "test_every_frame_arrives_once", "in the thread of its event loop only, but a frame"),
        (LosesRepliesNowAndThen, "test_ten_thousand_calls_with_random_cancels_and_no_cross_talk", "a call is answered"),
        (TrustsAnybody, "test_a_node_that_is_not_trusted_is_not_let_in", "authenticated: nothing comes from"),
        (BelievesNames, "test_a_node_gets_in_under_its_own_name_only", "authenticated: nothing comes from"),
    ],
)
def test_a_broken_promise_is_found_and_named(make: type[Radio], test: str, says: str) -> None:
    suite = type("Broken", (OverRadio,), {"make": make})
    with pytest.raises(Exception) as caught:
        getattr(suite(), test)()
    assert says in str(caught.value)


def test_a_close_that_closes_nothing_when_it_is_cancelled_may_be_repeated() -> None:
    suite = type("Fine", (OverRadio,), {"make": IsClosedOnlyIfNotCancelled})
    suite().test_a_cancelled_close_closes()


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ("test_garbage_from_strangers_ends_their_connections_and_nothing_else", "who sends b'"),
        ("test_strangers_that_say_nothing_are_hung_up_and_keep_nobody_waiting", "who says nothing"),
    ],
)
def test_a_node_that_lets_strangers_wait_for_ever_is_found(test: str, says: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        class Deaf(OverRadio):
            real_time = True
            patience = 1.0

            def address(self, transport: Radio) -> tuple[str, int]:
                host, port = server.getsockname()
                return host, port

        with pytest.raises(AssertionError, match=f"{says}.*, and is a stranger, is hung up"):
            getattr(Deaf(), test)()


def test_a_socket_that_is_left_open_in_real_time_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:

        class Leaks(Radio):
            async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
                await super().start(node, receiver, prover)
                asyncio.get_running_loop().add_reader(sock, print)

        with pytest.raises(AssertionError, match=r"when it is closed, nothing is left: \['a socket'"):
            type("Leaky", (OverRadio,), {"make": Leaks, "real_time": True})().test_a_node_may_be_alone()
