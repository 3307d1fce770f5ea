"""Handlers that fail: what their behavior says follows, and what the caller, the log and the supervisor get."""

import asyncio
from typing import Any, cast

import anyio
import pytest
from hypothesis import given, strategies as st

from meshkit.errors import CallTimeout, MeshkitError, NotAccepted, PeerLost, RateLimited, RemoteError
from meshkit.retrier import RetryPolicy
from meshkit.runtime import (
    Continue,
    DeadLetter,
    Fail,
    Message,
    Reject,
    Service,
    ServiceFailed,
    Stage,
    broadcast,
    handles,
    local,
    request,
)
from meshkit.runtime.failures import DeadLetters
from meshkit.testing import CancellationPoint, run
from meshkit.transports import MemoryHub
from tests.runtime.nodes import Node, everywhere
from tests.runtime.test_messages import balanced

STEADY = RetryPolicy(max_retries=3, base_delay=1.0, jitter=False)

LOGGED = local("bad:logged", str)
DROPPED = local("bad:dropped", str, on_error="drop")
KEPT = local("bad:kept", str, on_error="dead_letter")
RAISED = local("bad:raised", str, on_error="raise")
RETRIED = local("bad:retried", str, retry=STEADY, on_error="dead_letter")
TOLD = broadcast("bad:told", str, on_error="dead_letter")
ASKED = request("bad:asked", str, reply=int, on_error="dead_letter")
ASKED_AGAIN = request("bad:asked-again", str, reply=int, retry=STEADY, on_error="dead_letter")
ASKED_RAISED = request("bad:asked-raised", str, reply=int, on_error="raise")


def now() -> float:
    return asyncio.get_running_loop().time()


class Bad(Service):
    """Fails `failures` times, or as often as the payload says."""

    name = "bad"
    max_concurrent = 4

    def __init__(self) -> None:
        self.failures = 1000
        self.runs: list[float] = []
        self.done: list[str] = []

    @handles(LOGGED)
    @handles(DROPPED)
    @handles(KEPT)
    @handles(RAISED)
    @handles(RETRIED)
    @handles(TOLD)
    async def take(self, msg: Message[str]) -> None:
        await self.work(msg.payload)

    @handles(ASKED)
    @handles(ASKED_AGAIN)
    @handles(ASKED_RAISED)
    async def answer(self, msg: Message[str]) -> int:
        await self.work(msg.payload)
        return "text" if msg.payload == "wrong type" else len(self.runs)  # type: ignore[return-value]

    async def work(self, payload: str) -> None:
        self.runs.append(now())
        if len(self.runs) <= self.failures and payload not in {"fine", "hang", "block", "wrong type"}:
            if payload == "wait":
                raise RateLimited(name="x", key="k", max_count=1, window=1.0, retry_after=7.0)
            if payload == "wait long":
                raise RateLimited(name="x", key="k", max_count=1, window=1.0, retry_after=1000.0)
            raise ValueError(payload)
        if payload == "hang":
            await asyncio.Event().wait()
        if payload == "block":
            cast("Any", asyncio.get_running_loop())._now += 0.1  # as if it had computed for so long
        self.done.append(payload)


async def test_by_default_it_is_logged_with_its_traceback_and_nothing_is_kept() -> None:
    async with Node("alice", Bad()) as alice:
        await alice.emit(LOGGED, "a secret")
        await asyncio.sleep(1)
        assert "bad.take failed on 'bad:logged' from node 'alice'" in alice.logged
        assert "ValueError: a secret" in alice.logged
        assert alice.dead_letters == ()
        assert alice.stats().failed == 1


async def test_what_is_dropped_leaves_no_line_but_is_counted_and_explained() -> None:
    async with Node("alice", Bad()) as alice:
        message_id = await alice.emit(DROPPED, "x")
        await asyncio.sleep(1)
        assert alice.logged == ""
        assert alice.stats().failed == 1
        assert "bad.take failed: ValueError('x')" in alice.explain(message_id)


