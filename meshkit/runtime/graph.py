"""The graph: which method of which service handles which behavior, checked before anything runs."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from meshkit import _check
from meshkit.runtime.behavior import Behavior, Local, Request, behaviors_of
from meshkit.runtime.service import Service

__all__ = ["Graph", "Handler"]


B = TypeVar("B", bound=Behavior[Any])


class Handler(Generic[B]):
    """One method of one service, for one behavior."""

    __slots__ = ("behavior", "method", "service")

    def __init__(self, service: Service, method: Any, behavior: B) -> None:
        self.service = service
        self.method = method
        self.behavior = behavior

    def __repr__(self) -> str:
        return f"{self.service.name}.{self.method.__name__}"


class Graph:
    """The handlers of a node by kind: of requests one each, of other kinds any number.

    Raises:
        ValueError: Something is declared wrongly; the message names every fault, with its service and kind.
    """

    def __init__(self, node: str, services: Sequence[Service]) -> None:
        self.services = tuple(services)
        self.requests: dict[str, Handler[Any]] = {}
        self.local: dict[str, list[Handler[Any]]] = {}
        self.events: dict[str, list[Handler[Any]]] = {}
        faults = [*_faults_of_services(services)]
        if not faults:
            faults = [fault for service in services for fault in self._add(service)]
        if faults:
            raise ValueError("\n  ".join([f"node {node!r} cannot start:", *faults]))

    def _add(self, service: Service) -> Iterator[str]:
        seen: dict[str, str] = {}
        for name, method, behaviors in _marked_methods(type(service)):
            where = f"service {service.name!r}: {name}()"
            yield from (f"{where} {fault}" for fault in _faults_of_signature(method))
            for behavior in behaviors:
                handler = Handler(service, getattr(service, name), behavior)
                faults = list(self._faults_of(handler))
                if behavior.kind in seen:
                    faults.append(f"is already handled by {seen[behavior.kind]}() of the same service")
                seen[behavior.kind] = name
                yield from (f"{where}: {behavior.kind!r} {fault}" for fault in faults)
                if isinstance(behavior, Request):
                    self.requests.setdefault(behavior.kind, handler)
                else:
                    of_sort = self.local if isinstance(behavior, Local) else self.events
                    of_sort.setdefault(behavior.kind, []).append(handler)

    def _faults_of(self, handler: Handler[Any]) -> Iterator[str]:
        behavior = handler.behavior
        for other in self.handlers_of(behavior.kind):
            if other.behavior != behavior:
                yield f"is declared as {behavior!r} here, and as {other.behavior!r} for {other!r}"
            elif isinstance(behavior, Request) and other.service is not handler.service:
                yield f"is a request, which one service answers, and {other!r} does already"
        if not isinstance(behavior, Local):
            try:
                behavior.prepare()
            except Exception as error:  # noqa: BLE001 - msgspec and the annotations it evaluates raise many kinds
                yield f"cannot travel: {error}"

    def handlers_of(self, kind: str) -> list[Handler[Any]]:
        """Return all handlers of `kind`."""
        one = self.requests.get(kind)
        return [*([one] if one else ()), *self.local.get(kind, ()), *self.events.get(kind, ())]


def _faults_of_services(services: Sequence[Service]) -> Iterator[str]:
    names: set[str] = set()
    for service in services:
        if not isinstance(service, Service):
            yield f"{service!r} is not a Service: pass instances of its subclasses"
            continue
        name = getattr(service, "name", None)
        if not isinstance(name, str) or not name:
            yield f"{type(service).__name__} has no name: say name = ... in the class"
        elif name in names or name == "runtime":
            yield f"service {name!r}: {'the runtime itself has that name' if name == 'runtime' else 'there are two'}"
        else:
            names.add(name)
        for limit in ("max_mailbox", "max_concurrent"):
            yield from _fault(service, limit, _check.count)
        yield from _fault(service, "max_restarts", lambda n, v: _check.count(n, v, minimum=0))
        for timeout in ("start_timeout", "stop_timeout", "restart_window"):
            yield from _fault(service, timeout, _check.duration)


def _fault(service: Service, attribute: str, check: Any) -> Iterator[str]:
    try:
        check(attribute, getattr(service, attribute))
    except (TypeError, ValueError) as error:
        yield f"service {getattr(service, 'name', '?')!r}: {error}"


def _marked_methods(service: type[Service]) -> Iterator[tuple[str, Any, tuple[Behavior[Any], ...]]]:
    """Yield each method that handles something. One that overrides another handles what that one was marked with."""
    for name in sorted({name for base in service.__mro__ for name in vars(base)}):
        found = [vars(base)[name] for base in service.__mro__ if name in vars(base)]
        behaviors = next(filter(None, map(behaviors_of, found)), ())
        if behaviors and found[0] is not None:
            yield name, found[0], behaviors


def _faults_of_signature(method: Any) -> Iterator[str]:
    if not inspect.iscoroutinefunction(method):
        yield "handles messages, so it must be `async def`"
        return
    try:
        inspect.signature(method).bind("self", "msg")
    except TypeError:
        yield f"must take one message, `(self, msg)`, and takes {inspect.signature(method)}"
