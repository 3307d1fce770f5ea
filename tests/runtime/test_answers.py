"""Requests that come again: they join the work in flight, or get the answer that was given."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest
from hypothesis import given, strategies as st
from msgspec import Raw

from meshkit.errors import CallTimeout, PeerLost, RemoteError
from meshkit.retrier import RetryPolicy
from meshkit.runtime import Message, Reject, Service, handles, request
from meshkit.runtime.answers import Answers
from meshkit.runtime.wire import Ask, Cancel, Failure, Reply, decode, encode_payload
from meshkit.testing import CancellationPoint
from meshkit.transports import MemoryHub, MemoryTransport
from tests.runtime.nodes import Node, everywhere, plain
from tests.runtime.test_messages import balanced

# --- the core


class NaiveAnswers:
    """A list of all answers, the oldest first, of which too old or too many are not to be seen."""

    def __init__(self, ttl: float, max_answers: int, max_bytes: int) -> None:
        self.ttl, self.max_answers, self.max_bytes = ttl, max_answers, max_bytes
        self.kept: list[tuple[str, float, Any, int]] = []

    def keep(self, call_id: str, answer: Any, size: int, now: float) -> None:
        self.kept = [entry for entry in self.kept if entry[0] != call_id]
        self.kept.append((call_id, now + self.ttl, answer, size))
        self.kept = self.kept[-self.max_answers :]

    def get(self, call_id: str, now: float) -> Any:
        for at, (of, expiry, answer, _) in enumerate(self.kept):
            if of == call_id and expiry > now:
                whole = sum(size for *_, size in self.kept[at:]) <= self.max_bytes
                return answer if whole else Failure(call_id, "failed", code="reply_forgotten")
        return None


@given(
    st.integers(1, 5),
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12), st.sampled_from([0.0, 0.5, 3.0, 10.0])), max_size=60),
)
def test_answers_are_remembered_as_in_a_naive_list(
    max_answers: int, max_bytes: int, program: list[tuple[int, int, float]]
) -> None:
    real = Answers(ttl=10.0, max_answers=max_answers, max_bytes=max_bytes)
    model = NaiveAnswers(10.0, max_answers, max_bytes)
    now = 0.0
    for number, (which, size, pause) in enumerate(program):
        now += pause
        call_id = str(which)
        if real.get("alice", call_id, now) is None:  # only then it is answered anew
            answer: Reply | Failure = Reply(call_id, Raw(bytes([number]) * size))
            if number % 3 == 0:
                answer = Failure(call_id, "failed", "x" * size)
            real.keep("alice", answer, now)
            model.keep(call_id, answer, size, now)
        for other in range(8):
            assert real.get("alice", str(other), now) == model.get(str(other), now)
        assert real.get("bob", call_id, now) is None
        assert len(real) <= len(real._by_age) <= max_answers
        whole, by_age = list(real._whole), list(real._by_age)
        assert whole == by_age[len(by_age) - len(whole) :], "the end of it"


def test_no_more_is_kept_than_came_within_the_time_to_live() -> None:
    answers = Answers(ttl=10.0)
    for number in range(1000):
        answers.keep("alice", Reply(str(number), Raw(b"")), float(number))
    assert len(answers) == 10


def test_an_answer_that_is_larger_than_all_may_be_is_not_kept_but_that_there_was_one_is() -> None:
    answers = Answers(max_bytes=10)
    answers.keep("alice", Reply("1", Raw(b"x" * 11)), 0.0)
    assert answers.get("alice", "1", 1.0) == Failure("1", "failed", code="reply_forgotten")


# --- in a node

WORK = request("work:do", str, reply=int)
TRY = request("work:try", str, reply=int, retry=RetryPolicy(max_retries=3, base_delay=1.0, jitter=False))


class Work(Service):
    """Counts its runs; the payload says how it behaves. What takes time takes 5 s."""

    name = "work"
    max_concurrent = 3

    def __init__(self) -> None:
        self.runs = 0
        self.cancelled = 0
        self.together = 0

    @handles(WORK)
    @handles(TRY)
    async def do(self, msg: Message[str]) -> int:
        self.runs += 1
        run = self.runs
        self.together += 1
        assert self.together == 1, "the same request runs twice at a time"
        try:
            return await self._behave(msg.payload, run)
        finally:
            self.together -= 1

    async def _behave(self, how: str, run: int) -> int:
        if how.startswith("reject"):
            raise Reject("no", retryable=how == "reject for now")
        if how == "raise" or (how == "fail twice" and run < 3):
            raise ValueError(how)
        try:
            await asyncio.sleep(5.0)
        except asyncio.CancelledError:
            self.cancelled += 1
            if how == "slow to end":
                with anyio.CancelScope(shield=True):
                    await asyncio.sleep(3.0)
            if how == "reply all the same":
                return run
            if how == "fail at the end":
                raise ValueError(how) from None
            raise
        return run


class Asker:
    """The node alice, by hand: what it sends to bob, and the answers that it gets."""

    def __init__(self, hub: MemoryHub) -> None:
        self.hub = hub
        self.answers: list[Any] = []

    def received(self, sender: str, frame: bytes) -> None:
        self.answers += [wire for wire in decode(frame[2:]) if isinstance(wire, Reply | Failure)]

    def found(self, node: str) -> None: ...

    def lost(self, node: str, reason: str = "") -> None: ...

    def ask(self, payload: str, call_id: str = "1", within: float = 20.0, kind: str = "work:do") -> None:
        ask = Ask(call_id, kind, 1, 0.0, int(within * 1000), encode_payload(payload))
        self.hub.send("alice", "bob", plain(ask))

    def cancel(self, call_id: str = "1") -> None:
        self.hub.send("alice", "bob", plain(Cancel(call_id)))


async def asked(hub: MemoryHub) -> Asker:
    asker = Asker(hub)
    await MemoryTransport(hub).start("alice", asker, None)
    return asker


@asynccontextmanager
async def working(**options: Any) -> AsyncIterator[tuple[Asker, Work, Node]]:
    hub, work = MemoryHub(), Work()
    async with Node("bob", work, hub=hub, **options) as bob:
        yield await asked(hub), work, bob
        assert balanced(bob)


def reply(value: int) -> Reply:
    return Reply("1", encode_payload(value))


async def test_a_repeat_joins_the_work_in_flight_and_there_is_one_answer() -> None:
    async with working() as (alice, work, bob):
        alice.ask("work")
        await asyncio.sleep(1)
        alice.ask("work")
        await asyncio.sleep(10)
        assert alice.answers == [reply(1)]
        assert work.runs == 1
        assert bob.stats().dropped == {("work:do", "dedupe", "duplicate"): 1}


async def test_a_repeat_that_waits_longer_gives_the_work_more_time_and_one_that_waits_less_takes_none_away() -> None:
    async with working() as (alice, work, _):
        alice.ask("work", within=3.0)
        await asyncio.sleep(1)
        alice.ask("work", within=10.0)
        alice.ask("work", within=1.0)
        await asyncio.sleep(10)
        assert alice.answers == [reply(1)]
        assert work.cancelled == 0


async def test_a_repeat_of_what_was_answered_gets_the_same_answer_for_a_minute() -> None:
    async with working() as (alice, work, _):
        for pause in (64, 2, 64, 1):  # after 5 s it is answered; so it is known until 65, and then until 136
            alice.ask("work")
            await asyncio.sleep(pause)
        assert alice.answers == [reply(1), reply(1), reply(2), reply(2)]
        assert work.runs == 2


@pytest.mark.parametrize(("how", "runs"), [("reject for good", 1), ("raise", 1), ("reject for now", 2)])
async def test_a_failure_is_the_answer_to_a_repeat_unless_it_is_worth_trying_again(how: str, runs: int) -> None:
    async with working() as (alice, work, _):
        for _ in range(2):
            alice.ask(how)
            await asyncio.sleep(1)
        assert work.runs == runs
        assert len(alice.answers) == 2
        assert alice.answers[0] == alice.answers[1]


async def test_the_same_id_from_another_node_is_another_request() -> None:
    async with working() as (alice, work, bob):
        alice.ask("reject for good")
        await asyncio.sleep(1)
        with pytest.raises(RemoteError):
            await bob.call(WORK, "reject for good", to="bob", id="1")
        assert work.runs == 2


@pytest.mark.parametrize("how", ["work", "slow to end", "fail at the end"])
async def test_a_repeat_that_comes_while_the_first_is_being_cancelled_runs_again_once(how: str) -> None:
    async with working() as (alice, work, bob):
        alice.ask(how)
        await asyncio.sleep(1)
        alice.cancel()
        alice.ask(how)
        alice.ask(how)
        assert work.runs == 1, "the first has not ended yet"
        await asyncio.sleep(15)
        assert (work.runs, work.cancelled) == (2, 1)
        assert alice.answers == [reply(2)]
        assert bob.stats().delivered == 2


async def test_a_repeat_that_comes_while_the_first_is_cancelled_by_its_deadline_runs_again_once() -> None:
    async with working() as (alice, work, _):
        alice.ask("slow to end", within=2.0)
        await asyncio.sleep(3)
        alice.ask("slow to end")
        await asyncio.sleep(15)
        assert (work.runs, work.cancelled) == (2, 1)
        assert alice.answers == [reply(2)]


async def test_a_repeat_of_what_replies_though_it_is_cancelled_gets_that_reply() -> None:
    async with working() as (alice, work, _):
        alice.ask("reply all the same")
        await asyncio.sleep(1)
        alice.cancel()
        alice.ask("reply all the same")
        await asyncio.sleep(15)
        assert work.runs == 1
        assert alice.answers == [reply(1)]


async def test_a_repeat_that_is_given_up_too_does_not_run() -> None:
    async with working() as (alice, work, bob):
        alice.ask("slow to end")
        await asyncio.sleep(1)
        alice.cancel()
        alice.ask("slow to end")
        alice.cancel()
        await asyncio.sleep(15)
        assert work.runs == 1
        assert alice.answers == []
        alice.ask("slow to end")
        await asyncio.sleep(15)
        assert work.runs == 2, "nothing was answered, so that it is asked anew"
        assert bob.stats().cancelled == 1


async def test_a_repeat_for_which_there_is_no_room_any_more_is_told_so() -> None:
    async with working() as (alice, work, bob):
        alice.ask("slow to end")
        await asyncio.sleep(1)
        alice.cancel()
        alice.ask("slow to end")
        cast("Any", bob)._life.router.dispatcher.mailboxes._of["work"][0]._backlog.max_items = 0
        await asyncio.sleep(15)
        assert [answer.why for answer in alice.answers] == ["overloaded"]
        assert work.runs == 1
        assert bob.stats().dropped["work:do", "mailbox", "overloaded"] == 1


async def test_a_repeat_joins_work_that_waits_to_be_retried() -> None:
    async with working() as (alice, work, bob):
        alice.ask("fail twice", kind="work:try")
        await asyncio.sleep(0.5)
        assert bob.stats().queued == 1
        alice.ask("fail twice", kind="work:try")
        await asyncio.sleep(15)
        assert alice.answers == [reply(3)]
        assert work.runs == 3


async def test_work_that_waits_to_be_retried_ends_with_its_caller_and_a_repeat_begins_anew() -> None:
    async with working() as (alice, work, bob):
        alice.ask("raise", kind="work:try")
        await asyncio.sleep(0.5)
        alice.cancel()
        assert (bob.stats().queued, bob.stats().cancelled) == (0, 1)
        await asyncio.sleep(30)
        assert work.runs == 1
        alice.ask("raise", kind="work:try", within=100.0)
        await asyncio.sleep(30)
        assert work.runs == 5
        assert [answer.code for answer in alice.answers] == ["internal"]


async def test_while_draining_a_repeat_still_gets_what_was_answered() -> None:
    async with working() as (alice, work, bob):
        alice.ask("reject for good", "1")
        alice.ask("work", "2")
        await asyncio.sleep(1)
        stopping = asyncio.create_task(bob.stop())
        await asyncio.sleep(1)
        del alice.answers[:]
        alice.ask("reject for good", "1")
        alice.ask("work", "2")
        alice.ask("work", "3")
        await stopping
        assert {answer.id: getattr(answer, "why", "replied") for answer in alice.answers} == {
            "1": "failed",
            "2": "replied",
            "3": "draining",
        }
        assert work.runs == 2


async def test_a_call_is_repeated_with_its_id_when_its_answer_was_lost() -> None:
    hub, work = MemoryHub(), Work()
    async with Node("alice", hub=hub) as alice, Node("bob", work, hub=hub):
        asked = asyncio.create_task(alice.call(WORK, "work", to="bob", timeout=6.0, id="again"))
        await asyncio.sleep(4)
        hub.silence("bob")
        with pytest.raises((CallTimeout, PeerLost)):
            await asked
        hub.heal()
        await asyncio.sleep(5)
        assert await alice.call(WORK, "work", to="bob", id="again") == 1
        assert work.runs == 1


def test_whoever_is_cancelled_when_and_asks_again_gets_one_reply() -> None:
    async def scenario(point: CancellationPoint) -> None:
        hub, work = MemoryHub(), Work()
        async with Node("alice", hub=hub) as alice, Node("bob", work, hub=hub) as bob:
            await point.cancel(alice.call(WORK, "slow to end", to="bob", id="again"))
            assert await alice.call(WORK, "slow to end", to="bob", timeout=20.0, id="again") == work.runs
            assert work.runs <= 2
            assert balanced(bob)
            assert not cast("Any", bob)._life.router.dispatcher.serving

    everywhere(scenario)
