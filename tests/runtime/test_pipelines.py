"""Pipelines: the stages that a message passes on its way out and in, and what is left of one that was stopped."""

import asyncio
import contextlib
import gc
import math
import tracemalloc
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, strategies as st

from meshkit.errors import (
    MalformedFrame,
    NoHandler,
    NotAccepted,
    Overloaded,
    PeerLost,
    RateLimited,
    Unreachable,
)
from meshkit.events import Event
from meshkit.runtime import (
    Behavior,
    Continue,
    Drop,
    Fail,
    Message,
    MessageDropped,
    MessageSent,
    Service,
    Stage,
    broadcast,
    ephemeral,
    handles,
    local,
    request,
)
from meshkit.runtime.stages import EMIT, RECEIVE, Outcome, Pipeline, Step, Stopped
from meshkit.runtime.wire import Ask, Tell, encode_payload
from meshkit.testing import CancellationPoint, run
from meshkit.transports import MemoryHub
from tests.runtime.nodes import Node, everywhere, plain


def passes(msg: Message[Any]) -> Continue:
    return Continue(msg)


def a_message(payload: object = "boo") -> Message[Any]:
    return Message("5f", "x:tell", "alice", payload, 0.0)


def taker(behavior: Behavior[Any], name: str = "taker", **members: Any) -> Any:
    """Return a service that handles `behavior`, and has what came in `seen`."""
    seen: list[Any] = []

    async def take(_self: Service, msg: Message[Any]) -> Any:
        seen.append(msg.payload)
        return msg.payload

    mark = cast("Callable[[Any], Any]", handles(cast("Any", behavior)))
    members |= {"name": name, "take": mark(take), "seen": seen}
    made = cast("Callable[[], Any]", type("Taker", (Service,), members))
    return made()


async def settled() -> None:
    await asyncio.sleep(0.001)


# --- the pipeline itself


def test_each_custom_stage_runs_before_the_place_that_it_names_in_the_order_given() -> None:
    own = [Step(name, passes) for name in ("filter", "decode")]
    custom = [Stage(f"{place}-{n}", passes, place) for n in (1, 2) for place in ("filter", "mailbox", "decode")]
    assert str(Pipeline(own, custom)) == (
        "decode-1 -> decode-2 -> decode -> filter-1 -> filter-2 -> filter -> mailbox-1 -> mailbox-2"
    )


@given(st.lists(st.tuples(st.sampled_from(["continue", "change", "drop", "fail", "raise", "garbage"]), st.integers())))
def test_a_pipeline_does_what_its_stages_say_one_after_the_other(plan: list[tuple[str, int]]) -> None:
    ran: list[int] = []
    then: list[int] = []

    def stage(place: int, what: str, number: int) -> Callable[[Message[Any]], Outcome]:
        def act(msg: Message[Any]) -> Any:
            ran.append(place)
            if what == "raise":
                raise LookupError(number)
            new = msgspec.structs.replace(msg, payload=number)
            return {
                "continue": Continue(msg, lambda: then.append(place)),
                "change": Continue(new, lambda: then.append(place)),
                "drop": Drop(f"reason-{number}"),
                "fail": Fail(ValueError(number)),
                "garbage": number,
            }[what]

        return act

    pipeline = Pipeline([], [Stage(f"s{n}", stage(n, *step)) for n, step in enumerate(plan)])
    result = pipeline.run(a_message("first"))
    end = next((n for n, (what, _) in enumerate(plan) if what not in {"continue", "change"}), len(plan))
    payload = next((number for what, number in reversed(plan[:end]) if what == "change"), "first")
    assert ran == [*range(min(end + 1, len(plan)))]
    assert result.message == a_message(payload)
    assert then == [], "nothing is done while it is decided"
    if isinstance(result, Continue):
        assert end == len(plan)
        if result.then is not None:
            result.then()
        assert then == [*range(len(plan))]
    else:
        what, number = plan[end]
        assert result.stage == f"s{end}"
        expected = {"raise": LookupError, "fail": ValueError, "garbage": TypeError}
        if what == "drop":
            assert result.outcome == Drop(f"reason-{number}")
        else:
            assert isinstance(result.outcome, Fail)
            assert type(result.outcome.error) is expected[what]


