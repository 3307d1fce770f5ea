"""A log per service, in which repeated events become one line.

Run it: python -m examples.logger
"""

import asyncio
import sys
from collections.abc import Sequence

from meshkit import LogEntry, Logger


def stored(entries: Sequence[LogEntry]) -> str:
    return f"{sum(entry.count for entry in entries)} files came from {len(entries)} peers"


async def main() -> None:
    async with Logger(batch_window=0.2, output=sys.stdout, disabled=["presence"]) as logger:
        social = logger.service("social", emoji="🎭")
        stash = logger.service("stash", emoji="📦")
        presence = logger.service("presence", emoji="📡")
        logger.register_formatter("stash", "store", stored)

        stash.info("serving on port %d", 7001, peers=3)
        stash.debug("not shown, until the service is verbose")
        for actor in ("alice", "carol", "dave"):
            social.event("tease", actor, target="bob")
            stash.event("store", actor, count=4)
            presence.event("howdy", actor)  # nobody wants to read these
            await asyncio.sleep(0.1)
        stash.bind(disk="/dev/sda").warning("almost full", free="3%")

        await asyncio.sleep(0.3)  # nothing happens for a while, and the groups are written
        social.event("join", "erin", instant=True)
        social.event("visit", "erin")  # this one waits in its group until the end of the block


if __name__ == "__main__":
    asyncio.run(main())
