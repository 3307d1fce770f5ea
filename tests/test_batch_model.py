"""BatchCollector against a naive model of it, whatever is added, cancelled, finished and stopped in which order."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from meshkit.batch import BatchCollector
from meshkit.testing import VirtualTimeLoop

STEP = 0.5


class Broken(Exception):
    pass


@dataclass(eq=False)
class Item:
    number: int
    task: "asyncio.Task[Any] | None"
    submitted: bool
    accepted_at: float | None = None
    hurried: bool = False

    @property
    def heard(self) -> bool:
        """Whether somebody waits for its result."""
        return self.submitted and self.task is not None and not self.task.done()


class NaiveCollector(RuleBasedStateMachine):
    """The model is one queue. `flush` checks that what it is given is what the front of the queue demands."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.problems: list[Any] = []  # what would get lost in a task or a callback
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self.queue: list[Item] = []  # everything added and not begun: the first of them are accepted, the others wait
        self.flights: dict[asyncio.Future[Any], list[Item]] = {}
        self.told: list[tuple[int, str]] = []
        self.hurrying: list[tuple[asyncio.Task[None], set[Item]]] = []
        self.count = 0
        self.stopping = False

    def go(self, main: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(main)
        assert not self.problems

    @initialize(
        size=st.integers(1, 4),
        wait=st.sampled_from([0.0, STEP, 3 * STEP]),
        more=st.integers(0, 4),
        concurrency=st.integers(1, 3),
        drains=st.booleans(),
    )
    def begin(self, size: int, wait: float, more: int, concurrency: int, drains: bool) -> None:
        self.drains = drains  # whether flushes that begin after the stop end at once, or never
        self.size, self.wait, self.limit, self.concurrency = size, wait, size + more, concurrency
        self.collector = BatchCollector(
            self.flush,
            max_size=size,
            max_wait=wait,
            max_pending=self.limit,
            concurrency=concurrency,
            on_error=lambda items, error: self.told.extend((item, type(error).__name__) for item in items),
        )

        async def main() -> None:
            await self.collector.__aenter__()

        self.go(main())

    async def flush(self, numbers: list[int]) -> Any:
        try:
            items, self.queue = self.queue[: len(numbers)], self.queue[len(numbers) :]
            assert [item.number for item in items] == numbers, "not what was added first"
            assert 1 <= len(items) <= self.size
            assert len(self.flights) < self.concurrency
            first = items[0].accepted_at
            waited = first is not None and self.loop.time() - first >= self.wait
            assert len(items) == self.size or waited or items[0].hurried or self.wait == 0, "too early"
        except AssertionError as error:
            self.problems.append(error)
            raise
        if self.stopping and self.drains:
            return [f"done {item.number}" for item in items]
        release = self.loop.create_future()
        self.flights[release] = items
        return await release

    async def quiet(self) -> None:
        """Let everything run that can, and compare."""
        for _ in range(40):
            await asyncio.sleep(0)
        in_flight = sum(map(len, self.flights.values()))
        accepted = min(len(self.queue), self.limit - in_flight)  # nobody waits where there is room
        for item in self.queue[:accepted]:
            if item.accepted_at is None:
                item.accepted_at = self.loop.time()
            assert item.submitted or item.task is None or item.task.done()
        for item in self.queue[accepted:]:
            assert item.task is not None
            assert not item.task.done()
        if accepted and len(self.flights) < self.concurrency:
            first = self.queue[0]
            assert first.accepted_at is not None
            overdue = self.loop.time() >= first.accepted_at + self.wait
            due = accepted >= self.size or overdue or first.hurried
            assert not due, "should have begun"
        stats = self.collector.stats()
        assert (stats.pending, stats.in_flight) == (accepted + in_flight, in_flight)
        assert stats.waiting == len(self.queue) - accepted
        unsettled = set(self.queue) | {item for items in self.flights.values() for item in items}
        for task, items in self.hurrying:
            assert task.done() is not bool(items & unsettled), "flush() returned too early or too late"

    @rule(submit=st.booleans(), several=st.integers(1, 6))
    def add(self, submit: bool, several: int) -> None:
        async def main() -> None:
            for _ in range(several):
                verb: Any = self.collector.submit if submit else self.collector.add
                task: asyncio.Task[Any] = asyncio.ensure_future(verb(self.count))
                self.queue.append(Item(self.count, task, submit))
                self.count += 1
            await self.quiet()

        self.go(main())

    @rule()
    def try_add(self) -> None:
        async def main() -> None:
            room = len(self.queue) + sum(map(len, self.flights.values())) < self.limit
            assert self.collector.try_add(self.count) is room
            if room:
                self.queue.append(Item(self.count, None, submitted=False, accepted_at=self.loop.time()))
            self.count += 1
            await self.quiet()

        self.go(main())

    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        begun = [item for items in self.flights.values() for item in items]
        alive = [item for item in [*self.queue, *begun] if item.task is not None and not item.task.done()]
        if not alive:
            return
        item = data.draw(st.sampled_from(alive))

        async def main() -> None:
            if item in self.queue and item.accepted_at is None:
                self.queue.remove(item)  # it was not accepted yet: it will never be
            assert item.task is not None
            item.task.cancel()
            await self.quiet()
            assert item.task.cancelled()

        self.go(main())

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), how=st.sampled_from(["results", "raises", "some fail", "too few", "cancelled"]))
    def finish(self, data: Any, how: str) -> None:
        release = data.draw(st.sampled_from(list(self.flights)))
        items = self.flights.pop(release)
        numbers = [item.number for item in items]
        failing: dict[int, str] = {
            "results": dict[int, str](),
            "raises": dict.fromkeys(numbers, "Broken"),
            "some fail": {number: "Broken" for number in numbers if number % 2},
            "too few": {item.number: "RuntimeError" for item in items if item.submitted},
            "cancelled": dict.fromkeys(numbers, "OutcomeUnknown"),
        }[how]
        heard = [item for item in items if item.heard]
        expected = [(i.number, failing[i.number]) for i in items if i not in heard and i.number in failing]

        async def main() -> None:
            if how == "raises":
                release.set_exception(Broken())
            elif how == "cancelled":
                release.cancel()
            elif how == "too few":
                release.set_result([])
            else:
                release.set_result([Broken() if number in failing else f"done {number}" for number in numbers])
            self.told.clear()
            await self.quiet()
            assert self.told == expected
            for item in heard:
                assert item.task is not None
                assert item.task.done()
                error = item.task.exception()
                assert failing.get(item.number) == (None if error is None else type(error).__name__)
                assert error is not None or item.task.result() == f"done {item.number}"

        self.go(main())

    @rule()
    def hurry(self) -> None:
        async def main() -> None:
            accepted = {item for item in self.queue if item.accepted_at is not None}
            for item in accepted:
                item.hurried = True
            begun = {item for items in self.flights.values() for item in items}
            self.hurrying.append((asyncio.ensure_future(self.collector.flush()), accepted | begun))
            await self.quiet()

        self.go(main())

    @rule(steps=st.integers(1, 4))
    def time_passes(self, steps: int) -> None:
        async def main() -> None:
            for _ in range(steps):
                await asyncio.sleep(STEP)
                await self.quiet()

        self.go(main())

    def teardown(self) -> None:
        try:
            if hasattr(self, "collector"):
                self.go(self.stop())
            assert not asyncio.all_tasks(self.loop)
            assert not self.loop.live_timers()
        finally:
            for task in asyncio.all_tasks(self.loop):  # only after a failure: show that, not its consequences
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(60))
            self.loop.close()

    async def stop(self) -> None:
        """All that is accepted is flushed, or told once and in order; who waits to add is refused."""
        accepted = [item for item in self.queue if item.accepted_at is not None]
        refused = [item for item in self.queue if item.accepted_at is None]
        begun = [item for items in self.flights.values() for item in items]
        for item in accepted:
            item.hurried = True
        heard = [item for item in [*begun, *accepted] if item.heard]
        blocked = begun and len(self.flights) == self.concurrency  # nothing can begin any more
        flushed = accepted if self.drains and not blocked else []
        self.told.clear()
        self.stopping = True
        await self.collector.__aexit__()
        assert self.collector.stats().pending == 0
        assert not self.problems
        lost = [item for item in [*begun, *accepted] if item not in heard and item not in flushed]
        assert sorted(self.told) == sorted((item.number, "Closed") for item in lost)
        last = [number for number, _ in self.told if number in {item.number for item in accepted}]
        assert last == sorted(last) or self.concurrency > 1
        for item in [*heard, *refused]:
            assert item.task is not None
            await asyncio.wait([item.task])
            expected = "NoneType" if item in flushed else "Closed"
            assert type(item.task.exception()).__name__ == expected
        await asyncio.gather(*(task for task, _ in self.hurrying))


TestCollector = NaiveCollector.TestCase
TestCollector.settings = settings(max_examples=60, stateful_step_count=20)
