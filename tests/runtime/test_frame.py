import gc
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from meshkit.errors import (
    BadSeal,
    BadSignature,
    MalformedFrame,
    Replayed,
    Stale,
    UnknownSender,
    Untrusted,
)
from meshkit.runtime import frame as frames
from meshkit.runtime.frame import Opened, Prover, Trust, claimed_sender
from meshkit.runtime.identity import Identity, node_id_of

ALICE, BOB, EVE = (Identity.from_seed(letter * 32) for letter in (b"a", b"b", b"e"))
START = 1_700_000_000.0
NOW = START + 100
HEADER, SEAL, SIGNATURE = 90, 40, 64
RECIPIENT = slice(34, 66)


def prover(
    identity: Identity,
    trust: Trust = None,
    *,
    started: float = START,
    max_frame: int = 10_000,
    max_remembered: int = 1_000,
) -> Prover:
    return Prover(identity, trust=trust, started=started, max_frame=max_frame, max_remembered=max_remembered)


@pytest.fixture
def alice() -> Prover:
    return prover(ALICE)


@pytest.fixture
def bob() -> Prover:
    return prover(BOB)


def both(sender: Prover, bundle: bytes = b"bundle", now: float = NOW) -> list[bytes]:
    return [sender.seal(BOB.node_id, bundle, now), sender.sign(bundle, now)]


# --- what is good -------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.sampled_from([bytes, bytearray]))
def test_what_is_sealed_or_signed_opens_as_it_was(bundle: bytes, kind: type[bytes] | type[bytearray]) -> None:
    alice, bob = prover(ALICE), prover(BOB)
    sealed, signed = alice.seal(BOB.node_id, kind(bundle), NOW), alice.sign(kind(bundle), NOW)
    assert bob.open(sealed, NOW + 1) == Opened(ALICE.node_id, bundle, to_all=False, time=NOW, stale=None)
    assert bob.open(signed, NOW + 1) == Opened(ALICE.node_id, bundle, to_all=True, time=NOW, stale=None)
    assert len(sealed) == HEADER + SEAL + len(bundle)
    assert len(signed) == HEADER + SIGNATURE + len(bundle)
    assert bundle not in sealed or len(bundle) < 4


def test_what_is_signed_opens_at_every_node_and_what_is_sealed_at_one() -> None:
    sealed, signed = both(prover(ALICE))
    eve = prover(EVE)
    assert eve.open(signed, NOW).bundle == b"bundle"
    with pytest.raises(MalformedFrame, match="a frame for another node"):
        eve.open(sealed, NOW)


def test_the_way_back_has_another_key() -> None:
    """What Alice sealed for Bob does not open as what Bob sealed for Alice, with the header changed to say so."""
    frame = bytearray(prover(ALICE).seal(BOB.node_id, b"bundle", NOW))
    frame[2:34], frame[RECIPIENT] = frame[RECIPIENT], frame[2:34]
    with pytest.raises(BadSeal):
        prover(ALICE).open(bytes(frame), NOW)


def test_the_largest_bundle_fits_and_no_larger_one(alice: Prover, bob: Prover) -> None:
    assert alice.max_bundle == 10_000 - HEADER - SIGNATURE
    largest = bytes(alice.max_bundle)
    for frame in both(alice, largest):
        assert bob.open(frame, NOW).bundle == largest
    with pytest.raises(ValueError, match="bundle must be at most 9846 bytes, not 9847"):
        alice.seal(BOB.node_id, largest + b"x", NOW)
    with pytest.raises(ValueError, match="bundle must be at most 9846 bytes, not 9847"):
        alice.sign(largest + b"x", NOW)


