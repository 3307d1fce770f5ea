"""The core against naive models: exact to the last bit of a float, and bounded without forgetting what counts."""

import math
from collections.abc import Hashable, Iterator
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshkit.rate_limiter import SlidingWindow

WINDOWS = st.sampled_from([0.1, 0.3, 1.0, 7.0, 10.0, 60.0, 1e-3, 86_400.0])
STARTS = st.sampled_from([0.0, 0.1, 1 / 3, 1e6 + 0.1, 1.7e9, 1e12 + 0.3])
COUNTS = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 18, 40])


class Naive:
    """Keeps everything in lists, and calculates in fractions."""

    def __init__(self, max_count: int, window: float, max_keys: int = 10**9) -> None:
        self.max_count = max_count
        self.window = Fraction(window)
        self.max_keys = max_keys
        self.admitted: dict[Hashable, list[tuple[Fraction, float, int]]] = {}  # until when it counts, since when, cost

    def counting(self, key: Hashable, now: float) -> list[tuple[Fraction, float, int]]:
        return [item for item in self.admitted.get(key, []) if item[0] > now]

    def used(self, key: Hashable, now: float) -> int:
        return sum(cost for _, _, cost in self.counting(key, now))

    def limited(self, now: float) -> list[Hashable]:
        return [key for key in self.admitted if self.counting(key, now)]

    def fits(self, key: Hashable, now: float, cost: int) -> bool:
        used = self.used(key, now)
        return (used > 0 or len(self.limited(now)) < self.max_keys) and used + cost <= self.max_count

    def admit(self, key: Hashable, now: float, cost: int) -> None:
        self.admitted[key] = [*self.counting(key, now), (Fraction(now) + self.window, now, cost)]


def times(random: Random, window: float, start: float, length: int) -> Iterator[float]:
    """Yield times that mostly hit the edges of windows, or just miss them."""
    now = start
    for _ in range(length):
        yield now
        part = random.choice([0.0, 0.0, 1.0, 0.5, 1 / 3, 0.1, 0.99, 3.0, random.uniform(0, 1.5)])
        now += window * part
        now = random.choice([now, now, now, math.nextafter(now, math.inf)])


