import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, strategies as st

from meshkit.errors import Closed, MalformedFrame, MeshkitError, Overloaded, PeerLost, Unreachable
from meshkit.runtime.frame import Prover
from meshkit.runtime.identity import Identity
from meshkit.runtime.outbox import PLAIN, Outbox
from meshkit.runtime.wire import MAX_BUNDLE, Cancel, Goodbye, Reply, Wire, decode, encode
from meshkit.testing import SimLoop, run, simulated
from meshkit.testing._sim_faults import Faults
from tests.runtime.nodes import SLEEP, STORE, TEASE, Store, mesh

ALICE, BOB = (Identity.from_seed(letter * 32) for letter in (b"a", b"b"))


class Line:
    """A transport that keeps what it is given, or raises `error`."""

    in_process = True
    exposed = False
    max_frame = 10**9
    peers = ()

    def __init__(self, error: BaseException | None = None) -> None:
        self.sent: list[tuple[str | None, bytes]] = []
        self.error = error
        self.on_send: Callable[[], object] = lambda: None

    def send(self, to: str, frame: bytes) -> None:
        self._take(to, frame)

    def broadcast(self, frame: bytes) -> None:
        self._take(None, frame)

    def _take(self, to: str | None, frame: bytes) -> None:
        if self.error is not None:
            raise self.error
        assert type(frame) is bytes
        self.sent.append((to, frame))
        self.on_send()

    def bundles(self) -> list[tuple[str | None, list[Wire]]]:
        return [(to, decode(frame[len(PLAIN) :])) for to, frame in self.sent]


class Unsent(list[tuple[str | None, Sequence[Wire], Exception]]):
    def __call__(self, to: str | None, wires: Sequence[Wire], error: Exception) -> None:
        self.append((to, wires, error))


def outbox(line: Line, unsent: Unsent | None = None, prover: Prover | None = None) -> Outbox:
    return Outbox(cast("Any", line), prover, Unsent() if unsent is None else unsent)


def wire(number: int, size: int = 0) -> Reply:
    return Reply(str(number), msgspec.Raw(msgspec.msgpack.encode(bytes(size))))


async def turn() -> None:
    await asyncio.sleep(0)


async def test_what_is_posted_in_one_turn_leaves_in_one_frame_for_each_destination() -> None:
    line = Line()
    box = outbox(line)
    for number in range(6):
        box.post(("bob", "carol", None)[number % 3], wire(number))
    assert line.sent == [], "the turn is not over"
    await turn()
    assert line.bundles() == [
        ("bob", [wire(0), wire(3)]),
        ("carol", [wire(1), wire(4)]),
        (None, [wire(2), wire(5)]),
    ]
    await turn()
    box.post("bob", wire(6))
    await turn()
    assert line.bundles()[3:] == [("bob", [wire(6)])]


def test_bundles_that_leave_late_keep_their_order_and_leave_at_once_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faults, "ARMED", 1.0)
    monkeypatch.setattr(Faults, "FIRES", 1.0)

    async def main(sim: SimLoop) -> None:
        line = Line()
        box = outbox(line)
        box.post("bob", wire(0))
        await asyncio.sleep(Outbox.LATE / 2)
        assert line.sent == []
        box.post("bob", wire(1))
        await asyncio.sleep(Outbox.LATE)
        assert line.bundles() == [("bob", [wire(0), wire(1)])]
        box.post("bob", wire(2))
        box.flush()
        assert line.bundles()[1:] == [("bob", [wire(2)])]
        assert sim.fired == {"outbox: bundles leave late": 2}  # and no timer is left behind

    simulated(1, main, buggify=True)


async def test_a_bundle_is_bounded_in_count() -> None:
    line = Line()
    box = outbox(line)
    for number in range(2 * MAX_BUNDLE + 1):
        box.post("bob", wire(number))
    assert [len(bundle) for _, bundle in line.bundles()] == [MAX_BUNDLE, MAX_BUNDLE]
    await turn()
    assert [len(bundle) for _, bundle in line.bundles()] == [MAX_BUNDLE, MAX_BUNDLE, 1]
    assert [of.id for _, bundle in line.bundles() for of in cast("list[Reply]", bundle)] == [
        str(number) for number in range(2 * MAX_BUNDLE + 1)
    ]


