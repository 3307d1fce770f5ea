"""Hostile frames in any number, against a node of a running mesh.

10,000 by default; `MESHKIT_HOSTILE_FRAMES=100000` runs as many as the promise names.
"""

import asyncio
import gc
import math
import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from meshkit.runtime import Identity
from meshkit.runtime.frame import Prover
from meshkit.runtime.presence import Presence
from meshkit.runtime.wire import Ask, Beat, Reply, Tell, encode, encode_payload
from meshkit.testing import run
from tests.runtime.nodes import SLEEP, STORE, TEASE, Store, StoreAck
from tests.runtime.test_proved_mesh import ALICE, BOB, CAROL, EVE, Tapped, proved, settle, wall

FRAMES = int(os.environ.get("MESHKIT_HOSTILE_FRAMES", "10000"))
HEADER = 90
SENDER, RECIPIENT, STAMP = slice(2, 34), slice(34, 66), slice(82, 90)


async def recorded(hub: Tapped, nodes: list[Any]) -> list[tuple[str, str, bytes]]:
    """Let the mesh do a little of everything; return what went over the hub."""
    alice, bob, carol = nodes
    await asyncio.gather(*(alice.call(STORE, Store(f"{n}", bytes(n)), bob.node) for n in range(20)))
    await asyncio.gather(*(carol.emit(TEASE, "boo") for _ in range(5)))
    await carol.emit(TEASE, "boo", to=bob.node)
    call = asyncio.create_task(carol.call(SLEEP, 5.0, bob.node))
    await settle()
    call.cancel()
    await bob.call(STORE, Store("x"), alice.node)
    await asyncio.sleep(5)
    return list(hub.frames)


class Forger:
    """Makes frames that must not be taken by Bob, out of ones that others sent."""

    def __init__(self, rng: random.Random, frames: list[tuple[str, str, bytes]]) -> None:
        self.rng = rng
        self.for_bob = [frame for _, to, frame in frames if to == BOB.node_id]
        self.for_others = [frame for _, to, frame in frames if to != BOB.node_id]
        self.sealed_for_others = [frame for frame in self.for_others if frame[1] == 1]
        self.eve = Prover(EVE, started=0.0)
        self.alice = Prover(ALICE, started=0.0)
        self.strangers = [Identity.generate().public_key for _ in range(50)]
        self.stale = self._stale()

    def _stale(self) -> list[bytes]:
        """Return good frames of Alice that come too late: they are refused, and answered."""
        asks = encode([Ask(f"late-{n}", "stash:store", 1, 0.0, 1_000, encode_payload(Store("x"))) for n in range(2)])
        tells = encode([Tell("late", "social:tease", 1, 0.0, encode_payload("late"))])
        return [
            *(self.alice.seal(BOB.node_id, asks, wall() - 31 - n) for n in range(5)),
            *(self.alice.sign(tells, wall() - 31 - n) for n in range(5)),
        ]

    def one(self) -> tuple[str, bytes]:
        kind = self.rng.choice(list(KINDS))
        return kind, KINDS[kind](self)

    def _real(self) -> bytearray:
        return bytearray(self.rng.choice(self.for_bob))

    def random_bytes(self) -> bytes:
        return self.rng.randbytes(self.rng.randrange(400))

    def random_after_a_good_header(self) -> bytes:
        frame = self._real()
        return bytes(frame[: self.rng.choice((2, 34, 66, HEADER))]) + self.rng.randbytes(self.rng.randrange(300))

    def flipped(self) -> bytes:
        frame = self._real()
        for _ in range(self.rng.choice((1, 1, 2, 9))):
            frame[self.rng.randrange(len(frame))] ^= 1 << self.rng.randrange(8)
        return bytes(frame)

    def truncated(self) -> bytes:
        frame = self._real()
        return bytes(frame[: self.rng.randrange(len(frame))])

    def extended(self) -> bytes:
        return bytes(self._real()) + self.rng.randbytes(self.rng.randrange(1, 50))

    def replayed(self) -> bytes:
        return bytes(self._real())

    def forged(self) -> bytes:
        """A good frame by somebody whom nobody trusts, as it is or said to be Alice's."""
        bundle = encode([Tell("1", "social:tease", 1, 0.0, encode_payload("forged"))])
        frame = self.eve.sign(bundle, wall()) if self.rng.random() < 0.5 else self.eve.seal(BOB.node_id, bundle, wall())
        claimed = self.rng.choice((None, ALICE.public_key, CAROL.public_key, BOB.public_key, bytes(32)))
        return frame if claimed is None else frame[:2] + claimed + frame[34:]

    def of_a_stranger(self) -> bytes:
        frame = self._real()
        frame[SENDER] = self.rng.choice(self.strangers)
        return bytes(frame)

    def re_stamped(self) -> bytes:
        frame = self._real()
        frame[STAMP] = round((wall() + self.rng.uniform(-40, 40)) * 1_000_000).to_bytes(8, "big")
        return bytes(frame)

    def re_targeted(self) -> bytes:
        frame = bytearray(self.rng.choice(self.sealed_for_others))
        frame[RECIPIENT] = BOB.public_key
        return bytes(frame)

    def for_another(self) -> bytes:
        return self.rng.choice(self.sealed_for_others)

    def too_late(self) -> bytes:
        return self.rng.choice(self.stale)

    def plain(self) -> bytes:
        return b"\x01\x00" + encode([Tell("1", "social:tease", 1, 0.0, encode_payload("plain"))])

    def of_another_version(self) -> bytes:
        frame = self._real()
        frame[self.rng.randrange(2)] = self.rng.randrange(3, 256)
        return bytes(frame)


