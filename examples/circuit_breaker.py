"""A breaker per peer: bob goes silent, is left alone for a while, and is found again when he is back."""

import asyncio

from meshkit import CircuitBreaker, CircuitChanged, CircuitOpen, Event, PerKey


def tell(event: Event) -> None:
    if isinstance(event, CircuitChanged):
        print(f"  {event.name}: {event.before} -> {event.after}")


def breaker_of(peer: str) -> CircuitBreaker:
    return CircuitBreaker(failure_threshold=2, reset_timeout=0.1, name=peer, observer=tell)


breakers = PerKey(breaker_of)


async def store(peer: str, *, silent: bool) -> str:
    if silent:
        raise ConnectionError(f"no answer from {peer}")
    return f"stored with {peer}"


async def main() -> None:
    for silent in (True, False):
        print("bob is silent" if silent else "bob is back")
        for peer in ("alice", "bob", "bob", "bob"):
            try:
                print(await breakers[peer].call(store, peer, silent=silent and peer == "bob"))
            except (ConnectionError, CircuitOpen) as error:
                print(f"{type(error).__name__}: {str(error).partition(';')[0]}")
        await asyncio.sleep(0.15)


if __name__ == "__main__":
    asyncio.run(main())