@pytest.mark.parametrize("large", ["payload", "id"])
async def test_a_bundle_is_bounded_in_bytes_whatever_they_are_of(large: str) -> None:
    """An id of 100,000 characters is refused by whoever gets it; it is only the largest thing besides a payload."""
    line = Line()
    box = outbox(line)
    for number in range(9):
        box.post("bob", wire(number, 100_000) if large == "payload" else Cancel(str(number) * 100_000))
    await turn()
    assert [len(frame) <= Outbox.MAX_BYTES + len(PLAIN) for _, frame in line.sent] == [True] * 5
    assert len(line.sent[0][1]) > 200_000


async def test_what_is_larger_than_a_bundle_has_one_for_itself_and_keeps_its_place() -> None:
    line = Line()
    box = outbox(line)
    wires = [wire(0), wire(1, 2 * Outbox.MAX_BYTES), wire(2), wire(3)]
    for each in wires:
        box.post("bob", each)
    await turn()
    assert [bundle for _, bundle in line.bundles()] == [wires[:1], wires[1:2], wires[2:]]


async def test_all_bundles_fit_into_the_frames_of_a_prover_that_has_small_ones() -> None:
    line = Line()
    prover, bob = (Prover(of, started=0.0, max_frame=1_000) for of in (ALICE, BOB))
    unsent = Unsent()
    box = outbox(line, unsent, prover)
    for number in range(50):
        box.post(None, wire(number, number))
    await turn()
    assert unsent == []
    wall = asyncio.get_running_loop().wall_time()  # type: ignore[attr-defined]  # of the loop on virtual time
    arrived = [of for _, frame in line.sent for of in decode(bob.open(frame, wall).bundle)]
    assert arrived == [wire(number, number) for number in range(50)]
    assert 1 < len(line.sent) < 5


@pytest.mark.parametrize("to", [BOB.node_id, None])
async def test_what_does_not_fit_into_a_frame_is_unsent_alone(to: str | None) -> None:
    line, unsent = Line(), Unsent()
    box = outbox(line, unsent, Prover(ALICE, started=0.0, max_frame=1_000))
    for number, size in enumerate((0, 2_000, 0)):
        box.post(to, wire(number, size))
    await turn()
    assert len(line.sent) == 2
    [(unsent_to, wires, error)] = unsent
    assert (unsent_to, wires) == (to, [wire(1, 2_000)])
    assert isinstance(error, Unreachable)
    assert "bundle must be at most" in str(error)


async def test_who_has_no_node_id_cannot_be_sent_what_is_proved() -> None:
    line, unsent = Line(), Unsent()
    box = outbox(line, unsent, Prover(ALICE, started=0.0))
    box.post("bob", wire(0))
    box.post(BOB.node_id, wire(1))
    await turn()
    assert [to for to, _ in line.sent] == [BOB.node_id]
    assert "node 'bob' cannot be reached: 'bob' is not a node id" in str(unsent[0][2])


@pytest.mark.parametrize(
    "error", [Overloaded(name="line", limit=1), KeyError("x"), OSError(), StopIteration(), RecursionError()]
)
async def test_whatever_a_transport_raises_is_for_those_whose_messages_it_had(error: Exception) -> None:
    line, unsent = Line(error), Unsent()
    box = outbox(line, unsent)
    for to in ("bob", None, "carol"):
        box.post(to, wire(0))
        box.post(to, wire(1))
    await turn()
    assert unsent == [(to, [wire(0), wire(1)], error) for to in ("bob", None, "carol")]
    line.error = None
    box.post("bob", wire(2))
    await turn()
    assert line.bundles() == [("bob", [wire(2)])]


async def test_a_cancellation_that_a_transport_raises_is_a_failure_like_any_other() -> None:
    unsent = Unsent()
    box = outbox(Line(asyncio.CancelledError("of a task of its own")), unsent)
    box.post("bob", wire(0))
    box.flush()
    assert "of a task of its own" in str(unsent[0][2])
    await turn()


def test_an_interrupt_passes_through_and_the_other_destinations_are_served_in_the_next_turn() -> None:
    async def main() -> None:
        line, unsent = Line(KeyboardInterrupt()), Unsent()
        box = outbox(line, unsent)
        for to in ("bob", "carol"):
            box.post(to, wire(0))
        with pytest.raises(KeyboardInterrupt):
            box.flush()
        line.error = None
        await turn()
        await turn()
        assert line.bundles() == [("carol", [wire(0)])]

    run(main)


