import asyncio
import functools
import io
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from meshkit.errors import (
    CallTimeout,
    Closed,
    Draining,
    MalformedFrame,
    MeshkitError,
    NoHandler,
    NotAccepted,
    Overloaded,
    PeerLost,
    RateLimited,
    RemoteError,
    Unreachable,
)
from meshkit.logger import Logger
from meshkit.runtime import (
    Message,
    PeerUp,
    Reject,
    Service,
    TooFewReplies,
    broadcast,
    ephemeral,
    handles,
    local,
    request,
)
from meshkit.testing import SILENCE, Sent, TestRuntime, cancellation_points, run


class Item(msgspec.Struct, frozen=True):
    name: str
    count: int = 1


ORDER = request("shop:order", Item, reply=int)
PRICE = request("stock:price", str, reply=int)
PRICE_2 = PRICE.next(Item, reply=int)
RESERVE = request("stock:reserve", str, reply=bool)
SOLD = broadcast("shop:sold", Item)
LIMITED = broadcast("shop:limited", str, rate_limit=(1, 60.0))
TICK = ephemeral("shop:tick", int)
OPENED = local("shop:opened", object)
UNHANDLED = broadcast("shop:unhandled", str)


class Shop(Service):
    name = "shop"

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.cancelled = 0

    @handles(ORDER)
    async def order(self, msg: Message[Item]) -> int:
        if msg.payload.name == "sold out":
            raise Reject("sold_out", "come back tomorrow", retryable=True)
        if msg.payload.name == "broken":
            raise ZeroDivisionError("a secret")
        try:
            price = await self.rt.call(PRICE, msg.payload.name, timeout=5)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await self.rt.emit(SOLD, msg.payload)
        return price * msg.payload.count

    @handles(SOLD)
    async def on_sold(self, msg: Message[Item]) -> None:
        self.seen.append((msg.sender, msg.payload.name))

    @handles(LIMITED)
    async def on_limited(self, msg: Message[str]) -> None:
        self.seen.append(msg.payload)

    @handles(TICK)
    async def on_tick(self, msg: Message[int]) -> None:
        await asyncio.sleep(msg.payload)
        self.seen.append(msg.payload)
        await self.rt.emit(SOLD, Item("tick"), to=msg.sender)

    @handles(OPENED)
    async def on_opened(self, msg: Message[object]) -> None:
        self.seen.append(msg.payload)


# --- what it sends


async def test_a_unit_test_of_a_service_has_three_lines() -> None:
    async with TestRuntime(Shop()) as rt:
        rt.answer(PRICE, 10)
        assert await rt.inject(ORDER, Item("apple", 3)) == 30


async def test_what_left_for_others_is_decoded_in_order_and_the_rest_is_not_there() -> None:
    async with TestRuntime(shop := Shop(), peers=["bob", "carol"]) as rt:
        rt.answer(PRICE, 10)
        await rt.inject(ORDER, Item("apple", 3), sender="bob")
        await rt.emit(SOLD, Item("pear"), to="carol")
        await rt.emit(OPENED, "the door")
        await rt.emit(SOLD, Item("plum"), to="node")
        assert await rt.call(PRICE, "fig", to="carol") == 10
        sent = rt.sent
        assert sent[0] in [Sent(PRICE, "apple", to="bob"), Sent(PRICE, "apple", to="carol")]
        assert sent[1:] == [
            Sent(SOLD, Item("apple", 3)),
            Sent(SOLD, Item("pear"), to="carol"),
            Sent(PRICE, "fig", to="carol"),
        ]
        assert ("node", "apple") in shop.seen
        sent.clear()
        assert rt.sent == []
    assert rt.sent == []  # no sign of life, and no goodbye


async def test_what_was_emitted_is_sent_at_once() -> None:
    async with TestRuntime() as rt:
        await rt.emit(SOLD, Item("apple"))
        assert rt.sent == [Sent(SOLD, Item("apple"))]


async def test_what_leaves_as_it_stops_is_there_afterwards() -> None:
    class Polite(Service):
        name = "polite"

        async def stop(self) -> None:
            await self.rt.emit(SOLD, Item("the shop"))

    async with TestRuntime(Polite()) as rt:
        pass
    assert rt.sent == [Sent(SOLD, Item("the shop"))]


async def test_a_frame_with_many_messages_is_many_messages() -> None:
    async with TestRuntime() as rt:
        rt.answer(PRICE, 1, 2, 3)
        prices = await asyncio.gather(*(rt.call(PRICE, fruit, to="peer") for fruit in "abc"))
        assert prices == [1, 2, 3]
        assert [sent.payload for sent in rt.sent] == ["a", "b", "c"]


# --- answers