async def waits(msg: Message[Any]) -> Continue:
    return Continue(msg)


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (None, "returned None: neither Continue, Drop nor Fail"),
        (True, "returned True"),
        (a_message(), "returned Message"),
        (Continue, "returned <class"),
        (Continue(cast("Any", None)), "went on with None: only the payload may be another"),
        (Continue(msgspec.structs.replace(a_message(), id="60")), "only the payload may be another"),
        (Continue(msgspec.structs.replace(a_message(), sender="mallory")), "only the payload may be another"),
        (Continue(msgspec.structs.replace(a_message(), kind="y")), "only the payload may be another"),
        (Continue(msgspec.structs.replace(a_message(), version=2)), "only the payload may be another"),
        (Continue(msgspec.structs.replace(a_message(), deadline=1.0)), "only the payload may be another"),
        (Continue(a_message(3)), "must be str, not int"),
    ],
)
def test_a_stage_that_returns_what_it_must_not_has_failed(outcome: Any, why: str) -> None:
    stage = Stage("odd", lambda _: outcome)
    result = Pipeline([], [stage], check=broadcast("x:tell", str).check).run(a_message())
    assert isinstance(result, Stopped)
    assert isinstance(result.outcome, Fail)
    assert isinstance(result.outcome.error, TypeError)
    assert why in str(result.outcome.error)
    assert (result.stage, result.message) == ("odd", a_message())


def test_a_stage_that_waits_after_all_has_failed_and_nobody_is_warned_of_what_was_never_awaited() -> None:
    result = Pipeline([], [Stage("odd", lambda msg: cast("Any", waits(msg)))]).run(a_message())
    assert isinstance(result, Stopped)
    assert "neither Continue, Drop nor Fail" in str(cast("Fail", result.outcome).error)


def test_a_stage_cannot_pass_for_a_cancellation_of_who_runs_it_but_an_interrupt_passes() -> None:
    def raises(error: BaseException) -> Pipeline:
        def act(msg: Message[Any]) -> Outcome:
            raise error

        return Pipeline([], [Stage("odd", act)])

    result = raises(asyncio.CancelledError()).run(a_message())
    assert isinstance(result, Stopped)
    assert str(cast("Fail", result.outcome).error) == "stage 'odd' raised CancelledError"
    with pytest.raises(KeyboardInterrupt):
        raises(KeyboardInterrupt()).run(a_message())


@pytest.mark.parametrize("reason", ["", None, 3])
def test_a_drop_has_a_reason(reason: Any) -> None:
    with pytest.raises(TypeError, match="the reason of a Drop must be text, not"):
        Drop(reason)


@pytest.mark.parametrize("error", ["text", None, ValueError, asyncio.CancelledError()])
def test_a_fail_has_an_exception(error: Any) -> None:
    with pytest.raises(TypeError, match="the error of a Fail must be an exception, not"):
        Fail(error)


def test_a_stage_says_what_is_wrong_with_it() -> None:
    for name in (*EMIT, *RECEIVE):
        with pytest.raises(ValueError, match=f"'{name}' is one of the runtime's own stages"):
            Stage(name, passes)
    with pytest.raises(ValueError, match="the name of a stage must be text without spaces"):
        Stage("two words", passes)
    with pytest.raises(TypeError, match="stage 'odd': run must be a function of a message that is not async"):
        Stage("odd", cast("Any", waits))
    with pytest.raises(TypeError, match="stage 'odd': run must be a function"):
        Stage("odd", cast("Any", 3))
    with pytest.raises(ValueError, match="stage 'odd': on must be 'receive' or 'emit', not 'both'"):
        Stage("odd", passes, on=cast("Any", "both"))
    for place in ("frame", "kind", "version", "upgrade", "prove", "nowhere"):
        with pytest.raises(ValueError, match="stage 'odd': before must be one of decode, dedupe, rate_limit, filter"):
            Stage("odd", passes, place)
    with pytest.raises(ValueError, match="stage 'odd': before must be one of prove, not 'decode'"):
        Stage("odd", passes, "decode", on="emit")


# --- what is printed


async def test_a_runtime_prints_the_stages_of_each_kind_on_both_ways() -> None:
    ask = request("x:ask", int, reply=int, rate_limit=(10, 60.0), stages=[Stage("audit", passes)])
    tell = broadcast(
        "x:tell",
        str,
        content_key=len,
        remember=5.0,
        filter=bool,
        stages=[Stage("raw", passes, "decode"), Stage("stamp", passes, on="emit")],
    )
    note = local("x:note", int)
    late = ephemeral("x:late", int)
    behaviors: list[Behavior[Any]] = [ask, tell, note, late]
    services = [taker(behavior, f"s{n}") for n, behavior in enumerate(behaviors)]
    async with Node("alice", *services) as alice:
        assert alice.describe() == (
            "x:ask\n"
            "  emit     id -> prove -> transport -> notify\n"
            "  receive  frame -> kind -> version -> decode -> dedupe (by id)"
            " -> rate_limit (10 in 60 s from each sender) -> deadline -> audit -> mailbox -> s0.take\n"
            "x:late\n"
            "  emit     id -> prove -> transport -> notify\n"
            "  receive  frame -> kind -> version -> decode -> mailbox -> s3.take\n"
            "x:note\n"
            "  emit     id -> notify\n"
            "  receive  mailbox -> s2.take\n"
            "x:tell\n"
            "  emit     id -> content_key -> stamp -> prove -> transport -> notify\n"
            "  receive  frame -> kind -> version -> raw -> decode -> dedupe (by content, for 5 s) -> filter"
            " -> mailbox -> s1.take"
        )


