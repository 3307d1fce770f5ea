"""Versions: what is sent by older nodes is handled as it is, or upgraded step by step."""

import asyncio
from typing import Any, cast

import msgspec
import pytest

from meshkit.errors import MalformedFrame, NotAccepted, RateLimited
from meshkit.runtime import Message, Service, broadcast, ephemeral, handles, request
from meshkit.runtime.behavior import Ephemeral
from meshkit.transports import MemoryHub
from tests.runtime.nodes import Node


class One(msgspec.Struct, frozen=True):
    text: str


class Two(msgspec.Struct, frozen=True):
    text: str
    size: int


class Three(msgspec.Struct, frozen=True):
    text: str
    size: int
    tags: tuple[str, ...] = ()


def to_two(old: One) -> Two:
    if old.text == "bad":
        raise LookupError("a secret")
    return Two(old.text, len(old.text))


def to_three(old: Two) -> Three:
    return Three(old.text, old.size, ("upgraded",))


TELL = broadcast("x:tell", One)
TELL_2 = TELL.next(Two, upgrade=to_two)
TELL_3 = TELL_2.next(Three, upgrade=to_three)

ASK = request("x:ask", One, reply=int)
ASK_2 = ASK.next(Two, reply=int, upgrade=to_two)
ASK_3 = ASK_2.next(Three, reply=int, upgrade=to_three)


class Handles(Service):
    name = "new"

    def __init__(self) -> None:
        self.seen: list[Message[Any]] = []

    @handles(TELL_3)
    async def tell(self, msg: Message[Three]) -> None:
        self.seen.append(msg)

    @handles(ASK_3)
    async def ask(self, msg: Message[Three]) -> int:
        self.seen.append(msg)
        return msg.payload.size


async def settled() -> None:
    await asyncio.sleep(0.001)


def test_versions_are_numbered_from_one() -> None:
    assert [behavior.version for behavior in TELL_3.versions] == [1, 2, 3]
    assert TELL_3.versions == (TELL, TELL_2, TELL_3)
    assert repr(TELL_2) == "Broadcast('x:tell', Two, version=2)"
    assert repr(ASK_3) == "Request('x:ask', Three, version=3, reply=int)"
    assert TELL.next(Two, upgrade=to_two) == TELL_2
    assert TELL.next(Two) != TELL_2


def test_the_next_version_of_an_ephemeral_kind_is_ephemeral() -> None:
    assert isinstance(ephemeral("x:e", int).next(int), Ephemeral)


async def test_what_an_older_node_sends_is_upgraded_step_by_step() -> None:
    service, hub = Handles(), MemoryHub()
    async with Node("old", hub=hub) as old, Node("new", service, hub=hub) as new:
        await old.emit(TELL, One("abc"))
        await old.emit(TELL_2, Two("abc", 9))
        await old.emit(TELL_3, Three("abc", 9))
        await settled()
        assert [msg.payload for msg in service.seen] == [
            Three("abc", 3, ("upgraded",)),
            Three("abc", 9, ("upgraded",)),
            Three("abc", 9),
        ]
        assert [msg.version for msg in service.seen] == [3, 3, 3], "the version that the handler takes"
        assert "decode -> upgrade (to version 3) -> dedupe" in new.describe()
        assert new.describe().count("upgrade") == 4


async def test_a_call_of_an_older_version_is_answered() -> None:
    hub = MemoryHub()
    async with Node("old", hub=hub) as old, Node("new", Handles(), hub=hub):
        assert await old.call(ASK, One("abc"), to="new") == 3
        assert await old.call(ASK_2, Two("abc", 9), to="new") == 9


async def test_an_upgrade_that_raises_is_a_failure_of_the_node_that_upgrades() -> None:
    service, hub = Handles(), MemoryHub()
    async with Node("old", hub=hub) as old, Node("new", service, hub=hub) as new:
        with pytest.raises(NotAccepted, match="its stage 'upgrade' failed"):
            await old.call(ASK, One("bad"), to="new")
        await old.emit(TELL, One("bad"))
        await old.emit(TELL, One("good"))
        await settled()
        assert [msg.payload.text for msg in service.seen] == ["good"]
        assert new.stats().dropped == {("x:ask", "upgrade", "failed"): 1, ("x:tell", "upgrade", "failed"): 1}
        assert "new.ask failed at upgrade on 'x:ask' from node 'old'" in new.logged
        assert "LookupError: a secret" in new.logged


