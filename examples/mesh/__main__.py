"""Run the mesh, and what happens to it: a file is stashed, a confidant goes silent, the owner loses its memory.

It ends with a summary and the digest of the file before and after, and exits with 1 if anything does not match.
"""

import argparse
import asyncio
import hashlib
import os
import pathlib
import random
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio

from examples.mesh.checkpoint import Checkpoint
from examples.mesh.presence import Presence
from examples.mesh.social import Social
from examples.mesh.stash import Stash
from meshkit import Logger, MemoryHub, MemoryTransport, MeshkitError, Runtime

NAMES = ["alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy"]
PAUSE = 1.0  # seconds between chapters, so that what is batched is read where it belongs
COLOURED = sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@dataclass
class Node:
    """One node and its services."""

    name: str
    secret: bytes
    stash: Stash
    checkpoint: Checkpoint
    social: Social
    presence: Presence


def make_nodes(count: int) -> list[Node]:
    names = [NAMES[i] if i < len(NAMES) else f"node{i}" for i in range(count)]
    nodes: list[Node] = []
    for position, name in enumerate(names):
        secret = secrets.token_bytes(32)
        # The last node observes wrongly: it counts a thousandfold.
        checkpoint = Checkpoint(names, off_by=1000 if position == count - 1 else 1)
        nodes.append(Node(name, secret, Stash(secret), checkpoint, Social(), Presence()))
    return nodes


async def read(path: pathlib.Path) -> AsyncIterator[bytes]:
    """Yield the file piece by piece: it may be larger than memory."""
    async with await anyio.open_file(path, "rb") as file:
        while piece := await file.read(1 << 16):
            yield piece


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if COLOURED else f"\n== {text}", flush=True)


async def until(condition: Callable[[], bool], *, within: float, what: str) -> None:
    """Wait for the mesh to get there."""
    try:
        with anyio.fail_after(within):
            while not condition():  # noqa: ASYNC110 - watches services that know nothing of this story
                await anyio.sleep(0.02)
    except TimeoutError:
        sys.exit(f"after {within:g} s, still not: {what}")


async def story(nodes: list[Node], hub: MemoryHub, path: pathlib.Path, seconds: float) -> bool:
    """Play the story; return whether everything came out as it should."""
    started = asyncio.get_running_loop().time()
    owner, digest = nodes[0], hashlib.sha256()
    async for piece in read(path):
        digest.update(piece)
    before = digest.hexdigest()
    rng = random.Random(7)

    heading(f"{len(nodes)} nodes chat, and {owner.name} stashes {path.name}")
    target = nodes[1]
    async with anyio.create_task_group() as chat:
        chat.start_soon(owner.stash.put, read(path))
        for node in nodes[2:5]:
            await node.social.tease(target.name)
            await anyio.sleep(0.2)
    await anyio.sleep(PAUSE)

    heading(f"every node says how often {target.name} has restarted; {nodes[-1].name} is wrong by far")
    for node in nodes:
        await node.checkpoint.observe(target.name, restarts=rng.choice([3, 3, 4]), uptime=rng.randint(980, 1020))
    await until(lambda: all(n.checkpoint.decided for n in nodes), within=3, what="all nodes have decided")
    await anyio.sleep(PAUSE)

    silent = next(node for node in nodes if node.name in owner.stash.confidants)
    heading(f"{silent.name}, a confidant of {owner.name}, goes silent")
    hub.silence(silent.name)
    spare = len(nodes) - 1 > owner.stash.wanted
    await until(lambda: silent.name not in owner.stash.confidants, within=8, what="the breaker has opened")
    if spare:
        wanted = owner.stash.wanted
        await until(lambda: len(owner.stash.confidants) == wanted, within=60, what="the stash has healed")

    await anyio.sleep(PAUSE)

    confidants = sorted(owner.stash.confidants)
    heading(f"{owner.name} loses its memory, and asks for its file: {', '.join(confidants)}")
    owner.stash.lose_memory()
    digests: dict[str, str] = {}
    for peer in confidants:
        digests[peer] = hashlib.sha256(await owner.stash.recover(peer)).hexdigest()

    await anyio.sleep(max(PAUSE, seconds - (asyncio.get_running_loop().time() - started)))
    heading("summary")
    print(
        f"{'node':<8} {'state':<8} {'keeps parts of':<16} {'decided (restarts, uptime)':<28} {'news heard again':>16}"
    )
    for node in nodes:
        kept = ", ".join(sorted(node.stash.kept)) or "-"
        decided = node.checkpoint.decided.get(target.name)
        state = "silent" if node is silent else "up"
        print(f"{node.name:<8} {state:<8} {kept:<16} {decided!s:<28} {node.presence.repeated:>16}")
    print(f"\n{'sha256 before':<24} {before}")
    for peer, after in digests.items():
        print(f"{'after, from ' + peer:<24} {after}  {'same' if after == before else 'DIFFERENT'}")

    agreed = len({node.checkpoint.decided[target.name] for node in nodes}) == 1
    sane = nodes[0].checkpoint.decided[target.name][0] in {3, 4}
    checks = {
        "the file came back byte for byte": bool(digests) and set(digests.values()) == {before},
        "all nodes decided the same, despite the outlier": agreed and sane,
        "the stash healed": len(digests) == owner.stash.wanted or not spare,
    }
    for check, passed in checks.items():
        print(f"{check}: {'yes' if passed else 'NO'}")
    return all(checks.values())


async def main(path: pathlib.Path, count: int, seconds: float) -> bool:
    hub = MemoryHub()
    nodes = make_nodes(count)
    async with AsyncExitStack() as stack:
        for node in nodes:
            services = [node.stash, node.checkpoint, node.social, node.presence]
            logger = Logger(batch_window=0.5, node=node.name, output=sys.stdout)
            runtime = Runtime(node.name, services=services, transport=MemoryTransport(hub), logger=logger)
            await stack.enter_async_context(runtime)
        return await story(nodes, hub, path, seconds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.mesh", description=__doc__)
    default = pathlib.Path(__file__).parents[2] / "docs" / "design.md"
    parser.add_argument("--file", type=pathlib.Path, default=default, help="what is stashed (default: docs/design.md)")
    parser.add_argument("--nodes", type=int, default=5, help="how many nodes, from 3 (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long at least (default: as long as it takes)")
    parsed = parser.parse_args()
    if not 3 <= parsed.nodes <= 100:
        parser.error(f"--nodes must be from 3 to 100, not {parsed.nodes}")
    if not parsed.file.is_file():
        parser.error(f"--file {parsed.file} is not a file")
    return parsed


if __name__ == "__main__":
    given = arguments()
    try:
        sys.exit(0 if asyncio.run(main(given.file, given.nodes, given.seconds)) else 1)
    except MeshkitError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