@pytest.mark.parametrize("place", ["decode", "dedupe", "rate_limit", "filter", "deadline", "mailbox"])
@pytest.mark.parametrize("make", [broadcast, request])
async def test_the_stages_run_in_the_order_that_is_printed(place: str, make: Any) -> None:
    """Each custom stage is passed by a message that the runtime stops after it, and not by one stopped before."""
    reply: dict[str, Any] = {"reply": int} if make is request else {}
    reached: list[object] = []

    def watch(msg: Message[Any]) -> Outcome:
        reached.append(msg.payload)
        return Continue(msg)

    behavior = make(
        "x:n",
        int,
        rate_limit=(1, 60.0),
        filter=lambda msg: msg.payload != 7,
        stages=[Stage("s", watch, place)],
        **reply,
    )
    service = taker(behavior)
    async with Node("alice", service) as alice:

        async def send(payload: int) -> None:
            if make is request:
                with contextlib.suppress(NotAccepted, RateLimited):
                    await alice.call(behavior, payload, to="alice")
            else:
                await alice.emit(behavior, payload)

        await send(7)  # filtered
        await send(1)
        await send(2)  # too many
        await settled()
        raw = place == "decode"
        values = [b"\x07", b"\x01", b"\x02"] if raw else [7, 1, 2]
        stopped_before = {"filter": [2], "deadline": [7, 2], "mailbox": [7, 2]}.get(place, [])
        assert reached == [value for value in values if value not in stopped_before]
        assert service.seen == [1]


# --- outcomes


async def test_a_dropped_broadcast_is_counted_kept_and_told_to_the_observer_and_no_handler_sees_it() -> None:
    events: list[Event] = []
    shout = broadcast(
        "x:tell", str, stages=[Stage("calm", lambda msg: Drop("shouting") if msg.payload.isupper() else Continue(msg))]
    )
    service = taker(shout)
    async with Node("alice", service, observer=events.append) as alice:
        message_id = await alice.emit(shout, "BOO")
        await alice.emit(shout, "boo")
        await settled()
        dropped = MessageDropped("x:tell", "calm", "shouting", message_id, "alice")
        assert service.seen == ["boo"]
        assert alice.stats().dropped == {("x:tell", "calm", "shouting"): 1}
        assert [*alice.drops] == [dropped]
        assert [event for event in events if isinstance(event, MessageDropped)] == [dropped]
        assert alice.explain(message_id) == (
            f"message {message_id}\n  sent to every node\n  dropped at calm: shouting, from node 'alice'"
        )


async def test_an_observer_hears_of_each_message_that_leaves() -> None:
    events: list[Event] = []
    tell, ask, note = broadcast("x:tell", int), request("x:ask", int, reply=int), local("x:note", int)
    hub = MemoryHub()
    async with (
        Node("alice", taker(note), hub=hub, observer=events.append) as alice,
        Node("bob", taker(ask), hub=hub),
    ):
        ids = [await alice.emit(tell, 1), await alice.emit(tell, 2, to="bob"), await alice.emit(note, 3)]
        await alice.call(ask, 4, to="bob", id="call-1")
        sent = [event for event in events if isinstance(event, MessageSent)]
        assert sent == [
            MessageSent("x:tell", ids[0], None),
            MessageSent("x:tell", ids[1], "bob"),
            MessageSent("x:note", ids[2], None),
            MessageSent("x:ask", "call-1", "bob"),
        ]
        assert alice.stats().sent == 4


async def test_an_observer_that_raises_harms_nothing() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    def raises(event: Event) -> None:
        raise LookupError(event)

    tell = broadcast("x:tell", int, filter=lambda msg: msg.payload > 0)
    first, second = taker(tell, "first", max_mailbox=1), taker(tell, "second")
    async with Node("alice", first, second, observer=raises) as alice:
        for payload in (0, 1, 2):
            await alice.emit(tell, payload)
        await settled()
        assert second.seen == [1, 2]
        assert alice.stats().dropped == {("x:tell", "filter", "filtered"): 1, ("x:tell", "mailbox", "overloaded"): 1}
    assert {str(context["message"]) for context in reported} == {
        "meshkit: observer failed on MessageDropped",
        "meshkit: observer failed on MessageSent",
    }


