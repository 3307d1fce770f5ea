"""What a node does for whoever sits in front of it: one command per line, typed or piped."""

import asyncio
import hashlib
import os
import re
import shlex
import stat
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio

from examples.mesh.names import name_of
from examples.mesh.social import Social
from examples.mesh.stash import MOST_BYTES, Stash
from meshkit import Event, MeshkitError, PeerGone, PeerUp, Runtime

HELP = """\
peers          who is here
stash FILE     seal it, and leave it with three others
recover FILE   get back what was stashed, from all who have it, and write it to FILE
tease NAME     for all to hear
quit           leave the mesh"""


def say(text: str) -> None:
    """Print a line; when nobody reads any more, go on all the same."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain(error: Exception) -> str:
    """Return what an error says, without the number that the system gives it."""
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error))


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
                say(f"{peer.name} is about to leave")
            case PeerUp(peer):
                self.names[peer.node] = peer.name
                say(f"{peer.name} is here")
            case PeerGone(node, reason):
                say(f"{self.names.get(node, node)} is gone: {reason}")
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
                say(f"{line.strip()}: {plain(error)}")
        if not ends_with_its_input():
            await anyio.sleep_forever()

    async def obey(self, verb: str, *words: str) -> None:
        """Carry out one command."""
        command = self.commands.get((verb, len(words)))
        if command is None:
            say(HELP)
        else:
            await command(*words)

    # --- commands

    async def show_peers(self) -> None:
        """Print who is here."""
        for node, peer in self.rt.peers.items():
            say(f"{peer.name:<12} {node}")
        say(f"{len(self.rt.peers)} are here, and {self.rt.name}")

    async def put(self, path: str) -> None:
        """Stash a file."""
        file = anyio.Path(path)
        if not await file.is_file():
            raise ValueError("it is not a file" if await file.exists() else "there is no such file")
        if (await file.stat()).st_size > MOST_BYTES:
            raise ValueError(f"the file is too large: a stash takes {MOST_BYTES:,} bytes")
        data = await file.read_bytes()
        await self.stash.put([data])
        keep = ", ".join(sorted(name_of(self.rt, peer) for peer in self.stash.confidants)) or "nobody yet"
        say(f"{path} ({len(data):,} bytes, {digest(data)}) is with: {keep}")

    async def recover(self, path: str) -> None:
        """Get the file back from each one that has it; write it once."""
        file = anyio.Path(path)
        if await file.exists():
            raise ValueError("there is such a file already: give another name")
        if not await file.parent.is_dir():
            raise ValueError(f"there is no directory {file.parent}: make it first")
        written: bytes | None = None
        for peer in await self.stash.who_has_it():
            name = name_of(self.rt, peer)
            try:
                data = await self.stash.recover(peer)
            except MeshkitError as error:
                say(f"{name} did not give it back: {type(error).__name__}: {error}")
                continue
            say(f"{name} gave back {len(data):,} bytes, {digest(data)}")
            if written is None:
                await file.write_bytes(data)
                written = data
            elif data != written:
                say(f"{name} gave back another file than the first one did: see which you want")
        say(f"recovered to {path}" if written is not None else "nothing recovered: nobody here gave it")

    async def tease(self, name: str) -> None:
        """Tease a node, or all that have this name."""
        known = {node: peer.name for node, peer in self.rt.peers.items()}
        if name not in known.values():
            raise ValueError(f"there is no {name} here, only {', '.join(sorted({*known.values()})) or 'this node'}")
        for node in known:
            if known[node] == name:
                await self.social.tease(node)
        say(f"{name} is teased")


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
