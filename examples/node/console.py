"""What a node does for whoever sits in front of it: one command per line, typed or piped."""

import asyncio
import hashlib
import os
import shlex
import stat
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio

from examples.mesh.names import name_of
from examples.mesh.social import Social
from examples.mesh.stash import Stash
from meshkit import Event, MeshkitError, PeerGone, PeerUp, Runtime

HELP = """\
peers          who is here
stash FILE     seal it, and leave it with three others
recover FILE   get back what was stashed, from all who have it, and write it to FILE
tease NAME     for all to hear
quit           leave the mesh"""


class Console:
    """Carries out commands, one after the other, and says who comes and goes."""

    def __init__(self, stash: Stash, social: Social) -> None:
        self.stash, self.social = stash, social
        self.names: dict[str, str] = {}  # of all that were ever here
        self.commands: dict[tuple[str, int], Callable[..., Awaitable[None]]] = {
            ("peers", 0): self.show_peers,
            ("stash", 1): self.put,
            ("recover", 1): self.recover,
            ("tease", 1): self.tease,
        }

    @property
    def rt(self) -> Runtime:
        return self.stash.rt

    def see(self, event: Event) -> None:
        """Say who comes and goes: the observer of the runtime."""
        match event:
            case PeerUp(peer) if peer.draining:
                print(f"{peer.name} is about to leave", flush=True)
            case PeerUp(peer):
                self.names[peer.node] = peer.name
                print(f"{peer.name} is here", flush=True)
            case PeerGone(node, reason):
                print(f"{self.names.get(node, node)} is gone: {reason}", flush=True)
            case _:
                pass

    # --- lines

    async def run(self) -> None:
        """Carry out each line that comes in; return when there is nothing more to do."""
        lines: asyncio.Queue[str | None] = asyncio.Queue()
        threading.Thread(target=feed, args=(asyncio.get_running_loop(), lines), daemon=True).start()
        while (line := await lines.get()) is not None:
            try:
                words = shlex.split(line)
                if words == ["quit"]:
                    return
                if words:
                    await self.obey(*words)
            except (MeshkitError, OSError, ValueError) as error:
                print(f"{line.strip()}: {error}", flush=True)
        if not ends_with_its_input():
            await anyio.sleep_forever()

    async def obey(self, verb: str, *words: str) -> None:
        """Carry out one command."""
        command = self.commands.get((verb, len(words)))
        if command is None:
            print(HELP, flush=True)
        else:
            await command(*words)

    # --- commands

    async def show_peers(self) -> None:
        """Print who is here."""
        for node, peer in self.rt.peers.items():
            print(f"{peer.name:<12} {node}", flush=True)
        print(f"{len(self.rt.peers)} are here, and {self.rt.name}", flush=True)

    async def put(self, path: str) -> None:
        """Stash a file."""
        if not await anyio.Path(path).is_file():
            raise ValueError("there is no such file")
        data = await anyio.Path(path).read_bytes()
        await self.stash.put([data])
        keep = ", ".join(sorted(name_of(self.rt, peer) for peer in self.stash.confidants)) or "nobody yet"
        print(f"{path} ({len(data):,} bytes, {digest(data)}) is with: {keep}", flush=True)

    async def recover(self, path: str) -> None:
        """Get the file back from each one that has it; write it once."""
        if await anyio.Path(path).exists():
            raise ValueError("there is such a file already: give another name")
        written: bytes | None = None
        for peer in await self.stash.who_has_it():
            name = name_of(self.rt, peer)
            try:
                data = await self.stash.recover(peer)
            except MeshkitError as error:
                print(f"{name} did not give it back: {type(error).__name__}: {error}", flush=True)
                continue
            print(f"{name} gave back {len(data):,} bytes, {digest(data)}", flush=True)
            if written is None:
                await anyio.Path(path).write_bytes(data)
                written = data
            elif data != written:
                print(f"{name} gave back another file than the first one did: see which you want", flush=True)
        print(f"recovered to {path}" if written is not None else "nothing recovered: nobody here gave it", flush=True)

    async def tease(self, name: str) -> None:
        """Tease a node."""
        known = {peer.name: node for node, peer in self.rt.peers.items()}
        if name not in known:
            raise ValueError(f"there is no {name} here, only {', '.join(sorted(known)) or 'this node'}")
        await self.social.tease(known[name])


def digest(data: bytes) -> str:
    """Say which bytes these are."""
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def feed(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str | None]) -> None:
    """Pass on each line of the standard input, then None. In a thread: not every kind of input can be waited for."""
    rest = b""
    with suppress(OSError, RuntimeError):  # the latter when the loop has been closed meanwhile
        while sys.stdin is not None and (data := os.read(sys.stdin.fileno(), 65536)):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                loop.call_soon_threadsafe(lines.put_nowait, line.decode(errors="replace"))
        if rest:
            loop.call_soon_threadsafe(lines.put_nowait, rest.decode(errors="replace"))
        loop.call_soon_threadsafe(lines.put_nowait, None)


def ends_with_its_input() -> bool:
    """Say whether there is nothing to do at the end of the input: after Ctrl-D, or a pipe; not with `< /dev/null`."""
    if sys.stdin is None:
        return False
    return sys.stdin.isatty() or stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode)
