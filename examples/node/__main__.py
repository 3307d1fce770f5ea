"""One node of the example mesh, in a process of its own.

First make a key for each node, and note who they are:

    python -m examples.node --name alice --id >> ids
    python -m examples.node --name bob --id >> ids

Then start each in a terminal of its own, and type `help`:

    python -m examples.node --name alice --listen 127.0.0.1:7001 --trust $(cat ids)
    python -m examples.node --name bob --listen 127.0.0.1:7002 --join 127.0.0.1:7001 --trust $(cat ids)

Or all of them over a NATS server:

    python -m examples.node --name alice --nats nats://127.0.0.1:4222 --trust $(cat ids)
"""

import argparse
import asyncio
import io
import logging
import re
import signal
import sys
from pathlib import Path

import anyio

from examples.mesh.presence import Presence
from examples.mesh.social import Social
from examples.mesh.stash import Stash
from examples.node.console import Console, plain, say
from meshkit import Identity, Logger, MeshkitError, Runtime, TcpTransport
from meshkit.runtime.identity import public_key_of
from meshkit.transports import NatsTransport


class Lines(logging.Handler):
    """What the transport logs, among the other lines."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def node_name(text: str) -> str:
    """Return `text`, if it can be the name of a node, and of its key file."""
    if not re.fullmatch(r"\w[\w.-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"a name is up to 64 letters, digits, _, . and -, not {text!r}")
    return text


def node_id(text: str) -> str:
    """Return `text`, if it is the id of a node."""
    try:
        public_key_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.node", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, type=node_name, help="what it is called")
    parser.add_argument(
        "--key", type=Path, default=Path(), help="the file of its key, or where NAME.key is; made if there is none"
    )
    parser.add_argument("--id", action="store_true", help="only print the id of the node, for others to trust")
    parser.add_argument("--listen", metavar="HOST:PORT", help="where others reach it; port 0: any that is free")
    parser.add_argument("--join", metavar="HOST:PORT", nargs="+", default=[], help="where others are: one is enough")
    parser.add_argument("--nats", metavar="URL", nargs="+", help="servers of NATS, in the place of --listen and --join")
    parser.add_argument(
        "--trust", metavar="ID", nargs="+", type=node_id, help="who may join (default, on one machine only: anyone)"
    )
    parsed = parser.parse_args()
    if parsed.id:
        return parsed
    if bool(parsed.nats) == bool(parsed.listen or parsed.join):
        parser.error("say where it listens with --listen and whom it joins with --join; or, over NATS, only --nats")
    try:
        parsed.transport = NatsTransport(parsed.nats) if parsed.nats else TcpTransport(parsed.listen, join=parsed.join)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    if parsed.transport.exposed and parsed.trust is None:
        parser.error("this reaches beyond this machine: say with --trust whom it trusts")
    return parsed


async def main(given: argparse.Namespace, identity: Identity, stash: Stash) -> None:
    social = Social()
    console = Console(stash, social)
    runtime = Runtime(
        given.name,
        [stash, social, Presence()],
        transport=given.transport,
        identity=identity,
        trust=given.trust,
        logger=Logger(batch_window=0.5, node=given.name, output=sys.stdout),
        observer=console.see,
    )
    stopping, task = asyncio.Event(), asyncio.current_task()

    def stop() -> None:
        """Stop; asked for a second time, hurry."""
        if stopping.is_set() and task is not None:
            task.cancel()
        stopping.set()

    async with runtime:
        for number in (signal.SIGINT, signal.SIGTERM):  # until here it has nobody to say goodbye to, and just ends
            asyncio.get_running_loop().add_signal_handler(number, stop)
        say(f"{given.name} is {identity.node_id}")
        if given.listen:
            say(f"{given.name} listens on {given.transport.address}")

        async def obey() -> None:
            await console.run()
            stop()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(obey)
            await stopping.wait()
            tasks.cancel_scope.cancel()
        say(f"{given.name} leaves the mesh")


def run(stash: type[Stash] = Stash) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what this terminal cannot show
    given = arguments()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[Lines()])
    try:
        identity = Identity.load_or_create(given.key / f"{given.name}.key" if given.key.is_dir() else given.key)
        if given.id:
            print(identity.node_id)
        else:
            asyncio.run(main(given, identity, stash(identity)))
    except (MeshkitError, OSError, ValueError) as error:
        sys.exit(f"{given.name}: {plain(error)}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)


if __name__ == "__main__":
    run()
