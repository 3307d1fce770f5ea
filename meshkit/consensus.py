"""Consensus: one value out of the votes of many, though some of them are late, wrong or malicious.

>>> restarts = ConsensusHelper[int](3, trimmed_mean)
>>> for voter, value in [("alice", 41), ("bob", 43), ("mallory", 1_000_000)]:
...     restarts.add_vote(voter, value)
>>> restarts.has_quorum, restarts.result()
(True, 42)
>>> sorted(restarts.outcome().trimmed)
['mallory']

The result never depends on the order in which votes arrive: nodes that have the same votes agree on it.
"""

import asyncio
import cmath
import contextlib
import inspect
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Generic, TypeVar, cast

from meshkit import _check
from meshkit._time import running_loop
from meshkit.errors import NoQuorum, TooManyKeys, UnknownVoter

__all__ = ["ConsensusHelper", "Outcome", "majority", "median", "plurality", "trimmed_mean"]

T = TypeVar("T")
N = TypeVar("N", int, float)
H = TypeVar("H", bound=Hashable)

_MAX_DEPTH = 32  # of a vote: a deeper one might overflow the stack of whoever asks for the result


def trimmed_mean(values: Iterable[N]) -> N:
    """Return the mean of the values that are near the upper median: from a fifth of it to five times it; 0 for none.

    Near a median of 0 is what lies from -10 to 10. If all that is kept are ints, the mean is an int: exact at any
    size, each division truncating toward zero. With a float among them it is a float, correctly rounded, unless it is
    too large for one.

    Raises:
        TypeError: A value is neither an int nor a float (a bool is not).
        ValueError: A value is NaN or infinite.
    """
    mean: N = _mean(_near_median(values))
    return mean