# Made by another process, on another day: the format is a promise to nodes that run another version.
SEALED_VECTOR = (
    "0101af06a3e3291714e4f356c19c9b15cd1951ec6e6662aa77be07547f289383341d2df04125f0015afb47ce853aef877209"
    "4ff9498c14cb1b9e12973c2927da0fa6e368abe76708661d70e41b55627ad26800060a241e142100fe452165fdbbf45380ac"
    "fd6adf6554a877125f10a5f2a060d165e965636235c00ca801cd29f204ae207b924abb07e6"
)
SIGNED_VECTOR = (
    "0102af06a3e3291714e4f356c19c9b15cd1951ec6e6662aa77be07547f289383341d00000000000000000000000000000000"
    "00000000000000000000000000000000a6ae86facb06b0d7a79230fad24fdc0c00060a241e142100cffc3013561cc62fe437"
    "5d83711c47489c7255fb3b60088f0d0706e95c7d8c7492511a64e79b7734642c92a0ded0787d09e5b6675dda10be2083034f"
    "01d7ab0f746865206d6170"
)


def test_frames_of_another_day_open() -> None:
    for vector, to_all in ((SEALED_VECTOR, False), (SIGNED_VECTOR, True)):
        opened = prover(BOB, {ALICE.node_id}).open(bytes.fromhex(vector), NOW + 29)
        assert opened == Opened(ALICE.node_id, b"the map", to_all=to_all, time=NOW, stale=None)


OTHER_PROCESS = """
import sys
from meshkit.runtime.frame import Prover
from meshkit.runtime.identity import Identity
bob, alice = (Prover(Identity.from_seed(seed * 32), started=0.0) for seed in (b"b", b"a"))
bundles = [bob.open(bytes.fromhex(line), float(sys.argv[1])).bundle for line in sys.stdin.read().split()]
print(bob.seal(alice.identity.node_id, b" and ".join(bundles), float(sys.argv[1])).hex())
"""


def test_two_processes_agree(alice: Prover) -> None:
    sent = "\n".join(frame.hex() for frame in both(alice))
    command = [sys.executable, "-c", OTHER_PROCESS, str(NOW)]
    answer = subprocess.run(command, input=sent, capture_output=True, text=True, check=True).stdout
    opened = alice.open(bytes.fromhex(answer), NOW)
    assert (opened.sender, opened.bundle) == (BOB.node_id, b"bundle and bundle")


# --- what is hostile ----------------------------------------------------------------------------------------


def refused(bob: Prover, frame: bytes | bytearray, now: float = NOW) -> Untrusted:
    try:
        bob.open(bytes(frame), now)
    except Untrusted as error:
        assert bob.seen.count == 0
        return error
    raise AssertionError("it was opened")


@given(st.binary(max_size=300))
def test_random_bytes_are_malformed(frame: bytes) -> None:
    assert type(refused(prover(BOB), frame)) is MalformedFrame


@given(st.binary(max_size=200), st.integers(0, 2), st.integers(1, 2), st.sampled_from([BOB.public_key, bytes(32)]))
def test_random_bytes_in_a_frame_for_this_node_are_refused(
    data: bytes, version: int, proof: int, recipient: bytes
) -> None:
    frame = bytes([version, proof]) + data[:32].ljust(32, b"\7") + recipient + data[32:]
    refused(prover(BOB), frame)
    refused(prover(BOB, {ALICE.node_id}), frame)


@pytest.mark.parametrize("trust", [None, {ALICE.node_id}])
@pytest.mark.parametrize("which", [0, 1])
def test_no_bit_can_be_flipped(alice: Prover, trust: Trust, which: int) -> None:
    bob = prover(BOB, trust)
    frame = both(alice, b"b")[which]
    kinds: set[type[Untrusted]] = set()
    for position in range(len(frame)):
        for bit in range(8):
            flipped = bytearray(frame)
            flipped[position] ^= 1 << bit
            kinds.add(type(refused(bob, flipped)))
    expected = {MalformedFrame, (BadSeal, BadSignature)[which]}
    assert kinds == (expected | {UnknownSender} if trust else expected)
    assert bob.open(frame, NOW).bundle == b"b"


