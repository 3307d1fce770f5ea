"""BatchCollector when everything collides: adding, cancelling, flushing, failing and stopping at the same instants."""

import asyncio
from typing import Any

from hypothesis import given, strategies as st

from meshkit.batch import BatchCollector
from meshkit.errors import BatchFull, Closed
from meshkit.testing import run
from tests.test_batch import Told

ACTIONS = st.sampled_from(["add", "submit", "submit_nowait", "try_add", "flush"])


@given(
    plan=st.lists(st.tuples(ACTIONS, st.integers(0, 8), st.one_of(st.none(), st.integers(0, 8))), max_size=25),
    max_size=st.integers(1, 4),
    more=st.integers(0, 4),
    concurrency=st.integers(1, 3),
    stop_at=st.integers(0, 10),
    stop_timeout=st.sampled_from([0.0, 0.5, 100.0]),
    outcomes=st.lists(st.sampled_from(["good", "bad", "mixed", "slow"]), min_size=1, max_size=5),
)
def test_whatever_happens_at_one_instant_each_accepted_item_is_flushed_or_told_once(
    plan: list[tuple[str, int, int | None]],
    max_size: int,
    more: int,
    concurrency: int,
    stop_at: int,
    stop_timeout: float,
    outcomes: list[str],
) -> None:
    """Events fall on the same few instants, so that cancellations, grants, ends of flushes and the stop collide."""
    told = Told()
    flushed: list[int] = []
    given: list[int] = []
    accepted: set[int] = set()
    unknown: set[int] = set()
    heard: set[int] = set()
    calls = 0

    async def flush(items: list[int]) -> list[int | Exception]:
        nonlocal calls
        outcome = outcomes[calls % len(outcomes)]
        calls += 1
        given.extend(items)
        await asyncio.sleep(7 if outcome == "slow" else 1)
        if outcome == "bad":
            raise ConnectionError
        failing = {item for item in items if outcome == "mixed" and item % 2}
        flushed.extend(item for item in items if item not in failing)
        return [ValueError(item) if item in failing else item for item in items]

    async def act(collector: BatchCollector[int, Any], item: int, action: str) -> None:
        try:
            if action == "add":
                await collector.add(item)
                accepted.add(item)
            elif action == "try_add" and collector.try_add(item):
                accepted.add(item)
            elif action == "submit_nowait":
                future = collector.submit_nowait(item)
                accepted.add(item)
                future.add_done_callback(lambda done: heard.add(item) if done.exception() else None)
            elif action == "submit":
                unknown.add(item)
                assert await collector.submit(item) == item
                accepted.add(item)
            elif action == "flush":
                await collector.flush()
        except (ConnectionError, ValueError):
            heard.add(item)
            accepted.add(item)
        except BatchFull:
            assert item not in accepted
        except Closed as error:
            if item in accepted or error.executed == "maybe":
                heard.add(item)
            unknown.discard(item)
            if error.executed == "no" and item not in accepted and item in given:
                raise AssertionError("flushed, and told that it was not") from error

    async def main() -> None:
        async with (
            asyncio.timeout(1000),
            BatchCollector(
                flush,
                max_size=max_size,
                max_wait=1.0,
                max_pending=max_size + more,
                concurrency=concurrency,
                stop_timeout=stop_timeout,
                on_error=told,
            ) as collector,
        ):
            loop = asyncio.get_running_loop()
            tasks: list[asyncio.Task[None]] = []

            def start(item: int, action: str, cancel_after: int | None) -> None:
                task = loop.create_task(act(collector, item, action))
                tasks.append(task)
                if cancel_after is not None:
                    loop.call_later(cancel_after, task.cancel)

            for item, (action, at, cancel_after) in enumerate(plan):
                loop.call_later(at, start, item, action, cancel_after)
            await asyncio.sleep(stop_at)
            await collector.stop()
        await asyncio.sleep(100)
        for task in tasks:
            assert task.done()
            assert task.cancelled() or task.exception() is None
        assert collector.stats().pending == 0

    run(main)
    assert len(given) == len(set(given)), "flushed twice"
    assert len(told.items) == len(set(told.items)), "told twice"
    assert not set(flushed) & (set(told.items) | heard), "flushed, and told as failed"
    assert not set(told.items) & heard, "told to two"
    assert accepted <= set(flushed) | set(told.items) | heard, "lost"
    assert set(given) | set(told.items) <= accepted | unknown | heard, "came out of nowhere"
