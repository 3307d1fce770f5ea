import asyncio
import itertools
import math
import os
import pickle
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any, cast

import pytest
from hypothesis import example, given, settings, strategies as st

from meshkit.consensus import ConsensusHelper, Outcome, majority, median, plurality, trimmed_mean
from meshkit.errors import NoQuorum, TooManyKeys, UnknownVoter
from meshkit.testing import cancellation_points, run

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INTS = st.one_of(st.integers(-50, 50), st.integers())
PLAIN = st.recursive(
    st.one_of(st.integers(-3, 3), st.booleans(), st.sampled_from([0.0, -0.0, 1.0, "a", "b", "", b"a", None])),
    lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)


class Colour(Enum):
    RED = "red"
    GREEN = "green"


# --- trimmed_mean


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([100, 100, 100, 100, 1_000_000], 100),
        ([10, 12, 11, 13, 14], 12),
        ([0, 0, 0, 5, -5, 100], 0),
        ([-10, -10, -10, -12, -8], -10),
        ([42], 42),
        ([], 0),
        ([-10, -10, -11], -10),  # -31 / 3, toward zero
        ([-1, -2], -1),
        ([1, 2], 1),
        ([7, 35, 36], 26),  # the median 35 keeps [7, 175]
        ([6, 35, 36], 35),  # 6 is less than a fifth of it
        ([3, 1, 0], 1),  # a fifth of 1 is 0
        ([-3, -14, -16], -11),  # the upper median -14 keeps [-70, -2]: all three
        ([-1, -14, -16], -15),
    ],
)
def test_the_trimmed_mean_agrees_with_the_original(values: list[int], mean: int) -> None:
    assert trimmed_mean(values) == mean
    assert type(trimmed_mean(values)) is int


