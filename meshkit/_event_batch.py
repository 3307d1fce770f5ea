"""The core of the Logger: events become groups, and a group becomes one sentence.

>>> batch = EventBatch(window=3.0, max_wait=15.0, max_groups=1000, max_entries=250)
>>> for second, actor in enumerate(["alice", "carol", "dave"]):
...     opened = batch.add(("social", "tease", "bob"), actor, None, 1, {}, now=float(second))
>>> batch.take(now=4.9), batch.next_due
(None, 5.0)
>>> group = batch.take(now=5.0)
>>> sentence(group.key, group.counts)
'alice, carol, and dave teased bob'

The treaty:

- A group is due when `window` seconds have passed since its last event, and `max_wait` after its first at the latest.
- A group keeps one entry, a count, for each different (actor, message); the counts of its entries add up to what was
  added. Beyond `max_entries` an actor that is known loses its further messages, and new ones go by the name `OTHERS`.
- Beyond `max_groups`, events that would open another group are dropped and counted, by service.
- A finalizer or a signal handler may log in the middle of any step. What must not be torn apart is therefore done
  without a call in between: `counts[entry] += count`, not `get` and then set.
"""

import heapq
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

__all__ = ["OTHERS", "EventBatch", "Group", "Key", "names", "past_tense", "sentence"]

Key: TypeAlias = tuple[str, str, str | None]
"""What events are grouped by: service, event type, target."""

OTHERS = "(others)"
"""The actor that stands for all those whom a group has no room to name."""


class Group:
    """The events of one key since `opened`: how many of each (actor, message), in the order first seen, and when.

    `epoch` is for whoever opens it: what to add to its times to get seconds since the epoch.
    """

    __slots__ = ("_firsts", "_known", "counts", "epoch", "fields", "key", "last", "opened")

    def __init__(self, key: Key, fields: Mapping[str, object], now: float) -> None:
        self.key = key
        self.fields = fields
        """The fields that all events so far had in common."""
        self.opened = self.last = now
        self.epoch = 0.0
        self.counts: dict[tuple[str, str | None], int] = {}
        self._firsts: dict[tuple[str, str | None], float] = {}
        self._known: set[str] | None = None  # the actors, once there is no room for new entries

    def enter(self, entry: tuple[str, str | None], count: int, now: float, max_entries: int) -> None:
        """Count an event whose (actor, message) has no entry yet."""
        if len(self.counts) >= max_entries:
            if self._known is None:
                self._known = {actor for actor, _ in self.counts}
            entry = (entry[0] if entry[0] in self._known else OTHERS, None)
        self._firsts.setdefault(entry, now)
        self.counts.setdefault(entry, 0)
        self.counts[entry] += count

    def entries(self) -> Iterator[tuple[tuple[str, str | None], int, float]]:
        """Yield (actor, message), how many, and when first."""
        for entry, count in self.counts.items():
            yield entry, count, self._firsts[entry] + self.epoch

    def line_fields(self) -> dict[str, object]:
        """Return what a line about this group has for fields."""
        _, event_type, target = self.key
        actors = list(dict.fromkeys(actor for actor, _ in self.counts))
        fields = {**self.fields, "event_type": event_type, "actors": actors, "count": sum(self.counts.values())}
        return fields if target is None else {**fields, "target": target}

    def share(self, fields: Mapping[str, object]) -> None:
        """Keep only those fields that `fields` has as well."""
        self.fields = {key: value for key, value in self.fields.items() if key in fields and _same(value, fields[key])}


