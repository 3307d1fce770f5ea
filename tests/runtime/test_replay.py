"""The replay window, against a naive model that forgets nothing."""

import itertools
import random

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from meshkit.errors import Overloaded
from meshkit.runtime.replay import ReplayWindow

WINDOW, SKEW = 30, 2
SENDERS = st.sampled_from(["alice", "bob", "eve"])
moments = st.integers(-60, 60)


class ReplayMachine(RuleBasedStateMachine):
    """The model knows only what must be refused, and what must be accepted if the clock is sane and there is room."""

    @initialize(per_second=st.sampled_from([1, 5, 10, 50]), limit=st.sampled_from([1, 3, 10, 1_000]))
    def begin(self, per_second: int, limit: int) -> None:
        self.unit = 1_000_000 // per_second
        self.limit = limit
        self.now = 10**9
        self.before: list[tuple[str, bytes, int]] = []  # accepted, in all lives
        self.start()

    def start(self) -> None:
        self.accepted: set[tuple[str, bytes, int]] = set()
        self.refused: set[int] = set()  # stamps
        self.started = self.highest = self.now
        self.floor = (self.started - SKEW) * self.unit
        self.window = ReplayWindow(window=WINDOW * self.unit, floor=self.floor, max_keys=self.limit)

    @rule(seconds=st.integers(0, 20))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        self.highest = max(self.highest, self.now)

    @rule(seconds=st.integers(-100, 100) | st.sampled_from([10**6]))
    def the_clock_is_set(self, seconds: int) -> None:
        self.time_passes(seconds)

    @rule()
    def it_restarts(self) -> None:
        self.start()

    @rule(offset=moments, sender=SENDERS, key=st.binary(min_size=1, max_size=2))
    def one_comes(self, offset: int, sender: str, key: bytes) -> None:
        self.comes(sender, key, (self.now + offset) * self.unit)

    @precondition(lambda self: self.before)
    @rule(pick=st.randoms(use_true_random=False))
    def one_comes_again(self, pick: random.Random) -> None:
        self.comes(*pick.choice(self.before))

    def page(self, sender: str, stamp: int) -> tuple[str, int]:
        return sender, stamp // (2 * WINDOW * self.unit + 1)

    def comes(self, sender: str, key: bytes, stamp: int) -> None:
        now, window = self.now * self.unit, WINDOW * self.unit
        in_time = abs(now - stamp) <= window and stamp >= self.floor
        pages = [self.page(of, when) for of, _, when in self.accepted]
        has_half_its_share = 2 * pages.count(self.page(sender, stamp)) * len(set(pages)) > self.limit
        if not self.window.accepts(sender, stamp, now):
            # What is in time may be refused only if its stamp was out of the window at some time before, or its sender,
            # and no other one, has sent too many.
            assert not in_time or stamp < self.highest * self.unit - window or has_half_its_share
            if stamp < now - window:
                self.window.refuse(stamp, now)
                self.refused.add(stamp)
            return
        assert in_time
        assert stamp not in self.refused
        new = self.window.add(sender, key, stamp, now)
        if (sender, key, stamp) in self.accepted:
            assert not new
        elif not any((of, other) == (sender, key) for of, other, _ in self.accepted):
            assert new
        if new:
            self.accepted.add((sender, key, stamp))
            self.before.append((sender, key, stamp))
        live = [1 for of, _, when in self.accepted if when >= self.window.floor_of(of, when)]
        assert sum(map(len, self.window.__dict__["_by_size"])) <= len(self.window.__dict__["_pages"])
        assert len(live) <= self.window.count <= self.limit  # what was refused is forgotten in its turn