async def test_an_upgrade_that_makes_something_else_is_a_failure_too() -> None:
    behavior = TELL.next(Two, upgrade=lambda old: cast("Any", old))

    class Odd(Service):
        name = "odd"

        @handles(behavior)
        async def tell(self, msg: Message[Two]) -> None:
            raise AssertionError

    async with Node("alice", Odd()) as alice:
        await alice.emit(TELL, One("x"))
        await settled()
        assert alice.stats().dropped == {("x:tell", "upgrade", "failed"): 1}
        assert "x:tell: the payload must be Two, not One" in alice.logged


async def test_a_version_that_is_not_handled_is_refused_and_says_which_are() -> None:
    service, hub = Handles(), MemoryHub()
    tell_4, ask_4 = TELL_3.next(One), ASK_3.next(One, reply=int)
    async with Node("newer", hub=hub) as newer, Node("new", service, hub=hub) as new:
        with pytest.raises(NotAccepted, match="it is of version 4, and only 3, 2, 1 is handled"):
            await newer.call(ask_4, One("x"), to="new")
        await newer.emit(tell_4, One("x"))
        await settled()
        assert service.seen == []
        assert new.stats().dropped == {
            ("x:ask", "version", "not_accepted"): 1,
            ("x:tell", "version", "not_accepted"): 1,
        }


async def test_each_version_may_have_a_handler_and_a_reply_of_its_own() -> None:
    first = request("x:size", One, reply=int)
    second = first.next(Two, reply=str)

    class Both(Service):
        name = "both"

        @handles(first)
        async def one(self, msg: Message[One]) -> int:
            assert msg.version == 1
            return len(msg.payload.text)

        @handles(second)
        async def two(self, msg: Message[Two]) -> str:
            assert msg.version == 2
            return str(msg.payload.size)

    async with Node("alice", Both()) as alice:
        assert await alice.call(first, One("abc"), to="alice") == 3
        assert await alice.call(second, Two("abc", 9), to="alice") == "9"


async def test_a_version_with_a_handler_ends_the_upgrades_of_those_before_it() -> None:
    seen: list[tuple[str, object]] = []

    class Some(Service):
        name = "some"

        @handles(TELL_2)
        async def two(self, msg: Message[Two]) -> None:
            seen.append(("two", msg.payload))

        @handles(TELL_3)
        async def three(self, msg: Message[Three]) -> None:
            seen.append(("three", msg.payload))

    async with Node("alice", Some()) as alice:
        await alice.emit(TELL, One("a"))
        await alice.emit(TELL_3, Three("c", 1))
        await settled()
        assert seen == [("two", Two("a", 1)), ("three", Three("c", 1))]


async def test_nobody_gets_around_a_limit_or_is_heard_twice_by_sending_an_older_version() -> None:
    first = broadcast("x:tell", One)
    second = first.next(Two, upgrade=to_two, content_key=lambda payload: payload.text, rate_limit=(2, 60.0))
    seen: list[str] = []

    class Some(Service):
        name = "some"

        @handles(second)
        async def tell(self, msg: Message[Two]) -> None:
            seen.append(msg.payload.text)

    async with Node("alice", Some()) as alice:
        await alice.emit(first, One("a"))
        await alice.emit(second, Two("a", 1))
        await alice.emit(second, Two("b", 1))
        await alice.emit(first, One("c"))
        await settled()
        assert seen == ["a", "b"]
        assert alice.stats().dropped == {
            ("x:tell", "dedupe", "duplicate"): 1,
            ("x:tell", "rate_limit", "rate_limited"): 1,
        }


async def test_the_caller_with_an_older_version_is_limited_too() -> None:
    limited = ASK.next(Two, reply=int, upgrade=to_two, rate_limit=(1, 60.0))

    class Some(Service):
        name = "some"

        @handles(limited)
        async def ask(self, msg: Message[Two]) -> int:
            return msg.payload.size

    async with Node("alice", Some()) as alice:
        assert await alice.call(limited, Two("a", 7), to="alice") == 7
        with pytest.raises(RateLimited):
            await alice.call(ASK, One("a"), to="alice")


async def test_an_older_payload_is_decoded_as_its_own_version_declares() -> None:
    hub = MemoryHub()
    wrong = request("x:ask", int, reply=int)
    async with Node("old", hub=hub) as old, Node("new", Handles(), hub=hub):
        with pytest.raises(MalformedFrame, match="Expected `object`, got `int`"):
            await old.call(wrong, 3, to="new")
