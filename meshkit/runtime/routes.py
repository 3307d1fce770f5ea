"""Routes: the way of one version of one kind to its handlers, through the stages that its behavior asks for."""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from meshkit import _time
from meshkit.dedup import DedupCache
from meshkit.errors import MalformedFrame, RateLimited
from meshkit.rate_limiter import RateLimiter
from meshkit.runtime.behavior import Behavior, Ephemeral, Local, Request
from meshkit.runtime.message import Message
from meshkit.runtime.stages import Continue, Drop, Fail, Outcome, Pipeline, Step

if TYPE_CHECKING:
    from meshkit.runtime.graph import Handler

__all__ = ["Route"]

_MAX_SEEN = 100_000
"""Messages of one kind that are remembered, so as not to be handled twice. Beyond, the oldest is forgotten."""
_MAX_SENDERS = 10_000
"""Senders of one kind whose rate is limited at a time. Beyond, new ones are refused."""


class Route:
    """One for a request, any number of handlers for other kinds.

    A version without handlers is upgraded, step by step, to the next one that has some.
    """

    def __init__(
        self, behavior: Behavior[Any], upgrades: Sequence[Behavior[Any]], handlers: "Sequence[Handler]"
    ) -> None:
        self.behavior = behavior
        self.upgrades = tuple(upgrades)  # behaviors, each of which upgrades from the one before
        self._upgrades = [newer.upgrade for newer in upgrades if newer.upgrade is not None]
        self.handlers = tuple(handlers)
        self.pipeline = Pipeline(())
        self._node = ""
        self._seen: DedupCache | None = None

    @property
    def handled(self) -> Behavior[Any]:
        """The behavior that the handlers take: this one, or the one that it is upgraded to."""
        return self.upgrades[-1] if self.upgrades else self.behavior

    def __str__(self) -> str:
        behavior = self.behavior
        version = f" (version {behavior.version})" if self.upgrades or behavior.older else ""
        upgraded = f", upgraded to version {self.handled.version}" if self.upgrades else ""
        stages = [str(self.pipeline), "mailbox", ", ".join(map(repr, self.handlers)) + upgraded]
        if not isinstance(behavior, Local):
            stages[:0] = ["frame", "kind", "version"]
        return f"{behavior.kind}{version}: {' -> '.join(filter(None, stages))}"

    def compile(self, node: str, repeated: Callable[[Message[Any]], bool]) -> None:
        """Put its pipeline together, for one run of a node. `repeated` says whether a request came before."""
        self._node = node
        behavior = self.handled
        steps: list[Step] = []
        if not isinstance(behavior, Local):
            steps.append(("decode", self._decode))
        if isinstance(behavior, Request):
            steps.append(("dedupe", lambda message: Drop("duplicate") if repeated(message) else Continue(message)))
        elif behavior.content_key is not None or not isinstance(behavior, Local | Ephemeral):
            self._seen = DedupCache(ttl=behavior.remember, max_keys=_MAX_SEEN, name=f"{behavior.kind!r} on {node!r}")
            steps.append(("dedupe", self._dedupe))
        if behavior.rate_limit is not None:
            max_count, window = behavior.rate_limit
            name = f"{behavior.kind!r} on node {node!r}"
            self._limiter = RateLimiter(max_count=max_count, window=window, max_keys=_MAX_SENDERS, name=name)
            steps.append(("rate_limit", self._rate_limit))
        if behavior.filter is not None:
            accepts = behavior.filter
            steps.append(("filter", lambda message: Continue(message) if accepts(message) else Drop("filtered")))
        if isinstance(behavior, Request):
            steps.append(("deadline", _deadline))
        self.pipeline = Pipeline(steps, [stage for stage in behavior.stages if stage.on == "receive"])

    def remember(self, message: Message[Any]) -> None:
        """Remember a message that came into a mailbox, so that it does not come in again."""
        if self._seen is not None:
            self._seen.mark(self._key(message))

    def _decode(self, message: Message[Any]) -> Outcome:
        try:
            payload = self.behavior.decoder.decode(message.payload)
        except Exception as error:  # noqa: BLE001 - hostile bytes raise more than msgspec's own error
            return Fail(MalformedFrame(reason=f"{message.kind!r} on node {self._node!r}: {error}"))
        for upgrade in self._upgrades:
            payload = upgrade(payload)
        version = self.handled.version
        return Continue(
            Message(message.id, message.kind, message.sender, payload, message.time, version, message.deadline)
        )

    def _key(self, message: Message[Any]) -> Hashable:
        content_key = self.handled.content_key
        # Only who has sent a message can use up its id.
        return (message.sender, message.id) if content_key is None else content_key(message.payload)

    def _dedupe(self, message: Message[Any]) -> Outcome:
        if self._seen is not None and self._seen.seen(self._key(message)):
            return Drop("duplicate")
        return Continue(message)

    def _rate_limit(self, message: Message[Any]) -> Outcome:
        sender, limiter = message.sender, self._limiter
        if limiter.allow(sender):
            return Continue(message)
        max_count, window = self.handled.rate_limit or (0, 0.0)
        wait = limiter.retry_after(sender)
        name = f"{message.kind!r}"
        return Fail(RateLimited(name=name, key=sender, max_count=max_count, window=window, retry_after=wait))


def _deadline(message: Message[Any]) -> Outcome:
    return Drop("expired") if message.deadline <= _time.now() else Continue(message)