@pytest.mark.parametrize("fails", ["filter", "order_by"])
async def test_what_a_filter_or_order_by_raises_is_a_refusal_that_names_a_log_line_only_if_there_is_one(
    fails: str,
) -> None:
    def broken(_: object) -> Any:
        raise ZeroDivisionError

    for on_error in ("log", "drop"):
        ask = request("x:ask", int, reply=int, on_error=cast("Any", on_error), **cast("Any", {fails: broken}))
        service = taker(ask)
        async with Node("alice", service) as alice:
            with pytest.raises(NotAccepted) as caught:
                await alice.call(ask, 1, to="alice", id="5f")
            says = f"its stage '{fails}' failed" + (" (look for 5f in its log)" if on_error == "log" else "")
            assert (caught.value.reason, caught.value.executed, service.seen) == (says, "no", [])
            assert ("ZeroDivisionError" in alice.logged) == (on_error == "log")


async def test_the_caller_of_a_request_that_a_stage_stopped_is_refused() -> None:
    outcomes: dict[int, Callable[[], Outcome]] = {
        1: lambda: Drop("unwanted"),
        2: lambda: Fail(Overloaded(name="the disk", limit=3)),
        3: lambda: Fail(ValueError("a secret")),
        4: lambda: cast("Any", 1 / 0),
        5: lambda: cast("Any", "garbage"),
    }
    ask = request(
        "x:ask", int, reply=int, stages=[Stage("pick", lambda msg: outcomes.get(msg.payload, lambda: Continue(msg))())]
    )
    service, hub = taker(ask), MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("bob", service, hub=hub) as bob:
        assert await alice.call(ask, 0, to="bob") == 0
        with pytest.raises(NotAccepted, match=r"unwanted \(pick\)") as refused:
            await alice.call(ask, 1, to="bob")
        assert refused.value.executed == "no"
        with pytest.raises(Overloaded, match="the disk"):
            await alice.call(ask, 2, to="bob")
        for payload in (3, 4, 5):
            with pytest.raises(
                NotAccepted, match=r"its stage 'pick' failed \(look for [0-9a-f]+ in its log\)"
            ) as failed:
                await alice.call(ask, payload, to="bob")
            assert failed.value.executed == "no"
            assert "secret" not in str(failed.value)
        assert service.seen == [0]
        assert bob.stats().dropped == {
            ("x:ask", "pick", "unwanted"): 1,
            ("x:ask", "pick", "overloaded"): 1,
            ("x:ask", "pick", "failed"): 3,
        }
        assert "taker.take failed at pick on 'x:ask' from node 'alice'" in bob.logged
        assert "a secret" in bob.logged
        assert "stage 'pick' returned 'garbage': neither Continue, Drop nor Fail" in bob.logged


async def test_a_stage_may_go_on_with_another_payload() -> None:
    ask = request(
        "x:ask",
        int,
        reply=int,
        stages=[
            Stage("swap", lambda msg: Continue(msgspec.structs.replace(msg, payload=b"\x05")), "decode"),
            Stage("more", lambda msg: Continue(msgspec.structs.replace(msg, payload=msg.payload + 1))),
        ],
    )
    async with Node("alice", taker(ask)) as alice:
        assert await alice.call(ask, 1, to="alice") == 6


async def test_a_stage_before_decode_sees_the_bytes_as_they_came() -> None:
    seen: list[object] = []

    def sniff(msg: Message[Any]) -> Outcome:
        seen.append(msg.payload)
        return Drop("too_long") if len(msg.payload) > 4 else Continue(msg)

    tell = broadcast("x:tell", str, stages=[Stage("sniff", sniff, "decode")])
    service, hub = taker(tell), MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("bob", service, hub=hub) as bob:
        for payload in ("boo", "a long one"):
            await alice.emit(tell, payload)
        await settled()
        hub.send("alice", "bob", plain(Tell("1", "x:tell", 1, 0.0, msgspec.Raw(b"\x07"))))
        await settled()
        assert seen == [b"\xa3boo", b"\xaaa long one", b"\x07"]
        assert {type(payload) for payload in seen} == {bytes}
        assert service.seen == ["boo"]
        assert bob.stats().dropped == {
            ("x:tell", "sniff", "too_long"): 1,
            ("x:tell", "decode", "malformed_frame"): 1,
        }


async def test_what_a_stage_makes_of_the_bytes_must_be_bytes() -> None:
    swap = Stage("swap", lambda msg: Continue(msgspec.structs.replace(msg, payload="text")), "decode")
    tell = broadcast("x:tell", str, stages=[swap])
    async with Node("alice", taker(tell)) as alice:
        await alice.emit(tell, "boo")
        assert alice.stats().dropped == {("x:tell", "swap", "failed"): 1}
        assert "before it is decoded the payload must be bytes, not str" in alice.logged


# --- on the way out


