"""The core of the Logger: grouping against a naive model, and sentences."""

import doctest
import gc
import itertools
import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from meshkit import _event_batch, _event_timer, _log_output
from meshkit._event_batch import OTHERS, EventBatch, Group, Key, names, past_tense, sentence

WINDOW, MAX_WAIT, MAX_GROUPS, MAX_ENTRIES = 3.0, 10.0, 3, 4

KEYS = st.sampled_from(
    [("social", "tease", "bob"), ("social", "tease", "eve"), ("stash", "store", None), ("stash", "request", None)]
)
ACTORS = st.sampled_from(["alice", "bob", "carol", "dave", "eve", "frank"])
MESSAGES = st.sampled_from([None, "hello", "2.3 KB"])


def taken(batch: EventBatch, now: float = math.inf, limit: int | None = None) -> list[Group]:
    """Return the groups that are due, in order, at most `limit` of them."""
    return list(itertools.islice(iter(lambda: batch.take(now), None), limit))


@dataclass
class Told:
    """One group of the naive model: every event that it was told, one by one."""

    key: Key
    order: int
    events: list[tuple[float, str, str | None]] = field(default_factory=list)

    @property
    def due(self) -> float:
        return min(self.events[-1][0] + WINDOW, self.events[0][0] + MAX_WAIT)

    def counts(self) -> dict[tuple[str, str | None], int]:
        counts: dict[tuple[str, str | None], int] = {}
        for _, actor, message in self.events:
            entry = (actor, message)
            if entry not in counts and len(counts) >= MAX_ENTRIES:
                entry = (actor if any(actor == known for known, _ in list(counts)[:MAX_ENTRIES]) else OTHERS, None)
            counts[entry] = counts.get(entry, 0) + 1
        return counts