async def test_answers_are_given_in_order_and_the_last_again_and_again() -> None:
    async with TestRuntime() as rt:
        rt.answer(PRICE, Overloaded(name="stock", limit=1), 2, 3)
        with pytest.raises(Overloaded):
            await rt.call(PRICE, "apple", to="peer")
        assert [await rt.call(PRICE, "apple", to="peer") for _ in range(4)] == [2, 3, 3, 3]
        rt.answer(PRICE, 4)
        assert await rt.call(PRICE, "apple", to="peer") == 4


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Reject("sold_out", "no more", retryable=True), "RemoteError yes sold_out no more True"),
        (RemoteError(node="x", kind="y", code="internal"), "RemoteError yes internal  False"),
        (PeerLost(node="x"), "PeerLost maybe"),
        (NoHandler(kind="y", node="x"), "NoHandler no"),
        (NotAccepted(kind="y", node="x", reason="closed"), "NotAccepted no"),
        (MalformedFrame(reason="what?"), "MalformedFrame no"),
        (Overloaded(name="stock", limit=1), "Overloaded no"),
        (RateLimited(name="stock", key="k", max_count=1, window=2.0, retry_after=1.5), "RateLimited no 1.5"),
        (Draining(node="x"), "Draining no"),
        (SILENCE, "CallTimeout maybe"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
async def test_every_answer_is_what_a_real_node_would_give(answer: Any, expected: str) -> None:
    async with TestRuntime() as rt:
        rt.answer(PRICE, answer)
        with pytest.raises(MeshkitError) as caught:
            await rt.call(PRICE, "apple", to="peer", timeout=7)
        error: Any = caught.value
        told = [type(error).__name__, getattr(error, "executed", "no")]
        if isinstance(error, RemoteError):
            told += [error.code, error.detail, str(error.retryable)]
            assert (error.node, error.kind) == ("peer", PRICE.kind)
        elif isinstance(error, RateLimited):
            told.append(str(error.retry_after))
        assert " ".join(told) == expected
        assert asyncio.get_running_loop().time() == (7 if answer is SILENCE else 0)


async def test_each_call_gets_an_error_of_its_own() -> None:
    async with TestRuntime() as rt:
        rt.answer(PRICE, Draining(node="peer"))
        errors = [await _error(rt.call(PRICE, "apple", to="peer")) for _ in range(2)]
        assert errors[0] is not errors[1]


async def _error(call: Coroutine[Any, Any, Any]) -> MeshkitError:
    with pytest.raises(MeshkitError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (lambda rt: rt.answer(PRICE, "ten"), "stock:price: the reply must be int, not str"),
        (lambda rt: rt.answer(PRICE, 1, "ten"), "stock:price: the reply must be int, not str"),
        (lambda rt: rt.answer(PRICE), "needs an answer: a reply, an error or SILENCE"),
        (lambda rt: rt.answer(SOLD, 1), "only a request is"),
        (lambda rt: rt.answer(PRICE, ValueError("x")), r"ValueError\('x'\) is no answer of another node"),
        (lambda rt: rt.answer(PRICE, CallTimeout(name="x", timeout=1.0)), "SILENCE .which ends in a CallTimeout"),
        (lambda rt: rt.answer(PRICE, Unreachable(node="x")), "Unreachable is every node that is no peer"),
    ],
)
async def test_what_cannot_be_an_answer_is_told_at_once(script: Callable[[TestRuntime], None], told: str) -> None:
    async with TestRuntime() as rt:
        with pytest.raises(TypeError, match=told):
            script(rt)


async def test_what_was_not_scripted_is_refused_and_told_at_the_end() -> None:
    with pytest.raises(AssertionError, match=r"asked for what was not scripted: .*'stock:price', which node 'peer'"):
        async with TestRuntime() as rt:
            with pytest.raises(NotAccepted, match=r"the test scripted no answer to 'stock:price'.*rt.answer"):
                await rt.call(PRICE, "apple", to="peer")


async def test_what_any_node_was_asked_for_without_a_script_is_told_too() -> None:
    with pytest.raises(AssertionError, match="'stock:price', which any node was asked"):
        async with TestRuntime(Shop()) as rt:
            with pytest.raises(RemoteError, match="internal"):
                await rt.inject(ORDER, Item("apple"))
    with pytest.raises(AssertionError, match="'stock:price', which any node was asked"):
        async with TestRuntime() as rt:
            with pytest.raises(NoHandler):
                await rt.call_many(PRICE, "apple")


async def test_what_was_not_scripted_is_a_note_to_an_error_that_it_may_have_caused() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        async with TestRuntime() as rt:
            await _error(rt.call(PRICE_2, Item("apple"), to="peer"))
            raise ZeroDivisionError
    assert "no answer to 'stock:price' (version 2), which node 'peer' was asked" in caught.value.__notes__[0]
    async with rt:
        pass  # it is told once


