"""A webhook that is delivered again and again, and an order that is placed twice at once: each is done once."""

import asyncio

from meshkit import DedupCache

deliveries = DedupCache(ttl=3600, name="webhooks")
orders = DedupCache(ttl=3600, name="orders")


async def charge(order: str, cents: int) -> str:
    print(f"  charging {cents} cents for {order}")
    await asyncio.sleep(0.01)
    if cents <= 0:
        raise ValueError("nothing to charge")
    return f"receipt for {order}"


async def main() -> None:
    for delivery in ("evt-1", "evt-2", "evt-1"):
        print(delivery, "is new" if deliveries.check(delivery) else "was seen before")

    print("three clicks on one button:")
    clicks = (orders.once("order-7", charge, "order-7", 500) for _ in range(3))
    print(await asyncio.gather(*clicks))
    print("and a retry later:", await orders.once("order-7", charge, "order-7", 500))

    print("what fails may be tried again:")
    for cents in (0, 900):
        try:
            print(await orders.once("order-8", charge, "order-8", cents))
        except ValueError as error:
            print(f"  failed: {error}")


if __name__ == "__main__":
    asyncio.run(main())
