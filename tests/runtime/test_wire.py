import contextlib
import math
import pickle
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from meshkit.errors import (
    Draining,
    MalformedFrame,
    MeshkitError,
    NoHandler,
    NotAccepted,
    Overloaded,
    PeerLost,
    RateLimited,
    RemoteError,
)
from meshkit.runtime.message import MAX_DETAIL
from meshkit.runtime.wire import (
    MAX_BUNDLE,
    MAX_KINDS,
    Ask,
    Beat,
    Cancel,
    Failure,
    Goodbye,
    Reply,
    Tell,
    Wire,
    decode,
    decode_each,
    encode,
    encode_payload,
    refusal,
    rejection,
    to_error,
)

NIL = msgspec.Raw(b"\xc0")
WIRES: list[Wire] = [
    Tell("1", "a:b", 1, 1.5, encode_payload("x")),
    Ask("2", "a:b", 7, 0.0, 1_000, encode_payload([1, {"x": b"y"}])),
    Reply("3", NIL),
    Failure("4", "rate_limited", "login", 5, 60.0, 1.5),
    Cancel("5"),
    Beat("alice", ("a:b", "c:d"), 2.0, draining=True, greets=True),
    Goodbye(),
]


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def refused(data: bytes) -> str:
    with pytest.raises(MalformedFrame) as caught:
        decode(data)
    assert len(str(caught.value)) < 300
    return str(caught.value)


# --- what is good -------------------------------------------------------------------------------------------


def test_what_is_encoded_decodes_as_it_was() -> None:
    assert decode(encode(WIRES)) == WIRES
    for wire in WIRES:
        assert decode(encode([wire])) == [wire]
    assert decode(encode([])) == []


def test_the_names_of_fields_do_not_travel() -> None:
    assert msgspec.msgpack.decode(encode(WIRES[1:3])) == [
        ["a", "2", "a:b", 7, 0.0, 1_000, [1, {"x": b"y"}]],
        ["r", "3", None],
    ]


def test_what_a_newer_node_adds_at_the_end_is_ignored() -> None:
    assert decode(packed([["c", "5", "new"], ["g", {"new": 1}]])) == [Cancel("5"), Goodbye()]


# --- what is hostile ----------------------------------------------------------------------------------------

ASK = ["a", "2", "a:b", 1, 0.0, 1_000, None]


def asks_with(at: int, *values: object) -> list[list[Any]]:
    """Return requests in which the field at this place is each of these."""
    return [[*ASK[:at], value, *ASK[at + 1 :]] for value in values]


@pytest.mark.parametrize(
    "wire",
    [
        None,
        7,
        "text",
        [],
        {},
        [None],
        ["x"],
        ["aa", "1"],
        [["a"]],
        ASK[:-1],
        *asks_with(1, None, 7, b"2", ["2"], {}, "x" * 129),
        *asks_with(2, None, 7, b"2", ["2"], {}, "x" * 256),
        *asks_with(3, None, "1", 1.5, True, [], math.inf),
        *asks_with(4, None, "0", math.nan, math.inf, -math.inf, -1.0, 1e300, 2**63),
        *asks_with(5, None, -1, -(2**63), 2**63, 10**12 + 1, math.nan, 0.5),
        ["f", "4", "because"],
        ["f", "4", 7],
        ["f", "4", "failed", "detail", "many"],
        ["f", "4", "failed", b"detail"],
        ["f", "4", "failed", "x" * (MAX_DETAIL + 1)],
        ["f", "4", "failed", "", 0, 0.0, None, "x" * 256],
        ["c"],
        ["c", None],
        ["b", "alice", ["a:b"]],
        ["b", "alice", "a:b", 1.0],
        ["b", "alice", [7], 1.0],
        ["b", "alice", ["x" * 1_000], 1.0],
        ["b", "alice", ["x"] * (MAX_KINDS + 1), 1.0],
        ["b", "alice", ["a:b"], "1.0"],
        ["b", "x" * 256, [], 1.0],
    ],
)
def test_what_is_not_as_declared_is_malformed(wire: object) -> None:
    refused(packed([wire]))
    refused(packed([["g"], wire]))
    before, error, after = decode_each(packed([["g"], wire, ["c", "5"]]))
    assert (before, after) == (Goodbye(), Cancel("5")), "what it came with is understood"
    assert isinstance(error, MalformedFrame)


def test_a_version_that_no_integer_holds_is_malformed() -> None:
    head, tail = packed(["a", "2", "a:b"])[1:], packed([0.0, 1_000, None])[1:]
    assert decode(b"\x91\x97" + head + packed(1) + tail)[0] == Ask("2", "a:b", 1, 0.0, 1_000, NIL)
    huge = (2**70).to_bytes(9, "big")
    for version in (b"\xc7\x09\x01" + huge, b"\xc4\x09" + huge, b"\xcf" + huge[1:] + b"\xff", b"\xcb" + huge[:8]):
        refused(b"\x91\x97" + head + version + tail)