async def test_what_is_raised_stops_the_node_and_is_the_cause_in_its_host() -> None:
    alice = Node("alice", Bad())
    with pytest.raises(ServiceFailed) as caught:
        async with alice:
            await alice.emit(RAISED, "the cause")
            await asyncio.sleep(1000)
    assert now() < 1
    assert str(caught.value) == "handler 'bad.take' of service 'bad' on node 'alice' failed: ValueError: the cause"
    assert isinstance(caught.value.__cause__, ValueError)
    assert "bad.take failed" in alice.logged


async def test_where_a_call_raises_its_caller_is_answered_and_the_host_told() -> None:
    hub = MemoryHub()
    async with Node("alice", hub=hub) as alice:
        with pytest.raises(ServiceFailed, match=r"handler 'bad\.answer'"):
            async with Node("bob", Bad(), hub=hub):
                with pytest.raises(RemoteError, match="internal"):
                    await alice.call(ASKED_RAISED, "x", to="bob")
                await asyncio.sleep(1000)


# --- retries


async def test_a_handler_is_called_again_later_and_later_off_its_worker() -> None:
    bad = Bad()
    bad.failures, bad.max_concurrent = 3, 1
    async with Node("alice", bad) as alice:
        message_id = await alice.emit(RETRIED, "x")
        await asyncio.sleep(0.5)
        assert (alice.stats().queued, alice.stats().running) == (1, 0)
        await alice.emit(LOGGED, "fine")
        await asyncio.sleep(0.1)
        assert bad.done == ["fine"], "the only worker was free"
        await asyncio.sleep(20)
        assert bad.done == ["fine", "x"]
        assert bad.runs == [0, 0.5, 1, 3]
        assert (alice.stats().retried, alice.stats().failed) == (2, 0)
        assert "raised ValueError('x'): again in 1 s" in alice.explain(message_id)
        assert alice.logged == "", "it succeeded in the end"


async def test_retries_are_bounded_in_number_and_then_it_is_a_dead_letter() -> None:
    bad = Bad()
    async with Node("alice", bad) as alice:
        await alice.emit(RETRIED, "x")
        await asyncio.sleep(100)
        assert bad.runs == [0, 1, 3, 7]
        [letter] = alice.dead_letters
        assert (letter.handler, letter.stage, letter.attempts, repr(letter.error)) == (
            "bad.take",
            "handler",
            4,
            "ValueError('x')",
        )
        assert (alice.stats().retried, alice.stats().failed) == (3, 1)


async def test_retries_are_bounded_by_the_deadline_of_the_caller_who_is_told_at_once() -> None:
    bad = Bad()
    async with Node("alice", bad) as alice:
        with pytest.raises(RemoteError):
            await alice.call(ASKED_AGAIN, "x", to="alice", timeout=6.5)
        assert now() == 3, "the next one, at 7, would be too late"
        assert bad.runs == [0, 1, 3]
        assert alice.dead_letters[0].attempts == 3


async def test_the_caller_gets_the_reply_of_the_attempt_that_succeeds() -> None:
    bad = Bad()
    bad.failures = 2
    async with Node("alice", bad) as alice:
        assert await alice.call(ASKED_AGAIN, "x", to="alice") == 3
        assert alice.stats().handled == 1


async def test_an_error_that_says_when_to_come_back_is_heeded_unless_that_is_too_late() -> None:
    bad = Bad()
    bad.failures = 1
    async with Node("alice", bad) as alice:
        await alice.emit(RETRIED, "wait")
        await asyncio.sleep(20)
        assert bad.runs == [0, 7]
        bad.failures = 1000
        await alice.emit(RETRIED, "wait long")
        await asyncio.sleep(2000)
        assert len(bad.runs) == 3


async def test_who_rejects_is_not_called_again() -> None:
    kind = request("no:no", int, reply=int, retry=STEADY, on_error="raise")

    class No(Service):
        name = "no"

        @handles(kind)
        async def no(self, msg: Message[int]) -> int:
            raise Reject("no")

    async with Node("alice", No()) as alice:
        with pytest.raises(RemoteError, match="no"):
            await alice.call(kind, 1, to="alice")
        assert (now(), alice.logged) == (0, "")


async def test_a_drain_waits_for_what_is_to_be_retried() -> None:
    bad = Bad()
    bad.failures = 2
    async with Node("alice", bad) as alice:
        await alice.emit(RETRIED, "x")
        await asyncio.sleep(0.5)
    assert bad.done == ["x"]
    assert now() == 3


