"""Errors that cannot be shown, or sent, or are no `Exception`: whoever waits is told, and all else goes on."""

import asyncio
from collections.abc import Callable
from typing import Any, Self

import pytest

from meshkit.errors import MeshkitError, NotAccepted, Overloaded, RateLimited, Refused, RemoteError
from meshkit.retrier import RetryPolicy
from meshkit.runtime import Identity, Message, Service, Stage, broadcast, handles, request
from meshkit.runtime.journal import shown
from meshkit.transports import MemoryHub
from tests.runtime.nodes import Node


class Unshowable(Exception):
    def __repr__(self) -> str:
        raise ValueError("it has no text")

    __str__ = __repr__


class UnshowableByCancellation(Exception):
    def __repr__(self) -> str:
        raise asyncio.CancelledError

    __str__ = __repr__


class Outcome(BaseException):
    """As the failure of a test is for pytest."""


class WithoutText(Refused):
    def __str__(self) -> str:
        raise ValueError("it has no text")


HANDLERS_RAISE: dict[str, Callable[[], BaseException]] = {
    "unshowable": Unshowable,
    "unshowable by cancellation": UnshowableByCancellation,
    "no exception": Outcome,
    "a group of cancellations": lambda: BaseExceptionGroup("", [asyncio.CancelledError()]),
}
STAGES_RAISE: dict[str, Callable[[], BaseException]] = {
    **HANDLERS_RAISE,
    "without text": WithoutText,
    "not Unicode": lambda: NotAccepted(kind="k", node="n", reason="\ud800"),
    "a name that is not Unicode": lambda: Overloaded(name="\ud800", limit=1),
    "a limit that is no number": lambda: Overloaded(name="quota", limit="many"),  # type: ignore[arg-type]
    "a limit that is too large": lambda: Overloaded(name="quota", limit=2**70),
    "a long name": lambda: Overloaded(name="x" * 2_000_000, limit=1),
    "a key that has a long name": lambda: RateLimited(
        name="x" * 2_000_000, key="k", max_count=1, window=1.0, retry_after=1.0
    ),
}


def odd(message: Message[Any]) -> Any:
    error = STAGES_RAISE[message.payload]()
    raise error


HANDLE = request("odd:handle", str, reply=str)
RETRY = request("odd:retry", str, reply=str, retry=RetryPolicy(max_retries=2, base_delay=0.01))
PLAIN = request("odd:plain", str, reply=str)
TELL = broadcast("odd:tell", str)
STAGE = request("odd:stage", str, reply=str, stages=[Stage("odd", odd)])
ORDER = request("odd:order", str, reply=str, order_by=odd)


class Odd(Service):
    name = "odd"

    def __init__(self) -> None:
        self.begun: list[str] = []

    @handles(HANDLE)
    async def handle(self, msg: Message[str]) -> str:
        self.begun.append(msg.payload)
        await asyncio.sleep(0)
        error = HANDLERS_RAISE[msg.payload]()
        raise error

    @handles(RETRY)
    async def retry(self, msg: Message[str]) -> str:
        return await self.handle(msg)

    @handles(TELL)
    async def tell(self, msg: Message[str]) -> None:
        await self.handle(msg)

    @handles(PLAIN)
    async def plain(self, msg: Message[str]) -> str:
        task = asyncio.current_task()
        if msg.payload == "cancel" and task is not None:
            task.cancel()
        elif msg.payload == "fine":
            await asyncio.sleep(0)
        return msg.payload

    @handles(STAGE)
    async def staged(self, msg: Message[str]) -> str:
        self.begun.append(msg.payload)
        return "handled"

    @handles(ORDER)
    async def ordered(self, msg: Message[str]) -> str:
        self.begun.append(msg.payload)
        return "handled"


class Mesh:
    def __init__(self, *, proved: bool) -> None:
        hub, self.odd = MemoryHub(), Odd()
        one, other = (Identity.generate() if proved else None for _ in range(2))
        self.alice = Node("alice", hub=hub, identity=one)
        self.bob = Node("bob", self.odd, hub=hub, identity=other)

    async def __aenter__(self) -> Self:
        await self.alice.start()
        await self.bob.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.alice.stop()
        await self.bob.stop()

    def balances(self) -> bool:
        stats = self.bob.stats()
        return stats.delivered == stats.handled + stats.failed and not stats.queued and not stats.running