def a_cost(random: Random, max_count: int) -> int:
    return random.choice([1, 1, 1, max(1, max_count // 2), max_count])


@settings(max_examples=400)
@given(WINDOWS, STARTS, COUNTS, st.integers(0, 2**32))
def test_no_interval_ever_holds_more_than_max_count(window: float, start: float, max_count: int, seed: int) -> None:
    for schedule in range(10):  # 4,000 in all
        random = Random(seed + schedule)
        limiter = SlidingWindow(max_count, window)
        units: list[float] = []
        for now in times(random, window, start, 15):
            for _ in range(random.choice([1, 1, 2, min(max_count, 18) + 1])):
                cost = a_cost(random, max_count)
                if limiter.admit("key", now, cost):
                    units += [now] * cost
        for earlier, later in zip(units, units[max_count:], strict=False):  # one interval with both has one too many
            assert later - earlier >= window
            assert later >= earlier + window
            assert later - earlier > window * 1.01 or Fraction(later) - Fraction(earlier) >= Fraction(window)


@settings(max_examples=200)
@given(WINDOWS, STARTS, COUNTS, st.integers(0, 2**32))
def test_every_decision_is_that_of_the_naive_model(window: float, start: float, max_count: int, seed: int) -> None:
    random = Random(seed)
    limiter, naive = SlidingWindow(max_count, window), Naive(max_count, window)
    for now in times(random, window, start, 20):
        for _ in range(random.choice([1, 1, 2, min(max_count, 18) + 1])):
            key, cost = random.choice("aab"), a_cost(random, max_count)
            expected = naive.fits(key, now, cost)
            free_at = limiter.free_at(key, now, cost)
            assert (free_at <= now) == expected
            if free_at > now:  # exactly then, and not a float before
                just_before = math.nextafter(free_at, -math.inf)
                assert naive.fits(key, free_at, cost)
                assert not naive.fits(key, just_before, cost)
                assert limiter.fork(key).admit(key, free_at, cost)
                assert not limiter.fork(key).admit(key, just_before, cost)
            assert limiter.admit(key, now, cost) == expected
            if expected:
                naive.admit(key, now, cost)


class Keys(RuleBasedStateMachine):
    """All verbs and a few keys too many, against the naive model."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    @initialize(max_count=st.sampled_from([1, 2, 5, 16, 17, 70]), window=WINDOWS, start=STARTS, keys=st.integers(1, 4))
    def begin(self, max_count: int, window: float, start: float, keys: int) -> None:
        self.now = start
        self.kept: set[Hashable] = set()
        self.limiter = SlidingWindow(max_count, window, max_keys=keys, keep=self.kept)
        self.naive = Naive(max_count, window, keys)
        self.refused = 0

    @rule(part=st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1.0, 1.5]))
    def time_passes(self, part: float) -> None:
        self.now += self.limiter.window * part

    @rule(key=st.sampled_from("abcdef"), cost=st.integers(1, 70), times=st.sampled_from([1, 1, 3, 20]))
    def requests(self, key: str, cost: int, times: int) -> None:
        cost = min(cost, self.limiter.max_count) if cost % 2 else 1
        for _ in range(times):
            expected = self.naive.fits(key, self.now, cost)
            assert (self.limiter.free_at(key, self.now, cost) <= self.now) == expected
            limited = self.naive.limited(self.now)
            assert self.limiter.admit(key, self.now, cost) == expected
            if expected:
                self.naive.admit(key, self.now, cost)
            elif key not in limited:
                self.refused += 1

    @rule(key=st.sampled_from("abcdef"), pick=st.integers(0))
    def one_is_taken_back(self, key: str, pick: int) -> None:
        counting = self.naive.counting(key, self.now)
        if counting:
            _, time, cost = counting.pop(pick % len(counting))
            self.naive.admitted[key] = counting
            self.limiter.remove(key, time, cost)

    @rule()
    def clean_up(self) -> None:
        before = len(self.limiter)
        limited = self.naive.limited(self.now)
        assert self.limiter.cleanup(self.now) == before - len(limited)
        assert len(self.limiter) == len(limited)
        assert all(key in self.limiter for key in limited)

    @precondition(lambda self: len(self.naive.limited(self.now)) >= self.limiter.max_keys)
    @rule()
    def a_new_key_learns_when_there_is_room(self) -> None:
        free_at = self.limiter.free_at("new", self.now)
        assert free_at > self.now
        assert self.naive.fits("new", free_at, 1)
        assert not self.naive.fits("new", math.nextafter(free_at, -math.inf), 1)

    @invariant()
    def it_is_bounded_and_knows_whether_anything_counts(self) -> None:
        if hasattr(self, "limiter"):
            assert len(self.limiter) <= self.limiter.max_keys
            assert self.limiter.counts(self.now) == bool(self.naive.limited(self.now))
            assert self.limiter.refused_keys == self.refused


Keys.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestKeys = Keys.TestCase


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30), st.sampled_from([1, 3, 17]), WINDOWS)
def test_clocks_that_jump_neither_break_anything_nor_lock_anyone_out(
    times: list[float], max_count: int, window: float
) -> None:
    limiter = SlidingWindow(max_count, window, max_keys=2)
    for number, now in enumerate(times):
        limiter.admit("abc"[number % 3], now, 1 + number % max_count)
        for key in "ab":
            assert limiter.free_at(key, now, max_count) <= now + 2 * window
        assert len(limiter) <= 2


def test_what_a_clock_far_ahead_has_said_does_not_count() -> None:
    limiter = SlidingWindow(2, 10.0)
    assert limiter.admit("bob", 1e6, 2)
    assert limiter.admit("bob", 5.0, 2)
    assert not limiter.admit("bob", 5.0)
    assert limiter.free_at("bob", 5.0) == 15.0
    assert limiter.admit("bob", 1e6), "and the other way round"


def test_a_clock_that_steps_back_a_little_frees_nobody() -> None:
    limiter = SlidingWindow(2, 10.0)
    assert limiter.admit("bob", 100.0)
    assert limiter.admit("bob", 99.5)
    assert not limiter.admit("bob", 99.0)
    assert not limiter.admit("bob", 109.9)
    assert limiter.admit("bob", 110.0)


def test_the_window_is_half_open() -> None:
    limiter = SlidingWindow(1, 60.0)
    assert limiter.admit("bob", 0.0)
    assert not limiter.admit("bob", math.nextafter(60.0, 0))
    assert limiter.admit("bob", 60.0)


def test_a_sum_that_floats_round_down_is_not_the_end_of_a_window() -> None:
    limiter = SlidingWindow(1, 10.0)
    assert limiter.admit("bob", 0.1)
    assert Fraction(0.1 + 10.0) < Fraction(0.1) + 10
    assert not limiter.admit("bob", 0.1 + 10.0)
    assert limiter.admit("bob", math.nextafter(0.1 + 10.0, math.inf))


def test_a_window_too_small_for_the_clock_still_separates() -> None:
    limiter = SlidingWindow(1, 1e-9)
    assert limiter.admit("bob", 1e12)
    assert not limiter.admit("bob", 1e12)
    assert limiter.free_at("bob", 1e12) == math.nextafter(1e12, math.inf)
    assert limiter.admit("bob", math.nextafter(1e12, math.inf))


def test_what_has_left_the_window_takes_little_memory() -> None:
    limiter = SlidingWindow(10**9, 1.0)
    for step in range(10_000):
        assert limiter.admit("busy", step / 1000)
    assert 1000 <= len(limiter.of("busy")) <= 2 * 1000 + 64
    limiter.admit("busy", 20.0, cost=5000)
    limiter.admit("busy", 30.0, cost=5000)
    assert len(limiter.of("busy")) <= 10_000


@pytest.mark.parametrize("max_count", [1, 10, 1000])
def test_a_spray_of_keys_leaves_few_that_are_not_limited(max_count: int) -> None:
    limiter = SlidingWindow(max_count, 1.0)
    for step in range(10_000):
        assert limiter.admit(f"key {step}", step / 1000)
        assert len(limiter) <= 2 * 1000 + 4


def test_a_spray_of_keys_cannot_free_a_victim_and_is_counted() -> None:
    limiter = SlidingWindow(1, 60.0, max_keys=100)
    assert limiter.admit("victim", 0.0)
    for step in range(10_000):
        limiter.admit(f"spray {step}", step * 0.005)
        assert not limiter.admit("victim", step * 0.005)
    assert len(limiter) == 100
    assert limiter.refused_keys == 10_000 - 99
    assert limiter.admit("victim", 60.0)
    assert limiter.admit("late", 60.005), "the first of the spray made room"


def test_in_a_large_full_table_the_one_free_key_is_found_bit_by_bit() -> None:
    limiter = SlidingWindow(2, 60.0, max_keys=1000)
    for key in range(1000):
        assert limiter.admit(key, 0.0)
    for key in range(1000):
        assert key == 700 or limiter.admit(key, 30.0)
    attempts = 0
    while not limiter.admit("new", 60.0):
        attempts += 1
    assert attempts <= 1000 // limiter.STEPS + 1
    assert 700 not in limiter
    assert limiter.free_at("newer", 61.0) == pytest.approx(90.0), "an estimate, from 64 of them"
    assert limiter.refused_keys == attempts


def test_keys_to_be_kept_are_not_forgotten() -> None:
    kept = {"bob"}
    limiter = SlidingWindow(1, 10.0, max_keys=1, keep=kept)
    assert limiter.admit("bob", 0.0)
    assert not limiter.admit("carol", 20.0)
    assert limiter.free_at("carol", 20.0) == math.nextafter(20.0, math.inf), "any time now"
    assert limiter.cleanup(20.0) == 0
    kept.clear()
    assert limiter.admit("carol", 20.0)


@pytest.mark.parametrize("max_keys", [3, 1_000_000])
def test_a_key_whose_hash_changes_harms_no_other(max_keys: int) -> None:
    class Changing:
        name = "bob"

        def __hash__(self) -> int:
            return hash(self.name)

    limiter = SlidingWindow(1, 10.0, max_keys=max_keys)
    key = Changing()
    assert limiter.admit(key, 0.0)
    key.name = "carol"
    assert limiter.admit("dave", 0.0)
    assert limiter.counts(0.0)
    assert all(limiter.admit(number, number * 10.0) for number in range(1, 10))
    limiter.cleanup(1000.0)
    assert len(limiter) == 0


def test_very_many_keys_are_kept_in_several_dicts() -> None:
    limiter = SlidingWindow(1, 10.0, max_keys=1_000_000)
    for key in range(0, 64 * 3000, 64):
        assert limiter.admit(key, 1.0)
        assert not limiter.admit(key, 1.0)
    parts = [len(part) for part in limiter._places._parts]  # type: ignore[attr-defined]  # which only these keys have
    assert len(parts) % 2 == 1
    assert len(parts) >= 7
    assert max(parts) < 3000 / len(parts) * 1.5, "also where all keys are multiples of 64"
    assert "new" not in limiter
    assert limiter.cleanup(11.0) == 3000
    assert len(limiter) == 0


def test_a_copy_for_planning_is_independent() -> None:
    for max_count in (3, 40):
        limiter = SlidingWindow(max_count, 10.0)
        assert limiter.admit("bob", 1.0, max_count)
        copy = limiter.fork("bob")
        assert not copy.admit("bob", 5.0)
        assert copy.admit("bob", 11.0, max_count)
        assert limiter.free_at("bob", 11.0, max_count) == 11.0
        assert limiter.fork("carol").admit("carol", 5.0)


def test_what_was_never_admitted_cannot_be_taken_back() -> None:
    limiter = SlidingWindow(2, 10.0)
    limiter.remove("bob", 1.0)
    assert limiter.admit("bob", 1.0)
    limiter.remove("bob", 2.0)
    assert limiter.admit("bob", 1.0)
    assert not limiter.admit("bob", 1.0)


@pytest.mark.parametrize("cost", [0, -1, 4])
def test_a_cost_that_can_never_fit_is_an_error_at_once(cost: int) -> None:
    limiter = SlidingWindow(3, 10.0)
    with pytest.raises(ValueError, match="cost must be at"):
        limiter.admit("bob", 1.0, cost)
    with pytest.raises(ValueError, match="cost must be at"):
        limiter.free_at("bob", 1.0, cost)
    assert len(limiter) == 0
    with pytest.raises(TypeError, match="cost must be a whole number"):
        limiter.admit("bob", 1.0, 1.5)  # type: ignore[arg-type]
