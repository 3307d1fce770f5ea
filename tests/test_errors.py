"""The errors: their kinds, what they say, and that they travel with all that they know."""

import asyncio
import contextlib
import copy
import dataclasses
import gc
import inspect
import pickle
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from meshkit import errors
from meshkit.errors import (
    BadSeal,
    BadSignature,
    BatchFull,
    BulkheadFull,
    CallTimeout,
    CircuitOpen,
    Closed,
    Draining,
    MalformedFrame,
    MeshkitError,
    NoHandler,
    NoQuorum,
    NotAccepted,
    OutcomeUnknown,
    Overloaded,
    PeerLost,
    RateLimited,
    Refused,
    RemoteError,
    Replayed,
    Stale,
    TooManyKeys,
    UnknownSender,
    UnknownVoter,
    Unreachable,
    Untrusted,
)

SAYS: list[tuple[MeshkitError, str]] = [
    (Refused(), "It did not start; it is safe to try again."),
    (
        RateLimited(name="login", key="bob", max_count=5, window=60.0),
        "login: 'bob' has used all 5 admissions of the last 60 s",
    ),
    (
        RateLimited(name="login", key=None, max_count=5, window=60.0, retry_after=2.0),
        "login: all 5 admissions of the last 60 s are used; try again in 2 s",
    ),
    (CircuitOpen(name="db", state="open"), "db: the circuit is open, the call was not made"),
    (
        BulkheadFull(name="db", max_concurrent=3, max_queue=10),
        "db: 3 calls are running and 10 are waiting already",
    ),
    (
        BatchFull(name="gossip", max_pending=100),
        "gossip: 100 items are waiting to be flushed; flushing is slower than adding",
    ),
    (
        TooManyKeys(name="login", key=7, max_keys=1000),
        "login: no room for 7, all 1000 keys are in use; raise max_keys",
    ),
    (Unreachable(node="bob"), "node 'bob' cannot be reached: not connected"),
    (Unreachable(node="bob", reason="refused"), "node 'bob' cannot be reached: refused"),
    (NoHandler(kind="stash:store", node="bob"), "node 'bob' has no handler for 'stash:store'"),
    (Overloaded(name="mailbox", limit=64), "mailbox: full, it holds 64 already"),
    (Draining(node="bob"), "node 'bob' is draining; ask another one"),
    (
        NotAccepted(kind="stash:store", node="bob", reason="filtered (filter)"),
        "node 'bob' did not take this 'stash:store': filtered (filter)",
    ),
    (NoQuorum(name="restarts", votes=2, threshold=3), "restarts: no quorum, 2 of 3 votes are in"),
    (
        NoQuorum(name="restarts", votes=4, threshold=3, reason="no value has a majority"),
        "restarts: no quorum, no value has a majority",
    ),
    (UnknownVoter(name="restarts", voter="mallory"), "restarts: 'mallory' is not one of the voters"),
    (OutcomeUnknown(), "It may have happened; try again only if doing it twice is harmless."),
    (CallTimeout(name="ask", timeout=0.25), "ask: no result within 0.25 s; it may still have happened"),
    (PeerLost(node="bob"), "node 'bob' went away before it answered; it may still have happened"),
    (RemoteError(node="bob", kind="store"), "'store' failed on node 'bob' with code 'internal'"),
    (
        RemoteError(node="bob", kind="store", code="full", detail="no space", correlation_id="17"),
        "'store' failed on node 'bob' with code 'full': no space (look for 17 in its log)",
    ),
    (Untrusted(), "The bytes did not prove themselves; never retry."),
    (BadSeal(), "The sealed bytes could not be opened."),
    (BadSignature(), "The signature does not match the bytes and their sender."),
    (Stale(), "The message was stamped outside the window in which it would be accepted."),
    (Replayed(), "The message was seen before."),
    (UnknownSender(), "The sender is not trusted here."),
    (MalformedFrame(), "The bytes are not a frame that this version understands."),
    (MalformedFrame(reason="too long"), "the bytes are not what was declared: too long"),
    (Closed(name="pool"), "pool is closed"),
    (Closed(name="pool", executed="maybe"), "pool was closed while this call was under way"),
    (
        MeshkitError(),
        "The base of everything that meshkit raises on purpose, except `ValueError` and `TypeError` for bad arguments.",
    ),
]
EACH = [pytest.param(error, id=f"{type(error).__name__}-{number}") for number, (error, _) in enumerate(SAYS)]