async def test_a_version_is_a_script_of_its_own() -> None:
    async with TestRuntime() as rt:
        rt.answer(PRICE, 1)
        rt.answer(PRICE_2, 2)
        assert await rt.call(PRICE, "apple", to="peer") == 1
        assert await rt.call(PRICE_2, Item("apple"), to="peer") == 2


async def test_any_node_and_many_are_asked_as_in_a_real_mesh() -> None:
    async with TestRuntime(peers=["bob", "carol", "dave"]) as rt:
        rt.answer(PRICE, 1, 2, Reject("no"))
        assert await rt.call(PRICE, "apple") == 1
        assert rt.sent.pop().to in {"bob", "carol", "dave"}
        with pytest.raises(TooFewReplies) as caught:
            await rt.call_many(PRICE, "apple", quorum=2)
        assert sorted(caught.value.replies.values()) == [2]
        assert {sent.to for sent in rt.sent} == {"bob", "carol", "dave"}


async def test_a_node_that_is_no_peer_cannot_be_reached() -> None:
    async with TestRuntime(peers=["bob"]) as rt:
        rt.answer(PRICE, 1)
        with pytest.raises(Unreachable, match="it is none of the TestRuntime's peers: bob"):
            await rt.call(PRICE, "apple", to="carol")
        with pytest.raises(Unreachable, match="node 'node' can reach bob"):
            await rt.emit(SOLD, Item("apple"), to="carol")
        assert rt.sent == []


# --- what it receives


async def test_the_sender_gets_the_reply_or_the_error() -> None:
    async with TestRuntime(Shop()) as rt:
        rt.answer(PRICE, 10)
        assert await rt.inject(ORDER, Item("apple"), sender="bob") == 10
        with pytest.raises(RemoteError) as caught:
            await rt.inject(ORDER, Item("sold out"))
        assert (caught.value.code, caught.value.detail, caught.value.retryable) == (
            "sold_out",
            "come back tomorrow",
            True,
        )
        with pytest.raises(RemoteError, match="internal") as failed:
            await rt.inject(ORDER, Item("broken"))
        assert "secret" not in str(failed.value)
        with pytest.raises(NoHandler, match="node 'node' has no handler for 'stock:price'"):
            await rt.inject(PRICE, "apple")


async def test_a_sender_that_gives_up_cancels_the_handler() -> None:
    async with TestRuntime(shop := Shop()) as rt:
        rt.answer(PRICE, SILENCE)
        with pytest.raises(CallTimeout, match="'shop:order' on node 'node'"):
            await rt.inject(ORDER, Item("apple"), timeout=2)
        await rt.advance(0)
        assert shop.cancelled == 1
        with pytest.raises(RemoteError):  # its own call gives up after 5 s, and nobody caught that
            await rt.inject(ORDER, Item("apple"), timeout=9)
        assert asyncio.get_running_loop().time() == 7


async def test_a_message_is_handled_when_inject_returns_and_its_id_tells_its_story() -> None:
    async with TestRuntime(shop := Shop()) as rt:
        message_id = await rt.inject(SOLD, Item("apple"), sender="bob")
        assert shop.seen == [("bob", "apple")]
        assert "handled" in rt.explain(message_id)


async def test_the_pipelines_are_real() -> None:
    async with TestRuntime(shop := Shop()) as rt:
        for sender in ("bob", "bob", "carol"):
            await rt.inject(LIMITED, sender, sender=sender)
        assert shop.seen == ["bob", "carol"]
        assert [(drop.stage, drop.sender) for drop in rt.drops] == [("rate_limit", "bob")]
        await rt.advance(60)
        await rt.inject(LIMITED, "later", sender="bob")
        assert shop.seen[-1] == "later"


async def test_what_cannot_be_injected_is_told() -> None:
    async with TestRuntime(Shop()) as rt:
        with pytest.raises(NoHandler, match="node 'node' has no handler for 'shop:unhandled'"):
            await rt.inject(UNHANDLED, "boo")
        with pytest.raises(TypeError, match=r"Local\('shop:opened', object\) never comes from another node: emit"):
            await rt.inject(OPENED, "boo")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="the payload must be Item, not str"):
            await rt.inject(SOLD, "boo")  # type: ignore[misc]
        with pytest.raises(ValueError, match="what 'node' sends to itself is not injected"):
            await rt.inject(SOLD, Item("apple"), sender="node")
        with pytest.raises(ValueError, match="the name of a peer must be text"):
            await rt.inject(SOLD, Item("apple"), sender="")
    with pytest.raises(Closed):
        await rt.inject(SOLD, Item("apple"))
    with pytest.raises(RuntimeError, match="not running"):
        await TestRuntime().inject(SOLD, Item("apple"))