async def test_what_cannot_be_encoded_spoils_nothing_else() -> None:
    line = Line()
    box = outbox(line)
    with pytest.raises(UnicodeEncodeError):
        box.post("bob", Cancel("\ud800"))
    await turn()
    assert line.sent == [], "there was nothing to send"
    box.post("bob", wire(0))
    with pytest.raises(UnicodeEncodeError):
        box.post("bob", Reply("a" * 50 + "\ud800", msgspec.Raw(b"\xc0")))
    box.post("bob", wire(1))
    await turn()
    assert line.bundles() == [("bob", [wire(0), wire(1)])]


async def test_what_is_posted_while_a_bundle_is_sent_leaves_after_it_and_once() -> None:
    """As between two nodes on one hub, each of which answers at once when its bundle is full."""
    line = Line()
    box = outbox(line)
    more = iter(range(MAX_BUNDLE, MAX_BUNDLE + 10))

    def answer() -> None:
        for number in more:
            box.post("bob", wire(number))

    line.on_send = answer
    for number in range(MAX_BUNDLE):
        box.post("bob", wire(number))
    await turn()
    assert [len(bundle) for _, bundle in line.bundles()] == [MAX_BUNDLE, 10]
    assert [cast("Reply", of).id for _, bundle in line.bundles() for of in bundle] == [
        str(number) for number in range(MAX_BUNDLE + 10)
    ]


async def test_who_answers_each_frame_with_another_does_not_hold_up_the_loop() -> None:
    line = Line()
    box = outbox(line)
    line.on_send = lambda: box.post("bob", wire(0))
    box.post("bob", wire(0))
    for turns in range(1, 5):
        await turn()
        assert len(line.sent) == turns
    line.on_send = lambda: None
    await turn()


async def test_flush_sends_at_once_and_the_turn_has_nothing_left() -> None:
    line = Line()
    box = outbox(line)
    box.post(None, Goodbye())
    box.flush()
    assert line.bundles() == [(None, [Goodbye()])]
    await turn()
    box.flush()
    assert len(line.sent) == 1


async def test_nothing_is_kept_of_destinations_that_were_served() -> None:
    box = outbox(Line())
    for number in range(1_000):
        box.post(f"node {number}", wire(number))
    await turn()
    sizes = [len(value) for value in vars(box).values() if isinstance(value, dict | list | set)]
    assert sizes == [0] * len(sizes) != []


LIMIT = 1_000


def frames_of(posts: list[tuple[str | None, int, bool]]) -> dict[str | None, list[list[Wire]]]:
    """The model: in each turn, for each destination, the next bundle begins when the present one has no room."""
    frames: dict[str | None, list[list[Wire]]] = {}
    open_: dict[str | None, int] = {}  # bytes
    for number, (to, size, turn_ends) in enumerate(posts):
        each = wire(number, size)
        length = len(encode(each))
        if to not in open_ or open_[to] + length > LIMIT:
            frames.setdefault(to, []).append([])
            open_[to] = 3
        frames[to][-1].append(each)
        open_[to] += length
        if turn_ends:
            open_.clear()
    return frames


@given(
    st.lists(
        st.tuples(st.sampled_from(["bob", "carol", None]), st.sampled_from([0, 1, 50, 400, 5_000]), st.booleans()),
        max_size=60,
    )
)
def test_each_destination_gets_everything_once_in_order_in_as_few_frames_as_the_model_says(
    posts: list[tuple[str | None, int, bool]],
) -> None:
    async def main() -> None:
        line = Line()
        box = outbox(line)
        vars(box)["_max_bytes"] = LIMIT
        for number, (to, size, turn_ends) in enumerate(posts):
            box.post(to, wire(number, size))
            if turn_ends:
                await turn()
        await turn()
        arrived: dict[str | None, list[list[Wire]]] = {}
        for to, bundle in line.bundles():
            arrived.setdefault(to, []).append(bundle)
        assert arrived == frames_of(posts)

    run(main)


# --- in a node ----------------------------------------------------------------------------------------------


class Refusing:
    """Makes the hub raise an error instead of carrying anything."""

    def __init__(self, hub: Any, error: BaseException) -> None:
        self.error = error
        hub.send = hub.broadcast = self._raise

    def _raise(self, *_: object) -> None:
        raise self.error