def fresh(error: MeshkitError) -> MeshkitError:
    """Return an error with the same fields that no test has touched."""
    return type(error)(**vars(error))


# --- kinds --------------------------------------------------------------------------------------------------

KINDS: dict[type[MeshkitError], tuple[str, str]] = {
    Refused: (
        "no",
        """RateLimited CircuitOpen BulkheadFull BatchFull TooManyKeys Unreachable NoHandler Overloaded Draining
        NotAccepted NoQuorum UnknownVoter""",
    ),
    OutcomeUnknown: ("maybe", "CallTimeout PeerLost"),
    RemoteError: ("yes", ""),
    Untrusted: ("no", "BadSeal BadSignature Stale Replayed UnknownSender MalformedFrame"),
    Closed: ("no", ""),
}


def test_every_error_is_of_one_kind_and_the_kind_says_whether_the_work_ran() -> None:
    seen = {"MeshkitError", "Executed"}
    for kind, (executed, names) in KINDS.items():
        for name in [kind.__name__, *names.split()]:
            error = getattr(errors, name)
            assert issubclass(error, kind)
            assert [k for k in KINDS if issubclass(error, k)] == [kind]
            assert error.executed == executed
            seen.add(name)
    assert seen == set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)


def test_an_error_of_your_own_does_not_say_that_nothing_happened_unless_its_class_does() -> None:
    class Mine(MeshkitError):
        pass

    class MineRefused(Mine, Refused):
        pass

    assert (MeshkitError().executed, Mine().executed, MineRefused().executed) == ("maybe", "maybe", "no")


def test_every_error_is_in_the_table_of_sentences() -> None:
    classes = {getattr(errors, name) for name in errors.__all__ if inspect.isclass(getattr(errors, name))}
    assert {type(error) for error, _ in SAYS} == classes


def test_a_closed_error_knows_whether_the_call_had_begun() -> None:
    assert Closed(name="pool").executed == "no"
    assert Closed(name="pool", executed="maybe").executed == "maybe"


def test_a_call_timeout_is_a_timeout_error() -> None:
    with pytest.raises(TimeoutError):
        raise CallTimeout(name="ask", timeout=1.0)
    with pytest.raises(asyncio.TimeoutError):
        raise CallTimeout(name="ask", timeout=1.0)
    assert not isinstance(CallTimeout(name="ask", timeout=1.0), Refused)


def test_only_a_refusal_can_say_when_to_try_again() -> None:
    for error, _ in SAYS:
        assert hasattr(error, "retry_after") is isinstance(error, Refused)


# --- what they say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "sentence"), SAYS, ids=lambda value: type(value).__name__)
def test_each_error_writes_its_own_sentence(error: MeshkitError, sentence: str) -> None:
    assert str(error) == sentence
    with pytest.raises(type(error)) as caught:
        raise fresh(error)
    assert sentence in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("seconds", "hint"),
    [
        (0.0, "0 s"),
        (0.00123456, "0.00123 s"),
        (0.5, "0.5 s"),
        (12.3456, "12.3 s"),
        (99.96, "100 s"),
        (999.4, "999 s"),
        (999.5, "1000 s"),
        (999.99, "1000 s"),
        (1000.0, "1000 s"),
        (86_399.7, "86400 s"),
        (float("inf"), "inf s"),
        (float("nan"), "nan s"),
        (7, "7 s"),
        (3600, "3600 s"),
        (10**400, f"{10**400} s"),
    ],
)
def test_any_number_of_seconds_can_be_read(seconds: float, hint: str) -> None:
    assert (
        str(Draining(node="bob", retry_after=seconds))
        == f"node 'bob' is draining; ask another one; try again in {hint}"
    )


def test_the_fields_are_the_api_and_the_repr_shows_them() -> None:
    error = RateLimited(name="login", key="bob", max_count=5, window=60.0, retry_after=12.5)
    assert (error.name, error.key, error.max_count, error.window, error.retry_after) == ("login", "bob", 5, 60.0, 12.5)
    assert repr(error) == "RateLimited(retry_after=12.5, name='login', key='bob', max_count=5, window=60.0)"
    assert repr(BadSeal()) == "BadSeal()"


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        Draining("bob")  # type: ignore[arg-type, call-arg]
    with pytest.raises(TypeError, match="node"):
        Draining()  # type: ignore[call-arg]


