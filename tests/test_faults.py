import asyncio
import threading
from collections import Counter

import pytest

from meshkit import CallTimeout, Message, Runtime, Service, buggify, handles, request
from meshkit._entropy import buggified
from meshkit.testing import SimLoop, SimNetwork, run, simulate, simulated
from meshkit.testing._sim_faults import Faults

ECHO = request("echo:echo", int, reply=int)


async def looks(point: str = "point", count: int = 200) -> list[bool]:
    return [buggify(point) for _ in range(count)]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faults, "ARMED", 1.0)
    monkeypatch.setattr(Faults, "FIRES", 1.0)


# --- where it fires


@pytest.mark.usefixtures("always")
def test_nothing_fires_in_production_nor_on_virtual_time_nor_where_the_simulation_did_not_ask_for_it() -> None:
    never = [False] * 200
    assert [buggify("point") for _ in range(200)] == never
    assert asyncio.run(looks()) == run(looks) == simulated(1, lambda _: looks()) == never
    assert simulated(1, lambda _: looks(), buggify=True) == [True] * 200
    assert not buggified, "it ends with the simulation"


@pytest.mark.usefixtures("always")
def test_a_loop_in_another_thread_is_none_of_the_simulation() -> None:
    there: list[bool] = []

    async def main(_: SimLoop) -> bool:
        thread = threading.Thread(target=lambda: there.extend([buggify("point"), *asyncio.run(looks(count=3))]))
        thread.start()
        thread.join()
        return buggify("point")

    assert simulated(1, main, buggify=True)
    assert there == [False] * 4


def test_a_simulation_that_failed_leaves_nothing_armed() -> None:
    async def main(_: SimLoop) -> None:
        assert buggified
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        simulated(1, main, buggify=True)
    assert not buggified


def test_a_test_of_seeds_asks_for_it() -> None:
    fired: Counter[bool] = Counter()

    for on in (False, True):

        @simulate(seeds=20, buggify=on)
        async def test(sim: SimLoop) -> None:
            await looks()
            fired[on] += sim.fired["point"]  # noqa: B023

        test()
    assert fired[False] == 0 < fired[True]


# --- what the seed says


def test_a_quarter_of_the_seeds_arm_a_point_which_then_fires_a_quarter_of_the_times() -> None:
    counts = [sum(simulated(seed, lambda _: looks(), buggify=True)) for seed in range(400)]
    armed = [count for count in counts if count]
    assert 70 < len(armed) < 130
    assert 40 < sum(armed) / len(armed) < 60


def test_the_same_seed_fires_the_same_and_another_point_changes_nothing() -> None:
    async def both(sim: SimLoop) -> list[bool]:
        fired: list[bool] = []
        for _ in range(200):
            buggify("another")
            fired.append(buggify("point"))
        return fired

    alone = [simulated(seed, lambda _: looks(), buggify=True) for seed in range(40)]
    assert [simulated(seed, both, buggify=True) for seed in range(40)] == alone
    assert len(set(map(tuple, alone))) > 5


def test_points_are_armed_independently_of_one_another() -> None:
    async def main(sim: SimLoop) -> tuple[str, ...]:
        await looks("a")
        await looks("b")
        return tuple(sorted(sim.fired))

    assert {simulated(seed, main, buggify=True) for seed in range(60)} == {(), ("a",), ("b",), ("a", "b")}


def test_what_fires_disturbs_nothing_else_that_is_drawn() -> None:
    async def main(sim: SimLoop) -> tuple[float, float]:
        await looks()
        return sim.rng.random(), sim.stream("mine").random()

    assert simulated(3, main, buggify=True) == simulated(3, main)


@pytest.mark.usefixtures("always")
def test_what_has_fired_is_counted_logged_and_part_of_the_trace() -> None:
    log: list[str] = []

    async def main(sim: SimLoop) -> str:
        await asyncio.sleep(1)
        sim.log = log.append
        assert buggify("full")
        assert buggify("full")
        assert buggify("slow")
        sim.log = None
        assert sim.fired == {"full": 2, "slow": 1}
        return sim.trace

    assert simulated(1, main, buggify=True) == simulated(1, main, buggify=True)
    assert log[:3] == ["1.000000 buggify full", "1.000000 buggify full", "1.000000 buggify slow"]


# --- what it is good for


class Buffer:
    """Writes what it is given in lots of `SIZE`; what arrives while it writes is lost, which is the bug."""

    SIZE = 500

    def __init__(self) -> None:
        self.items: list[int] = []
        self.written: list[int] = []

    async def add(self, item: int) -> None:
        self.items.append(item)
        if len(self.items) >= self.SIZE or buggify("buffer: written early"):
            await self.write()

    async def write(self) -> None:
        self.written += self.items
        await asyncio.sleep(0.01)
        self.items.clear()


async def nothing_is_lost(_: SimLoop) -> None:
    buffer = Buffer()
    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(buffer.add(number))
    await buffer.write()
    assert sorted(set(buffer.written)) == list(range(20))


def test_a_bug_behind_a_rare_event_is_found_within_20_seeds_instead_of_never() -> None:
    for seed in range(200):
        simulated(seed, nothing_is_lost)
    with pytest.raises(AssertionError):
        for seed in range(20):
            simulated(seed, nothing_is_lost, buggify=True)


# --- in meshkit itself


class Echo(Service):
    name = "echo"
    max_concurrent = 3

    def __init__(self) -> None:
        self.begun: list[int] = []

    @handles(ECHO)
    async def echo(self, msg: Message[int]) -> int:
        self.begun.append(msg.payload)
        await asyncio.sleep(0.01)
        return msg.payload


def test_a_mesh_keeps_its_promises_whatever_fires_and_each_point_of_meshkit_does() -> None:
    fired: Counter[str] = Counter()

    async def main(sim: SimLoop) -> None:
        network, service = SimNetwork(), Echo()
        async with (
            Runtime("shop", transport=network.transport()) as shop,
            Runtime("depot", services=[service], transport=network.transport()),
        ):

            async def ask(number: int) -> None:
                if number % 5 == 4:
                    with pytest.raises(CallTimeout):
                        await shop.call(ECHO, number, to="depot", timeout=0.001)
                else:
                    assert await shop.call(ECHO, number, to="depot", timeout=5) == number

            for numbers in (range(10), range(10, 20)):
                async with asyncio.TaskGroup() as group:
                    for number in numbers:
                        group.create_task(ask(number))
                await asyncio.sleep(30)
                assert len(shop.peers) == 1, "one beat that is left out is not missed"
            given_up = asyncio.create_task(shop.call(ECHO, 99, to="depot", timeout=5))
            await asyncio.sleep(sim.rng.choice([0, 0.02, 0.06]))
            given_up.cancel()
        assert len(service.begun) == len(set(service.begun)), "what is asked once is done once"
        fired.update(sim.fired)

    for seed in range(30):
        simulated(seed, main, buggify=True)
    assert sorted(fired) == [
        "heartbeat: one is left out",
        "mailbox: a new worker begins late",
        "outbox: bundles leave late",
    ]
