"""A process that runs one node: `python -m tests.reliability.worker NAME LISTEN OPTIONS`, the options as JSON.

It prints "listens ADDRESS", and "peers COUNT" whenever that changes. Told "ask", it asks every node that it knows, and
prints "answers COUNT". It ends with its input, and drains on SIGTERM.
"""

import asyncio
import json
import logging
import signal
import sys
from typing import Any

import anyio

from meshkit import Event, MeshkitError, PeerGone, PeerUp
from tests.reliability.nodes import DO, address, node


async def main(name: str, listen: str, options: dict[str, Any]) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)

    def see(event: Event) -> None:
        if isinstance(event, PeerUp | PeerGone):
            print("peers", sum(bool(peer.kinds) for peer in rt.peers.values()), flush=True)

    rt = node(name, listen, observer=see, **options)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def obey() -> None:
        async for _ in reader:
            try:
                replies = (await rt.call_many(DO, 0, timeout=5.0)).replies
            except MeshkitError:
                replies = {}
            print("answers", len(replies), flush=True)
        stopping.set()

    async with rt, anyio.create_task_group() as tasks:
        print("listens", address(rt), flush=True)
        tasks.start_soon(obey)
        await stopping.wait()
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    logging.getLogger("meshkit").setLevel(logging.CRITICAL)  # who is met and lost is not of interest here
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
