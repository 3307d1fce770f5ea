"""Virtual time: an hour of waiting passes in microseconds, and always in the same order.

`VirtualTimeLoop` is an asyncio event loop whose clock jumps to the next timer as soon as nothing else can run.
Code under test needs no change: `asyncio.sleep`, anyio's scopes and everything in meshkit ask the loop for the
time. `run` runs a coroutine function on a fresh loop and fails if it leaves anything behind.

>>> import asyncio
>>> async def main():
...     await asyncio.sleep(3600)
...     return asyncio.get_running_loop().time()
>>> run(main)
3600.0

What cannot happen in virtual time is refused with an error: threads, sockets, processes. A wait that nothing will
ever end is a `Deadlock`, raised at once, with the place where every task waits.
"""

import asyncio
import gc
import math
import threading
import traceback
from asyncio import events
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

__all__ = ["Deadlock", "Leak", "Livelock", "VirtualTimeLoop", "run"]

_T = TypeVar("_T")


class Deadlock(RuntimeError):
    """Every task waits, no timer is set: in virtual time nothing will ever happen again."""


class Livelock(RuntimeError):
    """Tasks keep running without the clock ever moving."""


class Leak(AssertionError):
    """The code under test left tasks, timers or unhandled errors behind."""


class _Clock:
    """Stands where a selector stands in other loops: instead of waiting for I/O it moves the time forward."""

    def __init__(self, loop: "VirtualTimeLoop") -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        self._loop.next_batch(wait=timeout != 0)
        return []


def _refuse(what: str, more: str = "") -> NoReturn:
    raise RuntimeError(
        f"{what} takes real time, which virtual time cannot wait for; "
        f"fake it in this test, or run this test on an ordinary event loop{more}"
    )


