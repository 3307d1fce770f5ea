import asyncio
import contextlib
import math
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import anyio
import anyio.to_thread
import pytest

from meshkit import _time
from meshkit.testing import Deadlock, Leak, Livelock, VirtualTimeLoop, run


async def test_an_hour_passes_at_once_and_the_loop_says_so() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    assert loop.time() == 0.0
    real = time.monotonic()
    await asyncio.sleep(3600)
    assert loop.time() == 3600.0
    assert _time.now() == 3600.0
    assert time.monotonic() - real < 3600


@pytest.mark.real_time
async def test_a_test_marked_real_time_gets_an_ordinary_loop() -> None:
    assert not isinstance(asyncio.get_running_loop(), VirtualTimeLoop)


async def test_wall_time_moves_with_the_virtual_clock() -> None:
    before = _time.wall()
    await asyncio.sleep(86_400)
    assert _time.wall() - before == 86_400


def test_outside_a_loop_the_clocks_are_those_of_the_system() -> None:
    assert abs(_time.now() - time.monotonic()) < 60
    assert abs(_time.wall() - time.time()) < 60


def test_timers_fire_in_order_and_at_their_exact_times() -> None:
    seen: list[tuple[str, float]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for delay in (0.3, 0.1, 0.2, 1e-12, 1e9):
            loop.call_later(delay, lambda delay: seen.append((str(delay), loop.time())), delay)
        await asyncio.sleep(2e9)

    run(main)
    assert [name for name, _ in seen] == ["1e-12", "0.1", "0.2", "0.3", "1000000000.0"]
    assert [at for _, at in seen] == [pytest.approx(float(name), abs=1e-9) for name, _ in seen]


def test_anyio_timeouts_run_on_virtual_time() -> None:
    async def main() -> float:
        with anyio.move_on_after(50) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep_forever)
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        return asyncio.get_running_loop().time()

    assert run(main) == 50.0


def test_a_wait_that_nothing_can_end_is_a_deadlock_that_says_where() -> None:
    async def stuck_here() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(stuck_here(), name="the stuck one")

    with pytest.raises(Deadlock, match="nothing is ready") as caught:
        run(main)
    assert "the stuck one" in str(caught.value)
    assert "wait" in str(caught.value)
    assert "locks.py" in str(caught.value)


def test_a_deadlock_shows_the_stack_through_generators_context_managers_and_awaitables() -> None:
    async def innermost() -> None:
        await asyncio.Event().wait()

    async def numbers() -> AsyncGenerator[int]:
        await innermost()
        yield 1

    async def closes_late() -> AsyncGenerator[int]:
        try:
            yield 1
        finally:
            await innermost()

    @contextlib.asynccontextmanager
    async def managed() -> AsyncGenerator[None]:
        await innermost()
        yield

    class Awaitable:
        def __await__(self) -> Generator[Any, Any, None]:
            return innermost().__await__()

    async def iterate() -> None:
        async for _ in numbers():
            pass

    async def enter() -> None:
        async with managed():
            pass

    async def default() -> None:
        await anext(numbers(), 5)

    async def close() -> None:
        generator = closes_late()
        await anext(generator)
        await generator.aclose()

    async def wait() -> None:
        await Awaitable()

    for stuck in (iterate, enter, default, close, wait):
        with pytest.raises(Deadlock) as caught:
            run(stuck)
        places = [line.rpartition(" in ")[2] for line in str(caught.value).splitlines()]
        assert places[-2:] == [innermost.__qualname__, "Event.wait"], stuck


def test_running_forever_at_one_instant_is_a_livelock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualTimeLoop, "MAX_PASSES", 100)

    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Livelock, match="100 passes at one instant"):
        run(main)


def test_many_passes_between_timers_are_no_livelock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VirtualTimeLoop, "MAX_PASSES", 100)

    async def main() -> None:
        for _ in range(20):
            for _ in range(50):
                await asyncio.sleep(0)
            await asyncio.sleep(1)

    run(main)


def test_a_task_left_behind_is_a_leak() -> None:
    async def main() -> None:
        asyncio.get_running_loop().create_task(asyncio.sleep(1), name="forgotten")
        await asyncio.sleep(0)

    with pytest.raises(Leak, match="task forgotten"):
        run(main)


def test_a_timer_left_behind_is_a_leak_and_a_cancelled_one_is_not() -> None:
    async def main(cancel: bool) -> None:
        timer = asyncio.get_running_loop().call_later(1, print)
        if cancel:
            timer.cancel()

    run(lambda: main(cancel=True))
    with pytest.raises(Leak, match="timer"):
        run(lambda: main(cancel=False))


def test_an_error_in_a_callback_is_a_leak_with_that_error_as_its_cause() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)

    with pytest.raises(Leak, match="unhandled error") as caught:
        run(main)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_that_nobody_has_seen_is_a_leak_also_if_its_task_refers_to_itself() -> None:
    async def fail() -> None:
        myself = asyncio.current_task()
        raise KeyError(myself is None)

    async def main() -> None:
        asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(1)

    with pytest.raises(Leak, match="Task exception was never retrieved"):
        run(main)