KINDS: dict[str, Callable[[Forger], bytes]] = {
    name: make for name, make in vars(Forger).items() if not name.startswith("_") and name != "one"
}


def test_no_hostile_frame_reaches_a_handler_each_is_counted_once_and_nothing_is_left() -> None:
    async def main() -> None:
        trust = {ALICE.node_id, BOB.node_id, CAROL.node_id}
        async with proved(ALICE, BOB, CAROL, heartbeat=None, trust=trust) as (hub, nodes, stashes):
            bob, stash = nodes[1], stashes[1]
            forger = Forger(random.Random(7), await recorded(hub, nodes))
            hub.frames.clear()
            hub.inject(bob, forger.stale[0])
            before = (len(stash.begun), len(stash.teases), bob.stats(), nodes[0].stats(), asyncio.all_tasks())
            made: Counter[str] = Counter()

            async def flood(count: int) -> None:
                for n in range(count):
                    kind, frame = forger.one()
                    made[kind] += 1
                    hub.inject(bob, frame, f"10.0.0.{n % 256}")
                    if n % 100 == 0:
                        await settle()
                        hub.frames.clear()
                await settle()
                hub.frames.clear()

            async def memory_after(count: int) -> int:
                await flood(count)
                gc.collect()
                return tracemalloc.get_traced_memory()[0]

            warm_up = 2_000  # after which the journal holds as many drops and notes as it ever will
            await flood(FRAMES - 2 * warm_up)
            tracemalloc.start()
            try:
                await flood(warm_up // 2)
                first = await memory_after(warm_up // 2)
                second = await memory_after(warm_up)
            finally:
                tracemalloc.stop()
            assert abs(second - first) < 100_000, "bytes"

            assert (len(stash.begun), len(stash.teases)) == before[:2]
            assert asyncio.all_tasks() == before[4]
            after = bob.stats()
            assert (after.delivered, after.queued, after.running) == (before[2].delivered, 0, 0)
            reasons = Counter(after.dropped)
            reasons.subtract(before[2].dropped)
            assert {(kind, stage) for (kind, stage, _), count in reasons.items() if count} == {("", "frame")}
            counts = {reason: count for (_, _, reason), count in reasons.items() if count}
            assert sum(counts.values()) == made.total() == FRAMES
            assert set(counts) == {
                "malformed_frame",
                "unknown_sender",
                "bad_seal",
                "bad_signature",
                "replayed",
                "stale",
            }
            assert counts["stale"] == made["too_late"]
            assert counts["replayed"] >= made["replayed"]
            assert min(made.values()) > FRAMES / len(KINDS) / 2
            assert nodes[0].stats().delivered == before[3].delivered

            assert await nodes[0].call(STORE, Store("good", b"abc"), bob.node) == StoreAck(3), "it is as well as before"
            assert stash.begun[-1] == "good"

    run(main)


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


# --- what a node that is trusted may say ----------------------------------------------------------------------

IDS = st.sampled_from(["1", "2", "id", "", "x" * 128, "\0"]) | st.text(max_size=3)
TIMES = st.sampled_from([0.0, 1e9, -1.0, math.nan, math.inf, 1e300, -0.0]) | st.floats()
NUMBERS = st.sampled_from([0, 1, 2, -1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63)])
KIND_NAMES = st.sampled_from(["stash:store", "social:tease", "stash:stored", "stash:odd", "no:such", "", "a" * 256])
JUNK = st.recursive(
    st.none() | NUMBERS | TIMES | IDS | st.binary(max_size=5) | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(IDS, inner, max_size=3),
    max_leaves=10,
)
PAYLOADS = JUNK | st.just({"name": "x", "data": b"y"}) | st.just("text") | st.integers(1, 300).map(nested)
NAMES = st.sampled_from(["bob", "eve", "", "a b", "a\nb", "\x1b[2J", "x" * 300, "\u202e"]) | st.text(max_size=4)
MESSAGES = st.one_of(
    st.tuples(st.just("t"), IDS, KIND_NAMES, NUMBERS, TIMES, PAYLOADS),
    st.tuples(st.just("a"), IDS, KIND_NAMES, NUMBERS, TIMES, NUMBERS, PAYLOADS),
    st.tuples(st.just("r"), IDS, PAYLOADS),
    st.tuples(
        st.just("f"),
        IDS,
        st.sampled_from(["failed", "cut", "draining", "rate_limited", "no", ""]),
        IDS,
        NUMBERS,
        TIMES,
        TIMES | st.none(),
        IDS,
        st.booleans(),
    ),
    st.tuples(st.just("c"), IDS),
    st.tuples(
        st.just("b"),
        NAMES,
        st.lists(KIND_NAMES, max_size=3),
        TIMES | st.just(1e300),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    st.tuples(st.just("g")),
    JUNK,
)
BUNDLES = (
    st.lists(MESSAGES, max_size=6).map(msgspec.msgpack.encode)
    | st.binary(max_size=60)
    | JUNK.map(msgspec.msgpack.encode)
)


@given(st.lists(st.tuples(BUNDLES, st.booleans(), st.sampled_from([0, 0, 0, -40, 40])), min_size=1, max_size=6))
def test_whatever_a_trusted_node_says_nothing_breaks_and_nothing_is_left(
    frames: list[tuple[bytes, bool, int]],
) -> None:
    async def main() -> None:
        async with proved(BOB, CAROL) as (hub, [bob, carol], _):
            alice = Prover(ALICE, started=0.0)
            call = asyncio.create_task(bob.call(SLEEP, 2.0, carol.node, id="id"))
            await settle()
            for bundle, to_all, late in frames:
                sign_or_seal = alice.sign if to_all else lambda data, now: alice.seal(bob.node, data, now)
                hub.inject(bob, sign_or_seal(bundle, wall() + late), ALICE.node_id)
                await asyncio.sleep(0.01)
            assert await call == 2.0, "what others say to each other is not touched by it"
            assert await carol.call(STORE, Store("good"), bob.node) == StoreAck(0)
            await asyncio.sleep(5)
            stats = bob.stats()
            assert stats.queued == stats.running == stats.pending == 0
            assert stats.delivered == stats.handled + stats.failed + stats.cancelled
            assert set(bob.peers) - {ALICE.node_id} == {carol.node}

    run(main)


async def taken(*wires: Any, to_all: bool = False) -> tuple[dict[tuple[str, str, str], int], Any, Any]:
    """Let Bob receive what Alice says; return what was dropped, his `Stash`, and the node."""
    async with proved(BOB) as (hub, [bob], [stash]):
        alice = Prover(ALICE, started=0.0)
        bundle = msgspec.msgpack.encode(wires)
        hub.inject(bob, alice.sign(bundle, wall()) if to_all else alice.seal(bob.node, bundle, wall()))
        await settle()
        return dict(bob.stats().dropped), stash, dict(bob.peers)


MALFORMED = {("", "frame", "malformed_frame"): 1}


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "eve\nERROR all is lost", "a\x1b[2Jb", "a\u202eb", "a\u2028b", "a\u200bb"]
)
async def test_a_name_that_could_pass_for_something_else_is_not_shown(name: str) -> None:
    dropped, _, peers = await taken(Beat(name, (), 1.0))
    assert (dropped, [peer.name for peer in peers.values()]) == ({}, [ALICE.node_id])