async def test_calls_that_could_not_be_sent_fail_at_once_each_with_an_error_of_its_own() -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], _):
        shared = Overloaded(name="line", limit=7)
        Refusing(hub, shared)
        results = await asyncio.gather(
            *(alice.call(STORE, Store("x"), "bob") for _ in range(3)), return_exceptions=True
        )
        assert [type(error) for error in results] == [Overloaded] * 3
        assert len({id(error) for error in [*results, shared]}) == 4
        assert alice.stats().pending == 0
        del hub.send, hub.broadcast


@pytest.mark.parametrize(
    "error",
    [
        OSError("the line is dead"),
        asyncio.CancelledError("elsewhere"),
        StopIteration(),
        MalformedFrame(reason="of another layer"),
    ],
)
async def test_a_transport_that_fails_is_logged_and_nobody_knows_what_became_of_what_it_had(
    error: BaseException,
) -> None:
    async with mesh("alice", "bob") as (hub, [alice, bob], [_, stash]):
        Refusing(hub, error)
        with pytest.raises(PeerLost, match="node 'bob' went away before it answered; it may still have happened"):
            await alice.call(SLEEP, 1.0, "bob")
        assert "the transport failed" in alice.logged
        assert "peer=bob" in alice.logged
        tease = await alice.emit(TEASE, "boo")
        await turn()
        assert alice.stats().dropped["social:tease", "transport", "peer_lost"] == 1
        assert "dropped at transport: peer_lost" in alice.explain(tease)
        assert "peer='every node'" in alice.logged
        assert "node=" not in alice.logged, "who logs is not the one to whom it could not be sent"
        del hub.send, hub.broadcast
        await alice.call(STORE, Store("after"), "bob")
        assert stash.begun == ["after"]
        assert bob.stats().failed == 0


async def test_what_a_transport_has_carried_before_it_failed_may_have_run_as_its_caller_is_told() -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], [_, stash]):
        send = hub.send

        def send_and_fail(sender: str, to: str, frame: bytes) -> None:
            send(sender, to, frame)
            if sender == "alice":
                raise OSError("the broker closed while it acknowledged")

        hub.send = send_and_fail  # type: ignore[method-assign]
        with pytest.raises(PeerLost) as caught:
            await alice.call(STORE, Store("once"), "bob")
        assert caught.value.executed == "maybe"
        await asyncio.sleep(0.1)
        assert stash.begun == ["once"]


@pytest.mark.parametrize("error", [Unreachable(node="bob"), Overloaded(name="line", limit=7), Closed(name="line")])
async def test_a_transport_that_says_that_it_sent_nothing_is_believed(error: MeshkitError) -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], _):
        Refusing(hub, error)
        with pytest.raises(type(error)) as caught:
            await alice.call(STORE, Store("x"), "bob")
        assert caught.value.executed == "no"
        assert alice.logged == ""
        del hub.send, hub.broadcast


async def test_a_call_whose_id_is_not_unicode_harms_no_other() -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        results = await asyncio.gather(
            alice.call(STORE, Store("one"), "bob"),
            alice.call(STORE, Store("two"), "bob", id="\ud800"),
            alice.call(STORE, Store("three"), "bob"),
            return_exceptions=True,
        )
        assert [isinstance(of, Exception) for of in results] == [False, True, False]
        assert isinstance(results[1], ValueError)
        assert alice.stats().pending == 0


@pytest.mark.parametrize("bad", ["x" * 129, "", 7, b"x"])
async def test_an_id_is_a_short_text(bad: Any) -> None:
    async with mesh("alice", "bob") as (_, [alice, _], _):
        with pytest.raises(ValueError, match="id must be text of 1 to 128 characters, not "):
            await alice.call(STORE, Store("x"), "bob", id=bad)


class Half(Line):
    """A transport on which some nodes miss each broadcast."""

    def broadcast(self, frame: bytes) -> dict[str, Overloaded]:  # type: ignore[override]  # Line's returns nothing
        super().broadcast(frame)
        return {node: Overloaded(name=f"connection to {node}", limit=7) for node in ("bob", "carol")}


async def test_a_broadcast_that_some_nodes_miss_is_reported_once_with_who_misses_it() -> None:
    unsent = Unsent()
    box = outbox(line := Half(), unsent)
    box.post(None, wire(1))
    box.flush()
    assert len(line.sent) == 1
    [(to, wires, error)] = unsent
    assert (to, wires) == (None, [wire(1)])
    assert isinstance(error, Overloaded)
    assert str(error) == "connection to bob, and 1 more: full, it holds 7 already"
