"""Run the mesh, and what happens to it: a file is stashed, a confidant goes silent, the owner loses its memory.

It ends with a summary and the digest of the file before and after, and exits with 1 if anything does not match.
"""

import argparse
import asyncio
import hashlib
import math
import os
import pathlib
import random
import signal
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio

from examples.mesh.checkpoint import Checkpoint
from examples.mesh.presence import Presence
from examples.mesh.social import Social
from examples.mesh.stash import Stash
from meshkit import Identity, Logger, MemoryHub, MemoryTransport, MeshkitError, Runtime

NAMES = ["alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy"]
PAUSE = 1.0  # seconds between chapters, so that what is batched is read where it belongs
COLOURED = sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@dataclass
class Node:
    """One node and its services."""

    name: str
    identity: Identity
    stash: Stash
    checkpoint: Checkpoint
    social: Social
    presence: Presence

    @property
    def id(self) -> str:
        """What it is known by: its public key."""
        return self.identity.node_id


def make_nodes(count: int) -> list[Node]:
    names = [NAMES[i] if i < len(NAMES) else f"node{i}" for i in range(count)]
    nodes: list[Node] = []
    for position, name in enumerate(names):
        # The last node observes wrongly: it counts a thousandfold.
        checkpoint = Checkpoint(off_by=1000 if position == count - 1 else 1)
        identity = Identity.generate()
        nodes.append(Node(name, identity, Stash(identity), checkpoint, Social(), Presence()))
    return nodes


@dataclass
class Outcome:
    """What has come of the story."""

    before: str  # the digest of the file when it was stashed
    after: dict[str, str]  # the digest of what each confidant gave back, or why it gave nothing
    silent: Node
    subject: Node  # whom all nodes have observed


async def read(path: pathlib.Path) -> AsyncIterator[bytes]:
    """Yield the file piece by piece."""
    async with await anyio.open_file(path, "rb") as file:
        while piece := await file.read(1 << 16):
            yield piece


async def watched(chunks: AsyncIterable[bytes], see: Callable[[bytes], object]) -> AsyncIterator[bytes]:
    """Yield what `chunks` yields, and let `see` see it: so the digest is that of what was stashed."""
    async for chunk in chunks:
        see(chunk)
        yield chunk


def heading(text: str, explanation: str = "") -> None:
    print(f"\n\033[1m{text}\033[0m" if COLOURED else f"\n== {text}", flush=True)
    if explanation:
        print(f"\033[2m{explanation}\033[0m" if COLOURED else explanation, flush=True)


async def until(condition: Callable[[], bool], *, within: float, what: str) -> None:
    """Wait for the mesh to get there."""
    try:
        with anyio.fail_after(within):
            while not condition():  # noqa: ASYNC110 - watches services that know nothing of this story
                await anyio.sleep(0.02)
    except TimeoutError:
        sys.exit(f"after {within:g} s, still not: {what}")


async def story(nodes: list[Node], hub: MemoryHub, file: str, chunks: AsyncIterable[bytes], seconds: float) -> Outcome:
    """Play the story; return what has come of it."""
    started = asyncio.get_running_loop().time()
    owner, digest = nodes[0], hashlib.sha256()
    rng = random.Random(7)

    wanted = min(owner.stash.wanted, len(nodes) - 1)
    target, teasing = nodes[1], nodes[2:5]
    heading(
        f"{owner.name} stashes {file}",
        f"It is sealed with a key that only {owner.name} has, and left with {wanted} of {len(nodes) - 1} other nodes, "
        f"its confidants.\nMeanwhile {target.name} is teased: the events of a moment become one line.",
    )
    async with anyio.create_task_group() as chat:
        chat.start_soon(owner.stash.put, watched(chunks, digest.update))
        for node in teasing:
            await node.social.tease(target.id)
            await anyio.sleep(0.2)
    await until(lambda: len(owner.stash.confidants) == wanted, within=60, what=f"{wanted} nodes keep the file")
    await anyio.sleep(PAUSE)

    heading(
        f"every node says how often {target.name} has restarted",
        f"{nodes[-1].name} counts a thousandfold. All must decide the same, and sensibly.",
    )
    for node in nodes:
        node.checkpoint.observe(target.id, restarts=rng.choice([3, 3, 4]), uptime=rng.randint(980, 1020))
    for node in nodes:
        await node.checkpoint.decide(target.id)
    await anyio.sleep(PAUSE)

    silent = next(node for node in nodes if node.id in owner.stash.confidants)
    spare = len(nodes) - 1 > wanted
    healing = "another node takes the file in its place" if spare else "there is no other node to take its place"
    heading(
        f"{silent.name} goes silent",
        f"It hears nobody, and nobody hears it. After two calls without an answer the breaker of {owner.name} opens,\n"
        f"and {healing}.",
    )
    hub.silence(silent.id)
    await until(lambda: silent.id not in owner.stash.confidants, within=8, what="the breaker has opened")
    if spare:
        await until(lambda: len(owner.stash.confidants) == wanted, within=60, what="the stash has healed")
    await anyio.sleep(PAUSE)

    confidants = [node for node in nodes if node.id in owner.stash.confidants]
    heading(
        f"{owner.name} loses its memory",
        "All it has left is its key. It asks each of its confidants for the whole file: "
        f"{', '.join(node.name for node in confidants)}.",
    )
    owner.stash.lose_memory()
    after: dict[str, str] = {}
    for peer in confidants:
        try:
            after[peer.name] = hashlib.sha256(await owner.stash.recover(peer.id)).hexdigest()
        except MeshkitError as error:
            after[peer.name] = f"{type(error).__name__}: {error}"
    await anyio.sleep(max(PAUSE, seconds - (asyncio.get_running_loop().time() - started)))
    return Outcome(digest.hexdigest(), after, silent, target)