class BatchAgainstModel(RuleBasedStateMachine):
    """Everything an `EventBatch` says and gives, against lists that are searched from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = EventBatch(window=WINDOW, max_wait=MAX_WAIT, max_groups=MAX_GROUPS, max_entries=MAX_ENTRIES)
        self.open: list[Told] = []
        self.now = 0.0
        self.opened = 0
        self.added = self.written = self.dropped = 0
        self.untold: dict[str, int] = {}
        self.first_drop = 0.0

    @rule(key=KEYS, actor=ACTORS, message=MESSAGES, times=st.integers(1, 3), gap=st.sampled_from([0.0, 0.25, 1.0]))
    def add(self, key: Key, actor: str, message: str | None, times: int, gap: float) -> None:
        self.now += gap
        self.added += times
        group = next((group for group in self.open if group.key == key), None)
        opened = self.batch.add(key, actor, message, times, {}, self.now)
        assert (opened is not None) == (group is None and len(self.open) < MAX_GROUPS)
        if group is None:
            if len(self.open) == MAX_GROUPS:
                self.dropped += times
                self.first_drop = self.first_drop if self.untold else self.now
                self.untold[key[0]] = self.untold.get(key[0], 0) + times
                return
            self.opened += 1
            group = Told(key, self.opened)
            self.open.append(group)
        group.events += [(self.now, actor, message)] * times

    @rule(seconds=st.sampled_from([0.0, 0.25, 1.0, 2.75, 3.0, 4.0]), limit=st.sampled_from([None, 1, 2]))
    def time_passes(self, seconds: float, limit: int | None) -> None:
        self.now += seconds
        self.expect(taken(self.batch, self.now, limit), self.due(self.now)[:limit])

    @rule()
    def take_all(self) -> None:
        self.expect(taken(self.batch), self.due(math.inf))

    def due(self, now: float) -> list[Told]:
        due = (group for group in self.open if group.due <= now)
        return sorted(due, key=lambda group: (group.due, group.order))

    def expect(self, taken: list[Group], groups: list[Told]) -> None:
        assert [group.key for group in taken] == [group.key for group in groups]
        for real, told in zip(taken, groups, strict=True):
            assert real.counts == told.counts()
            assert list(real.counts) == list(told.counts())
            self.written += len(told.events)
            self.open.remove(told)

    @precondition(lambda self: self.untold)
    @rule()
    def tell_what_was_dropped(self) -> None:
        if self.open and self.now < self.first_drop + WINDOW:
            assert self.batch.take_dropped(self.now) == {}
        else:
            assert self.batch.take_dropped(self.now) == self.untold
            self.untold = {}

    @invariant()
    def counts_add_up(self) -> None:
        assert self.batch.pending == sum(len(group.events) for group in self.open)
        assert self.batch.dropped == self.dropped
        assert self.added == self.batch.pending + self.written + self.dropped
        assert len(self.batch) == len(self.open)

    @invariant()
    def nothing_is_due_before_it_says(self) -> None:
        next_due = self.batch.next_due
        if self.open:
            assert next_due is not None
            assert next_due <= min(group.due for group in self.open)
        else:
            assert next_due is None


TestBatchAgainstModel = BatchAgainstModel.TestCase
TestBatchAgainstModel.settings = settings(max_examples=100, stateful_step_count=30)


@pytest.mark.parametrize("module", [_event_batch, _event_timer, _log_output])
def test_the_examples_in_docstrings_run(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted > 0) == (0, True)


def batch(**limits: float) -> EventBatch:
    given = {"window": 3.0, "max_wait": 15.0, "max_groups": 1000, "max_entries": 250, **limits}
    return EventBatch(**given)  # type: ignore[arg-type]  # whole numbers among them


def test_a_steady_stream_is_due_after_max_wait_and_looked_at_once_a_window() -> None:
    stream = batch()
    looks = 0
    for tick in range(1501):
        now = tick / 100
        stream.add(("social", "tease", "bob"), "alice", None, 1, {}, now)
        assert stream.next_due is not None
        if stream.next_due <= now:
            looks += 1
            if group := stream.take(now):
                assert now == 15.0
                assert group.counts == {("alice", None): 1501}
    assert len(stream) == 0
    assert looks <= 6


def test_entries_say_when_each_began() -> None:
    one = batch()
    group = one.add(("social", "tease", None), "alice", None, 1, {}, 1.0)
    assert group is not None
    group.epoch = 1000.0
    one.add(("social", "tease", None), "bob", None, 2, {}, 2.0)
    one.add(("social", "tease", None), "alice", None, 1, {}, 3.0)
    assert list(group.entries()) == [(("alice", None), 2, 1001.0), (("bob", None), 2, 1002.0)]


def test_a_group_remembers_a_bounded_number_of_actors_and_every_count() -> None:
    one = batch(max_entries=3)
    for number in range(100):
        one.add(("social", "tease", None), f"peer{number}", None, 2, {}, 0.0)
    one.add(("social", "tease", None), "peer1", "a new message of a known actor", 5, {}, 0.0)
    [group] = taken(one)
    assert group.counts == {("peer0", None): 2, ("peer1", None): 7, ("peer2", None): 2, (OTHERS, None): 194}


def test_a_known_actor_with_too_many_messages_keeps_its_name() -> None:
    one = batch(max_entries=2)
    for number in range(10):
        one.add(("stash", "store", None), "alice", f"{number} KB", 1, {}, 0.0)
    [group] = taken(one)
    assert group.counts == {("alice", "0 KB"): 1, ("alice", "1 KB"): 1, ("alice", None): 8}


class Awkward:
    """Cannot be compared, as arrays cannot."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]  # what cannot be compared cannot be hashed


def test_a_group_has_the_fields_that_all_its_events_had() -> None:
    one = batch()
    awkward = Awkward()
    key = ("stash", "store", None)
    group = one.add(key, "alice", None, 1, {"shard": 3, "request": "a", "matrix": awkward, "only": 1}, 0.0)
    assert group is not None
    one.add(key, "alice", None, 1, {"shard": 3, "request": "b", "matrix": awkward}, 0.0)
    assert group.fields == {"shard": 3, "matrix": awkward}
    one.add(key, "alice", None, 1, {"shard": 3, "matrix": Awkward()}, 0.0)
    assert group.fields == {"shard": 3}
    one.add(key, "alice", None, 1, {}, 0.0)
    assert group.fields == {}
    one.add(key, "alice", None, 1, {"shard": 3}, 0.0)
    assert group.fields == {}


class Hostile:
    """Has no hash, so that it can be no part of a key."""

    def __hash__(self) -> int:
        raise RuntimeError("no hash")