async def test_one_message_that_is_malformed_is_counted_and_those_around_it_are_taken() -> None:
    good = Tell("1", "social:tease", 1, 0.0, encode_payload("boo"))
    bad: list[Any] = [
        ["t", "2", "social:tease", 1, math.nan, "boo"],
        ["a", "2", "stash:store", 1, 0.0, -1, {"name": "x"}],
        ["t", "x" * 1_000, "social:tease", 1, 0.0, "boo"],
        ["new", "a newer node knows what this is"],
        ["f", "2", "for a reason that is new"],
    ]
    also = Ask("3", "stash:store", 1, 0.0, 1_000, encode_payload(Store("x")))
    for wire in bad:
        dropped, stash, _ = await taken(good, wire, also)
        assert dropped.pop(("", "transport", "unreachable")) == 1, "the answer; she is not there"
        assert dropped == {("", "frame", "malformed_message"): 1}
        assert (len(stash.teases), stash.begun) == (1, ["x"])
    dropped, stash, _ = await taken(*[bad[0]] * 256)
    assert (dropped, stash.teases) == ({("", "frame", "malformed_message"): 256}, [])
    dropped, stash, _ = await taken(*[good] * 257)
    assert (dropped, stash.teases) == (MALFORMED, [])


async def test_duplicate_ids_in_one_bundle_are_handled_once() -> None:
    tell = Tell("1", "social:tease", 1, 0.0, encode_payload("boo"))
    ask = Ask("2", "stash:store", 1, 0.0, 1_000, encode_payload(Store("x")))
    dropped, stash, _ = await taken(*[tell] * 100, *[ask] * 100)
    assert (len(stash.teases), stash.begun) == (1, ["x"])
    assert dropped.pop(("", "transport", "unreachable")) == 1, "the one answer; she is not there"
    assert dropped == {("social:tease", "dedupe", "duplicate"): 99, ("stash:store", "dedupe", "duplicate"): 99}