def test_nothing_is_formatted_until_somebody_reads_it() -> None:
    class Key:
        def __repr__(self) -> str:
            raise AssertionError("formatted")

    error = RateLimited(name="login", key=Key(), max_count=5, window=60.0)
    with pytest.raises(RateLimited):
        raise error
    with pytest.raises(AssertionError, match="formatted"):
        str(error)


def test_each_error_is_itself_only() -> None:
    assert BadSeal() != BadSeal()
    assert len({BadSeal(), BadSeal()}) == 2


class OutOfCredit(Refused):
    """The account is empty.

    What this says below its first line is for programmers.
    """


class Unexplained(Refused):
    pass


def test_an_error_of_your_own_says_the_first_line_of_its_docstring() -> None:
    assert str(OutOfCredit()) == "The account is empty."
    assert str(OutOfCredit(retry_after=3.0)) == "The account is empty; try again in 3 s"
    assert str(Unexplained()) == "Unexplained"
    assert str(Unexplained(retry_after=3.0)) == "Unexplained; try again in 3 s"


@dataclasses.dataclass(eq=False)
class OfData(Refused):
    account: str


class FurtherDown(Refused):
    """
    The account is empty.
    """


class WithArguments(Refused):
    """The account is empty."""

    def __init__(self, account: str) -> None:
        super().__init__(retry_after=3.0)
        self.account = account

    def __str__(self) -> str:
        return f"account {self.args[0]} is empty"


def test_errors_of_your_own_may_be_written_in_any_style() -> None:
    assert str(OfData("bob")) == "OfData", "the docstring that a dataclass without one is given is no sentence"
    assert str(FurtherDown()) == "The account is empty."
    assert str(WithArguments("bob")) == "account bob is empty"


@pytest.mark.parametrize("error", [OutOfCredit(), Unexplained(), OfData("bob"), FurtherDown(), WithArguments("bob")])
def test_errors_of_your_own_travel_with_their_arguments(error: Refused) -> None:
    for received in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(received) is type(error)
        assert (str(received), received.args, vars(received)) == (str(error), error.args, vars(error))


# --- travelling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", EACH)
def test_each_error_pickles_with_its_notes_and_its_cause(error: MeshkitError, protocol: int) -> None:
    sent = fresh(error)
    sent.add_note("after 3 attempts")
    sent.__cause__ = ConnectionResetError("lost")
    received = pickle.loads(pickle.dumps(sent, protocol))
    assert type(received) is type(sent)
    assert str(received) == str(sent)
    assert repr(received) == repr(sent)
    assert received.executed == sent.executed
    assert received.__notes__ == ["after 3 attempts"]
    assert type(received.__cause__) is ConnectionResetError
    assert str(received.__cause__) == "lost"
    assert received.__suppress_context__


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", EACH)
def test_each_error_copies(error: MeshkitError, duplicate: Any) -> None:
    original = fresh(error)
    original.add_note("after 3 attempts")
    original.__cause__ = cause = ConnectionResetError("lost")
    copied = duplicate(original)
    assert copied is not original
    assert (type(copied), repr(copied), str(copied)) == (type(original), repr(original), str(original))
    assert copied.__notes__ == ["after 3 attempts"]
    assert repr(copied.__cause__) == repr(cause)
    assert (copied.__cause__ is cause) is (duplicate is copy.copy)


def test_without_notes_and_cause_there_are_none_afterwards_either() -> None:
    received = pickle.loads(pickle.dumps(BadSeal()))
    assert received.__cause__ is None
    assert not received.__suppress_context__
    assert vars(received) == {}


def test_raised_from_none_stays_raised_from_none() -> None:
    with pytest.raises(BadSeal) as caught:
        try:
            int("secret")
        except ValueError:
            raise BadSeal from None
    received = pickle.loads(pickle.dumps(caught.value))
    assert received.__suppress_context__
    assert received.__context__ is None


