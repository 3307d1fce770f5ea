"""Calls: what this node asks of others, and what comes of it.

A call waits in a `CallRegistry`, under the id of its request. An answer counts only if it comes from the node that was
asked. Whoever gives up, for whatever reason, lets that node know, so that it does not work for nothing.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import anyio
import msgspec

from meshkit import _check, _time
from meshkit.call_registry import CallRegistry
from meshkit.errors import CallTimeout, Executed, MeshkitError, OutcomeUnknown, PeerLost, Refused, RemoteError
from meshkit.runtime.behavior import Request
from meshkit.runtime.journal import MAX_NOTE, Journal
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
class TooFewReplies(OutcomeUnknown):
    """Fewer nodes than were needed have replied; `replies` and `errors` say what came of asking the others.

    `executed` is "no" only if no node has begun.
    """

    name: str
    quorum: int
    replies: Mapping[str, Any] = field(default_factory=dict[str, Any])
    errors: Mapping[str, MeshkitError] = field(default_factory=dict[str, MeshkitError])
    executed: Executed = "maybe"  # type: ignore[misc]  # as of Closed, its answer depends on what has happened

    def _sentence(self) -> str:
        why = "; ".join(f"{node}: {error}" for node, error in [*self.errors.items()][:3])
        more = f"; and {len(self.errors) - 3} others" if len(self.errors) > 3 else ""
        replies = "1 reply" if self.quorum == 1 else f"{self.quorum} replies"
        return f"{self.name}: fewer than {replies} came{f' ({why}{more})' if why else ''}"


class Calls:
    """The calls of one node. `check_size(to, bytes)` raises what forbids so large a payload; `post(to, wire)` sends."""

    def __init__(
        self, node: str, check_size: Callable[[str, int], None], post: Callable[[str, Wire], None], journal: Journal
    ) -> None:
        self._node = node
        self._check_size = check_size
        self._post = post
        self._journal = journal
        self._registry: CallRegistry[msgspec.Raw] = CallRegistry(name=f"calls of node {node!r}")
        self._loop = asyncio.get_running_loop()
        self._now = _time.clock_of(self._loop)
        # By id of a call: the node that was asked, the kind, and when.
        self._asked: dict[str, tuple[str, str, float]] = {}

    def __len__(self) -> int:
        return len(self._registry)

    async def call(
        self,
        behavior: Request[P, R],
        message: Message[P],
        to: str,
        timeout: float,
        then: Callable[[], object] | None = None,
    ) -> R:
        """Ask the node `to`, and return its reply. `then` is called once the request is on its way."""
        kind, call_id, note = behavior.kind, message.id, self._journal.note
        if call_id in self._asked:
            raise ValueError(f"a call with the id {call_id!r} is pending already: wait for it, or use a new id")
        remaining = min(timeout, anyio.current_effective_deadline() - self._now(), _LONGEST)
        milliseconds = int(remaining * 1000) if remaining > 0 else 0  # of a cancelled scope it is -infinity
        payload = encode_payload(message.payload)
        self._check_size(to, len(payload))
        ask = Ask(call_id, kind, behavior.version, message.time, milliseconds, payload)
        self._asked[call_id] = (to, kind, message.time)
        try:
            reply = await self._registry.call(functools.partial(self._send, to, ask, then), timeout=timeout, id=call_id)
        except BaseException as error:
            if isinstance(error, CallTimeout):
                error.name = f"{kind!r} on node {to!r}"
            if isinstance(error, CallTimeout | asyncio.CancelledError):
                self._post(to, Cancel(call_id))
            failed = isinstance(error, Exception)
            note((call_id, f"no reply: {error}"[:MAX_NOTE] if failed else "nobody waits for the reply any more", ""))
            raise
        finally:
            del self._asked[call_id]
        note((call_id, "answered by", to))
        try:
            return behavior.reply_decoder.decode(reply)
        except Exception as error:
            raise RemoteError(node=to, kind=kind, code="bad_reply") from error

    def _send(self, to: str, ask: Ask, then: Callable[[], object] | None, _: str) -> None:
        self._journal.note((ask.id, "asked of", to))
        self._journal.send(ask.kind, ask.id, to)
        self._post(to, ask)
        if then is not None:
            then()

    def answered(self, sender: str, answer: Reply | Failure) -> bool:
        """Take an answer; return whether it may be one: it is not, if another node was asked."""
        asked, kind, time = self._asked.get(answer.id, (sender, "", 0.0))
        if asked != sender:
            return False
        if isinstance(answer, Reply):
            self._registry.resolve(answer.id, answer.payload)
        elif not answer.refuses or answer.asked in {0.0, time}:  # else it was asked again since, and may run
            self._registry.reject(answer.id, to_error(answer, sender, kind, self._node))
        return True

    def fail(self, call_id: str, error: Exception) -> None:
        """Let a call fail that could not be sent."""
        self._registry.reject(call_id, error)

    def lost(self, node: str) -> None:
        """Fail the calls that wait for a node that has gone, when those that have not left yet have been refused."""
        for call_id, asked in self._asked.items():
            if asked[0] == node:
                self._loop.call_soon(self._lost, call_id, asked)

    def _lost(self, call_id: str, asked: tuple[str, str, float]) -> None:
        if self._asked.get(call_id) is asked:  # else it has ended meanwhile, and its id may be used again
            self._registry.reject(call_id, PeerLost(node=asked[0]))

    def close(self) -> None:
        """Fail every call that still waits for its answer."""
        self._registry.close()


async def first_that_takes_it(nodes: Sequence[str], timeout: float, call: Callable[[str, float], Awaitable[R]]) -> R:
    """Ask one node after the other, until one does not refuse; raise the last refusal if all do, or time runs out."""
    deadline = _time.now() + timeout
    for node in nodes[:-1]:
        try:
            return await call(node, timeout)
        except Refused:
            timeout = deadline - _time.now()
            if timeout <= 0:
                raise
    return await call(nodes[-1], timeout)


async def gather(
    nodes: Sequence[str], call: Callable[[str], Awaitable[R]], *, quorum: int | None, name: str, task: str
) -> Replies[R]:
    """Ask all nodes at once; return when `quorum` have replied (None: when each has answered).

    Raises:
        TooFewReplies: The quorum cannot be reached, or not any more.
        Exception: What a call raised that no node has answered: it was called wrongly.
    """
    needed = 0 if quorum is None else _check.count("quorum", quorum)
    replies: dict[str, R] = {}
    errors: dict[str, MeshkitError] = {}
    wrong: list[Exception] = []

    async def ask(node: str, scope: anyio.CancelScope) -> None:
        try:
            replies[node] = await call(node)
        except MeshkitError as error:
            errors[node] = error.with_traceback(None)  # which would hold this frame, and it the error
        except Exception as error:  # noqa: BLE001 - raised below, without a group around it
            wrong.append(error)
        if wrong or (quorum is not None and (len(replies) >= needed or len(nodes) - len(errors) < needed)):
            scope.cancel()

    if needed <= len(nodes):
        async with anyio.create_task_group() as group:
            for node in nodes:
                group.start_soon(ask, node, group.cancel_scope, name=f"{task} on {node}")
    if wrong:
        try:
            raise wrong[0]
        finally:
            wrong.clear()  # it holds the error, and that holds this frame: a cycle
    if len(replies) >= needed:
        return Replies(replies, errors)
    asked = len(nodes) if needed <= len(nodes) else 0
    refused = [error for error in errors.values() if error.executed == "no"]
    executed: Executed = "no" if len(refused) == asked else "maybe"
    raise TooFewReplies(name=name, quorum=needed, replies=replies, errors=errors, executed=executed)
