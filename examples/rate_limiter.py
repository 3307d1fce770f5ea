"""RateLimiter: three tries a second for each user; whoever waits, waits in line; a ping is answered from memory."""

import asyncio

from meshkit import RateLimiter

logins = RateLimiter(max_count=3, window=1.0, name="logins")
pings = RateLimiter(max_count=1, window=60.0, name="pings")
uploads = RateLimiter(max_count=2, window=0.1, name="uploads")


async def ping(peer: str) -> bool:
    print(f"pinging {peer}")
    return True


async def upload(number: int) -> None:
    await uploads.acquire("alice")
    print(f"upload {number}")


async def main() -> None:
    print("logins of bob:  ", [logins.allow("bob") for _ in range(5)])
    print("logins of carol:", [logins.allow("carol") for _ in range(2)])

    for _ in range(3):
        print("dave is there:", await pings.call_or_cached("dave", ping, "dave"))

    loop = asyncio.get_running_loop()
    start = loop.time()
    await asyncio.gather(*(upload(number) for number in range(6)))
    print("six uploads took at least 0.2 s:", loop.time() - start >= 0.2)


if __name__ == "__main__":
    asyncio.run(main())
