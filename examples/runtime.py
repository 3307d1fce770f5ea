"""Two nodes in one process: typed calls, a broadcast, and an error that says what to do."""

import asyncio

from meshkit import MemoryHub, MemoryTransport, RemoteError
from meshkit.runtime import Message, Reject, Runtime, Service, broadcast, handles, request

STORE = request("stash:store", bytes, reply=int)  # one node is asked, and replies
TEASE = broadcast("social:tease", str)  # goes to every node


class Stash(Service):
    name, emoji = "stash", "📦"

    @handles(STORE)
    async def store(self, msg: Message[bytes]) -> int:
        if len(msg.payload) > 100:
            raise Reject("too_big", "100 bytes are enough for anybody")
        return len(msg.payload)

    @handles(TEASE)
    async def tease(self, msg: Message[str]) -> None:
        print(f"{self.rt.name} hears {msg.sender} tease {msg.payload}")


async def main() -> None:
    hub = MemoryHub()  # where they meet
    alice, bob = (Runtime(name, [Stash()], transport=MemoryTransport(hub)) for name in ("alice", "bob"))
    async with alice, bob:
        print(alice.peers, await alice.call(STORE, b"dear diary", to="bob", timeout=5))
        await bob.emit(TEASE, "alice")
        try:
            await alice.call(STORE, bytes(1000), to="bob", timeout=5)
        except RemoteError as error:
            print(f"{error}; retryable: {error.retryable}")


if __name__ == "__main__":
    asyncio.run(main())
