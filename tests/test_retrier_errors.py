"""Which errors a Retrier retries, and what they ask for."""

import asyncio
import contextlib
import math
import random
from typing import Any, ClassVar

import pytest

from meshkit.errors import (
    BadSeal,
    CallTimeout,
    Closed,
    MeshkitError,
    OutcomeUnknown,
    PeerLost,
    RateLimited,
    Refused,
    RemoteError,
    Unreachable,
    Untrusted,
)
from meshkit.retrier import Retrier, RetryPolicy
from meshkit.testing import Leak, run
from tests.test_retrier import NONSENSE, PLAIN, Form, Script, clock, every_form

MAYBE = [CallTimeout(name="x", timeout=1.0), PeerLost(node="x"), Closed(name="x", executed="maybe")]
NO_USE = [BadSeal(), Closed(name="x"), RemoteError(node="x", kind="k")]


async def retries(error: Exception, on: Any, *, idempotent: bool = False) -> bool:
    fn = Script(error, "done")
    with contextlib.suppress(type(error)):
        return await Retrier(PLAIN, on=on, idempotent=idempotent).call(fn) == "done"
    assert len(fn.calls) == 1
    return False


def yes(_: Exception) -> bool:
    return True


@pytest.mark.parametrize("error", MAYBE[:2], ids=repr)
async def test_what_may_have_happened_is_retried_only_if_idempotent_or_named(error: Exception) -> None:
    for broad in (Exception, MeshkitError, TimeoutError, (OSError, MeshkitError, TimeoutError), yes):
        assert not await retries(error, broad)
        covered = isinstance(error, TimeoutError) or broad is not TimeoutError
        assert await retries(error, broad, idempotent=True) == covered
    assert await retries(error, OutcomeUnknown)
    assert await retries(error, (OSError, type(error)))
    other = PeerLost if isinstance(error, CallTimeout) else CallTimeout
    assert not await retries(error, (Exception, other)), "it names another one"


async def test_an_error_of_ones_own_may_have_happened_unless_it_says_otherwise() -> None:
    class ShopError(MeshkitError):
        pass

    class OutOfStock(ShopError):
        executed: ClassVar[Any] = "no"

    for broad in (Exception, MeshkitError):
        assert not await retries(ShopError(), broad)
        assert await retries(ShopError(), broad, idempotent=True)
        assert await retries(OutOfStock(), broad)
    assert await retries(ShopError(), ShopError), "it is named"
    assert await retries(OutOfStock(), ShopError)


async def test_a_base_of_ones_own_names_nothing_but_a_kind_of_ones_own_does() -> None:
    class ShopError(MeshkitError):
        pass

    class OrderUnknown(ShopError, OutcomeUnknown):
        pass

    class PaymentUnknown(ShopError):
        executed: ClassVar[Any] = "maybe"

    for error in (OrderUnknown(), PaymentUnknown()):
        assert not await retries(error, ShopError)
        assert await retries(error, ShopError, idempotent=True)
        assert await retries(error, type(error))


@pytest.mark.parametrize("error", NO_USE, ids=repr)
async def test_what_says_that_trying_again_is_no_use_is_retried_only_if_named_or_by_a_predicate(
    error: Exception,
) -> None:
    for broad in (Exception, MeshkitError):
        assert not await retries(error, broad)
        assert not await retries(error, broad, idempotent=True)
    assert await retries(error, type(error))
    assert await retries(error, yes)


async def test_a_closed_that_may_have_happened_needs_both() -> None:
    assert not await retries(MAYBE[2], Exception, idempotent=True)
    assert not await retries(MAYBE[2], yes)
    assert await retries(MAYBE[2], yes, idempotent=True)
    assert await retries(MAYBE[2], Closed)


async def test_refusals_and_retryable_remote_errors_are_retried_by_a_broad_class() -> None:
    assert await retries(Unreachable(node="x"), Exception)
    assert await retries(Unreachable(node="x"), Refused)
    assert await retries(RemoteError(node="x", kind="k", retryable=True), MeshkitError)
    assert not await retries(Unreachable(node="x", retry_after=1.0), (OSError, Untrusted)), (
        "it asks, but is not covered"
    )


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MAYBE[1], "PeerLost means that it may have happened; say idempotent=True if doing it twice is harmless"),
        (NO_USE[0], "BadSeal means that trying again is no use; name it in `on` if it is"),
    ],
)
async def test_the_note_says_why_an_error_was_not_retried(error: Exception, why: str) -> None:
    with pytest.raises(type(error)) as caught:
        await Retrier(PLAIN, on=Exception).call(Script(error))
    assert caught.value.__notes__ == [f"retrier: gave up after 1 attempt: {why}"]


async def test_a_predicate_sees_each_error_and_decides() -> None:
    seen = []

    def short(error: Exception) -> bool:
        seen.append(error)
        return len(str(error)) < 4

    errors = [OSError("ab"), KeyError("c"), OSError("long")]
    with pytest.raises(OSError, match="long"):
        await Retrier(PLAIN, on=short).call(Script(*errors))
    assert seen == errors


def test_a_predicate_that_fails_is_reported_and_masks_nothing() -> None:
    def broken(_: Exception) -> bool:
        raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(OSError, match="the real one"):
            await Retrier(PLAIN, on=broken).call(Script(OSError("the real one")))

    with pytest.raises(Leak, match=r"the predicate `on` failed on OSError.*ZeroDivisionError"):
        run(main)


