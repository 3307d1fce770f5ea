"""The pure parts of the transport over TCP: no socket, no loop."""

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings, strategies as st

from meshkit.runtime import Identity
from meshkit.transports._tcp.handshake import Handshake
from meshkit.transports._tcp.wire import (
    MAX_CONTROL,
    MOST_ADDRESSES,
    Address,
    Kind,
    Refusal,
    Rejected,
    Unrecorder,
    addresses,
    read_addresses,
    record,
)

ALICE, BOB, EVE = sorted((Identity.from_seed(seed * 32) for seed in (b"a", b"b", b"e")), key=lambda i: i.node_id)
Records = list[tuple[int, bytes]]


def read(unrecorder: Unrecorder) -> Records:
    records = []
    while (one := unrecorder.next()) is not None:
        records.append(one)
    return records


# --- records


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=300))), st.lists(st.integers(1, 200), min_size=1))
def test_records_are_the_same_in_whatever_slices_they_come(records: Records, sizes: list[int]) -> None:
    stream = b"".join(record(Kind(kind), body) for kind, body in records)
    unrecorder, got, at, turn = Unrecorder(300), Records(), 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        unrecorder.feed(stream[at : at + size])
        got += read(unrecorder)
        at, turn = at + size, turn + 1
        assert unrecorder.held < 305 or at < len(stream)
    assert got == records
    assert unrecorder.held == 0
    assert all(type(body) is bytes for _, body in got)


def test_records_come_byte_by_byte() -> None:
    unrecorder, got = Unrecorder(10), Records()
    for byte in record(Kind.FRAME, b"0123456789") + record(Kind.PING) + record(Kind.FRAME, b"x"):
        unrecorder.feed(bytes([byte]))
        got += read(unrecorder)
    assert got == [(Kind.FRAME, b"0123456789"), (Kind.PING, b""), (Kind.FRAME, b"x")]


@given(st.binary(max_size=2000), st.integers(0, 100))
def test_garbage_is_records_or_rejected_and_never_anything_else(garbage: bytes, limit: int) -> None:
    unrecorder = Unrecorder(limit)
    unrecorder.feed(garbage)
    with suppress(Rejected):
        assert all(len(body) <= limit for _, body in read(unrecorder))


def test_a_length_is_judged_before_anything_of_the_body_has_come() -> None:
    unrecorder = Unrecorder(1024)
    unrecorder.feed(struct.pack(">IB", 2**31, Kind.FRAME))
    with pytest.raises(Rejected, match="announced a record of 2147483648 bytes, where 1024 are allowed"):
        unrecorder.next()
    unrecorder = Unrecorder(1024)
    unrecorder.feed(struct.pack(">IB", 1024, Kind.FRAME))
    assert unrecorder.next() is None
    assert unrecorder.held == 5, "what is only promised takes no memory"


def test_the_limit_may_change_between_two_records() -> None:
    unrecorder = Unrecorder(1)
    unrecorder.feed(record(Kind.OPEN) + record(Kind.FRAME, b"xx"))
    assert unrecorder.next() == (Kind.OPEN, b"")
    unrecorder.limit = 2
    assert unrecorder.next() == (Kind.FRAME, b"xx")


# --- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7001", Address("127.0.0.1", 7001)),
        ("bob.example:1", Address("bob.example", 1)),
        ("[::1]:65535", Address("::1", 65535)),
        ("[fe80::1%eth0]:7001", Address("fe80::1%eth0", 7001)),
    ],
)
def test_an_address_is_read_and_written(text: str, address: Address) -> None:
    assert Address.parse(text, "join") == address
    assert str(address) == text


NO_ADDRESSES = [
    *("", "bob", "bob:", "bob:x", "bob:-1", "bob:65536", "bob:99999999999", "::1:7001", "[::1]", "[bob]:7001", "a b:1"),
    *("[::1:7001", "bob:٣", "x" * 400 + ":1", 7001, None, b"bob:7001", ":7001", "bob:0"),
    *("bücher.example:1", "\U0001f600:1", "bob\x7f:1", "bob:1\n"),
]


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_what_is_no_address_is_shown_with_its_argument(text: object) -> None:
    with pytest.raises(ValueError, match=r'an address in join must be "host:port", such as "127\.0\.0\.1:7001"'):
        Address.parse(text, "an address in join")