@pytest.mark.parametrize("what", HANDLERS_RAISE)
async def test_whatever_a_handler_raises_its_caller_is_told_and_the_next_one_is_served(what: str) -> None:
    async with Mesh(proved=False) as mesh:
        for _ in range(3):
            with pytest.raises(RemoteError) as caught:
                await mesh.alice.call(HANDLE, what, to="bob", timeout=5)
            assert (caught.value.code, caught.value.executed) == ("internal", "yes")
        assert await mesh.alice.call(PLAIN, "fine", to="bob", timeout=5) == "fine"
        assert (mesh.bob.stats().failed, mesh.balances()) == (3, True)
        assert "odd.handle" in mesh.bob.logged


async def test_a_handler_that_cancels_its_own_task_as_it_ends_has_replied_and_the_next_one_is_served() -> None:
    async with Mesh(proved=False) as mesh:
        calls = [mesh.alice.call(PLAIN, what, to="bob", timeout=5) for what in ("cancel", "fine") * 3]
        assert await asyncio.gather(*calls) == ["cancel", "fine"] * 3
        assert (mesh.bob.stats().handled, mesh.balances()) == (6, True)


@pytest.mark.parametrize("what", HANDLERS_RAISE)
async def test_whatever_a_handler_raises_nobody_waits_for_it_is_counted_and_logged(what: str) -> None:
    async with Mesh(proved=False) as mesh:
        await mesh.alice.emit(TELL, what, to="bob")
        await asyncio.sleep(1)
        assert (mesh.bob.stats().failed, mesh.balances()) == (1, True)
        assert "odd.tell" in mesh.bob.logged


async def test_an_error_that_cannot_be_shown_is_a_reason_to_try_again() -> None:
    async with Mesh(proved=False) as mesh:
        with pytest.raises(RemoteError):
            await mesh.alice.call(RETRY, "unshowable", to="bob", timeout=5)
        assert mesh.odd.begun == ["unshowable"] * 3
        assert (mesh.bob.stats().retried, mesh.balances()) == (2, True)


@pytest.mark.parametrize("proved", [False, True])
@pytest.mark.parametrize("what", STAGES_RAISE)
async def test_whatever_a_stage_raises_its_caller_is_told_and_nothing_that_came_with_it_suffers(
    what: str, proved: bool
) -> None:
    async with Mesh(proved=proved) as mesh:
        bob = mesh.bob.node
        before, stopped, after = await asyncio.gather(
            mesh.alice.call(PLAIN, "before", to=bob, timeout=5),
            mesh.alice.call(STAGE, what, to=bob, timeout=5),
            mesh.alice.call(PLAIN, "after", to=bob, timeout=5),
            return_exceptions=True,
        )
        assert (before, after) == ("before", "after")
        assert isinstance(stopped, Refused)
        assert mesh.odd.begun == []


@pytest.mark.parametrize("what", STAGES_RAISE)
async def test_whatever_a_stage_raises_a_call_to_this_very_node_is_answered_too(what: str) -> None:
    async with Mesh(proved=False) as mesh:
        with pytest.raises(MeshkitError) as caught:
            await mesh.bob.call(STAGE, what, to="bob", timeout=5)
        assert isinstance(caught.value, Refused)


@pytest.mark.parametrize("what", HANDLERS_RAISE)
async def test_whatever_order_by_raises_the_message_fails_as_if_its_handler_had_raised_it(what: str) -> None:
    async with Mesh(proved=False) as mesh:
        with pytest.raises(NotAccepted):
            await mesh.alice.call(ORDER, what, to="bob", timeout=5)
        assert (mesh.odd.begun, mesh.bob.stats().failed, mesh.balances()) == ([], 1, True)


def test_an_error_that_cannot_be_shown_is_shown_as_its_type() -> None:
    assert shown(ValueError("x")) == "ValueError('x')"
    assert shown(Unshowable()) == "Unshowable"
    assert shown(UnshowableByCancellation()) == "UnshowableByCancellation"