@pytest.mark.parametrize("which", [0, 1])
def test_no_length_but_its_own_will_do(alice: Prover, bob: Prover, which: int) -> None:
    frame = both(alice)[which]
    for length in range(len(frame)):
        assert isinstance(refused(bob, frame[:length]), MalformedFrame | BadSeal | BadSignature)
        refused(bob, frame[length + 1 :])
    for extra in (b"\0", b"x" * 100):
        assert type(refused(bob, frame + extra)) is (BadSeal, BadSignature)[which]
    assert "a frame of 10001 bytes" in str(refused(bob, frame.ljust(10_001)))


def test_a_frame_cannot_be_sent_on_to_another_node(alice: Prover) -> None:
    eve = prover(EVE)
    sealed, signed = (bytearray(frame) for frame in both(alice))
    assert "another node" in str(refused(eve, sealed))
    sealed[RECIPIENT] = signed[RECIPIENT] = EVE.public_key
    assert type(refused(eve, sealed)) is BadSeal
    assert "another node" in str(refused(eve, signed))
    sealed[RECIPIENT] = bytes(32)
    assert "another node" in str(refused(eve, sealed))


def test_a_seal_is_no_signature_and_the_other_way_round(alice: Prover, bob: Prover) -> None:
    sealed, signed = (bytearray(frame) for frame in both(alice, b"b" * 100))
    for recipient in (BOB.public_key, bytes(32)):
        for frame, proof in ((sealed, 2), (signed, 1)):
            frame[1], frame[RECIPIENT] = proof, recipient
            assert isinstance(refused(bob, frame), MalformedFrame | BadSeal | BadSignature)


def test_an_unknown_version_or_proof_is_malformed(alice: Prover, bob: Prover) -> None:
    for frame in both(alice):
        assert "version 2, and only 1 is understood" in str(refused(bob, b"\2" + frame[1:]))
        assert "without a whole proof" in str(refused(bob, frame[:1] + b"\3" + frame[2:]))


def test_a_frame_reflected_to_its_sender_is_malformed(alice: Prover) -> None:
    for frame in both(alice):
        assert "a frame from this node itself" in str(refused(alice, frame))


def test_nobody_can_speak_for_another(bob: Prover) -> None:
    for frame, error in zip(both(prover(EVE)), (BadSeal, BadSignature), strict=True):
        forged = frame[:2] + ALICE.public_key + frame[34:]
        assert type(refused(bob, forged)) is error


def test_a_sender_that_is_no_key_is_refused(alice: Prover, bob: Prover) -> None:
    sealed, signed = both(alice)
    for key in (bytes(32), b"\xff" * 32, b"\1" + bytes(31)):
        assert "whose sender is not a key" in str(refused(bob, sealed[:2] + key + sealed[34:]))
        assert type(refused(bob, signed[:2] + key + signed[34:])) is BadSignature