async def test_a_stage_on_the_way_out_sees_changes_and_stops_what_is_emitted() -> None:
    seen: list[Message[str]] = []

    def stamp(msg: Message[str]) -> Outcome:
        seen.append(msg)
        if msg.payload == "drop":
            return Drop("unwanted")
        if msg.payload == "fail":
            return Fail(LookupError("no stamp"))
        return Continue(msgspec.structs.replace(msg, payload=3 if msg.payload == "odd" else f"{msg.payload}!"))

    first = broadcast("x:tell", str)
    second = first.next(str, upgrade=str, stages=[Stage("stamp", stamp, on="emit")])
    service = taker(second)
    async with Node("alice", service) as alice:
        await alice.emit(second, "boo")
        with pytest.raises(NotAccepted, match=r"unwanted \(stage stamp\)"):
            await alice.emit(second, "drop")
        with pytest.raises(LookupError, match="no stamp"):
            await alice.emit(second, "fail")
        with pytest.raises(TypeError, match="the payload must be str, not int"):
            await alice.emit(second, "odd")
        await settled()
        assert service.seen == ["boo!"]
        assert {msg.version for msg in seen} == {2}
        assert alice.stats().sent == 1
        assert alice.stats().dropped == {("x:tell", "stamp", "unwanted"): 1, ("x:tell", "stamp", "failed"): 2}


async def test_a_stage_on_the_way_out_acts_when_the_message_has_left() -> None:
    charged: list[object] = []
    count = Stage("count", lambda msg: Continue(msg, lambda: charged.append(msg.payload)), on="emit")
    tell, ask = broadcast("x:tell", int, stages=[count]), request("x:ask", int, reply=int, stages=[count])
    async with Node("alice", taker(tell), taker(ask, "other")) as alice:
        await alice.emit(tell, 1)
        await alice.call(ask, 2, to="alice")
        with pytest.raises(Exception, match="cannot be reached"):
            await alice.emit(tell, 3, to="nobody")
        assert charged == [1, 2]


async def test_a_stage_on_the_way_out_acts_once_for_a_request_and_not_if_it_never_left() -> None:
    charged: list[object] = []
    count = Stage("count", lambda msg: Continue(msg, lambda: charged.append(msg.payload)), on="emit")
    refused = Stage("never", lambda _: Fail(Overloaded(name="all", limit=1)))
    ask = request("x:ask", int, reply=int, stages=[count])
    refuse = request("x:no", int, reply=int, stages=[count, refused])
    hub = MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("bob", taker(ask), taker(refuse, "no"), hub=hub):
        async with Node("carol", taker(refuse), hub=hub):
            await settled()
            with pytest.raises(Overloaded):
                await alice.call(refuse, 1)
            assert alice.stats().sent == 2, "each of the others was asked"
            assert charged == [1]
        hub.silence("bob")
        waiting = asyncio.create_task(alice.call(ask, 2, to="bob", id="5f"))
        await asyncio.sleep(1)
        with pytest.raises(ValueError, match="is pending already"):
            await alice.call(ask, 3, to="bob", id="5f")
        with pytest.raises(PeerLost):
            await waiting
        with pytest.raises(Unreachable, match="fallen silent"):
            await alice.call(ask, 4, to="bob")
        with pytest.raises(NoHandler):
            await alice.call(ask, 5)
        assert charged == [1, 2]


async def test_a_content_key_that_cannot_be_one_is_an_error_of_who_emits_it() -> None:
    tell = broadcast("x:tell", list[int], content_key=cast("Any", lambda payload: payload))
    async with Node("alice", taker(tell)) as alice:
        with pytest.raises(TypeError, match="unhashable"):
            await alice.emit(tell, [1])


# --- nothing is remembered or charged before it is delivered


async def test_long_content_keys_are_as_different_as_they_were_and_cost_no_memory() -> None:
    tell = broadcast("x:tell", tuple[bool, str], content_key=lambda p: p[1] if p[0] else p[1].encode())
    service, hub = taker(tell), MemoryHub()
    async with Node("bob", service, hub=hub) as bob, Node("alice", hub=hub) as alice:
        tracemalloc.start()
        try:
            for _ in range(2):
                for is_text in (True, False):
                    for number in range(50):
                        await alice.emit(tell, (is_text, "x" * 100_000 + str(number)))
                        await settled()
                        service.seen.clear()
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 1_000_000, "of 10 million bytes of keys"
        finally:
            tracemalloc.stop()
        assert (bob.stats().delivered, bob.stats().dropped) == (100, {("x:tell", "dedupe", "duplicate"): 100})