def test_a_bundle_holds_so_many_and_no_more() -> None:
    assert len(decode(encode([Goodbye()] * MAX_BUNDLE))) == MAX_BUNDLE == 256
    assert "length <= 256" in refused(encode([Goodbye()] * (MAX_BUNDLE + 1)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91\xdd\xff\xff\xff\xff",
        b"\x91\x94\xa1b\xa1x\xdd\xff\xff\xff\xff",  # kinds without end
        b"\x91\x92\xa1c\xdb\xff\xff\xff\xffx",  # an id without end
        b"\x91\x92\xa1c\xa1\xff",  # which is not UTF-8
        b"\x91\x92\xa1c\xa3\xed\xa0\x80",  # nor is a surrogate
        b"\x91\x93\xa1r\xa1x" + b"\x91" * 500_000 + b"\xc0",  # deeper than any stack
        b"\x91\x93\xa1r\xa1x" + b"\x81\xc0" * 500_000 + b"\xc0",
        b"\x91\x93\xa1r\xa1x\xc6\xff\xff\xff\xff",
        encode(WIRES) + b"\xc0",
        encode(WIRES)[:-1],
    ],
)
def test_bytes_that_are_made_to_break_decoders_are_malformed(data: bytes) -> None:
    refused(data)
    with contextlib.suppress(MalformedFrame):
        assert any(isinstance(item, MalformedFrame) for item in decode_each(data))


def test_what_the_decoder_quotes_of_hostile_bytes_is_cut_short() -> None:
    assert len(refused(packed([["x" * 900_000]]))) < 300
    [error] = decode_each(packed([["x" * 900_000]]))
    assert len(str(error)) < 300


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(["t", "a", "r", "f", "c", "b", "g", "failed", "cut"])
)
structures = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=30,
)


@given(st.binary(max_size=100) | structures.map(packed) | st.lists(structures, max_size=3).map(packed))
def test_whatever_comes_is_decoded_or_malformed(data: bytes) -> None:
    try:
        wires = decode(data)
    except MalformedFrame:
        with contextlib.suppress(MalformedFrame):
            assert any(isinstance(item, MalformedFrame) for item in decode_each(data))
        return
    assert decode_each(data) == wires or "nan" in str(wires)
    assert decode(encode(wires)) == wires or "nan" in str(wires)


@given(st.data())
def test_a_bundle_that_was_damaged_anywhere_is_decoded_or_malformed(data: st.DataObject) -> None:
    good = bytearray(encode(WIRES))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedFrame):
        decode(bytes(good[: data.draw(st.integers(0, len(good)))]))


# --- errors, there and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        NoHandler(kind="a:b", node="bob"),
        NotAccepted(kind="a:b", node="bob", reason="filtered (filter)"),
        MalformedFrame(reason="Expected `int`"),
        Overloaded(name="mailbox", limit=7),
        RateLimited(name="'a:b'", key="alice", max_count=5, window=60.0, retry_after=1.5),
        Draining(node="bob"),
    ],
)
def test_a_refusal_arrives_as_the_error_that_it_was(error: MeshkitError) -> None:
    [failure] = decode(encode([refusal("1", error)]))
    assert isinstance(failure, Failure)
    arrived = to_error(failure, "bob", "a:b", "alice")
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.executed == "no"
    assert arrived is not to_error(failure, "bob", "a:b", "alice"), "each caller gets one of its own"
    assert str(pickle.loads(pickle.dumps(arrived))) == str(error)


def test_what_a_handler_says_is_told_and_what_cannot_travel_is_internal() -> None:
    said = rejection("1", "quota", "x" * MAX_DETAIL, retryable=True)
    assert said == Failure("1", "failed", "x" * MAX_DETAIL, code="quota", retryable=True)
    odd: list[tuple[Any, Any, Any]] = [
        ("quota", "x" * (MAX_DETAIL + 1), True),
        ("x" * 256, "", True),
        ("quota", "\udc80", True),
        ("quota", object(), True),
        (7, "", True),
        ("quota", "", None),
    ]
    for code, detail, retryable in odd:
        failure = rejection("1", code, detail, retryable=retryable)
        assert failure == Failure("1", "failed", code="internal")
        assert decode(encode([failure])) == [failure]


def test_any_other_error_of_ours_arrives_as_not_accepted() -> None:
    failure = refusal("1", PeerLost(node="carol"))
    assert failure.why == "not_accepted"
    assert "carol" in str(to_error(failure, "bob", "a:b", "alice"))


def test_a_failure_arrives_with_what_it_says_and_who_can_be_asked_about_it() -> None:
    rejected = to_error(Failure("1", "failed", "too much", code="quota", retryable=True), "bob", "a:b", "alice")
    assert isinstance(rejected, RemoteError)
    assert (rejected.code, rejected.detail, rejected.retryable, rejected.correlation_id) == (
        "quota",
        "too much",
        True,
        "",
    )
    internal = to_error(Failure("1", "failed", code="internal"), "bob", "a:b", "alice")
    assert isinstance(internal, RemoteError)
    assert internal.correlation_id == "1"
    assert to_error(Failure("1", "cut"), "bob", "a:b", "alice").executed == "maybe"


@pytest.mark.parametrize("wait", [math.nan, math.inf, -math.inf, -1.0])
def test_nobody_sleeps_for_what_is_no_time(wait: float) -> None:
    """A timer that is set to NaN stops the event loop's others."""
    [failure] = decode(encode([Failure("1", "rate_limited", "x", 1, 1.0, wait)]))
    assert isinstance(failure, Failure)
    error = to_error(failure, "bob", "a:b", "alice")
    assert isinstance(error, RateLimited)
    assert error.retry_after is None