async def test_a_drain_cuts_what_is_to_be_retried_after_the_grace_and_its_caller_learns_that_it_may_have_run() -> None:
    bad, hub = Bad(), MemoryHub()
    async with Node("alice", hub=hub) as alice:
        async with Node("bob", bad, hub=hub, grace=2.0) as bob:
            asked = asyncio.create_task(alice.call(ASKED_AGAIN, "x", to="bob", timeout=100))
            await asyncio.sleep(1.5)
        with pytest.raises(PeerLost):
            await asked
    assert bad.runs == [0, 1, 3]
    assert bob.stats().cut == 1
    assert balanced(bob)
    assert bob.dead_letters == ()


def test_a_caller_may_give_up_at_any_time_and_nothing_is_left_of_its_retries() -> None:
    async def scenario(point: CancellationPoint) -> None:
        bad = Bad()
        bad.failures = 3
        async with Node("alice", bad) as alice:
            cancelled = await point.cancel(alice.call(ASKED_AGAIN, "x", to="alice", timeout=30))
            runs = len(bad.runs)
            assert balanced(alice)
            await asyncio.sleep(100)
            if cancelled:
                assert len(bad.runs) <= runs + 1
            stats = alice.stats()
            assert (stats.queued, stats.running, stats.pending) == (0, 0, 0)
            assert balanced(alice)

    everywhere(scenario)


# --- dead letters


def letter(number: int, size: int = 0) -> DeadLetter:
    message = Message(str(number), "k", "alice", number, 0.0)
    return DeadLetter(message, "h", "handler", 1, ValueError(), message, size)


@given(
    st.integers(1, 4),
    st.integers(1, 20),
    st.lists(st.tuples(st.sampled_from(["add", "ok", "no room", "fails"]), st.integers(0, 9))),
)
def test_dead_letters_are_kept_as_in_a_naive_list(
    max_letters: int, max_bytes: int, program: list[tuple[str, int]]
) -> None:
    real, naive, added = DeadLetters(max_letters, max_bytes), list[DeadLetter](), 0

    def add(size: int) -> None:
        nonlocal added, naive
        added += 1
        made = letter(added, size)
        real.add(made)
        naive = [*naive, made][-max_letters:]
        while len(naive) > 1 and sum(each.size for each in naive) > max_bytes:
            naive = naive[1:]

    gone = 0
    for verb, argument in program:
        if verb == "add":
            add(argument)
        elif naive:
            chosen = naive[argument % len(naive)]

            def again(chosen: DeadLetter, verb: str = verb) -> bool:
                if verb == "fails":
                    add(chosen.size)
                return verb == "ok"

            assert real.replay(chosen, again) is (verb != "no room")
            if verb != "no room" and chosen in naive:
                naive.remove(chosen)
                gone += 1
        assert list(real.letters) == naive
        assert real.forgotten == added - gone - len(naive)


async def test_a_dead_letter_can_be_replayed_once_and_again_if_it_fails_again() -> None:
    bad = Bad()
    async with Node("alice", bad) as alice:
        message_id = await alice.emit(KEPT, "x")
        await asyncio.sleep(1)
        [first] = alice.dead_letters
        assert alice.replay(first)
        with pytest.raises(ValueError, match=f"the dead letter of message {message_id} is not here any more"):
            alice.replay(first)
        await asyncio.sleep(1)
        [second] = alice.dead_letters
        assert second is not first
        bad.failures = 0
        assert alice.replay(second)
        await asyncio.sleep(1)
        assert bad.done == ["x"]
        assert alice.dead_letters == ()
        assert balanced(alice)


async def test_a_request_can_be_replayed_after_its_deadline_and_nobody_is_answered() -> None:
    bad, hub = Bad(), MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("bob", bad, hub=hub) as bob:
        with pytest.raises(RemoteError):
            await alice.call(ASKED, "x", to="bob", timeout=2)
        await asyncio.sleep(10)
        bad.failures = 0
        assert bob.replay(bob.dead_letters[0])
        await asyncio.sleep(1)
        assert bad.done == ["x"]
        assert alice.stats().dropped == {}