def naive_trimmed_mean(values: list[int]) -> int:
    """The rule in other words: exact fractions, cut off toward zero wherever the original divides."""
    if not values:
        return 0
    m = sorted(values)[len(values) // 2]
    if m > 0:
        near = [v for v in values if math.trunc(Fraction(m, 5)) <= v <= 5 * m]
    elif m < 0:
        near = [v for v in values if 5 * m <= v <= math.trunc(Fraction(m, 5))]
    else:
        near = [v for v in values if abs(v) <= 10]
    return math.trunc(Fraction(sum(near), len(near)))


@given(st.lists(INTS))
@example([10**400, 10**400 + 1, 10**400 + 3])
@example([-(10**30), -(10**30) - 1])
def test_of_ints_it_agrees_with_the_naive_one_exactly(values: list[int]) -> None:
    assert trimmed_mean(values) == naive_trimmed_mean(values)


@given(st.lists(FLOATS, min_size=1))
@example([sys.float_info.max] * 3)
@example([5e-324, 5e-324, 1e-323])
@example([0.1] * 10)
def test_of_floats_it_is_the_correctly_rounded_mean_of_what_is_near(values: list[float]) -> None:
    m = sorted(values)[len(values) // 2]
    low, high = sorted([m / 5, m * 5]) if m else (-10.0, 10.0)
    near = [Fraction(v) for v in values if low <= v <= high]
    assert trimmed_mean(values) == float(sum(near) / len(near))
    assert type(trimmed_mean(values)) is float


@given(st.lists(st.one_of(INTS, FLOATS)), st.randoms())
def test_it_does_not_depend_on_the_order_not_even_in_the_last_bit(values: list[float], rng: random.Random) -> None:
    before = trimmed_mean(values)
    rng.shuffle(values)
    after = trimmed_mean(values)
    assert (before, type(before), math.copysign(1, before)) == (after, type(after), math.copysign(1, after))


def test_a_float_among_what_is_kept_makes_the_mean_a_float_and_one_that_is_trimmed_does_not() -> None:
    assert (trimmed_mean([1, 2.0]), type(trimmed_mean([1, 2.0]))) == (1.5, float)
    assert (trimmed_mean([1, 2, 1e9]), type(trimmed_mean([1, 2, 1e9]))) == (1, int)


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([1e308, 1e308, 10**400], (2 * int(1e308) + 10**400) // 3),  # five times the median is infinite
        ([2 * 10**308] * 4 + [1e308], (8 * 10**308 + int(1e308)) // 5),
        ([-2 * 10**308] * 4 + [-1.5], -2 * 10**308),
        ([-2 * 10**308] * 4 + [-1e308], -((8 * 10**308 + int(1e308)) // 5)),
    ],
)
def test_a_mean_that_no_float_can_hold_stays_an_int(values: list[float], mean: int) -> None:
    assert trimmed_mean(values) == mean
    assert type(trimmed_mean(values)) is int


# --- median, plurality, majority


@given(st.lists(st.one_of(INTS, FLOATS), min_size=1), st.randoms())
def test_the_median_is_the_upper_one_and_always_somebodys_vote(values: list[float], rng: random.Random) -> None:
    value = median(values)
    assert any(value is vote for vote in values)
    assert value == statistics.median_high(values)
    rng.shuffle(values)
    assert repr(median(values)) == repr(value)


def test_of_equal_numbers_in_the_middle_the_median_is_the_same_one_in_any_order() -> None:
    for values in ([1, 1.0], [0.0, -0.0], [0, -0.0, 0.0]):
        assert len({repr(median(order)) for order in itertools.permutations(values)}) == 1


@settings(max_examples=60)
@given(st.lists(PLAIN, min_size=1), st.randoms())
def test_plurality_takes_a_most_frequent_value_and_always_the_same(values: list[Any], rng: random.Random) -> None:
    value = plurality(values)
    assert values.count(value) == max(values.count(other) for other in values)
    rng.shuffle(values)
    assert (plurality(values), type(plurality(values))) == (value, type(value))


@settings(max_examples=60)
@given(st.lists(PLAIN), st.randoms())
def test_majority_takes_what_more_than_half_agree_on_or_nothing(values: list[Any], rng: random.Random) -> None:
    agreed = [value for value in values if values.count(value) * 2 > len(values)]
    rng.shuffle(values)
    if agreed:
        assert majority(values) == agreed[0]
    else:
        with pytest.raises(NoQuorum):
            majority(values)


@pytest.mark.parametrize(
    ("values", "value"),
    [
        ([3, 1, 2], 1),
        (["b", "a"], "a"),
        ([10, 9], 9),  # by value, not by how it is written
        ([2, 2, 1, True, 1.0, 2], True),  # what is equal counts together
        ([1, True], True),
        ([0.0, -0.0], -0.0),
        ([(2, "b"), (2, "a"), (10, "a")], (2, "a")),
        ([frozenset({2, 3}), frozenset({1, 9})], frozenset({1, 9})),
        ([frozenset([8, 0]), frozenset([1, 9])], frozenset([8, 0])),  # by what it holds, not by how it is iterated over
        ([None, "a", 7], 7),
        ([Colour.RED, Colour.GREEN], Colour.GREEN),
        ([Decimal(1), Decimal(2)], Decimal(1)),
        ([b"it is at 0x10", b"b"], b"b"),  # bytes are plain data, whatever they say
    ],
)
def test_a_tie_goes_to_the_least(values: list[Any], value: Any) -> None:
    for order in (values, values[::-1]):
        assert repr(plurality(order)) == repr(value)


def test_a_tie_is_broken_the_same_way_whatever_the_hash_seed() -> None:
    code = (
        "from meshkit.consensus import plurality; names = ['alice', 'bob', 'carol', 'dave'];"
        "pairs = [frozenset({a, b}) for a in names for b in names if a != b];"
        "print(sorted(plurality(pairs)), plurality(set(names)), plurality({(a, None) for a in names}))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert said == {"['alice', 'bob'] alice ('alice', None)\n"}


def test_with_no_values_there_is_nothing_to_agree_on() -> None:
    assert trimmed_mean([]) == 0
    for aggregator in (median, plurality, majority):
        with pytest.raises(NoQuorum, match="no quorum"):
            aggregator([])


def test_no_majority_says_how_far_away_it_is() -> None:
    with pytest.raises(NoQuorum) as caught:
        majority(["a", "a", "b", "b"])
    expected = "majority: no quorum, the most frequent value has 2 of 4 votes, and a majority is 3"
    assert str(caught.value) == expected
    assert str(pickle.loads(pickle.dumps(caught.value))) == expected
    assert (caught.value.executed, caught.value.votes, caught.value.threshold) == ("no", 2, 3)


# --- what cannot be voted with


@dataclass(frozen=True)
class Point:
    x: float
    owner: object = None


class Addressed:
    pass


def nested(depth: int) -> tuple[Any, ...]:
    return (nested(depth - 1),) if depth else ()


BAD_NUMBERS: list[tuple[Any, type[Exception], str]] = [
    (True, TypeError, "True is a bool, not an int or a float"),
    ("41", TypeError, "'41' is a str, not an int or a float"),
    (None, TypeError, "None is a NoneType, not an int or a float"),
    (Decimal(1), TypeError, "is a Decimal, not an int or a float"),
    (1j, TypeError, "1j is a complex"),
    ("x" * 1000, TypeError, r"\.\.\.x*' is a str"),
    (math.nan, ValueError, "nan is not a finite number"),
    (math.inf, ValueError, "inf is not a finite number"),
    (-math.inf, ValueError, "-inf is not a finite number"),
]
BAD_VALUES: list[tuple[Any, type[Exception], str]] = [
    ([1], TypeError, r"\[1\] is a list, which is not hashable and cannot be counted: vote with a tuple"),
    ({"a": 1}, TypeError, r"\{'a': 1\} is a dict, which is not hashable"),
    ((1, [2]), TypeError, "is a tuple, which is not hashable"),
    (Addressed(), TypeError, "Addressed objects have no __repr__ of their own: theirs is not the same on every node"),
    (lambda: 1, TypeError, "function objects have no __repr__ of their own"),
    (Point(1, Addressed()), TypeError, "Point objects have no __repr__ of their own"),
    (math.nan, ValueError, "nan is not a finite number"),
    (complex(0, math.inf), ValueError, "is not a finite number"),
    (Decimal("NaN"), ValueError, r"Decimal\('NaN'\) is not a finite number"),
    ((1, ("a", math.inf)), ValueError, "inf is not a finite number"),
    (frozenset({math.nan}), ValueError, "nan is not a finite number"),
    (nested(32), ValueError, "it is nested more than 32 deep"),
    (nested(400), ValueError, "it is nested more than 32 deep"),
]


def both(aggregators: Iterable[Any], cases: list[tuple[Any, type[Exception], str]]) -> list[Any]:
    return [(aggregator, *case) for aggregator in aggregators for case in cases]


CASES = both((trimmed_mean, median), BAD_NUMBERS) + both((plurality, majority), BAD_VALUES)


@pytest.mark.parametrize(("aggregator", "value", "error", "words"), CASES)
def test_an_aggregator_says_what_is_wrong_with_a_value(
    aggregator: Callable[[list[Any]], Any], value: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        aggregator([1, value])


@pytest.mark.parametrize(("aggregator", "value", "error", "words"), CASES)
def test_a_bad_vote_is_refused_at_the_door_and_the_earlier_one_stays(
    aggregator: Callable[[list[Any]], Any], value: Any, error: type[Exception], words: str
) -> None:
    helper = ConsensusHelper[Any](1, aggregator, name="restarts")
    helper.add_vote("mallory", 7)
    with pytest.raises(error, match=f"restarts: the vote of 'mallory' was refused: .*{words}"):
        helper.add_vote("mallory", value)
    assert helper.outcome() == Outcome(7, frozenset({"mallory"}), frozenset(), replaced=0)


@pytest.mark.parametrize("value", [math.nan, -math.inf, Decimal("Infinity"), complex(math.nan, 0), (1, math.nan)])
def test_nan_and_infinities_are_refused_whatever_the_aggregator(value: Any) -> None:
    helper = ConsensusHelper[Any](1, lambda votes: votes[0])
    with pytest.raises(ValueError, match=r"the vote of 'mallory' was refused: .* is not a finite number"):
        helper.add_vote("mallory", value)
    assert helper.vote_count == 0


def test_the_deepest_vote_that_is_taken_can_be_counted_anywhere() -> None:
    helper = ConsensusHelper[Any](1, plurality)
    helper.add_vote("mallory", nested(31))
    helper.add_vote("alice", nested(31))

    def far_down(frames: int) -> Any:
        return far_down(frames - 1) if frames else helper.result()

    assert far_down(sys.getrecursionlimit() - 300) == nested(31)


# --- ConsensusHelper


def test_votes_of_a_checkpoint() -> None:
    restarts = ConsensusHelper[int](3, trimmed_mean, name="restarts")
    assert not restarts.has_quorum
    restarts.add_vote("alice", 41)
    restarts.add_vote("bob", 43)
    with pytest.raises(NoQuorum, match="restarts: no quorum, 2 of 3 votes are in"):
        restarts.result()
    with pytest.raises(NoQuorum):
        restarts.outcome()
    restarts.add_vote("mallory", 10**9)
    assert (restarts.vote_count, restarts.has_quorum, restarts.result()) == (3, True, 42)
    restarts.add_vote("mallory", 42)
    restarts.add_vote("mallory", -5)
    assert restarts.outcome() == Outcome(42, frozenset({"alice", "bob", "mallory"}), frozenset({"mallory"}), replaced=2)
    assert repr(restarts) == "ConsensusHelper('restarts', trimmed_mean, votes=3, threshold=3)"
    restarts.reset()
    assert (restarts.vote_count, restarts.has_quorum) == (0, False)
    restarts.add_vote("alice", 1)
    assert repr(restarts) == "ConsensusHelper('restarts', trimmed_mean, votes=1, threshold=3)"


def test_voting_again_does_not_count_twice() -> None:
    helper = ConsensusHelper[str](2, majority)
    for _ in range(5):
        helper.add_vote("mallory", "yes")
    assert (helper.vote_count, helper.has_quorum) == (1, False)
    helper.add_vote("bob", "yes")
    assert helper.outcome().replaced == 4


def test_no_majority_is_said_in_the_name_of_the_helper() -> None:
    helper = ConsensusHelper[str](2, majority, name="leader")
    helper.add_vote("alice", "alice")
    helper.add_vote("bob", "bob")
    assert helper.has_quorum
    with pytest.raises(NoQuorum, match="leader: no quorum, the most frequent value has 1 of 2 votes"):
        helper.result()


def test_a_stranger_has_no_vote() -> None:
    helper = ConsensusHelper[int](2, median, {"alice", "bob"}, name="restarts")
    helper.add_vote("alice", 1)
    with pytest.raises(UnknownVoter, match="restarts: 'mallory' is not one of the voters") as caught:
        helper.add_vote("mallory", 1)
    assert pickle.loads(pickle.dumps(caught.value)).voter == "mallory"
    assert helper.vote_count == 1


def test_without_a_list_of_voters_their_number_is_bounded() -> None:
    helper = ConsensusHelper[int](1, median, max_voters=100, name="restarts")
    for voter in range(100):
        helper.add_vote(voter, 1)
    with pytest.raises(TooManyKeys, match="restarts: no room for 'mallory', all 100 keys are in use"):
        helper.add_vote("mallory", 1)
    helper.add_vote(7, 2)  # who has voted may vote again
    assert (helper.vote_count, helper.outcome().replaced) == (100, 1)


def test_ten_thousand_votes() -> None:
    helper = ConsensusHelper[int](10_000, trimmed_mean)
    for voter in range(10_000):
        helper.add_vote(f"node {voter}", voter + 1)
    outcome = helper.outcome()
    assert outcome.value == naive_trimmed_mean(list(range(1, 10_001)))
    assert outcome.trimmed == {f"node {voter}" for voter in range(999)}


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=3), INTS, min_size=1), st.randoms())
def test_the_outcome_does_not_depend_on_the_order_of_arrival(votes: dict[str, int], rng: random.Random) -> None:
    def first(values: list[int]) -> int:
        return values[0]  # the rudest aggregator: what it returns is all about order

    for aggregator in (trimmed_mean, median, plurality, first):
        outcomes = set()
        for _ in range(3):
            helper = ConsensusHelper[int](1, aggregator)
            for voter in rng.sample(sorted(votes), len(votes)):
                helper.add_vote(voter, votes[voter])
            outcomes.add(helper.outcome())
        assert len(outcomes) == 1


@given(st.dictionaries(st.text(max_size=3), INTS, min_size=1))
def test_who_was_trimmed_is_who_voted_far_from_the_median(votes: dict[str, int]) -> None:
    helper = ConsensusHelper[int](1, trimmed_mean)
    for voter, value in votes.items():
        helper.add_vote(voter, value)
    outcome = helper.outcome()
    kept = [value for voter, value in votes.items() if voter not in outcome.trimmed]
    assert outcome.voters == set(votes)
    assert outcome.value == math.trunc(Fraction(sum(kept), len(kept)))
    assert outcome.value == naive_trimmed_mean(list(votes.values()))


def test_an_aggregator_of_your_own_can_say_whom_it_trimmed() -> None:
    def middle(votes: list[list[int]]) -> list[list[int]]:
        return sorted(votes)[1:-1]

    def mean(votes: list[list[int]]) -> list[int]:
        return [round(statistics.mean(column)) for column in zip(*middle(votes), strict=True)]

    helper = ConsensusHelper[list[int]](4, mean, kept=middle)  # votes need not be hashable either
    for voter, vote in {"alice": [1, 2], "bob": [3, 4], "carol": [5, 6], "dave": [99, 99]}.items():
        helper.add_vote(voter, vote)
    assert helper.outcome() == Outcome(
        [4, 5], frozenset({"alice", "bob", "carol", "dave"}), frozenset({"alice", "dave"}), 0
    )


def test_an_aggregator_may_change_its_list_and_raise_what_it_likes() -> None:
    def rude(votes: list[int]) -> int:
        votes.clear()
        raise ZeroDivisionError

    helper = ConsensusHelper[int](1, rude)
    helper.add_vote("alice", 1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            helper.result()
    assert helper.vote_count == 1


def test_voters_may_be_objects_that_only_this_process_can_tell_apart() -> None:
    helper = ConsensusHelper[int](2, median)
    for voter in (Addressed(), Addressed()):
        helper.add_vote(voter, 1)
    assert helper.result() == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"threshold": 0}, ValueError, "threshold must be at least 1, not 0"),
        ({"threshold": 1.5}, TypeError, "threshold must be a whole number, not 1.5"),
        ({"threshold": 3, "voters": ["a", "b", "a"]}, ValueError, r"at most the number of voters \(2\), not 3"),
        ({"threshold": 3, "max_voters": 2}, ValueError, r"threshold must be at most max_voters \(2\), not 3"),
        ({"max_voters": 0}, ValueError, "max_voters must be at least 1, not 0"),
        ({"voters": "alice"}, TypeError, "voters must be a collection of voters, not the single 'alice'"),
        ({"aggregator": None}, TypeError, "aggregator must be a plain function of a list of votes, not None"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    defaults: dict[str, Any] = {"threshold": 1, "aggregator": median}
    with pytest.raises(error, match=words):
        ConsensusHelper(**(defaults | arguments))


# --- waiting


async def test_many_wait_for_the_quorum_and_none_wakes_before() -> None:
    helper = ConsensusHelper[int](3, median)
    tasks = [asyncio.create_task(helper.wait()) for _ in range(10_000)]
    for voter in "ab":
        helper.add_vote(voter, 1)
        await asyncio.sleep(1)
        assert not any(task.done() for task in tasks)
    helper.add_vote("c", 1)
    helper.add_vote("d", 1)  # they are woken already
    await asyncio.gather(*tasks)
    assert asyncio.get_running_loop().time() == 2.0
    with pytest.raises(StopIteration):
        helper.wait().send(None)  # there is a quorum: nobody waits any more


async def test_a_reset_while_waiting_means_waiting_for_the_next_round() -> None:
    helper = ConsensusHelper[int](2, median)
    task = asyncio.create_task(helper.wait())
    await asyncio.sleep(1)
    helper.add_vote("a", 1)
    helper.add_vote("b", 1)
    helper.reset()  # it was woken, and has not run yet
    await asyncio.sleep(1)
    assert not task.done()
    helper.add_vote("a", 2)
    helper.add_vote("b", 2)
    await task
    assert helper.result() == 2


def test_a_cancelled_waiter_costs_the_others_nothing() -> None:
    count = 0
    for point in cancellation_points():

        async def main(point: Any = point) -> None:
            helper = ConsensusHelper[int](2, median)
            others = [asyncio.create_task(helper.wait()) for _ in range(3)]
            loop = asyncio.get_running_loop()
            loop.call_later(1, helper.add_vote, "a", 1)
            loop.call_later(2, helper.add_vote, "b", 1)
            await point.cancel(helper.wait())
            await asyncio.gather(*others)
            assert loop.time() == 2.0
            assert helper.vote_count == 2

        run(main)
        count += 1
    assert count > 3


def test_one_helper_serves_two_loops_one_after_the_other() -> None:
    helper = ConsensusHelper[int](1, median)

    async def main() -> None:
        asyncio.get_running_loop().call_later(1, helper.add_vote, "a", 1)
        await helper.wait()
        helper.reset()

    run(main)
    run(main)


def test_who_went_down_with_their_loop_does_not_keep_others_waiting() -> None:
    helper = ConsensusHelper[int](1, median)
    loop = asyncio.new_event_loop()
    left = [loop.create_task(helper.wait()) for _ in range(3)]
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    async def main() -> None:
        asyncio.get_running_loop().call_later(1, helper.add_vote, "a", 1)
        await helper.wait()

    run(main)
    for task in left:
        task.get_coro().close()
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # it was left on purpose


def test_an_aggregator_is_no_async_function() -> None:
    async def later(votes: list[int]) -> int:
        return votes[0]

    with pytest.raises(TypeError, match="aggregator must be a plain function of a list of votes, not <function"):
        ConsensusHelper[Any](1, cast("Any", later))


def test_a_vote_from_another_thread_is_refused_while_somebody_waits() -> None:
    votes: ConsensusHelper[int] = ConsensusHelper(1, median, name="restarts")
    waits, loops = threading.Event(), list[asyncio.AbstractEventLoop]()

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        loops.append(loop)
        loop.call_soon(waits.set)
        await votes.wait()

    thread = threading.Thread(target=asyncio.run, args=(wait(),), daemon=True)
    thread.start()
    assert waits.wait(10)
    with pytest.raises(RuntimeError, match="restarts: tasks of another event loop wait for votes: vote on that"):
        votes.add_vote("alice", 1)
    assert votes.vote_count == 0
    loops[0].call_soon_threadsafe(votes.add_vote, "alice", 1)
    thread.join(10)
    assert not thread.is_alive()
    assert votes.result() == 1
    votes.add_vote("bob", 1)  # nobody waits any more
