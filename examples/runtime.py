"""Two nodes in one process: typed calls, a broadcast, an error that says what to do, and the story of a message."""

import asyncio

from meshkit import MemoryHub, MemoryTransport, RemoteError
from meshkit.runtime import Message, Reject, Runtime, Service, broadcast, handles, request

STORE = request("stash:store", bytes, reply=int)  # one node is asked, and replies
TEASE = broadcast("social:tease", str, rate_limit=(1, 60.0))  # goes to every node; one in any minute from each


class Stash(Service):
    name, emoji = "stash", "📦"

    @handles(STORE)
    async def store(self, msg: Message[bytes]) -> int:
        if len(msg.payload) <= 100:
            return len(msg.payload)
        raise Reject("too_big", "100 bytes are enough for anybody")

    @handles(TEASE)
    async def tease(self, msg: Message[str]) -> None:
        print(f"{self.rt.name} hears {msg.sender} tease {msg.payload}")


async def main() -> None:
    hub = MemoryHub()  # where they meet
    alice, bob = (Runtime(name, [Stash()], transport=MemoryTransport(hub)) for name in ("alice", "bob"))
    async with alice, bob:
        print(await alice.call(STORE, b"dear diary", to="bob", timeout=5))  # without `to`: any node that can
        print((await alice.call_many(STORE, b"dear all", timeout=5)).replies)
        try:
            await alice.call(STORE, bytes(1000), to="bob", timeout=5)
        except RemoteError as error:
            print(f"{error}; retryable: {error.retryable}")
        await bob.emit(TEASE, "alice")
        print(bob.explain(await bob.emit(TEASE, "alice")))


if __name__ == "__main__":
    asyncio.run(main())
