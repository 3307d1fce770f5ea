"""Five nodes in five processes, and what happens to them: `python -m examples.node.story [--file PATH]`.

A file is stashed; its owner is killed (SIGKILL), and started again with its key and nothing else; one of the confidants
is frozen meanwhile (SIGSTOP). It exits with 0 only if each of the other confidants gives the file back, byte for byte.
"""

import argparse
import asyncio
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import anyio

from examples.node.console import say
from meshkit import Identity

NAMES = ["alice", "bob", "carol", "dave", "erin"]
PROGRAM = [sys.executable, "-m", "examples.node"]
COLOURED = sys.stdout.isatty() and not os.environ.get("NO_COLOR")


class Failed(Exception):
    """The story did not come to its end."""


def heading(text: str) -> None:
    say(f"\n\033[1m{text}\033[0m" if COLOURED else f"\n== {text}")


class Node:
    """A process, what it has said, and what it is told."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.said: list[str] = []
        self.news = asyncio.Event()

    async def listen(self) -> None:
        """Print what it says, until it has ended."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.said.append(line.decode(errors="replace").rstrip())
            say(f"\033[2m{self.name:<6}|\033[0m {self.said[-1]}" if COLOURED else f"{self.name:<6}| {self.said[-1]}")
            self.news.set()
        await self.process.wait()
        self.news.set()

    def tell(self, command: str) -> None:
        """Type a command."""
        assert self.process.stdin is not None
        say(f"{self.name:<6}> {command}")
        self.process.stdin.write(f"{command}\n".encode())

    async def says(self, *words: str) -> str:
        """Wait for a line that has all these words in it; return it."""
        try:
            with anyio.fail_after(20):
                while not (found := [line for line in self.said if all(word in line for word in words)]):
                    if self.process.returncode is not None:
                        raise Failed(f"{self.name} has ended, with {self.process.returncode}")
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise Failed(f"{self.name} does not say {' '.join(words)!r}") from None
        return found[0]


@asynccontextmanager
async def running(name: str, program: Sequence[str], *options: str) -> AsyncGenerator[Node, None]:
    """Start a node; whatever happens, its process has ended afterwards."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *program, "--name", name, *options, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # so that Ctrl-C comes to this process alone, which ends the others
    )  # fmt: skip
    node = Node(name, process)
    listening = asyncio.create_task(node.listen())
    try:
        yield node
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # which ends a frozen one, too
        with anyio.CancelScope(shield=True):
            await listening


async def story(file: Path, folder: Path, programs: Mapping[str, Sequence[str]], nats: Sequence[str]) -> bool:
    """Play the story; return whether the file came back as it was."""
    before = await anyio.Path(file).read_bytes()
    keys = {name: folder / f"{name}.key" for name in NAMES}
    trust = ["--trust", *(Identity.load_or_create(key).node_id for key in keys.values())]

    async with AsyncExitStack() as stack:

        async def start(name: str, listen: str, *join: str) -> Node:
            tcp = ["--listen", listen, *(["--join", *join] if join else [])]
            options = ["--key", str(keys[name]), *(["--nats", *nats] if nats else tcp), *trust]
            return await stack.enter_async_context(running(name, programs.get(name, PROGRAM), *options))

        async def address(node: Node) -> str:
            return "" if nats else (await node.says(f"{node.name} listens on")).split()[-1]

        heading("five nodes start" + ("" if nats else "; four of them are told where the first one is"))
        alice = await start("alice", "127.0.0.1:0")
        first = await address(alice)
        others = {name: await start(name, "127.0.0.1:0", first) for name in NAMES[1:]}
        for node in (alice, *others.values()):
            for name in {*NAMES} - {node.name}:
                await node.says(f"{name} is here")

        heading(f"alice stashes {file.name}: it is sealed, and left with three others")
        alice.tell(f"stash {shlex.quote(str(file))}")
        keep = (await alice.says(f"{file}", ": ")).rpartition(": ")[2].split(", ")
        if not {*keep} <= {*others}:
            raise Failed("nobody keeps the file")
        frozen, *awake = (others[name] for name in keep)
        spare = next(node for node in others.values() if node.name not in keep)

        heading("alice is killed (SIGKILL): what she had in her memory is gone")
        alice.process.kill()
        await alice.process.wait()
        await spare.says("alice is gone")

        heading(
            f"{frozen.name}, who has the file, is frozen (SIGSTOP); alice starts again, with her key and nothing else"
        )
        frozen.process.send_signal(signal.SIGSTOP)
        again = await start("alice", first, await address(spare))
        for node in (spare, *awake):
            await again.says(f"{node.name} is here")
        copy = folder / "recovered"
        again.tell(f"recover {shlex.quote(str(copy))}")
        await again.says("recovered")
        after = await anyio.Path(copy).read_bytes() if await anyio.Path(copy).exists() else None
        given = [line for line in again.said if " gave back " in line]

        heading(f"{frozen.name} is let go (SIGCONT), and comes back by itself; then all leave (SIGTERM)")
        frozen.process.send_signal(signal.SIGCONT)
        await again.says(f"{frozen.name} is here")
        ending = [again, *others.values()]
        for node in ending:
            node.process.terminate()
        with anyio.move_on_after(10):
            for node in ending:
                await node.process.wait()

    heading("summary")
    checks = {
        f"the file came back, byte for byte ({len(before):,} bytes)": after == before,
        f"each confidant that was not frozen gave it back: {', '.join(node.name for node in awake)}": (
            {line.split()[0] for line in given} == {node.name for node in awake}
        ),
        "all nodes left cleanly": all(node.process.returncode == 0 for node in ending),
    }
    for check, passed in checks.items():
        say(f"{check}: {'yes' if passed else 'NO'}")
    return all(checks.values())


def main(file: Path, programs: Mapping[str, Sequence[str]], nats: Sequence[str] = ()) -> int:
    """Play the story, with these programs in the place of some nodes; return the exit code."""

    async def play() -> bool:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with tempfile.TemporaryDirectory() as folder:
            return await story(file, Path(folder), programs, nats)

    try:
        return 0 if asyncio.run(play()) else 1
    except Failed as error:
        print(f"it went wrong: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.node.story", description=__doc__)
    default = Path(__file__).parents[2] / "docs" / "design.md"
    parser.add_argument("--file", type=Path, default=default, help="what is stashed (default: docs/design.md)")
    parser.add_argument("--nats", metavar="URL", nargs="+", default=[], help="servers of NATS (default: over TCP)")
    given = parser.parse_args()
    chosen = given.file.absolute()
    if not (chosen.is_file() and os.access(chosen, os.R_OK)):
        parser.error(f"--file {chosen} is not a file that can be read")
    sys.exit(main(chosen, {}, given.nats))