def summary(nodes: list[Node], outcome: Outcome) -> bool:
    """Print what has come of the story; return whether everything came out as it should."""
    heading("summary")
    row = "{:<8} {:<7}  {:<14}  {:<27}  {:>16}  {:>12}".format
    print(row("node", "state", "keeps parts of", "decided (restarts, uptime)", "news heard again", "pings spared"))
    for node in nodes:
        kept = ", ".join(owner.name for owner in nodes if owner.id in node.stash.kept) or "-"
        state = "silent" if node is outcome.silent else "up"
        decided = str(node.checkpoint.decided.get(outcome.subject.id))
        print(row(node.name, state, kept, decided, node.presence.repeated, node.presence.pings.stats().refused))
    print(f"\n{'sha256 before':<24} {outcome.before}")
    for peer, after in outcome.after.items():
        print(f"{'after, from ' + peer:<24} {after}  {'same' if after == outcome.before else 'DIFFERENT'}")

    wanted = min(nodes[0].stash.wanted, len(nodes) - 2)  # all but the owner and the silent one
    decisions = [node.checkpoint.decided.get(outcome.subject.id, (0, 0)) for node in nodes]
    sensible = all(3 <= restarts <= 4 and 980 <= uptime <= 1020 for restarts, uptime in decisions)
    checks = {
        f"each confidant ({wanted}) gave the file back, byte for byte": (
            len(outcome.after) == wanted and set(outcome.after.values()) == {outcome.before}
        ),
        f"{outcome.silent.name} is no longer a confidant": outcome.silent.name not in outcome.after,
        f"every other node has noticed that {outcome.silent.name} is silent": all(
            outcome.silent.id in node.presence.silent for node in nodes if node is not outcome.silent
        ),
        "all nodes decided the same, despite the outlier": len(set(decisions)) == 1 and sensible,
    }
    for check, passed in checks.items():
        print(f"{check}: {'yes' if passed else 'NO'}")
    return all(checks.values())


async def main(nodes: list[Node], file: str, chunks: AsyncIterable[bytes], seconds: float = 0.0) -> bool:
    hub = MemoryHub()
    members = {node.id for node in nodes}  # whom each of them trusts
    async with AsyncExitStack() as stack:
        for node in nodes:
            services = [node.stash, node.checkpoint, node.social, node.presence]
            logger = Logger(batch_window=0.5, node=node.name, output=sys.stdout)
            transport = MemoryTransport(hub)
            runtime = Runtime(
                node.name, services, transport=transport, identity=node.identity, trust=members, logger=logger
            )
            await stack.enter_async_context(runtime)
        outcome = await story(nodes, hub, file, chunks, seconds)
    return summary(nodes, outcome)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.mesh", description=__doc__)
    default = pathlib.Path(__file__).parents[2] / "docs" / "design.md"
    parser.add_argument("--file", type=pathlib.Path, default=default, help="what is stashed (default: docs/design.md)")
    parser.add_argument("--nodes", type=int, default=5, help="how many nodes, from 3 (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long at least (default: as long as it takes)")
    parsed = parser.parse_args()
    if not 3 <= parsed.nodes <= 100:
        parser.error(f"--nodes must be from 3 to 100, not {parsed.nodes}")
    if not 0 <= parsed.seconds < math.inf:
        parser.error(f"--seconds must be 0 or more, not {parsed.seconds}")
    if not (os.path.isfile(parsed.file) and os.access(parsed.file, os.R_OK)):
        parser.error(f"--file {parsed.file} is not a file that can be read")
    return parsed


if __name__ == "__main__":
    given = arguments()
    if hasattr(signal, "SIGPIPE"):  # end without a word when nobody reads any more: `python -m examples.mesh | head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        good = asyncio.run(main(make_nodes(given.nodes), given.file.name, read(given.file), given.seconds))
        sys.exit(0 if good else 1)
    except MeshkitError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