def test_where_a_node_listens_it_may_leave_the_host_or_the_port_open() -> None:
    assert Address.parse(":7001", "listen", host_needed=False) == Address("", 7001)
    assert str(Address("", 7001)) == ":7001"
    assert Address.parse("127.0.0.1:0", "listen", host_needed=False) == Address("127.0.0.1", 0)


def test_which_addresses_only_this_machine_can_reach() -> None:
    assert all(Address(host, 1).is_loopback for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(Address(host, 1).is_loopback for host in ("", "0.0.0.0", "::", "10.0.0.1", "localhost.example"))
    assert all(Address(host, 1).is_everywhere for host in ("", "0.0.0.0", "::"))


def test_as_many_addresses_as_are_told_at_once_fit_into_a_record_however_long_they_are() -> None:
    longest = str(Address.parse("x" * 298 + ":1", "x"))
    with pytest.raises(ValueError, match="must be"):
        Address.parse("x" * 299 + ":1", "x")
    assert len(addresses([("n" * 52, longest)] * MOST_ADDRESSES)) <= MAX_CONTROL


def test_known_addresses_travel() -> None:
    known = [(ALICE.node_id, "127.0.0.1:7001"), (BOB.node_id, "[::1]:7002")]
    assert read_addresses(addresses(known)) == known


@given(st.binary(max_size=200) | st.lists(st.tuples(st.text(), st.text())).map(addresses))
def test_what_are_no_addresses_is_rejected(body: bytes) -> None:
    with suppress(Rejected):
        assert all(isinstance(text, str) for known in read_addresses(body) for text in known)


# --- the handshake


def side(
    identity: Identity,
    *,
    dialled: bool,
    trust: Callable[[str], bool] = lambda _: True,
    challenge: bytes = b"",
    own: Callable[[bytes], bool] = lambda _: False,
    listens: str = "",
) -> Handshake:
    challenge = challenge or (b"d" if dialled else b"a") * 32
    return Handshake(identity, dialled=dialled, listens=listens, trusts=trust, challenge=challenge, dialling=own)


def pump(one: Handshake, other: Handshake, sent: bytes) -> bytes:
    """Let `one` receive what the other sent, and return what it answers."""
    unrecorder = Unrecorder(MAX_CONTROL)
    unrecorder.feed(sent)
    return b"".join(one.receive(kind, body) for kind, body in read(unrecorder))


def shake(dialler: Handshake, other: Handshake) -> tuple[bytes, bytes, bytes]:
    first = dialler.begin()
    second = pump(other, dialler, first)
    third = pump(dialler, other, second)
    assert pump(other, dialler, third) == b""
    return first, second, third


def test_both_prove_who_they_are_and_say_where_they_listen() -> None:
    alice, bob = side(ALICE, dialled=True, listens="alice:1"), side(BOB, dialled=False, listens=":2")
    assert bob.begin() == b""
    shake(alice, bob)
    assert alice.proved
    assert bob.proved
    assert (alice.peer, alice.listens) == (BOB.node_id, ":2")
    assert (bob.peer, bob.listens) == (ALICE.node_id, "alice:1")
    assert alice.is_arbiter
    assert not bob.is_arbiter


def test_the_dialler_proves_nothing_before_the_other_has() -> None:
    alice, bob = side(ALICE, dialled=True), side(BOB, dialled=False)
    second = pump(bob, alice, alice.begin())
    hello_only = second[: -len(record(Kind.PROOF, bytes(64)))]
    assert pump(alice, bob, hello_only) == b""
    assert not alice.proved


def refused(handshake: Handshake, sent: bytes) -> Rejected:
    with pytest.raises(Rejected) as caught:
        pump(handshake, handshake, sent)
    assert not handshake.proved
    return caught.value


def test_a_stranger_is_told_so_and_nothing_else() -> None:
    bob = side(BOB, dialled=False, trust=lambda node: node == ALICE.node_id)
    error = refused(bob, side(EVE, dialled=True).begin())
    assert error.refusal is Refusal.STRANGER
    assert EVE.node_id in str(error)
    alice = side(ALICE, dialled=True, trust=lambda _: False)
    assert refused(alice, pump(side(BOB, dialled=False), alice, alice.begin())).refusal is Refusal.STRANGER


def test_a_replayed_handshake_proves_nothing() -> None:
    first, second, third = shake(side(ALICE, dialled=True), side(BOB, dialled=False))
    bob = side(BOB, dialled=False, challenge=b"n" * 32)
    pump(bob, bob, first)
    assert refused(bob, third).refusal is Refusal.BAD_PROOF
    assert refused(side(ALICE, dialled=True, challenge=b"n" * 32), second).refusal is Refusal.BAD_PROOF


def test_a_proof_that_was_made_for_one_node_is_none_for_another() -> None:
    """Eve, whom all trust, passes on to Bob what Alice says to her."""
    alice, eve, bob = side(ALICE, dialled=True), side(EVE, dialled=False), side(BOB, dialled=False)
    hello = alice.begin()
    to_bob = pump(bob, bob, hello)
    del to_bob
    proof = pump(alice, eve, pump(eve, alice, hello))
    assert alice.peer == EVE.node_id
    assert refused(bob, proof).refusal is Refusal.BAD_PROOF


def test_a_reflection_proves_nothing() -> None:
    bob = side(BOB, dialled=False)
    answer = pump(bob, bob, side(ALICE, dialled=True).begin())
    assert isinstance(refused(bob, answer), Rejected)
    # Not even with the key of another: the signature says who dialled.
    proof = answer[-64:]
    assert refused(bob, record(Kind.PROOF, proof)).refusal is Refusal.BAD_PROOF
    assert refused(side(BOB, dialled=False), bob_hello(answer)).refusal is Refusal.SAME_KEY


def bob_hello(answer: bytes) -> bytes:
    return answer[: -len(record(Kind.PROOF, bytes(64)))]


@given(st.integers(0, 64 + 5 - 1), st.integers(1, 255))
@settings(max_examples=60)
def test_no_bit_of_a_handshake_can_be_changed(at: int, flip: int) -> None:
    alice, bob = side(ALICE, dialled=True, listens="alice:1"), side(BOB, dialled=False)
    hello = bytearray(alice.begin())
    hello[-1 - at % (len(hello) - 5)] ^= flip
    try:
        changed = pump(bob, alice, bytes(hello))
        pump(bob, alice, pump(alice, bob, changed))
    except Rejected:
        assert not bob.proved
        assert not alice.proved
    else:
        raise AssertionError("a changed hello was taken")


def test_a_node_that_meets_itself_knows_it() -> None:
    alice = side(ALICE, dialled=True)
    itself = side(ALICE, dialled=False, own=lambda challenge: challenge == alice.challenge)
    assert refused(itself, alice.begin()).refusal is Refusal.ITSELF
    twin = side(ALICE, dialled=False)
    assert refused(twin, alice.begin()).refusal is Refusal.SAME_KEY


def test_another_version_is_refused() -> None:
    hello = bytearray(side(ALICE, dialled=True).begin())
    hello[5] = 2
    error = refused(side(BOB, dialled=False), bytes(hello))
    assert error.refusal is Refusal.VERSION
    assert "it speaks version 2 of the protocol, and not 1" in str(error)


@pytest.mark.parametrize(
    "hello",
    [
        *(b"", b"\1", b"\1" + bytes(63), b"\1" * 65 + b"\xff"),
        *(b"\1" + EVE.public_key + bytes(32) + address for address in (b"no address", b"eve:0", b":0")),
    ],
)
def test_a_hello_that_is_none_is_rejected(hello: bytes) -> None:
    assert refused(side(BOB, dialled=False), record(Kind.HELLO, hello)).refusal is None


@pytest.mark.parametrize("kind", [k for k in Kind if k is not Kind.HELLO])
def test_nothing_comes_before_the_hello(kind: Kind) -> None:
    assert f"kind {kind} in the handshake" in str(refused(side(BOB, dialled=False), record(kind, bytes(64))))


@pytest.mark.parametrize("kind", [k for k in Kind if k is not Kind.PROOF])
def test_nothing_comes_between_the_hello_and_the_proof(kind: Kind) -> None:
    bob = side(BOB, dialled=False)
    pump(bob, bob, side(ALICE, dialled=True).begin())
    assert f"kind {kind} in the handshake" in str(refused(bob, record(kind, bytes(64))))


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=120)), max_size=5))
def test_nobody_gets_in_by_chance(records: Records) -> None:
    bob = side(BOB, dialled=False)
    try:
        for kind, body in records:
            bob.receive(kind, body)
    except Rejected:
        pass
    assert not bob.proved


def test_every_refusal_says_what_to_do() -> None:
    assert all(refusal.text for refusal in Refusal)
