"""CallRegistry: requests and responses over a queue, in any order; one is answered too late, one never."""

import asyncio
import random

from meshkit import CallRegistry, CallTimeout

calls: CallRegistry[int] = CallRegistry(timeout=0.2, name="squares")
requests: asyncio.Queue[tuple[str, int]] = asyncio.Queue()


async def server() -> None:
    """Answer in whatever order: each response names its request."""
    while True:
        call_id, number = await requests.get()
        if number != 3:  # which it never answers
            delay = random.uniform(0.0, 0.05)
            asyncio.get_running_loop().call_later(delay, calls.resolve, call_id, number * number)


async def square(number: int) -> str:
    try:
        return f"{number} squared is {await calls.call(lambda call_id: requests.put((call_id, number)))}"
    except CallTimeout as error:
        return f"{number} squared is unknown: {error}"


async def main() -> None:
    serving = asyncio.create_task(server())
    for line in await asyncio.gather(*(square(number) for number in range(5))):
        print(line)
    print("pending:", len(calls))
    serving.cancel()


if __name__ == "__main__":
    asyncio.run(main())