TestReplayWindow = ReplayMachine.TestCase


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-300, 300)), max_size=200))
def test_with_a_clock_that_goes_forward_all_that_is_in_time_and_new_is_accepted(steps: list[tuple[int, int]]) -> None:
    window, now = ReplayWindow(window=300 * 100_000, floor=0, max_keys=1_000), 10**9
    seen: set[int] = set()
    for step, offset in steps:
        now += step * 100_000
        stamp = now + offset * 100_000
        assert window.accepts("alice", stamp, now)
        assert window.add("alice", b"%d" % stamp, stamp, now) is (stamp not in seen)
        seen.add(stamp)


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(1, 20), SENDERS, st.integers(0, 500)), max_size=300))
def test_who_sends_in_order_never_notices_that_the_memory_is_full_and_nothing_is_accepted_twice(
    limit: int, steps: list[tuple[int, str, int]]
) -> None:
    window, now = ReplayWindow(window=300, floor=0, max_keys=limit), 10**9
    clocks = {"alice": -100, "bob": 0, "eve": 299}
    sent: list[tuple[str, bytes, int]] = []
    for step, sender, again in steps:
        now += step
        stamp = now + clocks[sender]
        assert window.accepts(sender, stamp, now)
        assert window.add(sender, b"%d" % len(sent), stamp, now)
        sent.append((sender, b"%d" % len(sent), stamp))
        replayed, key, when = sent[again % len(sent)]
        assert not window.accepts(replayed, when, now) or not window.add(replayed, key, when, now)


def test_a_flood_of_one_sender_takes_nothing_from_another() -> None:
    window, now, rng = ReplayWindow(window=1_000, floor=0, max_keys=100), 10**9, random.Random(1)
    for n in range(20):
        assert window.add("alice", b"%d" % n, now + n, now)
    flood: list[tuple[bytes, int]] = []
    for n in range(10_000):
        stamp = now + rng.randint(-1_000, 1_000)
        if window.accepts("eve", stamp, now) and window.add("eve", b"%d" % n, stamp, now):
            flood.append((b"%d" % n, stamp))
    assert window.count == 100
    assert len(flood) > 60
    assert not any(window.accepts("eve", stamp, now) and window.add("eve", key, stamp, now) for key, stamp in flood)
    for n in range(20):
        assert window.accepts("alice", now + n, now)
        assert not window.add("alice", b"%d" % n, now + n, now), "it is remembered as ever"
    assert window.accepts("alice", now - 1_000, now)
    assert window.add("alice", b"late", now - 1_000, now)


def test_what_was_stamped_while_clocks_were_years_ahead_is_in_nobodys_way() -> None:
    window, now, year = ReplayWindow(window=1_000, floor=0, max_keys=100), 10**9, 10**8
    ahead = [now + year + n for n in range(100)]
    assert all(window.add("alice", b"%d" % stamp, stamp, stamp) for stamp in ahead)
    sent: list[int] = []
    for n in range(2_000):
        assert window.accepts("alice", now + n, now + n)
        assert window.add("alice", b"%d" % (now + n), now + n, now + n)
        sent.append(now + n)
    assert window.count == 100
    assert not any(
        window.accepts("alice", when, when) and window.add("alice", b"%d" % when, when, when) for when in sent
    )
    last = ahead[-1]
    assert not any(window.accepts("alice", w, last) and window.add("alice", b"%d" % w, w, last) for w in ahead)


def test_more_senders_than_can_be_remembered_are_refused_until_others_have_gone() -> None:
    window, now = ReplayWindow(window=1_000, floor=0, max_keys=100, max_senders=2), 10**9
    for sender in ("alice", "bob", "carol", "dan"):  # each has two pages at most, or one
        assert window.add(sender, b"1", now, now)
    with pytest.raises(Overloaded, match="memory of senders of frames: full, it holds 2 already"):
        window.add("eve", b"1", now, now)
    assert window.add("alice", b"2", now, now), "who is known goes on"
    assert not window.add("alice", b"1", now, now)
    later = now + 1_001
    for n in range(8):
        assert window.add("alice", b"later %d" % n, later, later)
    assert window.add("eve", b"1", later, later)


def test_a_memory_that_was_full_is_emptied_little_by_little() -> None:
    window = ReplayWindow(window=1_000_000, floor=0, max_keys=1_000)
    for n in range(1_000):
        assert window.add("alice", b"%d" % n, n * 1_000, n * 1_000)
    counts: list[int] = []
    for n in range(1_000):
        assert window.add("bob", b"%d" % n, 10**9, 10**9)
        counts.append(window.count)
    assert counts[0] >= 998
    assert all(abs(before - after) <= 1 for before, after in itertools.pairwise(counts))
    assert counts[-1] == 1_000, "all of the old ones are gone"
