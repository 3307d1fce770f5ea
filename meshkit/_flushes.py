"""Running `flush` for a BatchCollector: a task for each batch, and for each of its items an outcome, told once."""

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence, Set as AbstractSet
from typing import Any, Generic, TypeAlias, TypeVar

from meshkit._time import now
from meshkit.errors import Closed, OutcomeUnknown

T = TypeVar("T")
AnyFuture: TypeAlias = asyncio.Future[Any]
_Outcomes: TypeAlias = tuple[Sequence[Any], Mapping[int, Exception]]


class Flush(Generic[T]):
    """One batch on its way: its items and, by position, the futures of those whose result somebody waits for.

    When it is `over`: how many items `failed`, the first `error`, and the failures `untold` because no future waits.
    """

    def __init__(
        self, owner: object, items: list[T], futures: dict[int, AnyFuture], outer: "Flush[Any] | None"
    ) -> None:
        self.owner, self.items, self.futures, self.outer = owner, items, futures, outer
        self.over = False
        self.started = now()
        self.failed = 0
        self.error: Exception | None = None
        self.untold: list[tuple[list[T], Exception]] = []

    def settle(self, results: Sequence[Any], errors: Mapping[int, Exception]) -> None:
        """Tell each item's future its error, if there is one at its position, else its result."""
        self.over = True
        self.failed, self.error = len(errors), next(iter(errors.values()), None)
        for position, error in errors.items():
            future = self.futures.pop(position, None)
            if future is not None and not future.done():  # done: whoever waited was cancelled
                future.set_exception(error)
            elif self.untold and self.untold[-1][1] is error:
                self.untold[-1][0].append(self.items[position])
            else:
                self.untold.append(([self.items[position]], error))
        for position, future in self.futures.items():
            if not future.done():
                future.set_result(results[position])


_current: "contextvars.ContextVar[Flush[Any] | None]" = contextvars.ContextVar("meshkit_flush", default=None)


class Flushes(Generic[T]):
    """The flushes of one collector that are running."""

    def __init__(self, flush: Callable[[list[T]], object], name: str) -> None:
        self._flush, self._name = flush, name
        self._tasks: set[asyncio.Task[_Outcomes]] = set()
        self.running = 0

    def open(self) -> None:
        """Bind to the running loop and to the context of whoever opens the collector, not of who fills a batch."""
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._cut = False

    def start(self, items: list[T], futures: dict[int, AnyFuture], ended: Callable[[Flush[T]], None]) -> None:
        """Flush `items` in a task; when that has ended, or was cancelled before it began, settle and call `ended`."""
        flush = Flush(self, items, futures, self._context.get(_current))

        def settle(results: Sequence[Any], errors: Mapping[int, Exception]) -> None:
            self.running -= 1
            flush.settle(results, errors)
            ended(flush)
            flush.items = []  # tasks that flush has started may live on, and keep their context, which knows this flush

        def done(task: asyncio.Task[_Outcomes]) -> None:
            self._tasks.discard(task)
            raised = asyncio.CancelledError() if task.cancelled() else task.exception()
            settle(*(task.result() if raised is None else self._all_failed(flush, raised)))

        self.running += 1  # counted first: an eager task begins inside create_task
        name = f"meshkit:{self._name}:flush"
        try:
            task = self._loop.create_task(self._run(flush), name=name, context=self._context.copy())
        except BaseException as error:  # what stops programs, out of an eager task
            settle(*self._all_failed(flush, error))
            raise
        self._tasks.add(task)
        task.add_done_callback(done, context=self._context)

    def cancel(self) -> None:
        """Cancel what runs: the collector is closing."""
        self._cut = True
        for task in self._tasks:
            task.cancel()

    def inside(self) -> bool:
        """Return whether this is called from inside one of these flushes, also from a task that it started."""
        flush = _current.get()
        while flush is not None and (flush.owner is not self or flush.over):
            flush = flush.outer
        return flush is not None

    async def _run(self, flush: Flush[T]) -> _Outcomes:
        """Return the results and, by position, the errors of the items that failed."""
        _current.set(flush)
        size = len(flush.items)
        returned: Any = self._flush(flush.items.copy())  # whatever is done to that list, it is known what was in it
        if inspect.isawaitable(returned):
            returned = await returned
        given = f"a {type(returned).__name__}"
        if _is_series(returned):
            results: list[Any] = list(returned)
            if len(results) == size:
                # Their types are asked: an object may claim to be an error (a mock does), and cannot be raised.
                failed = [pair for pair in enumerate(results) if issubclass(type(pair[1]), BaseException)]
                return results, {position: self._presentable(error) for position, error in failed}
            given = f"{len(results)} results"
        message = f"{self._name}: flush returned {given} for {size} items; it must return a list of one result for each"
        return (), dict.fromkeys(flush.futures, RuntimeError(message))  # who only adds asks for no results

    def _all_failed(self, flush: Flush[T], raised: BaseException) -> _Outcomes:
        return (), dict.fromkeys(range(len(flush.items)), self._presentable(raised))

    def _presentable(self, raised: BaseException) -> Exception:
        """Return `raised`, or what stands for it where raising it to those who wait would mean something else."""
        if isinstance(raised, Exception) and not isinstance(raised, StopIteration):
            return raised
        error = Closed(name=self._name, executed="maybe") if self._cut else OutcomeUnknown()
        error.__cause__ = raised
        error.add_note(f"flush of {self._name} ended with {type(raised).__name__}")
        return error


def _is_series(value: object) -> bool:
    """Return whether `value` is a collection of results; a text or a mapping is one too, but hardly means that."""
    return isinstance(value, Collection) and not isinstance(value, (Mapping, AbstractSet, str, bytes))
