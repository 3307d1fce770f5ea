"""One limit for a call, for a function and for a block; and a deadline around all of them."""

import asyncio

import anyio

from meshkit import CallTimeout, Timeout

limit = Timeout(0.3, name="ask")


@limit
async def ask(name: str, seconds: float) -> str:
    await asyncio.sleep(seconds)
    return f"{name} answered"


async def main() -> None:
    print(await ask("bob", 0.01))
    try:
        await ask("carol", 60)
    except CallTimeout as error:
        print(f"{error} (executed: {error.executed})")

    async with limit:
        print(await ask("dave", 0.01), "and", await ask("erin", 0.01))

    with anyio.move_on_after(0.1) as deadline:  # comes first, and is not mistaken for the Timeout's
        await ask("frank", 60)
    print(f"the deadline around it came first: {deadline.cancelled_caught}")


if __name__ == "__main__":
    asyncio.run(main())
