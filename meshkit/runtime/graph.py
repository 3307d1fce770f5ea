"""The graph: which method of which service handles which behavior, checked before anything runs."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from meshkit import _check
from meshkit.runtime.behavior import Behavior, Local, Request
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.message import Message, check_name
from meshkit.runtime.routes import Route
from meshkit.runtime.service import Service, behaviors_of

__all__ = ["Graph", "Handler"]


class Handler:
    """One method of one service, for one behavior."""

    __slots__ = ("behavior", "ended", "mailbox", "method", "name", "order_by", "queued", "service")

    mailbox: Mailbox[Any]
    """Where its messages wait; set when the node starts."""

    def __init__(self, service: Service, method: Any, behavior: Any) -> None:
        self.service = service
        self.method = method
        self.behavior = behavior
        self.order_by = getattr(behavior, "order_by", None)
        self.name = f"{service.name}.{method.__name__}"
        self.queued, self.ended = f"queued for {self.name}, from", f"handled by {self.name}"

    def __repr__(self) -> str:
        return self.name


class Graph:
    """The routes of a node, by kind and version.

    Raises:
        ValueError: Something is declared wrongly; the message names every fault, with its service and kind.
    """

    def __init__(self, node: str, services: Sequence[Service]) -> None:
        self.services = tuple(services)
        self.handlers: list[Handler] = []
        self.routes: dict[tuple[str, int], Route] = {}
        self.kinds: dict[str, Behavior[Any]] = {}  # the newest version of each
        faults = list(_faults_of_services(services))
        if not faults:
            faults = [fault for service in services for fault in self._add(service)]
        if not faults:
            faults = [fault for behavior in self.kinds.values() for fault in self._route(behavior)]
        if faults:
            raise ValueError("\n  ".join([f"node {node!r} cannot start:", *faults]))

    @property
    def requests(self) -> tuple[str, ...]:
        """The kinds of requests that are handled here."""
        return tuple(kind for kind, behavior in self.kinds.items() if isinstance(behavior, Request))

    def local_route(self, behavior: Local[Any]) -> Route | None:
        """Return the route of a local kind, whose handlers must declare it as it is emitted; None without handlers."""
        route = self.routes.get((behavior.kind, 1))
        if route is not None and route.behavior is not behavior and route.behavior != behavior:
            raise ValueError(f"{behavior!r} is emitted, but {route.handlers[0]!r} handles {route.behavior!r}")
        return route

    def handler(self, name: str, message: Message[Any]) -> Handler | None:
        """Return the handler of this name for messages of the kind and version of `message`, if there is one."""
        kind, version = message.kind, message.version
        found = (h for h in self.handlers if (h.name, h.behavior.kind, h.behavior.version) == (name, kind, version))
        return next(found, None)

    def _add(self, service: Service) -> Iterator[str]:
        """Add the handlers of a service; yield what is wrong with them."""
        for name, method, behaviors in _marked_methods(type(service)):
            where = f"service {service.name!r}: {name}()"
            yield from (f"{where} {fault}" for fault in _faults_of_signature(method))
            for behavior in behaviors:
                handler = Handler(service, getattr(service, name), behavior)
                yield from (f"{where}: {behavior.kind!r} {fault}" for fault in self._faults_of(handler))
                self.handlers.append(handler)

    def _faults_of(self, handler: Handler) -> Iterator[str]:
        behavior: Behavior[Any] = handler.behavior
        newest = self.kinds.setdefault(behavior.kind, behavior)
        if newest in behavior.versions:
            self.kinds[behavior.kind] = behavior
        elif behavior not in newest.versions:
            other = next(other for other in self.handlers if other.behavior.kind == behavior.kind)
            yield f"is declared as {behavior!r} here, and as {other.behavior!r} for {other!r}"
        for other in self.handlers:
            if other.behavior == behavior and (other.service is handler.service or isinstance(behavior, Request)):
                yield f"is handled by {other!r} already"
        for version in behavior.versions:
            try:
                version.prepare()
            except Exception as error:  # noqa: BLE001 - msgspec and the annotations that it evaluates raise many kinds
                yield f"cannot travel: {error}"

    def _route(self, newest: Behavior[Any]) -> Iterator[str]:
        """Add the routes of all versions of a kind, the newest first; yield what is wrong with them."""
        after = Route(newest)  # which is one that is handled
        for behavior in reversed(newest.versions):
            handlers = [handler for handler in self.handlers if handler.behavior == behavior]
            if handlers:
                after = Route(behavior, handlers)
            else:
                where = f"service {after.handlers[0].service.name!r}: {after.handlers[0].method.__name__}()"
                if after.behavior.upgrade is None:
                    yield f"{where}: {behavior!r} has no handler, and no upgrade to version {after.behavior.version}"
                    return
                if getattr(behavior, "reply", None) != getattr(after.handled, "reply", None):
                    yield f"{where}: {behavior!r} is upgraded for this handler, whose reply is of {after.handled!r}"
                after = Route(behavior, onward=after)
            self.routes[behavior.kind, behavior.version] = after
        yield from self._versions_missed(newest)

    def _versions_missed(self, newest: Behavior[Any]) -> Iterator[str]:
        """Yield which service would miss messages, since only another one handles their version."""
        handlers = [handler for handler in self.handlers if handler.behavior in newest.versions]
        for handler in handlers:
            own = {other.behavior.version for other in handlers if other.service is handler.service}
            for other in handlers:
                if other.behavior.version not in own:
                    where = f"service {handler.service.name!r}: {handler.method.__name__}()"
                    yield f"{where}: {newest.kind!r} of version {other.behavior.version} is handled by {other!r} only"


def _faults_of_services(services: Sequence[object]) -> Iterator[str]:
    names = {"runtime"}  # the runtime logs under this name itself
    for service in services:
        if not isinstance(service, Service):
            yield f"{service!r} is not a service: pass instances of subclasses of Service"
            continue
        if getattr(service, "name", None) is None:
            yield f'{type(service).__name__} has no name: give it one, as in `name = "stash"`'
            continue
        try:
            name = check_name(f"the name of {type(service).__name__}", service.name)
        except ValueError as error:
            yield str(error)
            continue
        if name in names:
            yield f"service {name!r}: the name is taken"
        if service.supervisor is not None and service.supervisor.runs:
            yield f"service {name!r}: this object runs already; each runtime needs one of its own"
        names.add(name)
        checks: dict[str, Callable[[str, Any], object]] = {
            "max_mailbox": _check.count,
            "max_mailbox_bytes": _check.count,
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