def test_a_forged_signature_costs_no_agreement_of_keys(bob: Prover, monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(*_: object) -> None:
        raise AssertionError("300 µs were spent on a stranger")

    frame = prover(EVE).sign(b"bundle", NOW)
    monkeypatch.setattr(Identity, "shared_with", agree)
    assert type(refused(bob, frame[:-1] + b"x")) is BadSignature


@given(st.binary(max_size=200))
def test_whom_a_frame_claims_to_be_from_is_read_from_its_header_alone(data: bytes) -> None:
    claimed = claimed_sender(data)
    if claimed:
        assert node_id_of(data[2:34]) == claimed
    for frame in both(prover(EVE), data):
        assert claimed_sender(frame) == EVE.node_id
        assert claimed_sender(frame[:HEADER]) == EVE.node_id
        assert claimed_sender(frame[: HEADER - 1]) == claimed_sender(b"\1\0" + frame[2:]) == ""


# --- trust --------------------------------------------------------------------------------------------------


def test_only_those_are_opened_that_are_trusted() -> None:
    friends: list[Trust] = [{ALICE.node_id}, [ALICE.node_id], {ALICE.node_id: "alice"}, lambda n: n == ALICE.node_id]
    for trust in friends:
        bob = prover(BOB, trust)
        for frame in both(prover(EVE)):
            error = refused(bob, frame)
            assert type(error) is UnknownSender
            assert error.__cause__ is None
        for frame in both(prover(ALICE)):
            assert bob.open(frame, NOW).sender == ALICE.node_id


def test_an_empty_set_trusts_nobody() -> None:
    for frame in both(prover(ALICE)):
        assert type(refused(prover(BOB, set()), frame)) is UnknownSender


def test_one_can_ask_who_is_trusted() -> None:
    asked = prover(BOB, {ALICE.node_id})
    assert asked.trusts(ALICE.node_id)
    assert not asked.trusts(EVE.node_id)
    assert prover(BOB).trusts(EVE.node_id)
    assert not prover(BOB, lambda _: bool(1 / 0)).trusts(ALICE.node_id)


def test_a_set_is_copied_and_a_predicate_asked_each_time(alice: Prover) -> None:
    trusted = {ALICE.node_id}
    copied, asking = prover(BOB, trusted), prover(BOB, lambda node_id: node_id in trusted)
    copied.open(alice.sign(b"", NOW), NOW)
    asking.open(alice.sign(b"", NOW), NOW)
    trusted.clear()
    copied.open(alice.sign(b"", NOW), NOW)
    with pytest.raises(UnknownSender):
        asking.open(alice.sign(b"", NOW), NOW)


def test_a_predicate_that_fails_does_not_trust_and_its_error_is_the_cause() -> None:
    failure = LookupError("the directory is down")

    def trust(_: str) -> bool:
        raise failure

    for frame in both(prover(ALICE)):
        error = refused(prover(BOB, trust), frame)
        assert type(error) is UnknownSender
        assert error.__cause__ is failure


@pytest.mark.parametrize("answer", [None, 1, "yes", object()])
def test_a_predicate_that_returns_no_bool_does_not_trust(answer: bool) -> None:
    error = refused(prover(BOB, lambda _: answer), prover(ALICE).sign(b"", NOW))
    assert type(error) is UnknownSender
    assert "trust must return a bool, not " in str(error.__cause__)


def test_a_predicate_that_is_interrupted_says_so() -> None:
    def trust(_: str) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prover(BOB, trust).open(prover(ALICE).sign(b"", NOW), NOW)


# --- time and replay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("age", "accepted"), [(30.0, True), (30.000001, False), (-30.0, True), (1e6, False)])
def test_a_frame_that_comes_too_late_yields_its_content_as_stale(
    alice: Prover, bob: Prover, which: int, age: float, accepted: bool
) -> None:
    stamp = START + 5_000_000
    opened = bob.open(both(alice, now=stamp)[which], stamp + age)
    assert (opened.bundle, opened.time) == (b"bundle", stamp)
    assert isinstance(opened.stale, Stale) is not accepted
    assert bob.seen.count == accepted


@pytest.mark.parametrize("ahead", [30.000001, 1e9])
def test_a_frame_from_the_future_is_stale_and_yields_nothing_since_its_time_will_come(
    alice: Prover, ahead: float
) -> None:
    for frame in both(alice, now=NOW + ahead):
        bob = prover(BOB)
        assert type(refused(bob, frame)) is Stale
        assert bob.open(frame, NOW + ahead).stale is None


def test_a_frame_that_was_refused_as_too_late_is_never_accepted(alice: Prover, bob: Prover) -> None:
    """Whoever asked was told that it did not run: so it must not when the clock has gone back."""
    for frame in both(alice):
        assert bob.open(frame, NOW + 31).stale is not None
        assert bob.open(frame, NOW + 20).stale is not None
        assert bob.open(frame, NOW - 100).stale is not None
    assert bob.open(alice.sign(b"after", NOW + 1), NOW).stale is None


def test_what_was_stamped_before_the_start_may_come_in_its_first_four_seconds_only(alice: Prover, bob: Prover) -> None:
    before, late, after = (alice.seal(BOB.node_id, b"", START + stamped) for stamped in (-1, -0.5, 0))
    assert bob.open(before, START + 4).stale is None
    opened = bob.open(late, START + 4.000001)
    assert opened.stale is not None
    assert opened.forgotten, "the life before may have accepted it"
    assert bob.open(after, START + 4.000001).stale is None
    assert bob.open(late, START).stale is not None, "nor when the clock goes back"


@pytest.mark.parametrize(("stamp", "accepted"), [(START - 2, True), (START - 2.000001, False), (START + 1, True)])
def test_what_is_stamped_before_the_start_is_stale(alice: Prover, bob: Prover, stamp: float, accepted: bool) -> None:
    for frame in both(alice, now=stamp):
        assert (bob.open(frame, START).stale is None) is accepted


def test_a_proved_replay_is_refused_for_as_long_as_its_stamp_would_be_accepted(alice: Prover) -> None:
    for frame in both(alice):
        bob = prover(BOB)
        for now in (NOW - 30, NOW, NOW + 15, NOW + 30):
            if now == NOW - 30:
                assert bob.open(frame, now).stale is None
            with pytest.raises(Replayed):
                bob.open(frame, now)
        assert bob.open(frame, NOW + 31).stale is not None


def test_a_clock_that_goes_back_does_not_make_a_replay_good(alice: Prover, bob: Prover) -> None:
    frame = alice.sign(b"old", NOW)
    bob.open(frame, NOW)
    for n in range(10):
        bob.open(alice.sign(b"new", NOW + 1000 + n), NOW + 1000)
    assert bob.seen.count == 10  # the old one is forgotten
    assert bob.open(frame, NOW).stale is not None


def test_a_clock_that_was_years_ahead_leaves_no_mark_when_it_is_set_right(alice: Prover, bob: Prover) -> None:
    bob.open(alice.sign(b"before", NOW), NOW)
    bob.open(alice.sign(b"ahead", NOW + 1e8), NOW + 1e8)
    assert bob.open(alice.sign(b"after", NOW + 5), NOW + 6).stale is None


def test_a_forger_cannot_take_the_id_of_a_frame(alice: Prover) -> None:
    """Ids are public: Eve sees one in a header and uses it first, unproved and, being trusted too, proved."""
    for frame in both(alice):
        bob = prover(BOB)
        forged = frame[:-1] + bytes([frame[-1] ^ 1])
        refused(bob, forged)
        bob.open(as_eve(frame), NOW)
        assert bob.open(frame, NOW).sender == ALICE.node_id


def as_eve(frame: bytes) -> bytes:
    """Return a good frame by Eve with the id and the stamp of `frame`."""
    header = frame[:2] + EVE.public_key + frame[34:HEADER]
    if frame[1] == 1:
        context = f"meshkit sealed frame 1 from {EVE.node_id} to {BOB.node_id}"
        return header + EVE.shared_with(BOB.node_id, context).seal_combined(b"eve", aad=header)
    return header + EVE.sign(b"meshkit signed frame 1\0" + header + b"eve") + b"eve"


def test_when_the_memory_is_full_the_first_of_who_has_sent_most_is_forgotten_and_nothing_opens_twice(
    alice: Prover,
) -> None:
    bob, eve = prover(BOB, max_remembered=10), prover(EVE)
    flood = [(eve.seal(BOB.node_id, b"", NOW + n), eve.sign(b"", NOW + n + 0.5))[n % 2] for n in range(25)]
    delayed, calm = alice.seal(BOB.node_id, b"late", NOW - 1), [alice.sign(b"", NOW + n) for n in range(3)]
    for frame in [*calm, *flood]:
        assert bob.open(frame, NOW + 25).stale is None
    assert bob.seen.count == 10
    for frame in calm:
        with pytest.raises(Replayed):
            bob.open(frame, NOW + 25)
    forgotten, remembered = flood[:18], flood[18:]
    for frame in forgotten:
        opened = bob.open(frame, NOW + 25)
        assert opened.stale is not None
        assert opened.forgotten, "it was accepted, so nobody may be told that it was not"
    for frame in remembered:
        with pytest.raises(Replayed):
            bob.open(frame, NOW + 25)
    assert bob.open(delayed, NOW + 25).stale is None, "who sends little is not touched by it"
    assert bob.open(eve.sign(b"", NOW + 25), NOW + 25).stale is None, "and who sends much, in order, does not notice"


def hostile(rng: random.Random, frame: bytes) -> Iterator[bytes]:
    while True:
        changed = bytearray(frame)
        changed[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        yield bytes(changed)
        yield rng.randbytes(rng.randrange(300))
        yield frame[: rng.randrange(len(frame))]
        yield frame[:2] + rng.randbytes(32) + frame[34:]


def test_a_flood_of_hostile_frames_leaves_nothing(alice: Prover) -> None:
    bob, rng = prover(BOB), random.Random(1)
    good = both(alice)
    kinds = [hostile(rng, frame) for frame in good]
    flood = [next(kinds[n % 2]) for n in range(1_000)]

    def open_all() -> int:
        count = 0
        for frame in flood:
            try:
                bob.open(frame, NOW)
            except Untrusted:
                count += 1
        gc.collect()
        return count

    assert open_all() == len(flood)
    tracemalloc.start()
    try:
        open_all()
        assert tracemalloc.get_traced_memory()[0] < 5_000
    finally:
        tracemalloc.stop()
    assert not bob.__dict__["_senders"]
    for frame in good:
        assert bob.open(frame, NOW).bundle == b"bundle"


def test_keys_are_kept_of_those_who_were_heard_or_spoken_to_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_MAX_PEERS", 3)
    bob = prover(BOB)
    peers = [Identity.generate() for _ in range(5)]
    for _ in range(2):
        for peer in peers:
            assert bob.open(prover(peer).seal(BOB.node_id, b"in", NOW), NOW).sender == peer.node_id
            assert prover(peer).open(bob.seal(peer.node_id, b"out", NOW), NOW).bundle == b"out"
    assert list(bob.__dict__["_senders"]) == [peer.public_key for peer in peers[2:]]
    derived = bob.__dict__["_recipient"].cache_info
    assert (derived().currsize, derived().misses) == (3, 10)
    for number in (2, 0, 4, 2):
        bob.seal(peers[number].node_id, b"", NOW)
    assert (derived().currsize, derived().misses) == (3, 11), "only the key for peer 0 was not there"


# --- arguments ----------------------------------------------------------------------------------------------


def test_a_recipient_must_be_another_node(alice: Prover) -> None:
    with pytest.raises(ValueError, match="a node does not send frames to itself"):
        alice.seal(ALICE.node_id, b"", NOW)
    for recipient in ("bob", BOB.node_id.upper(), node_id_of(bytes(32))):
        with pytest.raises(ValueError, match="is not a node id"):
            alice.seal(recipient, b"", NOW)


@pytest.mark.parametrize(
    ("name", "value", "kind", "says"),
    [
        ("started", float("nan"), ValueError, "NaN"),
        ("trust", ALICE.node_id, ValueError, "'.' is not a node id"),
        ("trust", ["bob"], ValueError, "'bob' is not a node id"),
        ("trust", [BOB], ValueError, "is not a node id"),
        ("trust", 7, TypeError, "not iterable"),
    ],
)
def test_each_bad_argument_is_refused(name: str, value: object, kind: type[Exception], says: str) -> None:
    arguments: dict[str, object] = {"started": START, name: value}
    with pytest.raises(kind, match=says):
        Prover(ALICE, **arguments)  # type: ignore[arg-type]


def test_an_async_predicate_is_refused() -> None:
    async def trust(_: str) -> bool:
        return True

    with pytest.raises(TypeError, match="trust must answer at once: an async function cannot"):
        prover(ALICE, trust)  # type: ignore[arg-type]


def test_ids_are_random(alice: Prover) -> None:
    assert len({alice.sign(os.urandom(1), NOW)[66:82] for _ in range(100)}) == 100