async def test_a_broadcast_can_be_replayed_though_it_was_seen_before() -> None:
    bad = Bad()
    async with Node("alice", bad) as alice:
        await alice.emit(TOLD, "x")
        await asyncio.sleep(1)
        bad.failures = 0
        assert alice.replay(alice.dead_letters[0])
        await asyncio.sleep(1)
        assert bad.done == ["x"]


async def test_dead_letters_outlive_a_run_and_can_be_replayed_in_the_next() -> None:
    bad = Bad()
    alice = Node("alice", bad)
    async with alice:
        await alice.emit(KEPT, "x")
        await asyncio.sleep(1)
    bad.failures = 0
    async with alice:
        assert alice.replay(alice.dead_letters[0])
        await asyncio.sleep(1)
    assert bad.done == ["x"]


async def test_without_room_a_dead_letter_stays() -> None:
    bad = Bad()
    bad.max_mailbox = bad.max_concurrent = 1
    async with Node("alice", bad, grace=0.0) as alice:
        await alice.emit(KEPT, "x")
        await asyncio.sleep(1)
        await alice.emit(KEPT, "hang")
        await asyncio.sleep(1)
        await alice.emit(KEPT, "fine")
        assert not alice.replay(alice.dead_letters[0])
        assert len(alice.dead_letters) == 1


async def test_a_stage_that_fails_makes_a_dead_letter_that_goes_through_all_stages_again() -> None:
    broken = True
    stage = Stage("odd", lambda msg: Fail(KeyError("odd")) if broken else _continue(msg))
    kind = request("odd:ask", str, reply=str, on_error="dead_letter", stages=[stage])
    seen: list[str] = []

    class Odd(Service):
        name = "odd"

        @handles(kind)
        async def ask(self, msg: Message[str]) -> str:
            seen.append(msg.payload)
            return msg.payload

    hub = MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("bob", Odd(), hub=hub) as bob:
        with pytest.raises(NotAccepted, match="failed"):
            await alice.call(kind, "x", to="bob", timeout=1)
        await asyncio.sleep(10)
        [first] = bob.dead_letters
        assert (first.stage, first.attempts, first.message.payload, first.handler) == ("odd", 1, "x", "odd.ask")
        assert bob.replay(first), "it was tried"
        [second] = bob.dead_letters
        assert second is not first
        broken = False
        assert bob.replay(second)
        await asyncio.sleep(1)
        assert seen == ["x"]
        assert bob.dead_letters == ()


def _continue(msg: Message[Any]) -> Any:
    return Continue(msg)


async def test_only_so_many_dead_letters_are_kept() -> None:
    async with Node("alice", Bad(), max_dead_letters=3) as alice:
        for number in range(5):
            await alice.emit(KEPT, str(number))
        await asyncio.sleep(1)
        assert [letter.message.payload for letter in alice.dead_letters] == ["2", "3", "4"]
        assert alice.letters.forgotten == 2


# --- handlers that misbehave


async def test_a_handler_that_hangs_is_cancelled_at_the_deadline_and_its_worker_goes_on() -> None:
    bad = Bad()
    bad.max_concurrent = 1
    async with Node("alice", bad) as alice:
        with pytest.raises(CallTimeout):
            await alice.call(ASKED, "hang", to="alice", timeout=5)
        assert await alice.call(ASKED, "fine", to="alice") == 2
        assert now() == 5
        assert alice.stats().cancelled == 1


async def test_a_handler_that_hangs_with_nobody_waiting_is_cut_when_the_node_stops_and_that_is_said() -> None:
    alice = Node("alice", Bad())
    async with alice:
        await alice.emit(LOGGED, "hang")
        await asyncio.sleep(100)
        assert alice.stats().running == 1
    assert now() == 105
    assert "node 'alice' stopped before it had handled: bad:logged (1)" in alice.logged
    assert balanced(alice)


async def test_a_reply_of_the_wrong_type_is_a_failure_like_any_other() -> None:
    async with Node("alice", Bad()) as alice:
        with pytest.raises(RemoteError) as caught:
            await alice.call(ASKED, "wrong type", to="alice")
        assert caught.value.code == "internal"
        assert "TypeError: bad:asked: the reply must be int, not str" in alice.logged
        assert alice.dead_letters[0].stage == "handler"