class EventBatch:
    """Collects events into groups, `take` gives those that are due. Times in seconds, of any one clock.

    Cost: two dict look-ups per event. A group has one place in a heap, never later than it is due, which is put right
    when it comes up: O(log groups), at most once a window for each group, however many events there are.
    """

    def __init__(self, *, window: float, max_wait: float, max_groups: int, max_entries: int) -> None:
        self._window = window
        self._max_wait = max_wait
        self._max_groups = max_groups
        self._max_entries = max_entries
        self._groups: dict[Key, Group] = {}
        self._heap: list[tuple[float, int, Group]] = []
        self._order = itertools.count()  # the earlier opened of two that are due together comes first
        self.dropped = 0
        """How many events were dropped, ever."""
        self._untold: dict[str, int] = {}
        self._tell_at = 0.0

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def pending(self) -> int:
        """How many events the open groups hold."""
        return sum(sum(group.counts.values()) for group in self._groups.values())

    @property
    def next_due(self) -> float | None:
        """No group is due before this; None when there are none."""
        return self._heap[0][0] if self._heap else None

    def add(
        self, key: Key, actor: str, message: str | None, count: int, fields: Mapping[str, object], now: float
    ) -> Group | None:
        """Count an event; return the group if this opened one (`next_due` comes nearer at no other time)."""
        entry = (actor, message)
        group = self._groups.get(key)
        if group is not None:
            try:
                group.counts[entry] += count
            except KeyError:
                group.enter(entry, count, now, self._max_entries)
            group.last = now
            if fields is not group.fields and group.fields:
                group.share(fields)
            return None
        if len(self._groups) >= self._max_groups:
            self._drop(key[0], count, now)
            return None
        group = Group(key, fields, now)
        group.enter(entry, count, now, self._max_entries)  # first of all: an actor that has no hash raises here
        if self._groups.setdefault(key, group) is not group:  # opened meanwhile, by a finalizer
            return self.add(key, actor, message, count, fields, now)
        heapq.heappush(self._heap, (now + self._window, next(self._order), group))
        return group

    def take(self, now: float) -> Group | None:
        """Take out the group that fell due first, if one is due."""
        while self._heap and self._heap[0][0] <= now:
            supposed, order, group = heapq.heappop(self._heap)
            when = min(group.last + self._window, group.opened + self._max_wait)
            if when <= supposed:
                return self._groups.pop(group.key)
            heapq.heappush(self._heap, (when, order, group))
        return None

    def take_dropped(self, now: float) -> dict[str, int]:
        """Return the events dropped by service and forget them: once a window, or as soon as no group is open."""
        if self._groups and now < self._tell_at:
            return {}
        dropped, self._untold = self._untold, {}
        return dropped

    def _drop(self, service: str, count: int, now: float) -> None:
        if not self._untold:
            self._tell_at = now + self._window
        self._untold[service] = self._untold.get(service, 0) + count
        self.dropped += count


def _same(one: object, other: object) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # noqa: BLE001 - values of users may compare however they like; arrays refuse to
        return False


# --- Sentences ---------------------------------------------------------------------------------------------


def sentence(key: Key, counts: Mapping[tuple[str, str | None], int]) -> str:
    """Return what happened, in English: "alice, carol, and dave teased bob".

    Without a target, the service is what it was done to ("alice and bob requested stash"). How often is said where it
    is not once for each actor ("(x12)"). The first three different messages follow, after a colon; messages that begin
    with the verb take the place of what it was done to ("alice and bob stored 2.3 kB; 1.7 kB").
    """
    service, event_type, target = key
    actors = list(dict.fromkeys(actor for actor, _ in counts))
    messages = list(dict.fromkeys(str(message) for _, message in counts if message is not None and message != ""))
    total = sum(counts.values())
    times = "" if total == len(actors) and OTHERS not in actors else f" (x{total})"
    verb = past_tense(str(event_type))
    if verb is None:
        done = f"did {event_type}" if target is None else f"did {event_type} to {target}"
    elif messages and all(message.startswith(f"{verb} ") for message in messages):
        return f"{names(actors)} {verb} {_some([message[len(verb) + 1 :] for message in messages])}{times}"
    else:
        done = f"{verb} {service if target is None else target}"
    return f"{names(actors)} {done}{times}{': ' if messages else ''}{_some(messages)}"


def _some(messages: list[str]) -> str:
    more = [f"and {len(messages) - 3} more"] if len(messages) > 3 else []
    return "; ".join(messages[:3] + more)


def names(actors: Iterable[str]) -> str:
    """Return a list as one writes it: "a", "a and b", "a, b, and c", all four of four, "a, b, c, and 7 others".

    Where `OTHERS` is among them, how many others is not known: "a, b, c, and more than 7 others".
    """
    listed = [str(actor) for actor in actors]
    named = [actor for actor in listed if actor != OTHERS]
    if len(named) < len(listed):
        rest = len(named) - 3
        listed = [*named[:3], f"more than {rest} others" if rest > 0 else "others"]
    elif len(listed) > 4:
        listed = [*listed[:3], f"{len(listed) - 3} others"]
    if len(listed) < 3:
        return " and ".join(listed)
    return f"{', '.join(listed[:-1])}, and {listed[-1]}"


_SHORT = re.compile(r"[^aeiou]*[aeiou][bdfgklmnprstvz]")


def past_tense(event_type: str) -> str | None:
    """Return the past tense of an event type that is one word in lower case, else None.

    What ends in -ed stays as it is, store -> stored, study -> studied, one short syllable doubles its consonant
    (stop -> stopped), all others take -ed (sync -> synced). There is no list of exceptions: for those there is
    `register_formatter`.
    """
    word = event_type
    if not (word.isascii() and word.isalpha() and word.islower()):
        return None
    if word.endswith("ed") and not word.endswith("eed"):
        return word
    if word.endswith("e"):
        return f"{word}d"
    if len(word) > 1 and word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ied"
    if _SHORT.fullmatch(word):
        return f"{word}{word[-1]}ed"
    return f"{word}ed"