def median(values: Iterable[N]) -> N:
    """Return the upper median: the middle value, or the greater of the two in the middle; always somebody's vote.

    Raises:
        NoQuorum: There are no values.
        TypeError, ValueError: As `trimmed_mean`.
    """
    ordered = _sorted_numbers(values)
    if not ordered:
        raise NoQuorum(name="median", votes=0, threshold=1)
    return ordered[len(ordered) // 2]


def plurality(values: Iterable[H]) -> H:
    """Return the most frequent value; among equally frequent ones the least, which is the same one on every node.

    Numbers and strings are ordered as usual, tuples and frozensets by what they hold, other types by their repr.

    Raises:
        NoQuorum: There are no values.
        TypeError: A value is not hashable, or its repr is an address, which differs between nodes.
        ValueError: A value is NaN or infinite, or a tuple or frozenset that holds such a one or is nested too deep.
    """
    counts = _counted(values)
    if not counts:
        raise NoQuorum(name="plurality", votes=0, threshold=1)
    return max(counts, key=lambda value: counts[value])  # the first of them, which is the least


def majority(values: Iterable[H]) -> H:
    """Return the value that more than half of the votes agree on.

    Raises:
        NoQuorum: There is none.
        TypeError, ValueError: As `plurality`.
    """
    counts = _counted(values)
    needed = counts.total() // 2 + 1
    for value, count in counts.items():
        if count >= needed:
            return value
    most = max(counts.values(), default=0)
    reason = f"the most frequent value has {most} of {counts.total()} votes, and a majority is {needed}"
    raise NoQuorum(name="majority", votes=most, threshold=needed, reason=reason)


def _near_median(values: Iterable[N]) -> list[N]:
    ordered = _sorted_numbers(values)
    if not ordered:
        return []
    middle: float = ordered[len(ordered) // 2]
    fifth = _divide(middle, 5) if isinstance(middle, int) else middle / 5
    low, high = sorted((fifth, middle * 5)) if middle else (-10, 10)
    return [value for value in ordered if low <= value <= high]  # never empty: the median itself is near


def _mean(numbers: list[Any]) -> Any:
    ratios = [number.as_integer_ratio() for number in numbers]
    unit = max((denominator for _, denominator in ratios), default=1)  # all are powers of two: it is a multiple of each
    total = sum(numerator * (unit // denominator) for numerator, denominator in ratios)
    if any(isinstance(number, float) for number in numbers):
        with contextlib.suppress(OverflowError):  # raised by what only an int can hold
            return total / (unit * len(numbers))  # the one rounding
    return _divide(total, unit * len(numbers) or 1)


def _divide(number: int, by: int) -> int:
    """Divide truncating toward zero, without going through a float."""
    return number // by if number >= 0 else -(-number // by)


def _sorted_numbers(values: Iterable[N]) -> list[N]:
    numbers = list(values)
    for value in numbers:
        _check_number(value)
    return sorted(numbers, key=_rank)


def _counted(values: Iterable[H]) -> Counter[H]:
    """Count equal values, the least first. The least also stands for all that are equal to it (1, 1.0, True)."""
    hashable = list(values)
    for value in hashable:
        _check_countable(value)
    return Counter(sorted(hashable, key=_rank))


def _rank(value: Any) -> tuple[Any, ...]:
    """Return a key that orders values of any types, in the same way in every process."""
    kind = type(value).__qualname__  # tells apart what is equal, but not the same
    members: Any = value
    if isinstance(value, (int, float)):
        return 0, value, kind, math.copysign(1, value) if value == 0 else 0
    if isinstance(value, str):
        return 1, str(value), kind
    if isinstance(value, tuple):
        return 2, [_rank(member) for member in members], kind
    if isinstance(value, frozenset):
        return 3, sorted(_rank(member) for member in members), kind
    text = repr(value)
    if " at 0x" in text and not isinstance(value, bytes):
        raise TypeError(
            f"{kind} objects have no __repr__ of their own: theirs is not the same on every node: vote with plain data"
        )
    return 4, kind, text


def _check_finite(value: Any, depth: int = 0) -> None:
    members: Any = value
    finite = True
    if isinstance(value, (tuple, frozenset)):
        if depth == _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        for member in members:
            _check_finite(member, depth + 1)
    elif isinstance(value, (float, complex)):
        finite = cmath.isfinite(value)
    elif isinstance(value, Decimal):
        finite = value.is_finite()
    if not finite:
        raise ValueError(f"{value!r} is not a finite number")


def _check_number(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{reprlib.repr(value)} is a {type(value).__name__}, not an int or a float")
    _check_finite(value)


def _check_countable(value: object) -> None:
    _check_finite(value)
    try:
        hash(value)
    except TypeError:
        text = f"{reprlib.repr(value)} is a {type(value).__name__}, which is not hashable and cannot be counted"
        raise TypeError(f"{text}: vote with a tuple, a frozenset or a string") from None
    _rank(value)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """The result `value`, who voted, whose votes were left out as outliers, and how often votes were replaced."""

    value: T
    voters: frozenset[Hashable]
    trimmed: frozenset[Hashable]
    replaced: int


class ConsensusHelper(Generic[T]):
    """Collect one vote per voter, and make one value of them with `aggregator` when at least `threshold` have voted.

    `aggregator` is `trimmed_mean`, `median`, `majority`, `plurality`, or any function of a list of votes; it is given
    them in the order of their voters, not of their arrival. If your own leaves out outliers, `kept(votes)` returns the
    collection of those that it counts, so that `outcome` can say who was trimmed.

    With `voters` given, only they have a vote. Otherwise anybody has, up to `max_voters` of them: a bound on memory.
    Who votes again replaces their vote. `add_vote` refuses what a built-in aggregator could not use, and with any
    aggregator NaN and infinity: one bad vote must not spoil the result of all.

    For the tasks of one loop; from other threads, use `anyio.from_thread`.
    Cost: `add_vote` O(1); `result` and `outcome` O(n log n), computed anew each time.
    """

    def __init__(
        self,
        threshold: int,
        aggregator: Callable[[list[T]], T],
        voters: Iterable[Hashable] | None = None,
        *,
        max_voters: int = 10_000,
        kept: Callable[[list[T]], Collection[T]] | None = None,
        name: str = "consensus",
    ) -> None:
        self._threshold = _check.count("threshold", threshold)
        if inspect.iscoroutinefunction(aggregator) or not callable(aggregator):
            raise TypeError(f"aggregator must be a plain function of a list of votes, not {aggregator!r}")
        if isinstance(voters, (str, bytes)):
            raise TypeError(f"voters must be a collection of voters, not the single {voters!r}")
        self._voters = None if voters is None else frozenset(voters)
        self._max_voters = _check.count("max_voters", max_voters) if self._voters is None else len(self._voters)
        if threshold > self._max_voters:
            who = "max_voters" if self._voters is None else "the number of voters"
            raise ValueError(f"threshold must be at most {who} ({self._max_voters}), not {threshold!r}")
        self._aggregator, self._name = aggregator, name
        self._kept = cast("Any", _near_median) if kept is None and aggregator is trimmed_mean else kept
        self._check: Callable[[Any], None] = _check_finite
        if aggregator in (trimmed_mean, median):
            self._check = _check_number
        elif aggregator in (majority, plurality):
            self._check = _check_countable
        self._votes: dict[Hashable, T] = {}
        self._replaced = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        aggregator = getattr(self._aggregator, "__name__", repr(self._aggregator))
        return f"ConsensusHelper({self._name!r}, {aggregator}, votes={len(self._votes)}, threshold={self._threshold})"

    def add_vote(self, voter: Hashable, value: T) -> None:
        """Count `value` as the vote of `voter`, in place of their earlier vote if there is one.

        Raises:
            UnknownVoter: `voters` were given, and this is none of them.
            TooManyKeys: `max_voters` others have voted.
            RuntimeError: A task waits on the loop of another thread.
            TypeError, ValueError: This value cannot be voted with; an earlier vote stays.
        """
        if self._voters is not None and voter not in self._voters:
            raise UnknownVoter(name=self._name, voter=voter)
        self._refuse_other_loops()
        try:
            self._check(value)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self._name}: the vote of {voter!r} was refused: {error}") from None
        if voter in self._votes:
            self._replaced += 1
        elif len(self._votes) >= self._max_voters:
            raise TooManyKeys(name=self._name, key=voter, max_keys=self._max_voters)
        self._votes[voter] = value
        if self.has_quorum:
            for waiter in self._waiters:
                if not (waiter.done() or waiter.get_loop().is_closed()):
                    waiter.set_result(None)

    def _refuse_other_loops(self) -> None:
        """Raise if the vote cannot wake those who wait, since their loop runs in another thread."""
        here = running_loop()
        for waiter in self._waiters if len(self._votes) + 1 >= self._threshold else ():  # it may be the last one needed
            if waiter.get_loop() is not here and waiter.get_loop().is_running():
                raise RuntimeError(f"{self._name}: tasks of another event loop wait for votes: vote on that loop")

    @property
    def vote_count(self) -> int:
        """How many have voted."""
        return len(self._votes)

    @property
    def has_quorum(self) -> bool:
        """Whether enough have voted for a result."""
        return len(self._votes) >= self._threshold

    def result(self) -> T:
        """Return the value that the votes amount to.

        Raises:
            NoQuorum: Too few have voted, or, with `majority`, too few agree.
        """
        if not self.has_quorum:
            raise NoQuorum(name=self._name, votes=len(self._votes), threshold=self._threshold)
        try:
            return self._aggregator(self._values())
        except NoQuorum as error:
            raise replace(error, name=self._name) from None  # the aggregator does not know whose votes they are

    def outcome(self) -> Outcome[T]:
        """Return the result, and what it is based on. Raises `NoQuorum` as `result` does."""
        value = self.result()
        trimmed: set[Hashable] = set()
        if self._kept is not None:
            kept = self._kept(self._values())
            with contextlib.suppress(TypeError):  # votes that are not hashable are looked up one by one
                kept = frozenset(kept)
            trimmed = {voter for voter, vote in self._votes.items() if vote not in kept}
        return Outcome(value, frozenset(self._votes), frozenset(trimmed), self._replaced)

    def _values(self) -> list[T]:
        """Return the votes, in an order that does not depend on their arrival."""
        try:
            return [self._votes[voter] for voter in sorted(self._votes, key=_rank)]
        except (TypeError, ValueError):  # voters that only this process can tell apart have no order in common
            return list(self._votes.values())

    def reset(self) -> None:
        """Forget all votes, for the next round. Who waits for a quorum goes on waiting."""
        self._votes.clear()
        self._replaced = 0

    async def wait(self) -> None:
        """Wait until there is a quorum. Any number of tasks can, and a cancelled one costs the others nothing."""
        while not self.has_quorum:  # after waking, too: the votes may have been reset before this task ran
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
