"""Many small things done as few big ones: rows are written together, and lookups share one query."""

import asyncio

from meshkit import BatchCollector

NAMES = {1: "alice", 2: "bob", 3: "carol"}


async def write(rows: list[str]) -> None:
    if "rotten" in rows:
        raise ConnectionError("the database refused the batch")
    print("INSERT", ", ".join(rows))


async def select(ids: list[int]) -> list[str | LookupError]:
    print("SELECT ... WHERE id IN", tuple(ids))
    return [NAMES.get(i, LookupError(f"no user {i}")) for i in ids]


def keep(rows: list[str], error: Exception) -> None:
    print(f"not written: {rows}, because {error}")


async def main() -> None:
    async with BatchCollector(write, max_size=3, max_wait=0.1, on_error=keep, name="rows") as rows:
        for row in ["one", "two", "three", "four", "rotten", "six", "seven"]:
            await rows.add(row)
    print(rows.stats())

    async with BatchCollector(select, max_size=100, max_wait=0, name="users") as users:  # whatever is asked at once
        found = await asyncio.gather(*(users.submit(i) for i in (3, 1, 7)), return_exceptions=True)
        print(found)


if __name__ == "__main__":
    asyncio.run(main())