def _refusing(what: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        """Refuse: it takes real time."""
        _refuse(what)

    return refuse


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """An asyncio event loop on virtual time: it starts at 0.0 and jumps from timer to timer.

    Works with `asyncio.Runner(loop_factory=VirtualTimeLoop)`, with pytest-asyncio (request the `virtual_time`
    fixture) and under anyio. Threads, sockets and subprocesses raise `RuntimeError`: they live in real time.
    """

    MAX_PASSES = 1_000_000
    """Passes of the loop without the clock moving, before it counts as a `Livelock`."""

    # asyncio keeps timers in `_scheduled` and polls through `_selector`; both are private, and as old as asyncio.
    # tests/testing/test_virtual_time.py fails on a Python where that changes.
    _scheduled: list[asyncio.TimerHandle]
    _clock_resolution: float
    _thread_id: int | None

    def __init__(self, *, wall_start: float = 1_767_225_600.0) -> None:
        """`wall_start` is what wall clocks say at the start (default: 2026-01-01 00:00 UTC)."""
        super().__init__()
        self._now = 0.0
        self._wall_start = wall_start
        self._called_by_thread = False
        self._settling: list[asyncio.Future[None]] = []
        self._passes = 0
        self._clock_resolution = 1e-9
        self._selector = _Clock(self)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def wall_time(self) -> float:
        """Return the virtual wall clock in seconds since the epoch: what `meshkit` code sees as wall time."""
        return self._wall_start + self._now

    async def settle(self) -> None:
        """Return when nothing is left to be done now: every other task waits for another one, or for later."""
        settled = self.create_future()
        self._settling.append(settled)
        await settled

    def next_batch(self, *, wait: bool) -> None:
        """Take note of another pass of the loop; if there is nothing to do (`wait`), move the time on."""
        if wait:
            self.refuse_threads()
            if not self.wake_settled():
                self._passes = 0
                self.jump_to_next_timer()
                return
        self._passes += 1
        if self._passes > self.MAX_PASSES:
            self._passes = 0
            raise Livelock(f"{self.MAX_PASSES} passes at one instant; " + self.where_tasks_wait())

    def wake_settled(self) -> bool:
        """Wake those who wait in `settle`; return whether there were any."""
        settling, self._settling = self._settling, []
        for settled in settling:
            if not settled.done():
                settled.set_result(None)
        return bool(settling)

    def jump_to_next_timer(self) -> None:
        """Move the clock to the earliest timer."""
        when = self._scheduled[0].when() if self._scheduled else math.inf  # where anyio.sleep_forever() ends
        if when == math.inf:
            raise Deadlock("nothing is ready and no timer is set; " + self.where_tasks_wait())
        self._now = max(self._now, when)
        # Late in virtual time a nanosecond is less than the float can hold, and no timer would ever be due.
        self._clock_resolution = max(1e-9, 2 * math.ulp(self._now))

    def refuse_threads(self) -> None:
        """Refuse to go on if anyio has started a worker thread: it does so by itself, unseen by the loop."""
        if self._called_by_thread or any(getattr(thread, "loop", None) is self for thread in threading.enumerate()):
            self._called_by_thread = False  # what waited for the thread is cancelled now, and may wait for other things
            _refuse("a thread", "; " + self.where_tasks_wait())

    def live_timers(self) -> list[asyncio.TimerHandle]:
        """Return the timers that are set and not cancelled."""
        return [timer for timer in self._scheduled if not timer.cancelled()]

    def where_tasks_wait(self) -> str:
        """Describe every unfinished task and where it waits: its stack, the innermost line last."""
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        lines = ["\n    ".join([f"  {task.get_name()}", *_stack(task)]) for task in tasks]
        return "tasks:\n" + "\n".join(lines) if lines else "there are no tasks"

    def call_soon_threadsafe(  # type: ignore[override]  # typeshed's overloads spell TypeVarTuple arguments
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """Schedule `callback`; only the loop's own thread may, since other threads live in real time."""
        if self._thread_id not in {None, threading.get_ident()}:
            self._called_by_thread = True
            _refuse("a call from another thread")
        return self.call_soon(callback, *args, context=context)

    def _process_events(self, event_list: list[Any]) -> None:
        """There is no I/O, so there are no events."""

    def _write_to_self(self) -> None:
        """There is no sleep to wake up from."""

    if not TYPE_CHECKING:  # typeshed knows these by their full signatures, which do not matter to a refusal
        run_in_executor = _refusing("a thread")
        add_reader = remove_reader = add_writer = remove_writer = _refusing("a socket")
        sock_accept = sock_connect = sock_recv = sock_recv_into = sock_sendall = sock_sendfile = _refusing("a socket")
        sock_recvfrom = sock_recvfrom_into = sock_sendto = _refusing("a socket")
        create_connection = create_unix_connection = create_datagram_endpoint = _refusing("a connection")
        connect_accepted_socket = start_tls = sendfile = _refusing("a connection")
        create_server = create_unix_server = _refusing("a server")
        connect_read_pipe = connect_write_pipe = _refusing("a pipe")
        subprocess_exec = subprocess_shell = _refusing("a process")
        add_signal_handler = remove_signal_handler = _refusing("a signal")


_HIDING = {"anext_awaitable", "async_generator_asend", "async_generator_athrow", "coroutine_wrapper"}
"""Types that tell only the garbage collector what they await."""


def _stack(task: "asyncio.Task[Any]") -> list[str]:
    """Describe the places at which `task` is suspended, following what it awaits."""
    awaited: Any = task.get_coro()
    places: list[str] = []
    while awaited is not None:
        if type(awaited).__name__ in _HIDING:
            awaited = gc.get_referents(awaited)[0]
            continue
        frame, inner = None, None
        for kind, awaits in (("cr", "cr_await"), ("gi", "gi_yieldfrom"), ("ag", "ag_await")):
            frame = frame or getattr(awaited, f"{kind}_frame", None)
            inner = inner or getattr(awaited, awaits, None)
        if frame is not None:
            places.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}")
        awaited = inner
    return places or ["not started"]


def _describe(context: dict[str, Any]) -> str:
    """Describe what went to the loop's exception handler."""
    told = {key: value for key, value in context.items() if key != "source_traceback"}
    error = context.get("exception")
    trace = "" if error is None else "\n" + "".join(traceback.format_exception(error)).rstrip()
    return f"unhandled error: {told!r}{trace}"


def run(main: Callable[[], Coroutine[Any, Any, _T]], *, loop: VirtualTimeLoop | None = None) -> _T:
    """Run `main()` on a fresh `VirtualTimeLoop` and return its result; fail if it leaves anything behind.

    `loop` is another one to run on, which is closed in the end. What `main` raises comes out as it is; errors that
    nobody has handled meanwhile are in its notes, since they may be why.

    Raises:
        Leak: Tasks or timers are left when `main` returns, or an error went to the loop's exception handler.
        Deadlock: Everything waits and nothing would ever wake it.
        Livelock: Tasks kept running without the clock moving.
    """
    if events._get_running_loop() is not None:
        if loop is not None:
            loop.close()
        raise RuntimeError("run() starts a loop of its own and cannot be called from a running one; await main()")
    loop = VirtualTimeLoop() if loop is None else loop
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            result = runner.run(main())
            tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
            left = [f"task {task.get_name()} at {_stack(task)[-1]}" for task in tasks]
            left += [f"timer {timer!r}" for timer in loop.live_timers()]
            del tasks
        gc.collect(1)  # a task that has failed, and refers to itself, would else say too late that nobody knows
    except BaseException as error:
        for context in unhandled:
            error.add_note(_describe(context))
        raise
    left += map(_describe, unhandled)
    if left:
        errors = [context["exception"] for context in unhandled if "exception" in context]
        raise Leak("left behind:\n  " + "\n  ".join(left)) from (errors[0] if errors else None)
    return result