@pytest.mark.parametrize("to", ["alice", "bob"])
async def test_a_handler_that_blocks_the_loop_makes_everybody_wait_so_long_and_no_longer(to: str) -> None:
    hub = MemoryHub()
    async with Node("alice", Bad(), hub=hub) as alice, Node("bob", Bad(), hub=hub):
        blocking = asyncio.create_task(alice.call(ASKED, "block", to=to, timeout=0.05))
        others = [asyncio.create_task(alice.call(ASKED, "fine", to=to, timeout=0.2)) for _ in range(20)]
        await asyncio.wait([blocking, *others])
        assert now() == pytest.approx(0.1)
        assert sorted(other.result() for other in others) == list(range(2, 22))
        assert isinstance(blocking.exception(), CallTimeout | None), "its reply was too late, or just in time"
        assert await alice.call(ASKED, "fine", to=to) == 22
        assert balanced(alice)


async def test_a_handler_that_floods_meets_the_limits_of_others() -> None:
    flood, drop = local("flood:go", int), local("flood:drop", int, overflow="drop_newest")

    class Flood(Service):
        name = "flood"

        @handles(flood)
        async def go(self, msg: Message[int]) -> None:
            for number in range(10_000):
                await self.rt.emit(drop, number)

    class Drain(Service):
        name = "drain"
        max_mailbox = 10
        max_concurrent = 1

        @handles(drop)
        async def take(self, msg: Message[int]) -> None:
            await asyncio.sleep(0.001)

    async with Node("alice", Flood(), Drain()) as alice:
        await alice.emit(flood, 1)
        await asyncio.sleep(1)
        stats = alice.stats()
        assert stats.handled + stats.dropped["flood:drop", "mailbox", "overloaded"] == 10_001
        assert balanced(alice)


async def test_a_service_that_keeps_dying_in_its_task_escalates_with_the_cause_while_its_handlers_fail_alone() -> None:
    class Dying(Bad):
        async def start(self) -> None:
            self.spawn(self.die)

        async def die(self) -> None:
            await asyncio.sleep(1)
            raise OSError("no disk")

    alice = Node("alice", Dying())
    with pytest.raises(ServiceFailed, match="task 'die' of service 'bad' on node 'alice' failed: OSError: no disk"):
        async with alice:
            for _ in range(100):
                await alice.emit(LOGGED, "x")
            await anyio.sleep(1000)
    assert alice.stats().failed == 100


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["call", "emit", "cancel", "repeat", "pause", "stop"]),
            st.sampled_from(["fine", "fail", "hang", "raise"]),
            st.integers(0, 5),
        ),
        max_size=25,
    )
)
def test_the_books_balance_whatever_happens(program: list[tuple[str, str, int]]) -> None:
    async def main() -> None:
        bad, hub = Bad(), MemoryHub()
        bad.failures, bad.max_mailbox, bad.max_concurrent = 12, 3, 2
        alice, bob = Node("alice", hub=hub), Node("bob", bad, hub=hub)
        calls: list[asyncio.Task[Any]] = []
        async with alice, bob:
            for verb, payload, number in program:
                kind = ASKED_AGAIN if number % 2 else ASKED
                if verb in {"call", "repeat"} and not any(not c.done() for c in calls if c.get_name() == str(number)):
                    repeats = str(number) if verb == "repeat" else None
                    asked = alice.call(kind, payload, to="bob", timeout=2.0 + number, id=repeats)
                    calls.append(asyncio.create_task(asked, name=repeats))
                elif verb == "emit" and bob.stats().queued < 3:
                    with anyio.move_on_after(1):
                        await bob.emit(RETRIED if number % 2 else KEPT, payload)
                elif verb == "cancel" and calls:
                    calls[number % len(calls)].cancel()
                elif verb == "pause":
                    await asyncio.sleep(number / 2)
                elif verb == "stop" and number == 5:
                    break
                assert balanced(bob)
                await asyncio.sleep(0)
                assert balanced(bob)
                assert bob.stats().queued <= 3 + 2
        assert balanced(bob)
        stats = bob.stats()
        assert (stats.queued, stats.running) == (0, 0)
        if calls:
            await asyncio.wait(calls)
        assert all(call.cancelled() or isinstance(call.exception(), MeshkitError | None) for call in calls)

    run(main)