async def test_whoever_sends_is_a_peer_from_then_on() -> None:
    seen: list[object] = []
    async with TestRuntime(Shop(), observer=seen.append) as rt:
        await rt.inject(TICK, 0, sender="bob")
        assert [*rt.peers] == ["bob", "peer"]
        assert [event.peer.node for event in seen if isinstance(event, PeerUp)] == ["peer", "bob"]
        assert rt.sent == [Sent(SOLD, Item("tick"), to="bob")]


async def test_a_sender_that_is_cancelled_cancels_the_handler() -> None:
    async with TestRuntime(shop := Shop()) as rt:
        rt.answer(PRICE, SILENCE)
        sender = asyncio.create_task(rt.inject(ORDER, Item("apple")))
        await rt.advance(1)
        sender.cancel()
        await rt.advance(0)
        assert (sender.cancelled(), shop.cancelled, rt.stats().pending) == (True, 1, 0)


def test_an_injection_can_be_cancelled_anywhere_and_leaves_nothing() -> None:
    cancelled = 0

    async def scenario(point: Any) -> None:
        nonlocal cancelled
        async with TestRuntime(shop := Shop()) as rt:
            rt.answer(PRICE, 10)

            async def both() -> int:
                await rt.inject(SOLD, Item("pear"))
                return await rt.inject(ORDER, Item("apple"))

            if await point.cancel(both()):
                cancelled += 1
            else:
                assert point.result == 10
            await rt.advance(0)
            assert ("peer", "pear") in shop.seen
            stats = rt.stats()
            assert (stats.running, stats.queued, stats.pending) == (0, 0, 0)

    for point in cancellation_points():
        run(functools.partial(scenario, point))
    assert cancelled == 6


async def test_a_request_that_is_in_flight_when_it_stops_is_answered() -> None:
    rt = TestRuntime(Shop())
    await rt.start()
    rt.answer(PRICE, SILENCE)
    asked = asyncio.create_task(rt.inject(ORDER, Item("apple"), timeout=100))
    await rt.advance(0)
    await rt.stop()
    with pytest.raises(MeshkitError):
        await asked


# --- time


async def test_advance_does_all_that_is_due_and_no_more() -> None:
    async with TestRuntime(shop := Shop()) as rt:
        for delay in (10, 20, 30):
            await rt.inject(TICK, delay)
        await rt.advance(10)
        assert asyncio.get_running_loop().time() == 10
        assert shop.seen == [10]
        assert rt.sent == [Sent(SOLD, Item("tick"), to="peer")]
        await rt.advance(0)
        assert shop.seen == [10]
        await rt.advance(3600)
        assert shop.seen == [10, 20, 30]
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="seconds must be finite and zero or more seconds"):
                await rt.advance(wrong)


async def test_two_can_wait_until_all_is_done() -> None:
    async with TestRuntime(Shop()) as rt:
        await asyncio.gather(rt.advance(0), rt.advance(0), rt.inject(SOLD, Item("apple")))


@pytest.mark.real_time
async def test_it_refuses_real_time() -> None:
    with pytest.raises(RuntimeError, match="request the fixture `virtual_time`, or use meshkit"):
        await TestRuntime().start()


# --- the node


async def test_it_is_a_runtime_that_may_be_started_again() -> None:
    output = io.StringIO()
    rt = TestRuntime(shop := Shop(), name="alice", logger=Logger(node="alice", output=output))
    rt.answer(PRICE, 10)  # before it starts, too
    for _ in range(2):
        async with rt:
            assert rt.node == "alice"
            assert await rt.inject(ORDER, Item("apple")) == 10
            assert await rt.call(ORDER, Item("pear"), to="alice") == 10
            await rt.emit(OPENED, thing := object())
            await rt.advance(0)
            assert shop.seen[-1] is thing
            with pytest.raises(RemoteError):
                await rt.inject(ORDER, Item("broken"))
    assert "a secret" in output.getvalue()


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="peers must be other nodes, and 'bob' is this one"):
        TestRuntime(name="bob", peers=["bob"])
    with pytest.raises(TypeError, match=r"peers must be names of nodes, as in \['bob'\], not one string"):
        TestRuntime(peers="bob")
    with pytest.raises(ValueError, match="the name of a node must be text"):
        TestRuntime(name="")


def test_pytest_does_not_take_it_for_a_test() -> None:
    assert not TestRuntime.__test__


def test_what_a_request_returns_is_typed() -> None:
    async def main() -> int:
        async with TestRuntime(Shop()) as rt:
            rt.answer(PRICE, 2)
            price: int = await rt.inject(ORDER, Item("apple"))
            message_id: str = await rt.inject(SOLD, Item("apple"))
            assert message_id
            return price

    assert run(main) == 2
