"""A read that is slow now and then: a second copy, sent after a quarter of a second, answers instead."""

import asyncio
import itertools

from meshkit import Hedger, RetryBudget
from meshkit.events import Event

copies = itertools.count(1)


def show(event: Event) -> None:
    print(f"  {event}")


hedger = Hedger(delay=0.25, budget=RetryBudget(ratio=0.1), name="read", observer=show)


@hedger
async def read(key: str) -> str:
    copy = next(copies)
    try:
        await asyncio.sleep(60 if copy == 3 else 0.01)  # the third read of all meets a replica that is busy
    except asyncio.CancelledError:
        print(f"  copy {copy} was cancelled")
        raise
    return f"{key} (copy {copy})"


async def main() -> None:
    for key in ["apple", "banana", "cherry"]:
        print(await read(key))


if __name__ == "__main__":
    asyncio.run(main())
