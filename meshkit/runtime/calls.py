"""Calls: what this node asks of others, and what comes of it.

A call waits in a `CallRegistry`, under the id of its request. An answer counts only if it comes from the node that was
asked. Whoever gives up, for whatever reason, lets that node know, so that it does not work for nothing.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import anyio
import msgspec

from meshkit import _check, _time
from meshkit.call_registry import CallRegistry
from meshkit.errors import CallTimeout, MeshkitError, NoQuorum, PeerLost, Refused, RemoteError
from meshkit.runtime.behavior import Request
from meshkit.runtime.message import Message
from meshkit.runtime.wire import Ask, Cancel, Failure, Reply, Wire, encode_payload, to_error

__all__ = ["Calls", "Replies", "TooFewReplies", "first_that_takes_it", "gather"]

P = TypeVar("P")
R = TypeVar("R")

_LONGEST = 1e9  # seconds that a call may wait, as far as other nodes are told


@dataclass(frozen=True, slots=True)
class Replies(Generic[R]):
    """What came of asking several nodes: a reply or an error of each; who is in neither was no longer waited for."""

    replies: Mapping[str, R]
    errors: Mapping[str, MeshkitError]


@dataclass(eq=False, kw_only=True)
class TooFewReplies(NoQuorum):
    """Too few of the nodes that were asked have replied; `partial` has the replies that came, and the errors."""

    partial: Replies[Any] = field(default_factory=lambda: Replies({}, {}))

    def _sentence(self) -> str:
        why = "; ".join(f"{node}: {error}" for node, error in self.partial.errors.items())
        return f"{self.name}: {self.votes} of {self.threshold} replies came ({why})"


class Calls:
    """The calls of one node. `post(to, wire, size)` sends."""

    def __init__(self, node: str, post: Callable[[str, Wire, int], None]) -> None:
        self._node = node
        self._post = post
        self._registry: CallRegistry[msgspec.Raw] = CallRegistry(name=f"calls of node {node!r}")
        self._asked: dict[str, tuple[str, str]] = {}  # by id of a call: the node that was asked, and the kind

    def __len__(self) -> int:
        return len(self._registry)

    async def call(self, behavior: Request[P, R], message: Message[P], to: str, timeout: float) -> R:
        """Ask the node `to`, and return its reply."""
        kind, call_id = behavior.kind, message.id
        remaining = min(timeout, anyio.current_effective_deadline() - _time.now())
        remaining = max(0.0, min(remaining, _LONGEST))  # the deadline of a scope that has been cancelled is -infinity
        encoded = encode_payload(message.payload)
        ask = Ask(call_id, kind, behavior.version, message.time, int(remaining * 1000), encoded)
        if call_id in self._asked:
            raise ValueError(f"a call with the id {call_id!r} is pending already: wait for it, or use a new id")
        self._asked[call_id] = (to, kind)
        try:
            reply = await self._registry.call(lambda _: self._post(to, ask, len(encoded)), timeout=timeout, id=call_id)
        except CallTimeout:
            self._post(to, Cancel(call_id), 0)
            raise CallTimeout(name=f"{kind!r} on node {to!r}", timeout=timeout) from None
        except asyncio.CancelledError:
            self._post(to, Cancel(call_id), 0)
            raise
        finally:
            del self._asked[call_id]
        try:
            return behavior.reply_decoder.decode(reply)
        except Exception as error:
            raise RemoteError(node=to, kind=kind, code="bad_reply") from error

    def answered(self, sender: str, answer: Reply | Failure) -> bool:
        """Take an answer; return whether it may be one: it is not, if another node was asked."""
        asked, kind = self._asked.get(answer.id, (sender, ""))
        if asked != sender:
            return False
        if isinstance(answer, Reply):
            self._registry.resolve(answer.id, answer.payload)
        else:
            self._registry.reject(answer.id, to_error(answer, sender, kind, self._node))
        return True

    def fail(self, call_id: str, error: Exception) -> None:
        """Let a call fail that could not be sent."""
        self._registry.reject(call_id, error)

    def lost(self, node: str) -> None:
        """Fail the calls that wait for a node that has gone."""
        for call_id in [call_id for call_id, (asked, _) in self._asked.items() if asked == node]:
            self._registry.reject(call_id, PeerLost(node=node))

    def close(self) -> None:
        """Fail every call that still waits for its answer."""
        self._registry.close()


async def first_that_takes_it(nodes: Sequence[str], call: Callable[[str], Any]) -> Any:
    """Ask one node after the other, until one does not refuse; raise the last refusal if all do."""
    for node in nodes[:-1]:
        try:
            return await call(node)
        except Refused:
            continue
    return await call(nodes[-1])


async def gather(nodes: Sequence[str], call: Callable[[str], Any], *, quorum: int | None, name: str) -> Replies[Any]:
    """Ask all nodes at once; return when `quorum` have replied (None: when each has answered).

    Raises:
        TooFewReplies: The quorum cannot be reached any more.
    """
    if quorum is not None:
        _check.count("quorum", quorum)
        if quorum > len(nodes):
            raise ValueError(f"quorum must be at most the number of nodes that are asked, {len(nodes)}, not {quorum}")
    replies: dict[str, Any] = {}
    errors: dict[str, MeshkitError] = {}

    async def ask(node: str, scope: anyio.CancelScope) -> None:
        try:
            replies[node] = await call(node)
        except MeshkitError as error:
            errors[node] = error
        if quorum is not None and (len(replies) >= quorum or len(nodes) - len(errors) < quorum):
            scope.cancel()

    async with anyio.create_task_group() as group:
        for node in nodes:
            group.start_soon(ask, node, group.cancel_scope, name=f"{name}:{node}")
    partial: Replies[Any] = Replies(replies, errors)
    if quorum is not None and len(replies) < quorum:
        raise TooFewReplies(name=name, votes=len(replies), threshold=quorum, partial=partial)
    return partial