async def test_a_payload_that_is_not_utf_8_or_too_deep_is_malformed_and_the_rest_is_taken() -> None:
    good = Tell("1", "social:tease", 1, 0.0, encode_payload("boo"))
    for payload in (b"\xa1\xff", b"\xa3\xed\xa0\x80", b"\xc0", b"\x91" * 300 + b"\xc0", b"\xcb\x7f\xf8" + bytes(6)):
        bad = Tell("2", "social:tease", 1, 0.0, msgspec.Raw(payload))
        dropped, stash, _ = await taken(bad, good)
        assert dropped == {("social:tease", "decode", "malformed_frame"): 1}
        assert len(stash.teases) == 1


async def test_a_reply_in_a_frame_that_is_signed_for_all_is_not_taken() -> None:
    dropped, *_ = await taken(Reply("1", encode_payload(1)), Reply("2", encode_payload(2)), to_all=True)
    assert dropped == {("", "frame", "not_sealed"): 2}


async def test_a_node_that_beats_every_1e300_seconds_still_falls_silent() -> None:
    async with proved(BOB, heartbeat=None) as (hub, [bob], _):
        alice = Prover(ALICE, started=0.0)
        for every in (1e300, math.inf, math.nan, -1.0, 0.0):
            hub.inject(bob, alice.sign(encode([Beat("alice", (), every)]), wall()))
            assert set(bob.peers) == {ALICE.node_id}
            await asyncio.sleep(4 * Presence.LONGEST)
            assert set(bob.peers) == set()


async def test_kinds_and_versions_that_are_made_up_fill_no_memory() -> None:
    wires = [Tell(f"{n}", f"made:up-{n}", n, 0.0, encode_payload(n)) for n in range(250)]
    wires += [Tell(f"v{n}", "social:tease", 2**40 + n, 0.0, encode_payload(n)) for n in range(5)]
    dropped, *_ = await taken(*wires)
    assert dropped == {("", "kind", "no_handler"): 250, ("social:tease", "version", "not_accepted"): 5}