async def test_the_same_content_from_two_senders_is_handled_once_and_the_own_broadcast_counts() -> None:
    tell = broadcast("x:tell", str, content_key=str.lower, remember=10.0)
    hub = MemoryHub()
    services = {name: taker(tell) for name in ("alice", "bob", "carol")}
    async with (
        Node("alice", services["alice"], hub=hub) as alice,
        Node("bob", services["bob"], hub=hub) as bob,
        Node("carol", services["carol"], hub=hub) as carol,
    ):
        await alice.emit(tell, "Fire")
        await settled()
        await bob.emit(tell, "FIRE")
        await settled()
        assert {name: service.seen for name, service in services.items()} == {name: ["Fire"] for name in services}
        for node in (alice, bob, carol):
            assert node.stats().dropped == {("x:tell", "dedupe", "duplicate"): 1}
        await asyncio.sleep(10)
        await bob.emit(tell, "FIRE")
        await settled()
        assert services["alice"].seen == ["Fire", "FIRE"], "after `remember` seconds it is news again"


async def test_a_message_with_the_id_of_another_is_handled_once_for_each_sender() -> None:
    tell = broadcast("x:tell", str)
    service, hub = taker(tell), MemoryHub()
    async with Node("alice", hub=hub), Node("carol", hub=hub), Node("bob", service, hub=hub) as bob:
        for sender in ("alice", "alice", "carol"):
            hub.send(sender, "bob", plain(Tell("1", "x:tell", 1, 0.0, encode_payload(sender))))
        await settled()
        assert service.seen == ["alice", "carol"]
        assert bob.stats().dropped == {("x:tell", "dedupe", "duplicate"): 1}


async def test_an_ephemeral_message_is_remembered_by_its_content_only() -> None:
    plainly, by_content = ephemeral("x:a", str), ephemeral("x:b", str, content_key=str)
    service, other, hub = taker(plainly), taker(by_content, "other"), MemoryHub()
    async with Node("alice", hub=hub), Node("bob", service, other, hub=hub):
        for kind in ("x:a", "x:b"):
            for _ in range(2):
                hub.send("alice", "bob", plain(Tell("1", kind, 1, 0.0, encode_payload("boo"))))
        await settled()
        assert (service.seen, other.seen) == (["boo", "boo"], ["boo"])


@pytest.mark.parametrize("stage", ["rate_limit", "filter", "custom", "custom failing", "mailbox"])
async def test_what_was_dropped_is_not_remembered_and_its_sender_not_charged(stage: str) -> None:
    stops = True

    def custom(msg: Message[Any]) -> Outcome:
        if stops and stage == "custom failing":
            return Fail(ValueError("not now"))
        return Drop("not_now") if stops and stage == "custom" else Continue(msg)

    tell = broadcast(
        "x:tell",
        str,
        content_key=str,
        rate_limit=(2, 60.0),
        filter=lambda _: not (stops and stage == "filter"),
        stages=[Stage("custom", custom)],
        max_mailbox=1,
    )
    service, hub = taker(tell), MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("bob", service, hub=hub) as bob:
        count = 20
        if stage == "rate_limit":
            for payload in ("1", "2"):
                await alice.emit(tell, payload)
                await settled()
        if stage == "mailbox":  # it has room for one; the others come before a worker has run
            await alice.emit(tell, "1")
        for _ in range(count):
            await alice.emit(tell, "boo")
        await settled()
        assert "boo" not in service.seen
        assert sum(bob.stats().dropped.values()) == count
        stops = False
        if stage == "rate_limit":
            await asyncio.sleep(60)
        await alice.emit(tell, "boo")
        await settled()
        assert service.seen[-1] == "boo", "the first that is delivered is the first that counts"
        await alice.emit(tell, "boo")
        await settled()
        assert service.seen.count("boo") == 1


