"""Routes: the way of one version of one kind to its handlers, through the stages that its behavior asks for."""

import functools
import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from meshkit.dedup import DedupCache
from meshkit.errors import MalformedFrame, RateLimited
from meshkit.rate_limiter import RateLimiter
from meshkit.runtime.behavior import Behavior, Ephemeral, Local, Request
from meshkit.runtime.message import Message
from meshkit.runtime.stages import EMIT, RECEIVE, Continue, Drop, Fail, Passed, Pipeline, Step

if TYPE_CHECKING:
    from meshkit.runtime.graph import Handler

__all__ = ["Route"]

_MAX_SEEN = 100_000
"""Messages of one kind that are remembered, so as not to be handled twice. Beyond, the oldest is forgotten."""
_MAX_KEY = 256
"""Characters, or bytes, of a content key that is kept as it is."""
_MAX_SENDERS = 10_000
"""Senders of one kind whose rate is limited at a time. Beyond, new ones are refused."""
_DUPLICATE, _EXPIRED, _FILTERED = Drop("duplicate"), Drop("expired"), Drop("filtered")


class Route:
    """The handlers of a version: one for a request, any number for other kinds.

    A version without handlers goes, upgraded, the way `onward` of the next version. What it remembers and charges is
    one for both: nobody gets around a limit by sending an older version.
    """

    def __init__(
        self, behavior: Behavior[Any], handlers: "Sequence[Handler]" = (), onward: "Route | None" = None
    ) -> None:
        self.behavior = behavior
        self.onward = onward
        self.handled: Behavior[Any] = behavior if onward is None else onward.handled
        self.handlers: tuple[Handler, ...] = tuple(handlers) if onward is None else onward.handlers
        self.pipeline = Pipeline(())
        self._upgrades: list[Callable[[Any], Any]] = []
        if onward is not None and onward.behavior.upgrade is not None:
            self._upgrades = [onward.behavior.upgrade, *onward._upgrades]
        self._steps: list[Step] = []  # the runtime's own stages, from "dedupe" on

    def __str__(self) -> str:
        behavior = self.behavior
        version = f" version {behavior.version}" if behavior.version != self.handled.version or behavior.older else ""
        stays = isinstance(behavior, Local)  # then there are neither frames nor versions
        emit = [EMIT[0], behavior.emitting or "", *(EMIT[-1:] if stays else EMIT[2:])]
        receive = [*(() if stays else RECEIVE[:3]), self.pipeline, RECEIVE[-1], ", ".join(map(repr, self.handlers))]
        out, back = (" -> ".join(filter(None, map(str, steps))) for steps in (emit, receive))
        return f"{behavior.kind}{version}\n  emit     {out}\n  receive  {back}"

    def compile(self, node: str, repeated: Callable[[Message[Any]], bool], now: Callable[[], float]) -> None:
        """Put its pipeline together, for one run of a node; first that of the route onward.

        `repeated` says whether a request came before.
        """
        behavior, steps = self.handled, list[Step]()
        if not isinstance(behavior, Local):
            steps.append(Step("decode", self._decoder(node)))
        if self.onward is not None:
            steps.append(Step("upgrade", self._upgrade, f"to version {behavior.version}"))
        self._steps = list(self._own_steps(node, repeated, now)) if self.onward is None else self.onward._steps
        custom = [stage for stage in behavior.stages if stage.on == "receive"]
        self.pipeline = Pipeline([*steps, *self._steps], custom, check=behavior.check)

    def _own_steps(
        self, node: str, repeated: Callable[[Message[Any]], bool], now: Callable[[], float]
    ) -> Iterator[Step]:
        behavior, name = self.behavior, f"{self.behavior.kind!r} on node {node!r}"
        if isinstance(behavior, Request):
            yield Step("dedupe", _dedupe_by_id(repeated), "by id")
        elif behavior.content_key is not None or not isinstance(behavior, Local | Ephemeral):
            seen = DedupCache(ttl=behavior.ttl, max_keys=_MAX_SEEN, name=name)
            how = f"by {'id' if behavior.content_key is None else 'content'}, for {behavior.ttl:g} s"
            yield Step("dedupe", functools.partial(self._dedupe, seen), how)
        if behavior.rate_limit is not None:
            max_count, window = behavior.rate_limit
            limiter = RateLimiter(max_count=max_count, window=window, max_keys=_MAX_SENDERS, name=name)
            each = f"{max_count} in {window:g} s from each sender"
            yield Step("rate_limit", functools.partial(self._rate_limit, limiter), each)
        if behavior.filter is not None:
            yield Step("filter", _filter(behavior.filter))
        if isinstance(behavior, Request):
            yield Step("deadline", _deadline(now))

    def _decoder(self, node: str) -> Callable[[Message[Any]], Passed]:
        decode = self.behavior.decoder.decode

        # In quotes, or they would be evaluated each time: of that, Python 3.12 and 3.13 do not give everything back.
        def run(msg: "Message[Any]") -> Passed:
            try:
                payload = decode(msg.payload)
            except Exception as error:  # noqa: BLE001 - hostile bytes raise more than msgspec's own error
                return Fail(MalformedFrame(reason=f"{msg.kind!r} on node {node!r}: {error}"))
            return Message(msg.id, msg.kind, msg.sender, payload, msg.time, msg.version, msg.deadline)

        return run

    def _upgrade(self, message: Message[Any]) -> Passed:
        payload = message.payload
        for upgrade in self._upgrades:
            payload = upgrade(payload)
        self.handled.check(payload)
        return replace(message, payload=payload, version=self.handled.version)

    def _dedupe(self, seen: DedupCache, message: Message[Any]) -> Passed:
        content_key = self.behavior.content_key
        # Only who has sent a message can use up its id.
        key: Hashable = (message.sender, message.id) if content_key is None else _small(content_key(message.payload))
        return _DUPLICATE if seen.seen(key) else Continue(message, functools.partial(seen.mark, key))

    def _rate_limit(self, limiter: RateLimiter, message: Message[Any]) -> Passed:
        sender = message.sender
        if limiter.check(sender):
            return Continue(message, functools.partial(limiter.allow, sender))
        max_count, window = self.behavior.rate_limit or (0, 0.0)
        wait = limiter.retry_after(sender)
        name = f"{message.kind!r}"
        return Fail(RateLimited(name=name, key=sender, max_count=max_count, window=window, retry_after=wait))


def _small(key: Hashable) -> Hashable:
    """Return what stands for a content key: of a long text or bytes, which would be kept whole, a digest."""
    if isinstance(key, str | bytes) and len(key) > _MAX_KEY and type(key) in {str, bytes}:
        data = key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")
        return type(key), hashlib.blake2b(data, digest_size=32).digest()
    return key


def _dedupe_by_id(repeated: "Callable[[Message[Any]], bool]") -> "Callable[[Message[Any]], Passed]":
    return lambda message: _DUPLICATE if repeated(message) else message


def _filter(accepts: "Callable[[Message[Any]], bool]") -> "Callable[[Message[Any]], Passed]":
    return lambda message: message if accepts(message) else _FILTERED


def _deadline(now: Callable[[], float]) -> "Callable[[Message[Any]], Passed]":
    return lambda message: _EXPIRED if message.deadline <= now() else message
