"""Two downloads at once, three more in line, and the rest are told at once that there is no room."""

import asyncio

from meshkit import Bulkhead, BulkheadFull

disk = Bulkhead(max_concurrent=2, max_queue=3, name="disk")
running = most = 0


@disk
async def download(number: int) -> str:
    global running, most  # noqa: PLW0603 - it shows what the bulkhead does, and is no part of its use
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.01)
    running -= 1
    return f"file {number} is here"


async def main() -> None:
    for result in await asyncio.gather(*(download(number) for number in range(1, 8)), return_exceptions=True):
        print(f"refused: {result}" if isinstance(result, BulkheadFull) else result)
    print(f"at most {most} at once; refused {disk.stats().refused}")

    async with disk:
        print(f"a block has a slot, too: {disk.stats().running} is taken")


if __name__ == "__main__":
    asyncio.run(main())