async def test_in_a_group_every_error_must_pass() -> None:
    assert await retries(ExceptionGroup("two", [OSError(), ValueError()]), (OSError, ValueError))
    assert await retries(ExceptionGroup("deep", [ExceptionGroup("inner", [OSError()]), OSError()]), OSError)
    assert not await retries(ExceptionGroup("one of them", [OSError(), ValueError()]), OSError)
    maybe = ExceptionGroup("maybe", [OSError(), PeerLost(node="x")])
    assert not await retries(maybe, Exception)
    assert await retries(maybe, Exception, idempotent=True)
    assert await retries(maybe, (OSError, PeerLost))


async def test_the_longest_wait_that_an_error_in_a_group_asks_for_counts() -> None:
    group = ExceptionGroup("busy", [Refused(retry_after=5.0), OSError(), Refused(retry_after=9.0)])
    fn = Script(group, "done")
    await Retrier(PLAIN, on=Exception).call(fn)
    assert fn.calls == [0.0, 9.0]


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(), GeneratorExit()])
@every_form
async def test_what_is_no_exception_passes_untouched_also_in_a_group(form: Form, error: BaseException) -> None:
    for raised in (error, BaseExceptionGroup("group", [OSError(), error])):
        fn = Script(raised)
        with pytest.raises(type(raised)) as caught:
            await form(Retrier(PLAIN, on=yes, idempotent=True), fn)
        assert caught.value is raised
        assert len(fn.calls) == 1


# --- What the other side asks for --------------------------------------------------------------------------


async def test_a_retry_after_is_a_floor_under_the_delay() -> None:
    fn = Script(Refused(retry_after=0.5), Refused(retry_after=10.0), "done")
    await Retrier(PLAIN, on=Refused).call(fn)
    assert fn.calls == [0.0, 1.0, 11.0]


async def test_a_retry_after_holds_also_beyond_max_delay() -> None:
    fn = Script(RateLimited(name="x", key=1, max_count=1, window=1.0, retry_after=45.0), "done")
    await Retrier(PLAIN, on=Refused).call(fn)
    assert fn.calls == [0.0, 45.0]


async def test_those_who_were_told_the_same_retry_after_come_back_apart_and_none_too_early() -> None:
    retrier = Retrier(RetryPolicy(base_delay=2.0), on=Refused, rng=random.Random(7))
    calls = [Script(Refused(retry_after=45.0), "done") for _ in range(100)]
    await asyncio.gather(*map(retrier.call, calls))
    delays = [fn.calls[1] for fn in calls]
    assert all(45.0 <= delay <= 47.0 for delay in delays)
    assert max(delays) - min(delays) > 1.0, "as far as the backoff alone would set them apart"


async def test_the_longest_wait_that_may_be_asked_for_is_waited_for() -> None:
    fn = Script(Refused(retry_after=60.0), "done")
    await Retrier(PLAIN, on=Refused).call(fn)
    assert fn.calls == [0.0, 60.0]


async def test_what_asks_for_too_long_a_wait_is_raised_now() -> None:
    for asked in (60.5, math.inf, 10**400):
        fn = Script(Refused(retry_after=asked))
        with pytest.raises(Refused) as caught:
            await Retrier(PLAIN, on=Refused).call(fn)
        assert len(fn.calls) == 1
        assert clock() == 0.0
        assert "more than max_retry_after=60" in caught.value.__notes__[0]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
async def test_a_retry_after_that_is_no_number_of_seconds_is_no_retry_after(nonsense: object) -> None:
    class Asked(Exception):
        retry_after = nonsense

    fn = Script(Asked(), "done")
    await Retrier(RetryPolicy(base_delay=0.25, jitter=False), on=Asked).call(fn)
    assert fn.calls == [0.0, 0.25]


async def test_a_retry_after_that_cannot_even_be_read_is_no_retry_after() -> None:
    class Odd(Exception):
        @property
        def retry_after(self) -> float:
            raise RuntimeError

    fn = Script(Odd(), "done")
    assert await Retrier(PLAIN, on=Odd).call(fn) == "done"
    assert fn.calls == [0.0, 1.0]


# --- `on` ---------------------------------------------------------------------------------------------------


async def async_predicate(_: Exception) -> bool:
    return True


class AsyncPredicate:
    async def __call__(self, _: Exception) -> bool:
        return True


class GroupOfOnesOwn(ExceptionGroup[Exception]):
    pass


@pytest.mark.parametrize(
    ("on", "kind", "message"),
    [
        (None, TypeError, "on must name classes of Exception .*, not None"),
        ((), ValueError, "on must name at least one exception class: to retry nothing, say max_retries=0"),
        ((OSError, "x"), TypeError, "on must name classes of Exception .*, not 'x'"),
        ([OSError], TypeError, "on must name classes of Exception"),
        (int, TypeError, "on must name classes of Exception"),
        (BaseException, TypeError, r"on must name classes of Exception \(cancellations are not for it\)"),
        (asyncio.CancelledError, TypeError, "cancellations are not for it"),
        (ExceptionGroup, TypeError, "on is asked about each error in a group: name those, not ExceptionGroup"),
        (GroupOfOnesOwn, TypeError, "on is asked about each error in a group: name those, not GroupOfOnesOwn"),
        (async_predicate, TypeError, "on must be a plain function, whose answer is there at once"),
        (AsyncPredicate(), TypeError, "on must be a plain function, whose answer is there at once"),
    ],
)
def test_on_must_say_which_errors(on: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Retrier(PLAIN, on=on)
    with pytest.raises(TypeError, match="on"):
        Retrier(PLAIN)  # type: ignore[call-arg]