@pytest.mark.parametrize("actor", [["alice"], Hostile()])
def test_an_actor_without_a_hash_is_refused_and_leaves_nothing(actor: Any) -> None:
    one = batch()
    for _ in range(2):  # as the first of its group, and as a further one
        with pytest.raises((TypeError, RuntimeError), match="hash"):
            one.add(("stash", "store", None), actor, None, 1, {}, 0.0)
        one.add(("stash", "store", None), "alice", None, 1, {}, 0.0)
    [group] = taken(one)
    assert group.counts == {("alice", None): 2}
    assert len(one) == 0


def test_an_event_in_the_middle_of_the_one_that_opens_its_group_loses_no_count() -> None:
    one = batch()
    key = ("stash", "store", None)

    class Interrupts(str):
        """Adds an event the first time that its hash is asked for, as a finalizer or a signal handler could there."""

        __slots__ = ("done",)

        def __hash__(self) -> int:
            if not hasattr(self, "done"):
                self.done = True
                one.add(key, "bob", None, 1, {}, 0.0)
            return str.__hash__(self)

    one.add(key, Interrupts("alice"), None, 1, {}, 0.0)
    [group] = taken(one)
    assert group.counts == {("bob", None): 1, ("alice", None): 1}
    assert len(one) == 0


def test_finalizers_that_log_in_the_middle_of_events_lose_no_count() -> None:
    one = batch()
    key = ("stash", "store", None)
    added = counted = 0

    class Logs:
        """Adds an event when it is collected: wherever the garbage collector happens to run."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            nonlocal added
            added += 1
            one.add(key, "alice", None, 1, {}, 0.0)

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            Logs()
            one.add(key, "alice", None, 1, {}, 0.0)
            added += 1
            counted += sum(sum(group.counts.values()) for group in taken(one))
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    counted += sum(sum(group.counts.values()) for group in taken(one))
    assert counted == added
    assert added > 400
    assert len(one) == 0


# --- sentences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actors", "text"),
    [
        ([], ""),
        (["alice"], "alice"),
        (["alice", "bob"], "alice and bob"),
        (["alice", "carol", "dave"], "alice, carol, and dave"),
        (["a", "b", "c", "d"], "a, b, c, and d"),
        (["a", "b", "c", "d", "e"], "a, b, c, and 2 others"),
        ([str(number) for number in range(1000)], "0, 1, 2, and 997 others"),
        (["a", OTHERS], "a and others"),
        (["a", "b", "c", OTHERS], "a, b, c, and others"),
        (["a", "b", "c", "d", OTHERS], "a, b, c, and more than 1 others"),
        ([str(number) for number in range(250)] + [OTHERS], "0, 1, 2, and more than 247 others"),
        ([OTHERS], "others"),
    ],
)
def test_names_are_listed_as_one_writes_them(actors: list[str], text: str) -> None:
    assert names(actors) == text


PAST_TENSES = {
    "tease": "teased",
    "store": "stored",
    "request": "requested",
    "sync": "synced",
    "agree": "agreed",
    "die": "died",
    "study": "studied",
    "retry": "retried",
    "howdy": "howdied",
    "deploy": "deployed",
    "stop": "stopped",
    "drop": "dropped",
    "log": "logged",
    "ping": "pinged",
    "join": "joined",
    "fail": "failed",
    "fix": "fixed",
    "show": "showed",
    "open": "opened",
    "visit": "visited",
    "limit": "limited",
    "need": "needed",
    "y": "yed",
    # what is in the past already
    "joined": "joined",
    "stored": "stored",
    # the regular past tense, also where English has another one
    "leave": "leaved",
}


@pytest.mark.parametrize(("event_type", "verb"), PAST_TENSES.items())
def test_the_verb_is_the_past_tense_of_the_event_type(event_type: str, verb: str) -> None:
    assert past_tense(event_type) == verb


@pytest.mark.parametrize("event_type", ["", "boot-sync", "peer_lost", "peer lost", "DM", "Tease", "größe", "v2"])
def test_what_is_not_one_word_in_lower_case_has_no_past_tense(event_type: str) -> None:
    assert past_tense(event_type) is None


def test_the_sentences_of_the_specification() -> None:
    three: dict[tuple[str, str | None], int] = {("alice", None): 1, ("carol", None): 1, ("dave", None): 1}
    assert sentence(("social", "tease", "bob"), three) == "alice, carol, and dave teased bob"
    assert sentence(("stash", "request", None), {("alice", None): 1, ("bob", None): 1}) == (
        "alice and bob requested stash"
    )
    assert sentence(("stash", "store", None), {("alice", "stored 2.3KB"): 1}) == "alice stored 2.3KB"


@pytest.mark.parametrize(
    ("event_type", "target", "counts", "text"),
    [
        ("tease", "bob", {("alice", None): 3}, "alice teased bob (x3)"),
        ("tease", "bob", {("alice", None): 3, ("carol", None): 1}, "alice and carol teased bob (x4)"),
        ("tease", "bob", {("alice", "nice hat"): 1}, "alice teased bob: nice hat"),
        ("tease", "bob", {("alice", "hi"): 1, ("carol", "hi"): 1}, "alice and carol teased bob: hi"),
        ("tease", "bob", {("alice", "hi"): 1, ("carol", "ho"): 1}, "alice and carol teased bob: hi; ho"),
        ("tease", "bob", {("alice", "hi"): 1, ("alice", "ho"): 2}, "alice teased bob (x3): hi; ho"),
        ("tease", "bob", {("a", str(n)): 1 for n in range(9)}, "a teased bob (x9): 0; 1; 2; and 6 more"),
        ("tease", "bob", {("alice", "teased bob again"): 2}, "alice teased bob again (x2)"),
        ("tease", "bob", {("alice", "teasedly"): 1}, "alice teased bob: teasedly"),
        ("store", None, {("alice", "stored 2 kB"): 1, ("bob", "stored 1 kB"): 1}, "alice and bob stored 2 kB; 1 kB"),
        (
            "store",
            None,
            {("alice", "stored 2 kB"): 1, ("bob", "1 kB"): 1},
            "alice and bob stored stash: stored 2 kB; 1 kB",
        ),
        ("tease", "bob", {("alice", ""): 1}, "alice teased bob"),
        ("tease", "bob", {("alice", None): 1, (OTHERS, None): 1}, "alice and others teased bob (x2)"),
        ("boot-sync", "bob", {("alice", None): 1}, "alice did boot-sync to bob"),
        ("boot-sync", None, {("alice", "12 events"): 2}, "alice did boot-sync (x2): 12 events"),
        ("sync", "", {("alice", None): 1}, "alice synced "),
        # what is no text is shown all the same
        ("store", None, {("alice", 2300): 1, (7, None): 1}, "alice and 7 stored stash: 2300"),
        (5, 6, {(None, None): 1}, "None did 5 to 6"),
    ],
)
def test_the_default_text(
    event_type: str, target: str | None, counts: dict[tuple[str, str | None], int], text: str
) -> None:
    assert sentence(("stash", event_type, target), counts) == text


@given(
    st.dictionaries(st.tuples(st.text(max_size=3), st.none() | st.text(max_size=3)), st.integers(1, 99), min_size=1),
    st.text(max_size=5),
    st.none() | st.text(max_size=3),
)
def test_every_group_has_a_sentence_that_begins_with_its_first_actor(
    counts: dict[tuple[str, str | None], int], event_type: str, target: str | None
) -> None:
    text = sentence(("service", event_type, target), counts)
    actors = {actor for actor, _ in counts}
    assert text.startswith(next(iter(counts))[0])
    assert (f"(x{sum(counts.values())})" in text) or sum(counts.values()) == len(actors)


def test_what_is_dropped_is_told_by_service_and_only_once() -> None:
    full = batch(max_groups=1)
    full.add(("a", "b", "0"), "alice", None, 1, {}, 0.0)
    for number in range(1, 10):
        full.add(("a", "b", str(number)), "alice", None, 2, {}, 0.0)
        full.add(("c", "d", None), "alice", None, 1, {}, 0.0)
    assert full.take_dropped(2.9) == {}
    assert full.take_dropped(3.0) == {"a": 18, "c": 9}
    assert full.take_dropped(math.inf) == {}
    assert full.dropped == 27