async def test_what_a_stage_has_changed_after_dedupe_is_remembered_by_what_it_was_there() -> None:
    more = Stage("more", lambda msg: Continue(msgspec.structs.replace(msg, payload=msg.payload + "!")))
    tell = broadcast("x:tell", str, content_key=str, stages=[more])
    service = taker(tell)
    async with Node("alice", service) as alice:
        for payload in ("boo", "boo", "boo!"):
            await alice.emit(tell, payload)
        await settled()
        assert service.seen == ["boo!", "boo!!"]


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
async def test_a_stage_that_fails_to_act_is_reported_and_the_message_is_handled(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    acted: list[int] = []
    bad = Stage("bad", lambda msg: Continue(msg, fail))
    good = Stage("good", lambda msg: Continue(msg, lambda: acted.append(msg.payload)))
    tell = broadcast("x:tell", int, stages=[bad, good])
    service = taker(tell)
    async with Node("alice", service) as alice:
        await alice.emit(tell, 1)
        await settled()
        assert (service.seen, acted) == ([1], [1])
        assert [context["message"] for context in reported] == [
            "meshkit: a stage failed after the message was delivered"
        ]


# --- local kinds


@pytest.mark.parametrize("overflow", ["wait", "refuse", "drop_newest", "drop_oldest"])
async def test_a_local_kind_is_remembered_by_its_content_whatever_its_overflow(overflow: Any) -> None:
    note = local("x:note", str, content_key=str, overflow=overflow)
    service = taker(note)
    async with Node("alice", service) as alice:
        for payload in ("a", "b", "a"):
            await alice.emit(note, payload)
        await settled()
        assert service.seen == ["a", "b"]
        assert alice.stats().dropped == {("x:note", "dedupe", "duplicate"): 1}


async def test_a_local_message_that_is_refused_is_counted_and_not_remembered() -> None:
    note = local("x:note", str, content_key=str, overflow="refuse", max_mailbox=1)
    service = taker(note)
    async with Node("alice", service) as alice:
        await alice.emit(note, "a")
        with pytest.raises(Overloaded):
            await alice.emit(note, "b")
        await settled()
        await alice.emit(note, "b")
        await settled()
        assert service.seen == ["a", "b"]
        assert alice.stats().dropped == {("x:note", "mailbox", "overloaded"): 1}


def test_of_equal_local_messages_that_wait_for_room_one_is_handled_whichever_is_cancelled() -> None:
    async def scenario(point: CancellationPoint) -> None:
        seen: list[str] = []
        note = local("x:note", str, content_key=str, max_mailbox=1, max_concurrent=1)

        class Slow(Service):
            name = "slow"

            @handles(note)
            async def take(self, msg: Message[str]) -> None:
                await asyncio.sleep(1)
                seen.append(msg.payload)

        async with Node("alice", Slow()) as alice:
            await alice.emit(note, "a")
            await asyncio.sleep(0.1)
            await alice.emit(note, "b")
            waiting = asyncio.create_task(point.cancel(alice.emit(note, "c")))
            await asyncio.sleep(0)
            behind = asyncio.create_task(alice.emit(note, "c"))
            cancelled = await waiting
            await behind
            await asyncio.sleep(10)
            assert seen == ["a", "b", "c"]
            assert alice.stats().dropped == ({} if cancelled else {("x:note", "dedupe", "duplicate"): 1})
            await alice.emit(note, "d")

    everywhere(scenario)


# --- the rate limit


async def test_a_call_above_the_limit_is_refused_over_the_wire_with_when_to_come_again() -> None:
    ask = request("x:ask", int, reply=int, rate_limit=(2, 10.0))
    service, hub = taker(ask), MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("carol", hub=hub) as carol, Node("bob", service, hub=hub) as bob:
        await alice.call(ask, 1, to="bob")
        await asyncio.sleep(4)
        await alice.call(ask, 2, to="bob")
        with pytest.raises(RateLimited) as refused:
            await alice.call(ask, 3, to="bob")
        error = refused.value
        assert (error.max_count, error.window, error.key, error.executed) == (2, 10.0, "alice", "no")
        assert error.retry_after == pytest.approx(6.0)
        assert await carol.call(ask, 4, to="bob") == 4, "each sender has a limit of its own"
        await asyncio.sleep(error.retry_after or 0)
        assert await alice.call(ask, 5, to="bob") == 5
        assert service.seen == [1, 2, 4, 5]
        assert bob.stats().dropped == {("x:ask", "rate_limit", "rate_limited"): 1}


async def test_a_request_that_comes_again_is_not_charged_again() -> None:
    ask = request("x:ask", int, reply=int, rate_limit=(2, 10.0))
    async with Node("alice", taker(ask)) as alice:
        for _ in range(5):
            assert await alice.call(ask, 1, to="alice", id="again") == 1
        assert await alice.call(ask, 2, to="alice") == 2


async def test_a_spray_of_senders_is_bounded_and_gets_nobody_around_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshkit.runtime.routes._MAX_SENDERS", 100)
    tell = broadcast("x:tell", int, rate_limit=(1, 10.0))
    service, hub = taker(tell), MemoryHub()

    async with Node("bob", service, hub=hub) as bob:

        def send(sender: str, number: int) -> None:
            bob._life.router.intake.take(sender, Tell(f"{number}", "x:tell", 1, 0.0, encode_payload(number)))  # type: ignore[union-attr]  # as from many nodes

        send("victim", 0)
        for number in range(1, 1001):
            send(f"sender-{number}", number)
        send("victim", 1001)
        await settled()
        assert service.seen == [*range(100)]
        assert bob.stats().dropped == {("x:tell", "rate_limit", "rate_limited"): 902}
        await asyncio.sleep(20)
        send("newcomer", 1002)
        await settled()
        assert service.seen[-1] == 1002


# --- hostile content


async def test_functions_of_a_behavior_that_raise_on_what_came_are_failures_and_never_harm_the_transport() -> None:
    def odd(value: Any) -> Any:
        raise LookupError(value)

    tells = [
        broadcast("x:key", int, content_key=lambda payload: odd(payload) if payload > 9 else payload),
        broadcast("x:filter", int, filter=lambda msg: odd(msg) if msg.payload > 9 else True),
        broadcast("x:order", int, order_by=lambda msg: odd(msg) if msg.payload > 9 else 0),
        broadcast("x:unhashable", int, order_by=lambda msg: cast("Any", [] if msg.payload > 9 else 0)),
    ]
    services = [taker(tell, f"s{n}") for n, tell in enumerate(tells)]
    hub = MemoryHub()
    async with Node("alice", hub=hub), Node("bob", *services, hub=hub) as bob:
        wires = [
            Tell(f"{kind.kind}-{payload}", kind.kind, 1, 0.0, encode_payload(payload))
            for payload in (99, 1)
            for kind in tells
        ]
        hub.send("alice", "bob", plain(*wires))
        await settled()
        assert [service.seen for service in services] == [[1]] * 4
        for service in ("s0", "s1", "s2", "s3"):
            assert f"{service}.take failed" in bob.logged


async def test_a_request_whose_order_cannot_be_told_is_answered_and_leaves_nothing() -> None:
    ask = request("x:ask", int, reply=int, order_by=lambda msg: cast("Any", []))
    async with Node("alice", taker(ask)) as alice:
        with pytest.raises(NotAccepted, match="'order_by' failed"):
            await alice.call(ask, 1, to="alice")
        assert (alice.stats().queued, alice.stats().running, alice.stats().pending) == (0, 0, 0)


async def test_expired_requests_and_malformed_ones_reach_no_handler() -> None:
    ask = request("x:ask", int, reply=int)
    service, hub = taker(ask), MemoryHub()
    async with Node("alice", hub=hub) as alice, Node("bob", service, hub=hub) as bob:
        hub.send("alice", "bob", plain(Ask("1", "x:ask", 1, 0.0, 0, encode_payload(1))))
        with pytest.raises(MalformedFrame):
            await alice.call(request("x:ask", str, reply=int), "text", to="bob")
        await settled()
        assert service.seen == []
        assert bob.stats().dropped == {("x:ask", "deadline", "expired"): 1, ("x:ask", "decode", "malformed_frame"): 1}


# --- what failed in a stage, as a dead letter


async def test_what_failed_in_a_stage_is_a_dead_letter_as_it_was_there_and_can_be_replayed() -> None:
    broken = True

    def check(msg: Message[Any]) -> Outcome:
        return Fail(ValueError("broken")) if broken else Continue(msg)

    ask = request("x:ask", int, reply=int, on_error="dead_letter", stages=[Stage("check", check)])
    raw = broadcast("x:raw", int, on_error="dead_letter", stages=[Stage("early", check, "decode")])
    service, other = taker(ask), taker(raw, "other")
    async with Node("alice", service, other) as alice:
        with pytest.raises(NotAccepted):
            await alice.call(ask, 1, to="alice", timeout=1)
        await alice.emit(raw, 2)
        letter, early = alice.dead_letters
        assert (letter.message.payload, letter.stage, letter.handler) == (1, "check", "taker.take")
        assert (early.message.payload, type(early.message.payload)) == (b"\x02", bytes)
        await asyncio.sleep(5)  # nobody waits any more
        assert alice.replay(letter)
        assert len(alice.dead_letters) == 2, "it failed again: there is one new letter, and the old one is gone"
        assert letter not in alice.dead_letters
        broken = False
        for each in alice.dead_letters:
            assert alice.replay(each)
        await settled()
        assert (service.seen, other.seen, alice.dead_letters) == ([1], [2], ())


async def test_a_letter_whose_replay_fails_where_one_letter_is_kept_takes_its_own_place() -> None:
    tell = broadcast("x:tell", int, on_error="dead_letter", stages=[Stage("no", lambda _: Fail(ValueError("no")))])
    async with Node("alice", taker(tell), max_dead_letters=1) as alice:
        await alice.emit(tell, 1)
        [letter] = alice.dead_letters
        assert alice.replay(letter)
        [new] = alice.dead_letters
        assert new is not letter
        assert new.message.deadline == math.inf


def test_a_failing_stage_stops_the_node_where_that_is_declared() -> None:
    async def main() -> None:
        tell = broadcast("x:tell", int, on_error="raise", stages=[Stage("no", lambda _: Fail(ValueError("no")))])
        with pytest.raises(Exception, match=r"handler 'taker\.take' at no") as stopped:
            async with Node("alice", taker(tell)) as alice:
                await alice.emit(tell, 1)
                await asyncio.sleep(1)
        assert isinstance(stopped.value.__cause__, ValueError)

    run(main)
