"""The graph: which method of which service handles which behavior, checked before anything runs."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from meshkit import _check
from meshkit.runtime.behavior import Behavior, Local, Request, behaviors_of
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.message import check_name
from meshkit.runtime.service import Service

__all__ = ["Graph", "Handler"]


class Handler:
    """One method of one service, for one behavior."""

    __slots__ = ("behavior", "mailbox", "method", "service")

    mailbox: Mailbox[Any]
    """Where its messages wait; set when the node starts."""

    def __init__(self, service: Service, method: Any, behavior: Any) -> None:
        self.service = service
        self.method = method
        self.behavior = behavior

    def __repr__(self) -> str:
        return f"{self.service.name}.{self.method.__name__}"


class Graph:
    """The handlers of a node by kind: one for each request, any number for other kinds.

    Raises:
        ValueError: Something is declared wrongly; the message names every fault, with its service and kind.
    """

    def __init__(self, node: str, services: Sequence[Service]) -> None:
        self.services = tuple(services)
        self.handlers: list[Handler] = []
        self.requests: dict[str, Handler] = {}
        self.broadcasts: dict[str, list[Handler]] = {}
        self._local: dict[str, list[Handler]] = {}
        faults = list(_faults_of_services(services))
        if not faults:
            faults = [fault for service in services for fault in self._add(service)]
        if faults:
            raise ValueError("\n  ".join([f"node {node!r} cannot start:", *faults]))

    def local_handlers(self, behavior: Local[Any]) -> Sequence[Handler]:
        """Return the handlers of a local kind, which must declare it as it is emitted."""
        handlers = self._local.get(behavior.kind, ())
        for handler in handlers:
            if handler.behavior is not behavior and handler.behavior != behavior:
                raise ValueError(f"{behavior!r} is emitted, but {handler!r} handles {handler.behavior!r}")
        return handlers

    def _add(self, service: Service) -> Iterator[str]:
        """Add the handlers of a service; yield what is wrong with them."""
        for name, method, behaviors in _marked_methods(type(service)):
            where = f"service {service.name!r}: {name}()"
            yield from (f"{where} {fault}" for fault in _faults_of_signature(method))
            for behavior in behaviors:
                handler = Handler(service, getattr(service, name), behavior)
                yield from (f"{where}: {behavior.kind!r} {fault}" for fault in self._faults_of(handler))
                self.handlers.append(handler)
                if isinstance(behavior, Request):
                    self.requests[behavior.kind] = handler
                else:
                    by_kind = self._local if isinstance(behavior, Local) else self.broadcasts
                    by_kind.setdefault(behavior.kind, []).append(handler)

    def _faults_of(self, handler: Handler) -> Iterator[str]:
        behavior: Behavior[Any] = handler.behavior
        for other in self.handlers:
            if other.behavior.kind != behavior.kind:
                continue
            if other.behavior != behavior:
                yield f"is declared as {behavior!r} here, and as {other.behavior!r} for {other!r}"
            elif other.service is handler.service or isinstance(behavior, Request):
                yield f"is handled by {other!r} already"
        try:
            behavior.prepare()
        except Exception as error:  # noqa: BLE001 - msgspec and the annotations that it evaluates raise many kinds
            yield f"cannot travel: {error}"


def _faults_of_services(services: Sequence[object]) -> Iterator[str]:
    names = {"runtime"}  # the runtime logs under this name itself
    for service in services:
        if not isinstance(service, Service):
            yield f"{service!r} is not a service: pass instances of subclasses of Service"
            continue
        try:
            name = check_name(f"the name of {type(service).__name__}", getattr(service, "name", None))
        except ValueError as error:
            yield str(error)
            continue
        if name in names:
            yield f"service {name!r}: the name is taken"
        if service.crew is not None and service.crew.runs:
            yield f"service {name!r}: this object runs already; each runtime needs one of its own"
        names.add(name)
        checks: dict[str, Callable[[str, Any], object]] = {
            "max_mailbox": _check.count,
            "max_concurrent": _check.count,
            "max_restarts": functools.partial(_check.count, minimum=0),
            "restart_window": _check.duration,
            "start_timeout": _check.duration,
            "stop_timeout": _check.duration,
        }
        for attribute, check in checks.items():
            try:
                check(attribute, getattr(service, attribute))
            except (TypeError, ValueError) as error:
                yield f"service {name!r}: {error}"
        for hook, waits in (("init", False), ("start", True), ("stop", True)):
            if inspect.iscoroutinefunction(getattr(service, hook)) is not waits:
                yield f"service {name!r}: {hook}() must {'' if waits else 'not '}be `async def`"


def _marked_methods(service: type[Service]) -> Iterator[tuple[str, Any, tuple[Behavior[Any], ...]]]:
    """Yield each method that handles something. One that overrides another handles what that one was marked with."""
    for name in sorted({name for base in service.__mro__ for name in vars(base)}):
        found = [vars(base)[name] for base in service.__mro__ if name in vars(base)]
        behaviors = next((marks for method in found if (marks := behaviors_of(method))), ())
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