def test_an_error_of_a_generator_that_is_closed_at_the_end_is_a_leak() -> None:
    generators: list[AsyncGenerator[int]] = []

    async def numbers() -> AsyncGenerator[int]:
        try:
            yield 1
        finally:
            raise KeyError("in the generator")

    async def main() -> None:
        generators.append(numbers())
        await anext(generators[0])

    with pytest.raises(Leak, match="in the generator"):
        run(main)


def test_an_error_in_a_callback_is_told_where_it_was_the_reason_of_a_deadlock() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()

        def reply() -> None:
            answer.set_result(1 / 0)

        loop.call_soon(reply)
        await answer

    with pytest.raises(Deadlock) as caught:
        run(main)
    (note,) = caught.value.__notes__
    assert note.startswith("unhandled error: ")
    assert "in reply\n    answer.set_result(1 / 0)" in note
    assert note.endswith("ZeroDivisionError: division by zero")


def test_what_main_raises_comes_out_unchanged() -> None:
    async def main() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(main)


async def test_run_inside_a_running_loop_says_what_to_do() -> None:
    async def main() -> None: ...

    with pytest.raises(RuntimeError, match="await main"):
        run(main)


REFUSED: list[Callable[[Any], Any]] = [
    lambda loop: loop.run_in_executor(None, print),
    lambda loop: loop.add_reader(0, print),
    lambda loop: loop.add_writer(0, print),
    lambda loop: loop.create_connection(asyncio.Protocol, "localhost", 1),
    lambda loop: loop.create_server(asyncio.Protocol, "localhost", 1),
    lambda loop: loop.subprocess_exec(asyncio.SubprocessProtocol, "true"),
    lambda loop: loop.subprocess_shell(asyncio.SubprocessProtocol, "true"),
    lambda loop: asyncio.to_thread(print),
    lambda loop: loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("localhost", 0)),
    lambda loop: asyncio.open_unix_connection("/nowhere"),
    lambda loop: loop.sock_recv(None, 1),
    lambda loop: loop.connect_read_pipe(asyncio.Protocol, sys.stdin),
    lambda loop: loop.add_signal_handler(signal.SIGTERM, print),
    lambda loop: loop.remove_signal_handler(signal.SIGTERM),
    lambda loop: loop.remove_reader(0),
    lambda loop: anyio.run_process(["true"]),
]


@pytest.mark.parametrize("attempt", REFUSED)
async def test_what_takes_real_time_is_refused_with_the_reason(attempt: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError, match="takes real time"):
        await attempt(asyncio.get_running_loop())


async def test_a_call_from_another_thread_is_refused_and_one_from_its_own_is_not() -> None:
    loop = asyncio.get_running_loop()
    errors: list[BaseException] = []

    def call() -> None:
        try:
            loop.call_soon_threadsafe(print)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "another thread" in str(errors[0])
    fired = asyncio.Event()
    loop.call_soon_threadsafe(fired.set)
    await fired.wait()


def test_a_worker_thread_of_anyio_is_refused_instead_of_passed_over_by_the_clock() -> None:
    release = threading.Event()

    async def main() -> None:
        with anyio.move_on_after(3600):
            await anyio.to_thread.run_sync(release.wait)

    try:
        with pytest.raises(RuntimeError, match=r"a thread takes real time(.|\n)*run_sync"):
            run(main)
    finally:
        release.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_thread_of_anyio_that_is_done_before_the_loop_looks_is_refused_as_well() -> None:
    threads: list[threading.Thread] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, lambda: threads.append(threading.current_thread()))
            while not threads:
                await asyncio.sleep(0)
            threads[0].join()  # it called the loop, was refused, and ended
            await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match="a thread takes real time"):
        run(main)


@pytest.mark.parametrize("forever", [anyio.sleep_forever, lambda: asyncio.sleep(math.inf)])
def test_sleeping_forever_is_a_deadlock_when_nothing_else_can_happen(forever: Callable[[], Any]) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(forever, name="sleeps forever")
            await asyncio.sleep(5)

    with pytest.raises(Deadlock, match="sleeps forever"):
        run(main)


def test_the_pytest_plugin_costs_nothing_to_import() -> None:
    code = "import sys, meshkit.testing.pytest_plugin; print([m for m in sys.modules if m.startswith('meshkit.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "virtual_time" not in out


def test_without_a_pytest_asyncio_that_asks_for_a_loop_the_fixture_fails_instead_of_waiting(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.asyncio\nasync def test_it(virtual_time): ...\ndef test_plain(virtual_time): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:asyncio", "-p", "no:cacheprovider", "--rootdir", ".", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "virtual_time needs pytest-asyncio 1.5 or later" in done.stdout
    assert "1 passed" in done.stdout