class Untravelled(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")  # so that unpickling calls it with one argument, and fails


@pytest.mark.parametrize("cause", [Untravelled("this", "that"), ValueError(threading.Lock())], ids=["loads", "dumps"])
def test_a_cause_that_does_not_pickle_travels_as_its_text(cause: Exception) -> None:
    error = PeerLost(node="bob")
    error.__cause__ = cause
    received = pickle.loads(pickle.dumps(error))
    assert repr(received.__cause__) == repr(RuntimeError(f"{type(cause).__name__}: {cause}"))
    assert copy.copy(error).__cause__ is cause


def test_a_key_that_does_not_pickle_travels_as_its_text() -> None:
    lock = threading.Lock()
    error = RateLimited(name="login", key=lock, max_count=5, window=60.0, retry_after=1.0)
    received = pickle.loads(pickle.dumps(error))
    assert received.key == repr(lock)
    assert (received.name, received.max_count, received.retry_after) == ("login", 5, 1.0)
    assert copy.copy(error).key is lock


class Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__

    def __reduce__(self) -> str:
        raise RuntimeError("no")


def test_what_neither_pickles_nor_prints_travels_as_the_name_of_its_type() -> None:
    error = RateLimited(name="login", key=[Hostile()], max_count=5, window=60.0)
    error.__cause__ = Hostile()
    received = pickle.loads(pickle.dumps(error))
    assert received.key == "<list>"
    assert repr(received.__cause__) == "RuntimeError('Hostile')"


def test_raising_the_same_class_again_and_again_grows_nothing() -> None:
    def refuse(times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(CircuitOpen):
                raise CircuitOpen(name="db", state="open", retry_after=1.0)

    refuse(10)
    gc.collect()
    before = len(gc.get_objects())
    refuse(10_000)
    assert len(gc.get_objects()) - before < 100


def test_a_long_chain_of_causes_travels() -> None:
    """Longer than Python's stack is deep; each error in it is pickled once, or a chain of 25 would take minutes."""
    error: MeshkitError | None = None
    for number in range(2000):
        above = Closed(name=str(number))
        above.__cause__ = error
        error = above
    received = pickle.loads(pickle.dumps(error))
    names = []
    while received is not None:
        names.append(received.name)
        received = received.__cause__
    assert names == [str(number) for number in reversed(range(2000))]


def test_an_error_that_is_its_own_cause_travels_too() -> None:
    error = Closed(name="pool")
    with pytest.raises(Closed):
        raise error from error
    received = pickle.loads(pickle.dumps(error))
    assert received.name == "pool"
    assert received.__cause__ is None


def test_two_errors_that_are_the_cause_of_each_other_travel() -> None:
    one, two = Closed(name="one"), Closed(name="two")
    one.__cause__, two.__cause__ = two, one
    received = pickle.loads(pickle.dumps(one))
    assert (received.name, received.__cause__.name, received.__cause__.__cause__) == ("one", "two", None)


def test_an_error_out_of_the_group_that_is_its_cause_travels() -> None:
    group = ExceptionGroup("all", [Closed(name=str(number)) for number in range(10)])
    for member in group.exceptions:
        member.__cause__ = group  # as `raise group.exceptions[0] from group` leaves it
    received = pickle.loads(pickle.dumps(group.exceptions[3]))
    assert received.name == "3"
    members = received.__cause__.exceptions
    assert [(member.name, member.__cause__) for member in members] == [(str(number), None) for number in range(10)]


def test_the_members_of_a_group_keep_their_own_causes() -> None:
    inner = PeerLost(node="bob")
    inner.__cause__ = ConnectionResetError("lost")
    outer = Closed(name="pool")
    outer.__cause__ = ExceptionGroup("all", [inner, inner])
    received = pickle.loads(pickle.dumps(outer))
    assert [repr(each.__cause__) for each in received.__cause__.exceptions] == ["ConnectionResetError('lost')"] * 2
    assert pickle.loads(pickle.dumps(inner)).__cause__ is not None, "and nothing of the first time is remembered"


def test_a_group_as_the_cause_travels() -> None:
    error = PeerLost(node="bob")
    error.__cause__ = ExceptionGroup("both", [BadSeal(), CallTimeout(name="ask", timeout=1.0)])
    received = pickle.loads(pickle.dumps(error))
    assert isinstance(received.__cause__, ExceptionGroup)
    assert [type(member) for member in received.__cause__.exceptions] == [BadSeal, CallTimeout]


def fail() -> None:
    raise CallTimeout(name="ask", timeout=1.0) from ValueError("why")


@pytest.mark.real_time
def test_an_error_comes_back_from_another_process() -> None:
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(CallTimeout, match="ask: no result"),
    ):
        pool.submit(fail).result()
