"""A confidant that is busy at first is asked again; what may have happened already is not done twice."""

import asyncio

from meshkit import PeerLost, Refused, Retrier, RetryBudget, RetryPolicy
from meshkit.events import Event

stored: list[str] = []
refusals = [Refused(), Refused(retry_after=0.1)]


async def store(confidant: str, data: str) -> str:
    if confidant == "carol":
        raise PeerLost(node=confidant)  # did carol store it before she went away? Nobody knows.
    if refusals:
        raise refusals.pop(0)
    stored.append(data)
    return f"{confidant} holds {len(stored)} item(s)"


def show(event: Event) -> None:
    print(f"  {event}")


async def main() -> None:
    policy = RetryPolicy(max_retries=3, base_delay=0.05, jitter=False, timeout=5.0)
    retrier = Retrier(policy, on=(Refused, ConnectionError), budget=RetryBudget(), name="stash", observer=show)
    print(await retrier.call(store, "bob", "diary"))
    try:
        await Retrier(policy, on=Exception, name="stash").call(store, "carol", "diary")
    except PeerLost as error:
        print(f"{error}\n  {error.__notes__[0]}")


if __name__ == "__main__":
    asyncio.run(main())
